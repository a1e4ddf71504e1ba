"""Arithmetic: integers of Python and arrays, and sums in a fixed order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_TERMS = 16  # that `sum_in_order` adds at a time


def cdiv(dividend: Any, divisor: Any) -> Any:
    """Divide integers, rounding up.

    Args:
      dividend: int, or an integer array that is not negative. For an array with
        negative entries, these give a number from the exact result to 0.
      divisor: positive int or integer array.

    Returns:
      The smallest integer that is at least `dividend / divisor`, of the operands' type.

    >>> cdiv(7, 4), cdiv(8, 4)
    (2, 2)
    """
    if isinstance(dividend, jax.Array):
        return floor_div(dividend + (divisor - 1), divisor)
    return -(-dividend // divisor)


def floor_div(dividend: jax.Array, divisor: Any) -> jax.Array:
    """Divide integers that are not negative, rounding down.

    `//` serves negative numbers too, with ten instructions in place of one.

    Args:
      dividend: integer array.
      divisor: positive int or integer scalar.
    """
    return lax.div(dividend, _like(dividend, divisor))


def remainder(dividend: jax.Array, divisor: Any) -> jax.Array:
    """Return the remainder of `floor_div`, with its arguments."""
    return lax.rem(dividend, _like(dividend, divisor))


def midpoint(low: jax.Array, high: jax.Array) -> jax.Array:
    """Return floor((low + high) / 2) of integers of any sign, without overflow.

    >>> int(midpoint(jnp.int32(-(2**31)), jnp.int32(2**31 - 1)))
    -1
    """
    return (low & high) + ((low ^ high) >> 1)


def _like(array: jax.Array, value: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, array.dtype), array.shape)


def sum_in_order(x: jax.Array) -> jax.Array:
    """Return the sum of x [..., E] over its last axis, [...], in a fixed order.

    XLA's sums depend on the shape of x and on what it fuses. Here every addition is one
    of arrays, and nothing is fused that could round differently. Differentiable.
    """
    while (size := x.shape[-1]) > 1:
        number = min(_TERMS, size)
        padding = -size % number
        x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, padding)))
        parts = lax.optimization_barrier(x.reshape(*x.shape[:-1], number, -1))
        total = parts[..., 0, :]
        for term in range(1, number):
            total = total + parts[..., term, :]
        x = lax.optimization_barrier(total)
    return x[..., 0]
