"""Losses: policy gradient, PPO's clipped surrogate, and GRPO.

Pipeline: log-probabilities, advantages -> [losses] -> gradients. Pure functions.

All arrays have one entry per token, 0 where `mask` is False.

Shape symbols: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.rl.estimators import KLKind, kl_estimate

Aggregate = Literal["token", "sequence", "constant"]


class PolicyLoss(NamedTuple):
    """A loss, and what to watch beside it; all f32[]."""

    loss: jax.Array
    clip_share: jax.Array  # share of tokens whose ratio the clipping has cut
    mean_ratio: jax.Array  # mean of new / old probability
    kl: jax.Array  # estimate of the divergence from the reference; 0 without one


def aggregate(
    values: jax.Array,
    mask: jax.Array,
    how: Aggregate = "token",
    length: int | None = None,
) -> jax.Array:
    """Return a mean of values per token, f32[].

    Args:
      values: f32[B, T].
      mask: bool[B, T], tokens that count.
      how: "token": mean over all tokens (DAPO), so long sequences count more.
        "sequence": mean of the means of each sequence (GRPO). "constant": sum over
        tokens divided by B * `length` (Dr. GRPO), so no length matters.
      length: for "constant", for example the largest number of generated tokens; None
        is T.

    Source: Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476; Liu et al. 2025.
    """
    kept = jnp.where(mask, values, 0.0)
    counts = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    if how == "token":
        return jnp.sum(kept) / jnp.maximum(jnp.sum(counts), 1.0)
    if how == "sequence":
        means = jnp.sum(kept, axis=-1) / jnp.maximum(counts, 1.0)
        num_sequences = jnp.sum(counts > 0, dtype=jnp.float32)
        return jnp.sum(means) / jnp.maximum(num_sequences, 1.0)
    if how == "constant":
        size = mask.shape[-1] if length is None else length
        return jnp.sum(kept) / (mask.shape[0] * size)
    raise ValueError(f"how: expected 'token', 'sequence' or 'constant', got {how!r}")


def policy_gradient_loss(
    logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    weights: jax.Array | None = None,
    how: Aggregate = "token",
    length: int | None = None,
) -> jax.Array:
    """Return the REINFORCE loss -weight * advantage * logprob, f32[].

    Args:
      logprobs: f32[B, T], of the sampled tokens under the trained policy.
      advantages: f32[B], or f32[B, T] per token.
      mask: bool[B, T], sampled tokens.
      weights: f32[B] or f32[B, T], importance weights (`corrections`); None: 1.
      how: see `aggregate`.
      length: see there.
    """
    _check_shapes(logprobs, mask)
    gain = _per_token(advantages, logprobs) * logprobs
    if weights is not None:
        gain = gain * jax.lax.stop_gradient(_per_token(weights, logprobs))
    return -aggregate(gain, mask, how, length)


def ppo_clip_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    weights: jax.Array | None = None,
    reference: jax.Array | None = None,
    kl_coefficient: float = 0.0,
    kl_kind: KLKind = "k3",
    how: Aggregate = "token",
    length: int | None = None,
) -> PolicyLoss:
    """Return PPO's clipped surrogate loss.

    Args:
      logprobs: f32[B, T], of the sampled tokens under the trained policy.
      old_logprobs: f32[B, T], under the policy before this batch's updates. Those of
        the rollout do, if its numerics are the trainer's (`LLM(batch_invariant=True)`);
        otherwise recompute them, and pass `weights`.
      advantages: f32[B], or f32[B, T] per token.
      mask: bool[B, T], sampled tokens.
      clip_low: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      clip_high: None is `clip_low`; DAPO uses 0.28 with 0.2.
      weights: f32[B] or f32[B, T], importance weights (`corrections`); None: 1.
      reference: f32[B, T], log-probabilities under a reference; needed with
        `kl_coefficient`.
      kl_coefficient: weight of the KL divergence from the reference.
      kl_kind: its estimator, see `estimators.kl_estimate`.
      how: see `aggregate`.
      length: see there.

    Raises:
      ValueError: shapes differ, or there is a coefficient and no reference.

    Source: Schulman et al. 2017. https://arxiv.org/abs/1707.06347
    """
    _check_shapes(logprobs, mask, old_logprobs)
    if kl_coefficient and reference is None:
        raise ValueError(
            "reference: expected log-probabilities with kl_coefficient="
            f"{kl_coefficient:g}, got None"
        )
    high = clip_low if clip_high is None else clip_high
    gap = jnp.where(mask, logprobs - jax.lax.stop_gradient(old_logprobs), 0.0)
    ratio = jnp.exp(gap)
    gains = _per_token(advantages, logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + high)
    gain = jnp.minimum(ratio * gains, clipped * gains)
    if weights is not None:
        gain = gain * jax.lax.stop_gradient(_per_token(weights, logprobs))
    loss = -aggregate(gain, mask, how, length)
    kl = jnp.float32(0.0)
    if reference is not None:
        gaps = kl_estimate(jnp.where(mask, logprobs, 0.0), reference, kl_kind)
        kl = aggregate(gaps, mask, how, length)
        loss = loss + kl_coefficient * kl
    is_cut = (clipped * gains < ratio * gains).astype(jnp.float32)
    return PolicyLoss(loss, aggregate(is_cut, mask), aggregate(ratio, mask), kl)


def grpo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    kl_coefficient: float = 0.0,
    reference: jax.Array | None = None,
    how: Aggregate = "sequence",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    weights: jax.Array | None = None,
    length: int | None = None,
) -> PolicyLoss:
    """Return the loss of GRPO: `ppo_clip_loss`, as a mean of means of sequences.

    With `advantages.dr_grpo_advantages` and `how="constant"` it is that of Dr. GRPO,
    with `how="token"` and `clip_high` that of DAPO. See `ppo_clip_loss` for the
    arguments.

    Source: Shao et al. 2024, equation 3. https://arxiv.org/abs/2402.03300
    """
    return ppo_clip_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        weights=weights,
        reference=reference,
        kl_coefficient=kl_coefficient,
        how=how,
        length=length,
    )


def _per_token(values: jax.Array, like: jax.Array) -> jax.Array:
    """Return values of sequences f32[B] as f32[B, 1]; those of tokens as they are."""
    values = jnp.asarray(values, jnp.float32)
    if values.shape == like.shape:
        return values
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"advantages, weights: expected shape {like.shape[:1]} or {like.shape}, "
            f"got {values.shape}"
        )
    return values[:, None]


def _check_shapes(logprobs: jax.Array, *others: jax.Array) -> None:
    if logprobs.ndim != 2 or any(each.shape != logprobs.shape for each in others):
        raise ValueError(
            "logprobs, old_logprobs, mask: expected one shape [B, T], got "
            f"{[each.shape for each in (logprobs, *others)]}"
        )
