"""Top-n-sigma: tokens within n standard deviations of the largest logit.

Source: Tang et al. 2024. https://arxiv.org/abs/2411.07641
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.contrib.thresholds import keep
from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import number


def _top_n_sigma(logits: jax.Array, row: Row, *, n: jax.Array) -> jax.Array:
    sigma = jnp.std(logits, where=logits > -jnp.inf)
    return keep(logits, logits >= jnp.max(logits) - n * sigma)


def top_n_sigma(n: float = 1.0) -> LogitsProcessor:
    """Keep logits of at least max - n * sigma; the temperature does not change which.

    Args:
      n: number of standard deviations of the allowed tokens' logits, above 0.
    """
    return LogitsProcessor(_top_n_sigma, {"n": number("n", n, above=0)})
