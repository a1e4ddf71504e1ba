"""DoLa: the last layer is contrasted with the earlier one that differs most from it.

Source: Chuang et al. 2023. https://arxiv.org/abs/2309.03883
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jpaged.decoding.base import Context, Decision, DecodingAlgorithm, own_rows
from jpaged.decoding.parameters import Range
from jpaged.decoding.sample import sample_rows


def _divergence(last: jax.Array, early: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence f32[...] of log-probabilities f32[..., V]."""
    middle = jnp.logaddexp(last, early) - jnp.log(2.0)

    def relative(p: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(p > -jnp.inf, jnp.exp(p) * (p - middle), 0.0), axis=-1)

    return 0.5 * (relative(last) + relative(early))


def _step(
    keys: jax.Array, logits: jax.Array, state: tuple[()], context: Context
) -> tuple[tuple[()], Decision]:
    assert context.layers is not None
    early = jax.nn.log_softmax(context.layers, axis=-1)
    last = jnp.broadcast_to(jax.nn.log_softmax(logits), early.shape)
    chosen = jnp.argmax(_divergence(last, early), axis=0)
    early = jnp.take_along_axis(early, chosen[None, :, None], axis=0)[0]
    # Only tokens that the last layer finds plausible.
    best = jnp.max(logits, axis=-1, keepdims=True)
    is_plausible = logits >= best + jnp.log(context.parameters["alpha"])
    scores = jnp.where(is_plausible, logits - early, -jnp.inf)
    tokens = sample_rows(keys, scores, context.parameters["temperature"])
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return state, Decision(
        tokens, own_rows(len(logits)), logprobs, jnp.zeros(len(logits), bool)
    )


def _init(num_rows: int) -> tuple[()]:
    return ()


def dola(
    layers: Sequence[int], alpha: float = 0.1, temperature: float = 0.0
) -> DecodingAlgorithm:
    """Build the algorithm: scores are log p(last layer) - log p(early layer).

    Args:
      layers: candidates for the early layer, from 0; one of them is fixed contrast.
      alpha: tokens with less than this share of the largest probability are dropped,
        above 0 and at most 1. Data.
      temperature: of the scores; 0 is greedy. Data.
    """
    parameters = {"alpha": alpha, "temperature": temperature}
    ranges = {"alpha": Range(above=0, high=1), "temperature": Range(low=0)}
    return DecodingAlgorithm(
        _init,
        _step,
        needs={"layers"},
        layers=tuple(layers),
        parameters=parameters,
        ranges=ranges,
        keeps_rows=True,
    )
