"""Indexing: reads and writes of arrays at arrays of indices, and selection of rows.

Reads and writes are smaller programs than `array[index]` and `array.at[index]`, which
count negative indices from the end, and tracing them takes a third of the time. `index`
is an array of int32, or a tuple of such arrays for the leading axes.

Shape symbols: S entries of an index, or rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def take(array: jax.Array, index: Any, *others: Any) -> jax.Array:
    """Return `array[index, *others]` for indices from 0 to the end of each axis.

    Indices out of range read an arbitrary entry.
    """
    at, number = _stacked((index, *others))
    batch, rest = at.ndim - 1, array.shape[number:]
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + len(rest))),
        collapsed_slice_dims=tuple(range(number)),
        start_index_map=tuple(range(number)),
    )
    sizes = (*[1] * number, *rest)
    return lax.gather(array, at, dimensions, sizes, mode="promise_in_bounds")


def get_or(array: jax.Array, index: Any, fill: Any) -> jax.Array:
    """Return `array[index]`; `fill` for indices that are negative or too large."""
    at = array.at[index]
    return at.get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def put(array: jax.Array, index: Any, values: Any) -> jax.Array:
    """Return `array` with `values` at `index`, except at indices out of range."""
    return _scatter(lax.scatter, array, index, values)


def add(array: jax.Array, index: Any, values: Any) -> jax.Array:
    """Return `array` with `values` added at `index`, as `put`."""
    return _scatter(lax.scatter_add, array, index, values)


def least(array: jax.Array, index: Any, values: Any) -> jax.Array:
    """Return `array` with its minima with `values` at `index`, as `put`."""
    return _scatter(lax.scatter_min, array, index, values)


def last_positions(index: jax.Array, size: int) -> jax.Array:
    """Return the last position in `index`, [S], of each number below `size`; i32[size].

    The position is -1 for numbers that do not occur.
    """
    numbers = jnp.arange(size, dtype=jnp.int32)
    position = jnp.arange(index.size, dtype=jnp.int32)
    is_here = index[None, :] == numbers[:, None]
    return jnp.max(jnp.where(is_here, position[None, :], -1), axis=1)


def where_rows(is_new: jax.Array, new: Any, old: Any) -> Any:
    """Return the rows of `new` where `is_new` is True, and those of `old` elsewhere.

    Args:
      is_new: bool[S].
      new: a pytree of arrays [S, ...].
      old: a pytree of the same structure and shapes.
    """

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def _scatter(scatter: Any, array: jax.Array, index: Any, values: Any) -> jax.Array:
    at, number = _stacked(index if isinstance(index, tuple) else (index,))
    batch, rest = at.ndim - 1, array.shape[number:]
    shape = (*at.shape[:-1], *rest)
    values = jnp.broadcast_to(jnp.asarray(values, array.dtype), shape)
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(batch, batch + len(rest))),
        inserted_window_dims=tuple(range(number)),
        scatter_dims_to_operand_dims=tuple(range(number)),
    )
    return scatter(array, at, values, dimensions, mode="drop")


def _stacked(index: tuple[Any, ...]) -> tuple[jax.Array, int]:
    """Return the indices side by side on a last axis, and their number."""
    arrays = jnp.broadcast_arrays(*index) if len(index) > 1 else list(index)
    columns = [lax.expand_dims(array, (array.ndim,)) for array in arrays]
    return lax.concatenate(columns, columns[0].ndim - 1), len(index)
