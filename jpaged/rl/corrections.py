"""Corrections: weights for tokens that another policy than the trained one sampled.

Pipeline: log-probabilities of rollout and trainer -> [corrections] -> losses.

The rollout's policy differs from the trainer's: by rounding, by an older version of the
weights, or by filters. A weight is the ratio of their probabilities, truncated, because
a product of ratios has a large variance. No gradient flows through it.

Shape symbols: B sequences, T tokens.

Source: Ionides 2008, truncated importance sampling; Yao et al. 2025,
https://fengyao.notion.site/off-policy-rl; Zheng et al. 2025 (GSPO) for the geometric
mean. https://arxiv.org/abs/2507.18071
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Beyond = Literal["truncate", "mask"]


def token_weights(
    trainer: jax.Array,
    rollout: jax.Array,
    mask: jax.Array,
    *,
    cap: float = 2.0,
    beyond: Beyond = "truncate",
) -> jax.Array:
    """Return a weight for each token.

    Args:
      trainer: f32[B, T], log-probabilities of the tokens under the trainer's policy.
      rollout: f32[B, T], under the policy that sampled them.
      mask: bool[B, T], tokens that were sampled; others get weight 0.
      cap: largest weight, above 0.
      beyond: "truncate" lowers larger weights to `cap`; "mask" sets them to 0.

    Returns:
      f32[B, T], without gradient.
    """
    ratios = jnp.where(mask, trainer - rollout, 0.0)
    return jnp.where(mask, _limited(ratios, cap, beyond), 0.0)


def sequence_weights(
    trainer: jax.Array,
    rollout: jax.Array,
    mask: jax.Array,
    *,
    cap: float = 2.0,
    beyond: Beyond = "truncate",
    is_geometric: bool = False,
) -> jax.Array:
    """Return a weight for each sequence, the ratio of its probabilities.

    Args:
      trainer: see `token_weights`, like the following arguments.
      rollout: see there.
      mask: see there.
      cap: see there.
      beyond: see there.
      is_geometric: the geometric mean of the tokens' ratios instead of their product,
        so that long sequences have no extreme weights.

    Returns:
      f32[B], without gradient.
    """
    total = jnp.sum(jnp.where(mask, trainer - rollout, 0.0), axis=-1)
    if is_geometric:
        total = total / jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.float32), 1.0)
    return _limited(total, cap, beyond)


def _limited(log_ratios: jax.Array, cap: float, beyond: Beyond) -> jax.Array:
    if not cap > 0:
        raise ValueError(f"cap: expected a number above 0, got {cap!r}")
    log_ratios = jax.lax.stop_gradient(log_ratios)
    most = jnp.log(jnp.float32(cap))
    limited = jnp.exp(jnp.minimum(log_ratios, most))
    if beyond == "truncate":
        return limited
    if beyond == "mask":
        return jnp.where(log_ratios > most, 0.0, limited)
    raise ValueError(f"beyond: expected 'truncate' or 'mask', got {beyond!r}")


class Mismatch(NamedTuple):
    """How far the rollout's policy is from the trainer's, on sampled tokens."""

    mean_abs: jax.Array  # f32[], mean of |trainer - rollout|
    max_abs: jax.Array  # f32[]
    kl: jax.Array  # f32[], k3 estimate of KL(rollout || trainer)
    effective_share: jax.Array  # f32[], effective sample size of the weights / tokens


def mismatch(trainer: jax.Array, rollout: jax.Array, mask: jax.Array) -> Mismatch:
    """Compare log-probabilities f32[B, T] where `mask` bool[B, T] is True."""
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    gap = jnp.where(mask, trainer - rollout, 0.0)
    weights = jnp.where(mask, jnp.exp(gap), 0.0)
    squares = jnp.maximum(jnp.sum(jnp.square(weights)), 1e-30)
    return Mismatch(
        mean_abs=jnp.sum(jnp.abs(gap)) / count,
        max_abs=jnp.max(jnp.abs(gap)),
        kl=jnp.sum(jnp.expm1(gap) - gap) / count,
        effective_share=jnp.square(jnp.sum(weights)) / squares / count,
    )
