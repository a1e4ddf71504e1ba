"""Tables: measured times on a grid, with interpolation and extrapolation.

Pipeline: profile files -> [tables] -> profiles.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

# After its last measurement, an axis is extrapolated for this many times its length.
_EXTRAPOLATION = 15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Values at the points of a grid, linear along each axis between them.

    Below the first point of an axis, the value is that of the first point. Above the
    last measured point, the value continues with the mean slope of the upper half of
    the axis, or stays constant if that slope is negative. The last point of each axis
    is extrapolated in this way, not measured (`measured` leaves it out).
    """

    axes: tuple[jax.Array, ...]  # f32[n_i] each, ascending
    values: jax.Array  # f32[n_0, n_1, ...]

    def __call__(self, *where: jax.Array) -> jax.Array:
        """Return f32[], the value at a point; `where` has f32[] for each axis."""
        index = jnp.int32(0)
        corners, shares = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32)
        for axis, size, x in zip(self.axes, self.values.shape, where, strict=True):
            x = jnp.clip(x, axis[0], axis[-1])
            low = jnp.sum(axis[1:-1] <= x, dtype=jnp.int32)
            share = (x - axis[low]) / (axis[low + 1] - axis[low])
            index = index * size + low
            # Each corner splits in two: the lower and the upper point of this axis.
            corners = jnp.concatenate([corners * size, corners * size + 1])
            shares = jnp.concatenate([shares * (1 - share), shares * share])
        return jnp.sum(self.values.reshape(-1)[index + corners] * shares)

    @property
    def measured(self) -> tuple[tuple[float, float], ...]:
        """First and last measured point of each axis; host only."""
        return tuple((float(axis[0]), float(axis[-2])) for axis in self.axes)

    @classmethod
    def of(cls, axes: list[np.ndarray], values: np.ndarray) -> Grid:
        """Build a grid from measurements, filling the gaps.

        A missing value between measurements along an axis is interpolated linearly (the
        mean over all axes where this is possible). Other missing values are
        extrapolated as described above.

        Args:
          axes: ascending points of each axis.
          values: f[n_0, n_1, ...], NaN where nothing was measured.

        Raises:
          ValueError: all values are missing.
        """
        values = np.asarray(values, np.float64)
        if not np.isfinite(values).any():
            raise ValueError("values: expected at least one measurement, got none")
        values = _fill(axes, values)
        ends = []
        for number, axis in enumerate(axes):
            axis = np.asarray(axis, np.float64)
            end = axis[-1] + _EXTRAPOLATION * max(axis[-1] - axis[0], 1.0)
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
    """Build a grid from a list of measurements.

    Args:
      columns: f[N] for each axis, the coordinates of each measurement. The points of an
        axis are all coordinates that occur.
      times: f[N], seconds. Measurements of the same point are replaced by their median.
    """
    axes = [np.unique(column) for column in columns]
    shape = tuple(len(axis) for axis in axes)
    points = np.ravel_multi_index(
        [
            np.searchsorted(axis, column)
            for axis, column in zip(axes, columns, strict=True)
        ],
        shape,
    )
    values = np.full(math.prod(shape), np.nan)
    order = np.argsort(points, kind="stable")
    starts = np.flatnonzero(np.diff(points[order], prepend=-1))
    for group in np.split(order, starts[1:]):
        values[points[group[0]]] = np.median(times[group])
    return Grid.of(axes, values.reshape(shape))


def _slope(axis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the slope of the upper half of the last axis, at least 0."""
    if len(axis) == 1:
        return np.zeros(values.shape[:-1])
    # With an even number of points, the lower of the two middle points.
    middle = (len(axis) - 1) // 2
    rise = values[..., -1] - values[..., middle]
    return np.maximum(rise / (axis[-1] - axis[middle]), 0)


def _fill(axes: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    """Fill missing values: first between measurements, then beyond them."""
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
    """Return each missing value along one axis; NaN if it is known or undefined."""
    moved = np.moveaxis(values, number, -1)
    out = np.full(moved.shape, np.nan)
    for index in itertools.product(*map(range, moved.shape[:-1])):
        line = moved[index]
        missing = np.isnan(line)
        known = np.flatnonzero(~missing)
        if not missing.any() or not known.size:
            continue
        first, last = known[0], known[-1]
        inside = missing & (axis >= axis[first]) & (axis <= axis[last])
        out[index][inside] = np.interp(axis[inside], axis[known], line[known])
        if beyond:
            slope = _slope(axis[known], line[known])
            over = missing & (axis > axis[last])
            out[index][over] = line[last] + slope * (axis[over] - axis[last])
            out[index][missing & (axis < axis[first])] = line[first]
    return np.moveaxis(out, -1, number)
