"""Products with weights: XLA's, or in a step of the engine those of a backend.

Pipeline: Linear, Output, ExpertLinear -> [models.products] -> XLA, cpu.products.

The engine calls the decoder inside `serving`. Outside of it, and where a backend has no
product, the products are XLA's: they have gradients and can be sharded.

Inside `batch_invariant`, the bits of a row's results depend on the row alone. The shape
of a product decides in which order XLA sums, and what it fuses decides what is rounded.
So each product has the rows of one tile, and `settled` ends what may be fused.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.attention import backends
from jpaged.models.quantize import product_int8
from jpaged.pages.backend import Products

Tree = TypeVar("Tree")
# Rows of a tile: of XLA's products, and of a backend's, whose rows are independent.
_XLA_ROWS, _KERNEL_ROWS = 16, 128


class Invariant(NamedTuple):
    """Batch invariance with the kernels of a backend."""

    implementation: str | None


_serving: contextvars.ContextVar[Products | None] = contextvars.ContextVar(
    "products", default=None
)
_invariant: contextvars.ContextVar[Invariant | None] = contextvars.ContextVar(
    "invariant", default=None
)


@contextlib.contextmanager
def serving(attention: str | None, is_invariant: bool = False) -> Iterator[None]:
    """Use the products of an attention backend in what is traced inside.

    The setting belongs to the thread, and ends with the `with` statement.

    Args:
      attention: name of the backend; None: the preferred one.
      is_invariant: as in `batch_invariant`.
    """
    if is_invariant:
        with batch_invariant(attention):
            yield
        return
    token = _serving.set(backends.products(attention))
    try:
        yield
    finally:
        _serving.reset(token)


@contextlib.contextmanager
def batch_invariant(attention: str | None = None) -> Iterator[None]:
    """Compute with the bits of `LLM(batch_invariant=True)` in what is traced inside.

    `model(tokens)` is then equal to what the LLM computes, bit for bit, on the same
    backend and with the same jax. Use it inside of a jitted function, around the call
    of the model:

        @jax.jit
        def logprobs(model, tokens):
            with jpaged.rl.batch_invariant():
                return jpaged.rl.token_logprobs(model, tokens)

    Args:
      attention: the LLM's `attention`.
    """
    token = _invariant.set(Invariant(attention))
    try:
        yield
    finally:
        _invariant.reset(token)


def invariant() -> Invariant | None:
    """Return the setting of `batch_invariant`, or None outside of it."""
    return _invariant.get()


def settled(tree: Tree) -> Tree:
    """Return `tree`; inside `batch_invariant`, nothing is fused across it."""
    return tree if _invariant.get() is None else lax.optimization_barrier(tree)


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
    if (setting := _invariant.get()) is not None:
        rows = x.reshape(-1, x.shape[-1])
        out = _invariant_matmul(setting, rows, weight, scale)
        return out.reshape(*x.shape[:-1], -1)
    if (kernels := _serving.get()) is not None:
        rows = x.reshape(-1, x.shape[-1])
        out = kernels.matmul(rows, weight, scale)
        if out is not None:
            return out.reshape(*x.shape[:-1], -1)
    return _matmul(x, weight, scale)


def _matmul(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is not None:
        return product_int8(x, weight, scale)
    is_full = weight.dtype == jnp.float32
    return jnp.matmul(x, weight, precision=lax.Precision.HIGHEST if is_full else None)


def _invariant_matmul(
    setting: Invariant, x: jax.Array, weight: jax.Array, scale: jax.Array | None
) -> jax.Array:
    """Return x [M, in] @ weight by tiles of rows; differentiable."""
    if scale is not None:
        return _by_tiles(setting, x, weight, scale)

    def forward(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _by_tiles(setting, x, weight, None)

    def backward(operands: Any, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda x, w: _matmul(x, w, None), *operands)[1](cotangent)

    multiply = jax.custom_vjp(forward)
    multiply.defvjp(lambda *operands: (forward(*operands), operands), backward)
    return multiply(x, weight)


def _by_tiles(
    setting: Invariant, x: jax.Array, weight: jax.Array, scale: jax.Array | None
) -> jax.Array:
    kernels = backends.products(setting.implementation)

    def product(rows: jax.Array) -> jax.Array:
        rows = settled(rows)
        out = None if kernels is None else kernels.matmul(rows, weight, scale)
        return settled(_matmul(rows, weight, scale) if out is None else out)

    size, num_rows = _XLA_ROWS if kernels is None else _KERNEL_ROWS, x.shape[0]
    if kernels is not None and num_rows <= size:
        return product(x)
    num_tiles = cdiv(num_rows, size)
    x = jnp.pad(x, ((0, num_tiles * size - num_rows), (0, 0)))
    out = lax.map(product, x.reshape(num_tiles, size, -1))
    return out.reshape(num_tiles * size, -1)[:num_rows]


def grouped_matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, counts: jax.Array
) -> jax.Array | None:
    """Return a backend's product of groups of rows, or None; see `pages.Products`."""
    kernels = _serving.get()
    if kernels is None:
        return None
    return kernels.grouped_matmul(x, weight, scale, counts)
