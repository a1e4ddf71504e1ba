"""Advantages: how much better a sample is than others of its prompt.

Pipeline: rewards -> [advantages] -> losses. Pure functions of arrays.

Shape symbols: B prompts, N samples of each prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def _checked(rewards: ArrayLike, least: int) -> jax.Array:
    checked = jnp.asarray(rewards, jnp.float32)
    if checked.ndim < 1 or checked.shape[-1] < least:
        raise ValueError(
            f"rewards: expected shape [..., N] with at least {least} samples of each "
            f"prompt on the last axis, got {checked.shape}"
        )
    return checked


def grpo_advantages(
    rewards: ArrayLike, *, eps: float = 1e-4, ddof: int = 1
) -> jax.Array:
    """Return rewards minus their group's mean, divided by its standard deviation.

    Args:
      rewards: f32[..., N], rewards of the N samples of each prompt.
      eps: added to the standard deviation. A group of equal rewards gets zeros.
      ddof: 1: the sample standard deviation; 0: that of the group itself.

    Returns:
      f32[..., N].

    Raises:
      ValueError: a group has fewer than two samples.

    Source: Shao et al. 2024, section 4.1. https://arxiv.org/abs/2402.03300
    """
    checked = _checked(rewards, 2)
    deviation = jnp.std(checked, axis=-1, keepdims=True, ddof=ddof)
    return dr_grpo_advantages(rewards) / (deviation + eps)


def dr_grpo_advantages(rewards: ArrayLike) -> jax.Array:
    """Return rewards f32[..., N] minus their group's mean, f32[..., N].

    Without the division, prompts whose samples are all good or all bad but one do not
    count more than others.

    Source: Liu et al. 2025 (Dr. GRPO). https://arxiv.org/abs/2503.20783
    """
    checked = _checked(rewards, 2)
    return checked - jnp.mean(checked, axis=-1, keepdims=True)


def rloo_advantages(rewards: ArrayLike) -> jax.Array:
    """Return rewards f32[..., N] minus the mean of the group's other samples.

    This baseline does not depend on the sample, so the gradient is unbiased.

    Source: Ahmadian et al. 2024 (RLOO). https://arxiv.org/abs/2402.14740
    """
    count = _checked(rewards, 2).shape[-1]
    return dr_grpo_advantages(rewards) * (count / (count - 1))
