"""Batch invariance: the bits of a row's results depend on the row alone.

Pipeline: layers, layer_kernels -> [models.invariant] -> XLA, a backend's kernels.

The shape of a product decides in which order XLA sums, and what it fuses decides what
is rounded. So inside `batch_invariant` each product has the rows of one tile, a mean is
a sum in a fixed order, and `settled` ends what may be fused. A backend's kernels must
compute each row independently of the others, as those of "cpu" do.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv, sum_in_order
from jpaged.attention import backends

Tree = TypeVar("Tree")
Matmul = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
# Rows of a tile: of XLA's products, and of a backend's.
_XLA_ROWS, _KERNEL_ROWS = 16, 128


class Invariant(NamedTuple):
    """Batch invariance with the kernels of a backend."""

    implementation: str | None


_setting: contextvars.ContextVar[Invariant | None] = contextvars.ContextVar(
    "invariant", default=None
)


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
    token = _setting.set(Invariant(attention))
    try:
        yield
    finally:
        _setting.reset(token)


def invariant() -> Invariant | None:
    """Return the setting of `batch_invariant`, or None outside of it."""
    return _setting.get()


def settled(tree: Tree) -> Tree:
    """Return `tree`; inside `batch_invariant`, nothing is fused across it."""
    return tree if _setting.get() is None else lax.optimization_barrier(tree)


def mean(x: jax.Array) -> jax.Array:
    """Return the mean of x [..., E] over its last axis, [..., 1]."""
    if _setting.get() is None:
        return jnp.mean(x, axis=-1, keepdims=True)
    return settled(sum_in_order(x)[..., None] / x.shape[-1])


def matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, xla_matmul: Matmul
) -> jax.Array:
    """Return x [..., in] @ weight [in, out] by tiles of rows; differentiable.

    Args:
      x: floats.
      weight: floats or int8.
      scale: of an int8 weight.
      xla_matmul: the product where the backend has none, and for the gradient.
    """

    def forward(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        out = _by_tiles(rows, weight, scale, xla_matmul)
        return out.reshape(*x.shape[:-1], -1)

    if scale is not None:
        return forward(x, weight)

    def backward(operands: Any, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda x, w: xla_matmul(x, w, None), *operands)[1](cotangent)

    multiply = jax.custom_vjp(forward)
    multiply.defvjp(lambda *operands: (forward(*operands), operands), backward)
    return multiply(x, weight)


def _by_tiles(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, xla_matmul: Matmul
) -> jax.Array:
    setting = _setting.get()
    kernels = None
    if setting is not None:
        kernels = backends.layer_kernels(setting.implementation)

    def product(rows: jax.Array) -> jax.Array:
        rows = lax.optimization_barrier(rows)
        out = None if kernels is None else kernels.matmuls(rows, [weight], [scale])
        result = xla_matmul(rows, weight, scale) if out is None else out[0]
        return lax.optimization_barrier(result)

    size, num_rows = _XLA_ROWS if kernels is None else _KERNEL_ROWS, x.shape[0]
    if kernels is not None and num_rows <= size:
        return product(x)
    num_tiles = cdiv(num_rows, size)
    x = jnp.pad(x, ((0, num_tiles * size - num_rows), (0, 0)))
    out = lax.map(product, x.reshape(num_tiles, size, -1))
    return out.reshape(num_tiles * size, -1)[:num_rows]
