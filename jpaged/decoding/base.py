"""The two interfaces of decoding: logits transforms and decoding algorithms.

Place on the road: decoder -> logits -> [decoding] -> (tokens, parents) -> engine.

A logits transform changes the scores of one step. A decoding algorithm turns
scores into a `Decision`: which token each row takes, and which row it continues.
It is written for one request and its rows; the engine runs it for all requests of
its kind at once, whenever all rows of a request have their logits. It never sees a
block: the engine applies `parents` as one `fork` of the block tables, and
copy-on-write follows from the reference counts.

Shape letters: S rows of one request, V vocabulary, Q sequences: the S rows and
behind them those that the algorithm only holds.
Source: Kwon et al. 2023, Section 5.2 (fork, append and free suffice).
https://arxiv.org/abs/2309.06180
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

State = Any  # a pytree that only its own algorithm looks into


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decision:
    """What one decoding step decided for each sequence.

    Sequence q becomes what row or sequence parents[q] held, followed by tokens[q]. A
    sequence that had finished takes no token any more: whoever continues it is as it
    was. The first S sequences are the rows, which get logits while they have not
    finished. An algorithm may hold more (Q > S), such as the best finished beams of
    beam search; then these are the request's outputs, and otherwise the rows are.

    A request ends when all its rows have finished, or at its limit of tokens. EOS,
    stop tokens and the limit finish a row without being asked.
    """

    tokens: jax.Array  # i32[Q], the token that sequence q takes
    parents: jax.Array  # i32[Q], the sequence that q continues
    logprobs: jax.Array  # f32[Q], log-probability of the token under the raw model
    finished: jax.Array  # bool[Q], q has ended; always true for held sequences


class LogitsTransform(Protocol):
    """A function that changes the scores of one step, row by row."""

    def __call__(self, logits: jax.Array, params: Any = None) -> jax.Array:
        """Return the transformed f32[S, V].

        Args:
            logits: f32[S, V]; -inf marks a token that cannot be chosen.
            params: a pytree of per-row arrays (for example `SamplingRows`), or
                None where every transform carries its own constants.
        """
        ...


class InitFn(Protocol):
    """The first half of a decoding algorithm."""

    def __call__(self, num_rows: int) -> State:
        """Return the state before the first step of a request with `num_rows` rows."""
        ...


class StepFn(Protocol):
    """The second half of a decoding algorithm."""

    def __call__(
        self, keys: jax.Array, logits: jax.Array, state: State
    ) -> tuple[State, Decision]:
        """Return the next state and what to do with each sequence.

        In the first step all rows hold the prompt, so their logits are equal.

        Args:
            keys: key[S], one PRNG key per row (see `token_keys`), new in every step.
                They depend on the request, not on the batch, so the tokens of a
                request do not depend on what else runs.
            logits: f32[S, V]; the engine hands over the model's log-probabilities,
                with -inf where the request's own rules forbid a token. A finished
                row's are meaningless.
            state: what `init` or the last `step` returned.
        """
        ...


class DecodingAlgorithm(NamedTuple):
    """A pair of pure functions, as an optax optimiser is; for one request."""

    init: InitFn
    step: StepFn


def chain(*transforms: LogitsTransform) -> LogitsTransform:
    """Return the transform that applies `transforms` from left to right.

    All of them get the same `params`. An empty chain changes nothing.

    >>> double = lambda logits, params=None: 2.0 * logits
    >>> increase = lambda logits, params=None: logits + 1.0
    >>> chain(double, increase)(jnp.array([[1.0, 2.0]]))
    Array([[3., 5.]], dtype=float32)
    """
    for position, transform in enumerate(transforms):
        if not callable(transform):
            raise TypeError(
                f"chain: argument {position} must be a logits transform, a function "
                f"(logits, params) -> logits; got {transform!r}"
            )

    def chained(logits: jax.Array, params: Any = None) -> jax.Array:
        for transform in transforms:
            logits = transform(logits, params)
        return logits

    return chained


def own_rows(num_rows: int) -> jax.Array:
    """Return i32[S] parents with which every row continues itself."""
    return jnp.arange(num_rows, dtype=jnp.int32)
