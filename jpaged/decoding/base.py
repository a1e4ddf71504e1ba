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
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

State = Any  # a pytree that only its own algorithm reads


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
    """

    tokens: jax.Array  # i32[Q], next token of sequence q
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


class StepFn(Protocol):
    """The second half of a decoding algorithm."""

    def __call__(
        self, keys: jax.Array, logits: jax.Array, state: State
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

        Returns:
          The next state and the decision.
        """
        ...


class DecodingAlgorithm(NamedTuple):
    """A pair of pure functions for one request, similar to an optax optimiser."""

    init: InitFn
    step: StepFn


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

    def chained(logits: jax.Array) -> jax.Array:
        for transform in transforms:
            logits = transform(logits)
        return logits

    return chained


def own_rows(num_rows: int) -> jax.Array:
    """Parents i32[S] with which every row continues itself."""
    return jnp.arange(num_rows, dtype=jnp.int32)
