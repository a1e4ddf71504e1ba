"""XTC, "exclude top choices": sometimes all probable tokens but the last are dropped.

Source: p-e-w 2024. https://github.com/oobabooga/text-generation-webui/pull/6335
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import number


def _xtc(
    logits: jax.Array, row: Row, *, threshold: jax.Array, probability: jax.Array
) -> jax.Array:
    is_top = jax.nn.softmax(logits) >= threshold
    least = jnp.min(jnp.where(is_top, logits, jnp.inf))
    is_applied = jax.random.uniform(row.key) < probability
    is_dropped = is_top & (logits > least) & (jnp.sum(is_top) >= 2)
    return jnp.where(is_applied & is_dropped, -jnp.inf, logits)


def xtc(threshold: float = 0.1, probability: float = 0.5) -> LogitsProcessor:
    """Drop, for some tokens, all choices above a probability but the least of them.

    Args:
      threshold: choices with at least this probability, from 0 to 1; above 0.5 there
        are never two, and nothing changes.
      probability: how often it applies, from 0 to 1.
    """
    parameters = {
        "threshold": number("threshold", threshold, low=0, high=1),
        "probability": number("probability", probability, low=0, high=1),
    }
    return LogitsProcessor(_xtc, parameters)
