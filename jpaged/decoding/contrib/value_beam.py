"""Beam search by a value function: the continuations with the best values are kept.

The rows hold `width` beams with `candidates` next tokens each, so a step computes the
hidden states of all of them at once. The next step values all rows, and continues the
best `width` that have not ended. The output is the complete text with the best value.

Source: a value function in place of the probability, Yang and Klein 2021 (FUDGE),
section 3; Snell et al. 2024 compare it with best of n. https://arxiv.org/abs/2104.05218
https://arxiv.org/abs/2408.03314
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.base import NO_TOKEN, Context, Decision, DecodingAlgorithm
from jpaged.decoding.values import Leaf, Value, evaluate
from jpaged.validation import error, integer, token_ids

_NUM_STOP_IDS = 8
_STOP_IDS = "stop_ids"


class ValueBeamState(NamedTuple):
    """The state of a search with S rows."""

    totals: jax.Array  # f32[S], log-probability of the rows' texts
    is_row: jax.Array  # bool[S], rows that have a text of their own
    best: jax.Array  # f32[], value of the best complete text so far; -inf: none
    num_steps: jax.Array  # i32[]


def _init(num_rows: int, *, width: int) -> ValueBeamState:
    if num_rows % width:
        raise ValueError(
            f"num_rows: expected a multiple of width ({width}), the same number of "
            f"candidates for each beam, got {num_rows}"
        )
    return ValueBeamState(
        totals=jnp.zeros(num_rows, jnp.float32),
        is_row=jnp.arange(num_rows, dtype=jnp.int32) == 0,  # all have the prompt
        best=jnp.float32(-jnp.inf),
        num_steps=jnp.int32(0),
    )


def _step(
    keys: jax.Array,
    logits: jax.Array,
    state: ValueBeamState,
    context: Context,
    *,
    width: int,
    value: Value,
) -> tuple[ValueBeamState, Decision]:
    num_rows = len(logits)
    is_complete, is_last = _complete(state, context)
    values = _values(value, logits, state, context, is_complete)
    at = jnp.argmax(jnp.where(is_complete, values, -jnp.inf)).astype(jnp.int32)
    is_better = is_complete[at] & (values[at] > state.best)
    # Beams: the best rows that continue, each with its most probable tokens.
    is_open = state.is_row & ~is_complete
    scores = jnp.where(
        is_open, jnp.maximum(values, jnp.finfo(jnp.float32).min), -jnp.inf
    )
    scores, beams = jax.lax.top_k(scores, width)
    each = num_rows // width
    parents = jnp.repeat(beams.astype(jnp.int32), each)
    continues = jnp.repeat(scores > -jnp.inf, each)
    number = jnp.arange(num_rows, dtype=jnp.int32)
    is_first = state.num_steps == 0  # one beam, whose candidates fill all rows
    _, leading = jax.lax.top_k(logits, min(num_rows, logits.shape[1]))
    rank = jnp.where(is_first, number, number % each)
    parents = jnp.where(is_first, 0, parents)
    continues = jnp.where(is_first, rank < leading.shape[1], continues)
    continues &= ~is_last
    tokens = leading[parents, jnp.minimum(rank, leading.shape[1] - 1)].astype(jnp.int32)
    logprobs = logits[parents, tokens]
    continues &= logprobs > -jnp.inf
    state = ValueBeamState(
        totals=state.totals[parents] + jnp.where(continues, logprobs, 0.0),
        is_row=continues,
        best=jnp.where(is_better, values[at], state.best),
        num_steps=state.num_steps + 1,
    )
    decision = Decision(
        tokens=jnp.append(jnp.where(continues, tokens, NO_TOKEN), NO_TOKEN),
        parents=jnp.append(parents, jnp.where(is_better, at, jnp.int32(num_rows))),
        logprobs=jnp.append(logprobs, 0.0),
        finished=jnp.append(~continues, True),
    )
    return state, decision


def _complete(state: ValueBeamState, context: Context) -> tuple[jax.Array, jax.Array]:
    """Which rows have complete texts, bool[S]; whether no row can continue, bool[]."""
    tokens, lens, limits = context.tokens, context.num_tokens, context.limits
    assert tokens is not None
    assert lens is not None
    assert limits is not None
    last = jnp.take_along_axis(tokens, lens[:, None] - 1, axis=1)[:, 0]
    is_stop = jnp.isin(last, context.parameters[_STOP_IDS]) & (state.num_steps > 0)
    # The engine chooses the last token of a request, but does not compute it.
    is_last = jnp.any(state.is_row & (lens + 1 >= limits))
    return state.is_row & (is_stop | is_last), is_last


def _values(
    value: Value,
    logits: jax.Array,
    state: ValueBeamState,
    context: Context,
    is_complete: jax.Array,
) -> jax.Array:
    """Values f32[S] of the rows; NaN counts as the worst one."""
    parameters = {
        name: one for name, one in context.parameters.items() if name != _STOP_IDS
    }
    leaves = Leaf(
        context.tokens,  # pyright: ignore[reportArgumentType]
        context.prompt_lens,  # pyright: ignore[reportArgumentType]
        context.num_tokens,  # pyright: ignore[reportArgumentType]
        state.totals,
        logits,
        context.hidden,
        is_complete,
    )
    found = evaluate(value, leaves, parameters)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def value_beam(
    value: Callable[..., Any],
    *,
    width: int,
    parameters: Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] = (),
    hidden_size: int = 0,
) -> DecodingAlgorithm:
    """Build the algorithm.

        AlgorithmParams(value_beam(value, width=4), num_rows=16, ignore_eos=True)

    has 4 beams with 4 candidates each. The request's `max_tokens` is one more than that
    of the output, because the last candidates are computed and not continued.

    Args:
      value: function `(leaf, **parameters) -> f32[]` of a text, see
        `jpaged.decoding.values`. It also values texts that have not ended.
      width: beams; compiled. The candidates of each are num_rows / width.
      parameters: of the value function; data.
      stop_ids: tokens that end a text, at most 8. Data.
      hidden_size: of the model, if the value function reads `leaf.hidden`.

    Raises:
      ValueError: a value is out of range, or a parameter has the name "stop_ids".
    """
    if not callable(value):
        raise error("value", "a function (leaf, **parameters) -> number", value)
    width = integer("width", width, low=1)
    ids = token_ids("stop_ids", stop_ids)
    if len(ids) > _NUM_STOP_IDS:
        raise error("stop_ids", f"at most {_NUM_STOP_IDS} tokens", ids)
    own = dict(parameters or {})
    if _STOP_IDS in own:
        raise error("parameters", f"other names than {_STOP_IDS!r}", sorted(own))
    padded = np.full(_NUM_STOP_IDS, NO_TOKEN, np.int32)
    padded[: len(ids)] = ids
    init, step = _functions(width, value)
    return DecodingAlgorithm(
        init,
        step,
        needs={"history", "hidden"} if hidden_size else {"history"},
        hidden_size=integer("hidden_size", hidden_size, low=0),
        parameters=own | {_STOP_IDS: padded},
    )


@functools.lru_cache(maxsize=64)
def _functions(width: int, value: Value) -> tuple[Any, Any]:
    """The same functions for the same arguments, so that programs are shared."""
    return (
        functools.partial(_init, width=width),
        functools.partial(_step, width=width, value=value),
    )
