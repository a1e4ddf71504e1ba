"""Layers: the operations of a decoder's layers for which there are kernels.

Pipeline: models.layer_kernels -> [cpu.layers] -> cpu.calls.

The products read weights as the model stores them, and win where reading them is what
takes time. XLA's product needs many rows to be as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jpaged.cpu import calls, library
from jpaged.pages.backend import LayerKernels

# Most rows of x, by the weight's dtype (docs/decisions/cpu_kernels.md).
MAX_ROWS = {"float32": 128, "bfloat16": 256, "float16": 256, "int8": 256}
MAX_ROWS_OF_PAIRS = 1024  # with int8 weights, where they are multiplied in pairs


def max_rows(dtype: str) -> int:
    """Return the most rows of x with weights of a dtype; 0 if there is no kernel."""
    if dtype == "int8" and library.has_int8_pairs():
        return MAX_ROWS_OF_PAIRS
    return MAX_ROWS.get(dtype, 0)


def matmuls(
    x: jax.Array, weights: Sequence[jax.Array], scales: Sequence[jax.Array | None]
) -> list[jax.Array] | None:
    """Return x `[M, K]` @ weight `[K, N]` * scale `[N]` of each, or None for XLA's."""
    is_one_dtype = all(weight.dtype == weights[0].dtype for weight in weights)
    if not (is_one_dtype and _is_served(x, weights[0])):
        return None
    return calls.matmuls(x, weights, scales)


def grouped_matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, counts: jax.Array
) -> jax.Array | None:
    """Return groups of rows of x `[T, K]`, each multiplied by its matrix `[K, N]`.

    Args:
      x: the first counts[0] rows are multiplied by weight[0], and so on.
      weight: `[X, K, N]`.
      scale: f32`[X, N]`, or None.
      counts: i32`[X]`. Rows past their sum give zeros.
    """
    if not _is_served(x, weight):
        return None
    return calls.grouped_matmul(x, weight, scale, counts)


def _is_served(x: jax.Array, weight: jax.Array) -> bool:
    is_known = jnp.dtype(x.dtype).name in ("float32", "bfloat16", "float16")
    return is_known and x.shape[0] <= max_rows(jnp.dtype(weight.dtype).name)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array | None:
    """Return x `[..., E]` / its root mean square * weight `[E]`, or None for XLA's."""
    if x.dtype != jnp.float32 or weight.dtype != jnp.float32:
        return None
    rows = x.reshape(-1, x.shape[-1])
    return calls.rms_norm(rows, weight, eps).reshape(x.shape)


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array | None:
    """Return activation(gate) * up, or None for XLA's."""
    if gate.dtype != jnp.float32 or activation not in calls.ACTIVATIONS:
        return None
    return calls.gated(gate, up, activation)


LAYER_KERNELS = LayerKernels(matmuls, grouped_matmul, rms_norm, gated)
