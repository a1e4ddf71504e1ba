"""Locally typical sampling: tokens whose surprise is close to the entropy.

Source: Meister et al. 2022. https://arxiv.org/abs/2202.00666
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.contrib.thresholds import entropy, largest_threshold
from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import number


def _typical(logits: jax.Array, row: Row, *, mass: jax.Array) -> jax.Array:
    logprobs = jax.nn.log_softmax(logits)
    distance = jnp.abs(-logprobs - entropy(logits))
    closeness = jnp.where(logprobs == -jnp.inf, -jnp.inf, -distance)
    threshold = largest_threshold(closeness, jnp.exp(logprobs), mass)
    return jnp.where(closeness >= threshold, logits, -jnp.inf)


def typical(mass: float = 0.9) -> LogitsProcessor:
    """Keep the tokens closest to the entropy whose probabilities sum to `mass`.

    Args:
      mass: above 0 and below 1, as `typical_p` of transformers.
    """
    mass = number("mass", mass, above=0, high=1)
    return LogitsProcessor(_typical, {"mass": mass}, after_temperature=True)
