"""Tables: measured times on a grid, and what lies between the measurements.

Place on the road: profile files -> [tables] -> profiles.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Beyond its last measurement an axis goes on, straight, for this many times its length.
_FAR = 15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Values at the crossings of axes, linear along each axis between them.

    Below an axis's first point the value is that of the point. Above the last measured
    one it goes on with the mean slope of the axis's upper half, never downwards: each
    axis ends in a point that was not measured (`measured` leaves it out).
    """

    axes: tuple[jax.Array, ...]  # f32[n_i] each, rising
    values: jax.Array  # f32[n_0, n_1, ...]

    def __call__(self, *where: jax.Array) -> jax.Array:
        """f32[], the value at a place: f32[] for each axis."""
        index = jnp.int32(0)
        corners, shares = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32)
        for axis, size, x in zip(self.axes, self.values.shape, where, strict=True):
            x = jnp.clip(x, axis[0], axis[-1])
            low = jnp.sum(axis[1:-1] <= x, dtype=jnp.int32)
            share = (x - axis[low]) / (axis[low + 1] - axis[low])
            index = index * size + low
            # Each corner so far has two: on this axis's lower point and on its upper.
            corners = jnp.concatenate([corners * size, corners * size + 1])
            shares = jnp.concatenate([shares * (1 - share), shares * share])
        return jnp.sum(self.values.reshape(-1)[index + corners] * shares)

    @property
    def measured(self) -> tuple[tuple[float, float], ...]:
        """First and last measured point of each axis; on the host."""
        return tuple((float(axis[0]), float(axis[-2])) for axis in self.axes)

    @classmethod
    def of(cls, axes: list[np.ndarray], values: np.ndarray) -> Grid:
        """A grid of rising axes and values, NaN where nothing was measured.

        What is missing between measurements along an axis is put on the line between
        them (the mean over the axes that have such a line); what is missing beyond them
        goes on with the slope of their upper half, never downwards.

        Raises:
          ValueError: nothing at all was measured.
        """
        values = np.asarray(values, np.float64)
        if not np.isfinite(values).any():
            raise ValueError("values: expected at least one measurement, got none")
        values = _fill(axes, values)
        ends = []
        for number, axis in enumerate(axes):
            axis = np.asarray(axis, np.float64)
            end = axis[-1] + _FAR * max(axis[-1] - axis[0], 1.0)
            slope = _slope(axis, np.moveaxis(values, number, -1))
            last = np.take(values, -1, axis=number)
            more = np.expand_dims(last + slope * (end - axis[-1]), number)
            values = np.concatenate([values, more], axis=number)
            ends.append(np.append(axis, end))
        return cls(
            axes=tuple(jnp.asarray(axis, jnp.float32) for axis in ends),
            values=jnp.asarray(values, jnp.float32),
        )


def grid_of_rows(columns: list[np.ndarray], times: np.ndarray) -> Grid:
    """A grid of measurements: of each its places (a column for each axis) and time.

    The median of those at the same place; the axes are all places that occur.
    """
    axes = [np.unique(column) for column in columns]
    shape = tuple(len(axis) for axis in axes)
    places = np.ravel_multi_index(
        [
            np.searchsorted(axis, column)
            for axis, column in zip(axes, columns, strict=True)
        ],
        shape,
    )
    values = np.full(math.prod(shape), np.nan)
    order = np.argsort(places, kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    for group in np.split(order, starts[1:]):
        values[places[group[0]]] = np.median(times[group])
    return Grid.of(axes, values.reshape(shape))


def _slope(axis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of the upper half of the last axis of `values`, at least 0; 0 for one point."""
    if len(axis) == 1:
        return np.zeros(values.shape[:-1])
    # One of the two middle points, and never the last.
    middle = (len(axis) - 1) // 2
    rise = values[..., -1] - values[..., middle]
    return np.maximum(rise / (axis[-1] - axis[middle]), 0)


def _fill(axes: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    """`values` without NaN: between measurements first, and then beyond them."""
    for beyond in (False, True):
        while np.isnan(values).any():
            lines = [
                _lines(axis, values, number, beyond) for number, axis in enumerate(axes)
            ]
            known = np.isfinite(lines)
            counts = known.sum(axis=0)
            if not counts.any():
                break
            sums = np.where(known, lines, 0.0).sum(axis=0)
            means = sums / np.maximum(counts, 1)
            values = np.where(counts > 0, means, values)
    return values


def _lines(
    axis: np.ndarray, values: np.ndarray, number: int, beyond: bool
) -> np.ndarray:
    """What each missing value would be along one axis; NaN where known or unknown."""
    moved = np.moveaxis(values, number, -1)
    out = np.full(moved.shape, np.nan)
    for place in itertools.product(*map(range, moved.shape[:-1])):
        line = moved[place]
        missing = np.isnan(line)
        known = np.flatnonzero(~missing)
        if not missing.any() or not known.size:
            continue
        first, last = known[0], known[-1]
        inside = missing & (axis >= axis[first]) & (axis <= axis[last])
        out[place][inside] = np.interp(axis[inside], axis[known], line[known])
        if beyond:
            slope = _slope(axis[known], line[known])
            over = missing & (axis > axis[last])
            out[place][over] = line[last] + slope * (axis[over] - axis[last])
            out[place][missing & (axis < axis[first])] = line[first]
    return np.moveaxis(out, -1, number)
