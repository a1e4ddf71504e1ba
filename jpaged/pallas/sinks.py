"""Attention sinks, applied to the results of a kernel.

Pipeline: pallas.tpu.attention, pallas.gpu.calls -> [pallas.sinks].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def apply_sinks(
    out: jax.Array, lse: jax.Array, sinks: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Add to each head a score that has no value.

    Args:
      out: Output without sinks, f32[T, H, D].
      lse: Its log-sum-exp, f32[T, H]; -inf for queries that see nothing, which stay
        empty.
      sinks: [H].
      dtype: The returned output's dtype. The output is rounded once, here.

    Returns:
      The output [T, H, D] and the log-sum-exp f32[T, H].
    """
    is_empty = jnp.isneginf(lse)
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, :])
    share = jnp.where(is_empty, 0.0, jnp.exp(lse - total))
    out = (out * share[..., None]).astype(dtype)
    return out, jnp.where(is_empty, -jnp.inf, total)
