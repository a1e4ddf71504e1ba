"""The two interfaces of decoding: logits transforms and decoding algorithms.

Pipeline: decoder -> logits -> [decoding] -> (tokens, parents) -> engine.

A logits transform changes the logits of one step. A decoding algorithm turns logits
into a `Decision`: the next token of each row, and the row that it continues. An
algorithm is written for the rows of one request. The engine runs it for all requests of
its kind at once, when all rows of a request have their logits. An algorithm never sees
a block: the engine applies `parents` as one `fork` of the block tables, and
copy-on-write follows from the reference counts.

Shape symbols: S rows of one request, V vocabulary, Q sequences: the S rows, followed by
sequences that the algorithm only retains.

Source: Kwon et al. 2023, Section 5.2 (fork, append and free suffice).
https://arxiv.org/abs/2309.06180
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpaged.decoding.parameters import ANY_NUMBER, Range, Specs, as_parameters, specs_of
from jpaged.validation import error, number

State = Any  # a pytree that only its own algorithm reads
NO_TOKEN = -1  # as a token of a finished sequence: it ends without another one
# What an algorithm can get beside the logits, see `Context`.
NEEDS = ("history", "hidden", "layers", "draft")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decision:
    """The result of a decoding step for each sequence.

    Sequence q becomes the previous sequence parents[q] followed by tokens[q]. A
    finished sequence gets no more tokens: a sequence that continues it becomes a copy
    of it. The first S sequences are the rows, which get logits until they finish. An
    algorithm may retain further sequences (Q > S), such as the finished hypotheses of
    beam search. These are then the outputs of the request; otherwise the rows are.

    A request ends when all its rows have finished, or at its limit of tokens. The
    engine also finishes a row at EOS, at a stop token and at the limit of tokens.

    A sequence with the token NO_TOKEN becomes a copy of its parent and ends.
    """

    tokens: jax.Array  # i32[Q], next token of sequence q, or NO_TOKEN
    parents: jax.Array  # i32[Q], the sequence that q continues
    logprobs: jax.Array  # f32[Q], log-probability of the token under the raw model
    finished: jax.Array  # bool[Q], whether q has ended; always true if q is retained


class LogitsTransform(Protocol):
    """A function that changes the logits of one step, row by row."""

    def __call__(self, logits: jax.Array, /) -> jax.Array:
        """Transforms logits.

        Args:
          logits: f32[S, V]; -inf marks a token that cannot be chosen.

        Returns:
          The transformed logits f32[S, V].
        """
        ...


class InitFn(Protocol):
    """The first half of a decoding algorithm."""

    def __call__(self, num_rows: int) -> State:
        """Returns the state before the first step of a request with `num_rows` rows."""


class Context(NamedTuple):
    """What the step of an algorithm gets beside the logits, if it needs something.

    Shape symbols: L tokens of the longest sequence, E hidden size, N chosen layers.
    """

    parameters: dict[str, jax.Array]  # the request's
    prompt_lens: jax.Array | None = None  # i32[S]
    num_tokens: jax.Array | None = None  # i32[S], of prompt and output of each row
    limits: jax.Array | None = None  # i32[S], number of tokens at which the row ends
    tokens: jax.Array | None = None  # "history": i32[S, L]; V after the last
    hidden: jax.Array | None = None  # "hidden": [S, E], after the final norm
    layers: jax.Array | None = None  # "layers": f32[N, S, V], their logits
    draft: jax.Array | None = None  # "draft": f32[S, V], the draft model's logprobs


class StepFn(Protocol):
    """The second half of a decoding algorithm."""

    def __call__(
        self, keys: jax.Array, logits: jax.Array, state: State, *context: Any
    ) -> tuple[State, Decision]:
        """Decides the next token and the parent of each sequence.

        In the first step all rows continue the prompt, so their logits are equal.

        Args:
          keys: key[S], one PRNG key per row (see `token_keys`), new in every step. They
            depend on the request and not on the batch, so the tokens of a request do
            not depend on other requests.
          logits: f32[S, V]. The engine passes the model's log-probabilities, with -inf
            where the request's rules forbid a token. Those of a finished row are
            undefined.
          state: The result of `init` or of the previous `step`.
          *context: One `Context`, if the algorithm has needs or parameters.

        Returns:
          The next state and the decision.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DecodingAlgorithm:
    """A pair of pure functions for one request, similar to an optax optimiser.

    Two algorithms with the same functions are equal, and share compiled programs,
    whatever the values of their parameters are.

    Attributes:
      init: Returns the state before the first step.
      step: One step.
      needs: What `step` gets in its `Context`: "history", "hidden", "layers", "draft".
      parameters: Numbers or arrays by name that `step` reads in its `Context`. They are
        data of each request: `AlgorithmParams.parameters` replaces their values. int,
        float and bool become int32, float32 and bool.
      ranges: Allowed values of `parameters`, by name. Parameters with a range become
        float32. A value out of range is refused, here and in `AlgorithmParams`.
      layers: With "layers": numbers of the layers, from 0, after which the output head
        computes logits, without the final norm.
      hidden_size: With "hidden": E of the model.
      keeps_rows: Each row continues itself. The engine then ignores `parents`, and the
        tokens of a row are final: they can be streamed.
      num_companions: Prompts that a request must give beside its own
        (`AlgorithmParams.companions`); None: any number.

    Raises:
      ValueError: A need is unknown or lacks its size, or a parameter is not a number
        or is out of range.
    """

    init: InitFn
    step: Callable[..., tuple[State, Decision]]  # a StepFn, with or without a Context
    needs: Iterable[str] = ()
    parameters: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False
    )
    layers: tuple[int, ...] = ()
    hidden_size: int = 0
    keeps_rows: bool = False
    num_companions: int | None = None
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict, compare=False)
    specs: Specs = dataclasses.field(init=False, default=())

    def __post_init__(self) -> None:
        """Check the needs, and convert the parameters to arrays."""
        needs = set((self.needs,) if isinstance(self.needs, str) else self.needs)
        if unknown := sorted(map(str, needs - set(NEEDS))):
            raise ValueError(f"needs: expected some of {NEEDS}, got {unknown[0]!r}")
        layers = tuple(int(layer) for layer in self.layers)
        if ("layers" in needs) != bool(layers) or min(layers, default=0) < 0:
            raise ValueError(
                "layers: expected numbers of layers, from 0, together with the need "
                f"'layers', got layers={layers} and needs={sorted(needs)}"
            )
        if ("hidden" in needs) != (self.hidden_size > 0):
            raise ValueError(
                "hidden_size: expected the model's hidden size together with the need "
                f"'hidden', got {self.hidden_size} and needs={sorted(needs)}"
            )
        ranges = dict(self.ranges)
        if unknown := sorted(set(ranges) - set(self.parameters)):
            raise error("ranges", f"names of {sorted(self.parameters)}", unknown[0])
        given = dict(self.parameters)
        for name, one in ranges.items():
            if not isinstance(one, Range):
                raise error(f"ranges[{name!r}]", "a Range", one)
            one.check(name, given[name])
            given[name] = np.asarray(given[name]).astype(np.float32)
        parameters = as_parameters(given)
        # Sorted, because processes that share a mesh compare what is printed.
        checked = dict(needs=tuple(sorted(needs)), layers=layers, parameters=parameters)
        for name, value in (checked | {"specs": specs_of(parameters)}).items():
            object.__setattr__(self, name, value)


def has_context(algorithm: Any) -> bool:
    """Whether the algorithm's `step` gets a `Context`."""
    return bool(getattr(algorithm, "needs", ()) or getattr(algorithm, "specs", ()))


def parameters_of(
    algorithm: Any, given: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """Return the parameters of a request: the algorithm's, and those `given`.

    Raises:
      ValueError: A name is unknown, or a value has another shape or dtype, or is out
        of range.
    """
    known = dict(getattr(algorithm, "parameters", {}))
    ranges = getattr(algorithm, "ranges", {})
    specs = {name: spec for name, *spec in getattr(algorithm, "specs", ())}
    for name, value in (given or {}).items():
        if name not in known:
            raise ValueError(
                f"parameters: expected names among {sorted(known)}, the algorithm's, "
                f"got {name!r}"
            )
        shape, dtype = specs[name]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        converted = float(value) if is_integer and dtype == "float32" else value
        (array,) = as_parameters({name: converted}).values()
        if (array.shape, array.dtype.name) != (shape, dtype):
            raise ValueError(
                f"parameters[{name!r}]: expected {dtype} of shape {shape}, got "
                f"{array.dtype.name} of shape {array.shape}"
            )
        if name in ranges:
            ranges[name].check(f"parameters[{name!r}]", value)
        known[name] = array
    return known


def chain(*transforms: LogitsTransform) -> LogitsTransform:
    """Combines transforms: applies them from left to right.

    An empty chain returns the logits unchanged.

    Args:
      *transforms: Functions from logits to logits.

    Raises:
      TypeError: An argument is not callable.

    >>> double = lambda logits: 2.0 * logits
    >>> increase = lambda logits: logits + 1.0
    >>> chain(double, increase)(jnp.array([[1.0, 2.0]]))
    Array([[3., 5.]], dtype=float32)
    """
    for position, transform in enumerate(transforms):
        if not callable(transform):
            raise TypeError(
                f"chain: expected a logits transform, a function logits -> logits, as "
                f"argument {position}, got {transform!r}"
            )

    return Chain(transforms)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms that are applied from left to right."""

    transforms: tuple[LogitsTransform, ...]

    def __call__(self, logits: jax.Array, /) -> jax.Array:
        """Applies all transforms."""
        for transform in self.transforms:
            logits = transform(logits)
        return logits


@dataclasses.dataclass(frozen=True)
class NumberTransform:
    """A transform with a number, which `sampling` passes as data.

    Attributes:
      function: (logits f32[S, V], number f32[]) -> f32[S, V].
      name: Of the number, for messages.
      value: The number.
      range: Allowed values.

    Raises:
      ValueError: The number is out of range.
    """

    function: Any
    name: str
    value: float
    range: Range = ANY_NUMBER

    def __post_init__(self) -> None:
        """Check the number, unless it is traced."""
        if not isinstance(self.value, Tracer):
            number(self.name, self.value)
            self.range.check(self.name, self.value)

    def __call__(self, logits: jax.Array, /) -> jax.Array:
        """Applies the function with the value."""
        return self.function(logits, jnp.float32(self.value))


def own_rows(num_rows: int) -> jax.Array:
    """Parents i32[S] with which every row continues itself."""
    return jnp.arange(num_rows, dtype=jnp.int32)
