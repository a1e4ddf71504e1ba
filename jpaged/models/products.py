"""Products with weights: XLA's, or in a step of the engine those of a backend.

Pipeline: Linear, Output, ExpertLinear -> [models.products] -> XLA, cpu.products.

The engine calls the decoder inside `serving`. Outside of it, and where a backend has no
product, the products are XLA's: they have gradients and can be sharded.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jpaged.attention import backends
from jpaged.models.quantize import product_int8
from jpaged.pages.backend import Products

_serving: contextvars.ContextVar[Products | None] = contextvars.ContextVar(
    "products", default=None
)


@contextlib.contextmanager
def serving(attention: str | None) -> Iterator[None]:
    """Use the products of an attention backend in what is traced inside.

    The setting belongs to the thread, and ends with the `with` statement.

    Args:
      attention: name of the backend; None: the preferred one.
    """
    token = _serving.set(backends.products(attention))
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
    """Return a backend's product of groups of rows, or None; see `pages.Products`."""
    kernels = _serving.get()
    if kernels is None:
        return None
    return kernels.grouped_matmul(x, weight, scale, counts)
