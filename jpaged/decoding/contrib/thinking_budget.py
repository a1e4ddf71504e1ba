"""Thinking budget: the end of the reasoning is forced after a number of tokens.

Source: budget forcing, Muennighoff et al. 2025. https://arxiv.org/abs/2501.19393
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import error, integer, token_ids


def _force(
    logits: jax.Array, row: Row, *, budget: jax.Array, end: jax.Array
) -> jax.Array:
    length, size = row.tokens.shape[0], end.shape[0]
    index = jnp.arange(length + 1, dtype=jnp.int32)

    def follows(count: int) -> jax.Array:
        """Which positions of the output come after the first tokens of `end`."""
        matches = index - count >= row.prompt_len
        for i in range(count):
            matches &= row.tokens[jnp.maximum(index - count + i, 0)] == end[i]
        return matches

    has_ended = jnp.any(follows(size) & (index <= row.num_tokens))
    done = jnp.int32(0)
    for count in range(1, size):
        done = jnp.where(follows(count)[row.num_tokens], count, done)
    num_generated = row.num_tokens - row.prompt_len
    token = end[done]
    is_due = (num_generated >= budget) & ~has_ended & (logits[token] > -jnp.inf)
    is_other = jnp.arange(logits.shape[0], dtype=jnp.int32) != token
    forced = jnp.where(is_due & is_other, -jnp.inf, logits)
    # The check of submissions refuses NaN, and with it tokens outside the vocabulary.
    return jnp.where(jnp.any(end >= logits.shape[0]), jnp.nan, forced)


def thinking_budget(budget: int, end: int | Sequence[int]) -> LogitsProcessor:
    """Force the tokens that end the reasoning after `budget` tokens of the output.

    Nothing changes once the output contains them. If another rule of the request
    forbids the next of them, it is not forced.

    Args:
      budget: at least 0.
      end: token that ends the reasoning, such as that of "</think>", or several in
        order. Their number is compiled.
    """
    ends = token_ids("end", (end,) if isinstance(end, int | np.integer) else end)
    if not ends:
        raise error("end", "at least one token id", ends)
    budget = integer("budget", budget, low=0, high=2**31 - 1)
    return LogitsProcessor(_force, {"budget": budget, "end": np.array(ends, np.int32)})
