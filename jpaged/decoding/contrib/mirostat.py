"""Mirostat 2: the surprise of the text is kept at a target.

The state is the largest surprise that is allowed. After each token it moves by the
difference between the token's surprise and the target.

Source: Basu et al. 2021. https://arxiv.org/abs/2007.14966
"""

import math

import jax
import jax.numpy as jnp

from jpaged.decoding.contrib.thresholds import keep
from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import number


def _start(*, tau: jax.Array, eta: jax.Array) -> jax.Array:
    return jnp.float32(2.0) * tau


def _truncate(
    logits: jax.Array, row: Row, mu: jax.Array, *, tau: jax.Array, eta: jax.Array
) -> jax.Array:
    surprise = -jax.nn.log_softmax(logits) / math.log(2.0)
    return keep(logits, surprise <= mu)


def _learn(
    logits: jax.Array,
    row: Row,
    mu: jax.Array,
    token: jax.Array,
    *,
    tau: jax.Array,
    eta: jax.Array,
) -> jax.Array:
    left = _truncate(logits, row, mu, tau=tau, eta=eta)
    surprise = -jax.nn.log_softmax(left)[token] / math.log(2.0)
    # Infinite if a later filter has forced a token that is truncated here.
    error = jnp.where(jnp.isfinite(surprise), surprise - tau, 0.0)
    return mu - eta * error


def mirostat(tau: float = 5.0, eta: float = 0.1) -> LogitsProcessor:
    """Keep the surprise of the sampled tokens near `tau`.

    Args:
      tau: target in bits, above 0.
      eta: rate at which the limit follows the error, from 0 to 1.
    """
    parameters = {
        "tau": number("tau", tau, above=0),
        "eta": number("eta", eta, low=0, high=1),
    }
    return LogitsProcessor(
        _truncate, parameters, init=_start, update=_learn, after_temperature=True
    )
