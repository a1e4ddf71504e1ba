"""DRY: a penalty on tokens that continue a repetition, exponential in its length.

Source: p-e-w 2024. https://github.com/oobabooga/text-generation-webui/pull/5677
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import integer, number, token_ids

MAX_LENGTH = 50  # of repetitions; longer ones have the same penalty


def _dry(
    logits: jax.Array,
    row: Row,
    *,
    multiplier: jax.Array,
    base: jax.Array,
    allowed_length: jax.Array,
    breakers: jax.Array,
) -> jax.Array:
    tokens = row.tokens
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    last = row.num_tokens - 1

    def compare(
        k: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        lengths, matches = carry
        own = jnp.where(last >= k, tokens[jnp.maximum(last - k, 0)], -1)
        earlier = jnp.where(index >= k, tokens[jnp.maximum(index - k, 0)], -2)
        matches &= (own == earlier) & ~jnp.any(own == breakers)
        return lengths + matches.astype(jnp.int32), matches

    start = jnp.zeros_like(tokens), index < last
    lengths, _ = jax.lax.fori_loop(0, MAX_LENGTH, compare, start)
    following = jnp.where(index < last, jnp.roll(tokens, -1), logits.shape[0])
    longest = jnp.zeros(logits.shape, jnp.int32).at[following].max(lengths, mode="drop")
    excess = (longest - allowed_length).astype(jnp.float32)
    is_repeated = (longest >= allowed_length) & (longest > 0)
    # Finite, because 0 * inf is NaN.
    growth = jnp.minimum(base**excess, 1e30)
    return logits - jnp.where(is_repeated, multiplier * growth, 0.0)


def dry(
    multiplier: float = 0.8,
    base: float = 1.75,
    allowed_length: int = 2,
    sequence_breakers: Sequence[int] = (),
) -> LogitsProcessor:
    """Subtract multiplier * base ** (length - allowed_length) from repeating tokens.

    The length is that of the longest end of the text, up to 50 tokens, which occurred
    before and was followed by the token.

    Args:
      multiplier: at least 0; 0 is off.
      base: at least 1.
      allowed_length: repetitions that are shorter have no penalty; at least 1.
      sequence_breakers: tokens that no repetition contains, such as line breaks. Their
        number is compiled.
    """
    found = token_ids("sequence_breakers", sequence_breakers)
    parameters = {
        "multiplier": number("multiplier", multiplier, low=0),
        "base": number("base", base, low=1, high=100),
        "allowed_length": integer("allowed_length", allowed_length, low=1),
        "breakers": np.array(found, np.int32),
    }
    return LogitsProcessor(_dry, parameters)
