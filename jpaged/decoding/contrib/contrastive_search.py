"""Contrastive search: the most probable candidate that is unlike the text before it.

The rows hold the k most probable candidates for one token, so a step computes the
hidden states of all of them at once. The next step chooses one by its probability and
its similarity to the earlier hidden states, and all rows continue it.

Source: Su et al. 2022. https://arxiv.org/abs/2202.06417
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.base import NO_TOKEN, Context, Decision, DecodingAlgorithm
from jpaged.decoding.parameters import Range
from jpaged.validation import error, integer, token_ids

_NUM_STOP_IDS = 8


class ContrastiveState(NamedTuple):
    """The state of a contrastive search with k rows."""

    units: jax.Array  # f32[max_tokens + 1, E], hidden states of the text, normalised
    num_units: jax.Array  # i32[]
    logprobs: jax.Array  # f32[k], of the rows' candidates
    is_stop: jax.Array  # bool[k], candidates that end the text
    is_over: jax.Array  # bool[]


def _init(num_rows: int, *, max_tokens: int, hidden_size: int) -> ContrastiveState:
    return ContrastiveState(
        units=jnp.zeros((max_tokens + 1, hidden_size), jnp.float32),
        num_units=jnp.int32(0),
        logprobs=jnp.zeros(num_rows, jnp.float32),
        is_stop=jnp.zeros(num_rows, bool),
        is_over=jnp.bool_(False),
    )


def _step(
    keys: jax.Array,
    logits: jax.Array,
    state: ContrastiveState,
    context: Context,
) -> tuple[ContrastiveState, Decision]:
    assert context.hidden is not None
    k, alpha = len(logits), context.parameters["alpha"]
    hidden = context.hidden.astype(jnp.float32)
    units = hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)
    known = jnp.arange(len(state.units), dtype=jnp.int32)[None, :] < state.num_units
    similarity = jnp.where(known, units @ state.units.T, -1.0)
    scores = (1 - alpha) * jnp.exp(state.logprobs) - alpha * jnp.max(similarity, axis=1)
    # The first step has no candidates: all rows are the prompt.
    best = jnp.where(state.num_units > 0, jnp.argmax(scores), 0).astype(jnp.int32)
    logprobs, tokens = jax.lax.top_k(logits[best], k)
    tokens = tokens.astype(jnp.int32)
    is_stop = jnp.isin(tokens, context.parameters["stop_ids"])
    is_over = state.is_over | ((state.num_units > 0) & state.is_stop[best])
    state = ContrastiveState(
        state.units.at[state.num_units].set(units[best]),
        state.num_units + 1,
        logprobs,
        is_stop,
        is_over,
    )
    # The output is retained: the text up to the chosen candidate.
    decision = Decision(
        tokens=jnp.append(jnp.where(is_over, NO_TOKEN, tokens), NO_TOKEN),
        parents=jnp.full(k + 1, best),
        logprobs=jnp.append(logprobs, 0.0),
        finished=jnp.append(jnp.full(k, is_over), True),
    )
    return state, decision


def contrastive_search(
    *,
    max_tokens: int,
    hidden_size: int,
    alpha: float = 0.6,
    stop_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Build the algorithm, for `AlgorithmParams(num_rows=k, ignore_eos=True)`.

    The request's `max_tokens` is one more than that of the output, because the last
    candidates are computed and not chosen.

    Args:
      max_tokens: of the request at most; compiled. Only the output's hidden states, and
        that of the prompt's last token, are compared; the paper compares the prompt's
        too.
      hidden_size: of the model.
      alpha: weight of the similarity, from 0 (greedy) to 1. Data.
      stop_ids: tokens that end the text, at most 8. Data.

    Raises:
      ValueError: there are more stop tokens, or another value is out of range.
    """
    max_tokens = integer("max_tokens", max_tokens, low=1)
    hidden_size = integer("hidden_size", hidden_size, low=1)
    ids = token_ids("stop_ids", stop_ids)
    if len(ids) > _NUM_STOP_IDS:
        raise error("stop_ids", f"at most {_NUM_STOP_IDS} tokens", ids)
    padded = np.full(_NUM_STOP_IDS, NO_TOKEN, np.int32)
    padded[: len(ids)] = ids
    return DecodingAlgorithm(
        _init_function(max_tokens, hidden_size),
        _step,
        needs={"hidden"},
        hidden_size=hidden_size,
        parameters={
            "alpha": alpha,
            "stop_ids": padded,
        },
        ranges={"alpha": Range(0, 1)},
    )


@functools.lru_cache(maxsize=64)
def _init_function(max_tokens: int, hidden_size: int) -> Any:
    """The same function for the same sizes, so that programs are shared."""
    return functools.partial(_init, max_tokens=max_tokens, hidden_size=hidden_size)
