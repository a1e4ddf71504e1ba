"""Dynamic temperature: high where the model is unsure, low where it is sure.

Source: entropy-based dynamic temperature, Zhang et al. 2024.
https://arxiv.org/abs/2403.14541 (the formula is that of llama.cpp's dynatemp)
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.contrib.thresholds import entropy
from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import number


def _divide(
    logits: jax.Array, row: Row, *, low: jax.Array, high: jax.Array, exponent: jax.Array
) -> jax.Array:
    count = jnp.sum(logits > -jnp.inf)
    most = jnp.log(jnp.maximum(count, 2).astype(jnp.float32))
    share = jnp.clip(entropy(logits) / most, 0.0, 1.0)
    return logits / (low + (high - low) * share**exponent)


def dynamic_temperature(
    low: float = 0.5, high: float = 1.5, exponent: float = 1.0
) -> LogitsProcessor:
    """Divide by low + (high - low) * (entropy / largest entropy) ** exponent.

    The request's own temperature divides as well; leave it at 1.

    Args:
      low: temperature where one token is certain, above 0.
      high: temperature where all allowed tokens are equally probable, at least `low`.
      exponent: above 0.
    """
    low = number("low", low, low=0.01)
    parameters = {
        "low": low,
        "high": number("high", high, low=low),
        "exponent": number("exponent", exponent, above=0),
    }
    return LogitsProcessor(_divide, parameters)
