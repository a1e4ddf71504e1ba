"""Eta and epsilon sampling: tokens below an absolute probability are cut off.

Source: Hewitt et al. 2022. https://arxiv.org/abs/2210.15191
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.contrib.thresholds import entropy, keep
from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import number


def _epsilon(logits: jax.Array, row: Row, *, epsilon: jax.Array) -> jax.Array:
    return keep(logits, jax.nn.softmax(logits) >= epsilon)


def _eta(logits: jax.Array, row: Row, *, epsilon: jax.Array) -> jax.Array:
    eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy(logits)))
    return keep(logits, jax.nn.softmax(logits) >= eta)


def epsilon_sampling(epsilon: float = 3e-4) -> LogitsProcessor:
    """Keep tokens with a probability of at least `epsilon`, from 0 to 1."""
    epsilon = number("epsilon", epsilon, low=0, high=1)
    return LogitsProcessor(_epsilon, {"epsilon": epsilon}, after_temperature=True)


def eta_sampling(epsilon: float = 3e-4) -> LogitsProcessor:
    """Epsilon sampling whose threshold is lower where the entropy is high.

    Args:
      epsilon: from 0 to 1; the threshold is min(epsilon, sqrt(epsilon) * exp(-H)).
    """
    epsilon = number("epsilon", epsilon, low=0, high=1)
    return LogitsProcessor(_eta, {"epsilon": epsilon}, after_temperature=True)
