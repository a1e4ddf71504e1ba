"""Operations of layers: XLA's, or in a step of the engine those of a backend.

Pipeline: models.layers, models.moe -> [models.layer_kernels] -> XLA, cpu.layers.

The engine calls the decoder inside `serving`. Outside of it, and where a backend has no
kernel, the operations are XLA's: they have gradients and can be sharded.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from jpaged.attention import backends
from jpaged.models import invariant
from jpaged.models.invariant import settled
from jpaged.models.quantize import product_int8
from jpaged.pages.backend import LayerKernels

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

_serving: contextvars.ContextVar[LayerKernels | None] = contextvars.ContextVar(
    "layer_kernels", default=None
)


@contextlib.contextmanager
def serving(attention: str | None, is_invariant: bool = False) -> Iterator[None]:
    """Use the kernels of an attention backend in what is traced inside.

    The setting belongs to the thread, and ends with the `with` statement.

    Args:
      attention: name of the backend; None: the preferred one.
      is_invariant: compute as inside `invariant.batch_invariant`.
    """
    if is_invariant:
        with invariant.batch_invariant(attention):
            yield
        return
    token = _serving.set(backends.layer_kernels(attention))
    try:
        yield
    finally:
        _serving.reset(token)


def matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None = None
) -> jax.Array:
    """Return x [..., in] @ weight [in, out]; float32 products at full precision.

    By default, GPUs and TPUs multiply float32 with 10 or 7 bits of mantissa.

    Args:
      x: floats.
      weight: in the dtype of x, or int8.
      scale: f32[out], of an int8 weight.

    Returns:
      [..., out], in the dtype of x.
    """
    return matmuls(x, [weight], [scale])[0]


def matmuls(
    x: jax.Array, weights: Sequence[jax.Array], scales: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """Return the products of x with several weights; see `matmul`.

    A backend may compute them in one call.
    """
    if invariant.invariant() is not None:
        return [
            invariant.matmul(x, weight, scale, _xla_matmul)
            for weight, scale in zip(weights, scales, strict=True)
        ]
    if (kernels := _serving.get()) is not None:
        rows = x.reshape(-1, x.shape[-1])
        out = kernels.matmuls(rows, weights, scales)
        if out is not None:
            return [each.reshape(*x.shape[:-1], -1) for each in out]
    return [
        _xla_matmul(x, weight, scale)
        for weight, scale in zip(weights, scales, strict=True)
    ]


def _xla_matmul(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is not None:
        return product_int8(x, weight, scale)
    is_full = weight.dtype == jnp.float32
    return jnp.matmul(
        x, weight, precision=jax.lax.Precision.HIGHEST if is_full else None
    )


def grouped_matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, counts: jax.Array
) -> jax.Array | None:
    """Return a backend's product of groups of rows, or None; see `LayerKernels`."""
    kernels = _serving.get()
    if kernels is None:
        return None
    return kernels.grouped_matmul(x, weight, scale, counts)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return x [..., E] / its root mean square * weight [E], in the dtype of x.

    Statistics are float32. The quotient is rounded to the dtype of x before it is
    multiplied, unless the weight is wider, as in transformers.
    """
    if (kernels := _serving.get()) is not None:
        out = kernels.rms_norm(x, weight, eps)
        if out is not None:
            return out
    wide = settled(x).astype(jnp.float32)
    variance = invariant.mean(jnp.square(wide))
    normed = wide * jax.lax.rsqrt(variance + eps)
    wider = max(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    normed = settled(normed.astype(wider))
    weight = jnp.expand_dims(weight.astype(wider), range(x.ndim - 1))
    return settled((normed * weight).astype(x.dtype))


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """Return activation(gate) * up, see `ACTIVATION_FUNCTIONS`."""
    if (kernels := _serving.get()) is not None:
        out = kernels.gated(gate, up, activation)
        if out is not None:
            return out
    return settled(ACTIVATION_FUNCTIONS[activation](gate) * up)
