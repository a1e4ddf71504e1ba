"""Thresholds and entropies that several methods need. No sort: see `transforms`."""

import jax
import jax.numpy as jnp

from jpaged.arithmetic import midpoint
from jpaged.decoding.transforms import from_ordered, to_ordered


def largest_threshold(
    scores: jax.Array, weights: jax.Array, target: jax.Array | float
) -> jax.Array:
    """Largest threshold at or above which tokens have a weight of at least `target`.

    Bisection over the ordered float32 numbers, which is exact: 33 passes.

    Args:
      scores: f32[V].
      weights: f32[V], at least 0.
      target: f32[]; if all tokens together do not reach it, all are kept.
    """

    def narrow(
        _: int, bounds: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        first, last = bounds
        middle = midpoint(first, last)
        kept = jnp.where(scores >= from_ordered(middle), weights, 0.0)
        reaches = jnp.sum(kept) >= target
        return jnp.where(reaches, middle, first), jnp.where(reaches, last, middle)

    low = to_ordered(jnp.float32(-jnp.inf))
    high = to_ordered(jnp.max(scores)) + 1
    first, _ = jax.lax.fori_loop(0, 33, narrow, (low, high))
    return from_ordered(first)


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy f32[] in nats of softmax(logits)."""
    logprobs = jax.nn.log_softmax(logits)
    terms = jnp.where(logprobs == -jnp.inf, 0.0, jnp.exp(logprobs) * logprobs)
    return -jnp.sum(terms)


def keep(logits: jax.Array, is_kept: jax.Array) -> jax.Array:
    """Logits of the tokens that are kept, and always of the largest; others: -inf."""
    return jnp.where(is_kept | (logits == jnp.max(logits)), logits, -jnp.inf)
