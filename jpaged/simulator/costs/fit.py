"""Fit: a cost model from measurements of one's own machine.

Place on the road: loads and seconds -> [fit] -> cost model and what it leaves over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.load import Load

# Singular values of the scaled columns below this share of the largest are none.
_RANK_SHARE = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A cost model that is linear in a load's features, each coefficient a leaf."""

    seconds: Features  # f32[] each, seconds for one of the feature

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds."""
        work = jnp.stack(features(load))
        return jnp.sum(work * jnp.stack([*map(jnp.float32, self.seconds)]))


@dataclasses.dataclass(frozen=True)
class FitReport:
    """What a fit leaves over; seconds, measured minus predicted."""

    coefficients: Mapping[str, float]  # of the features that were fitted
    residuals: np.ndarray  # f64[N]
    rms_s: float  # root of their mean square
    mean_error: float  # of |residual| / measured
    max_error: float
    explained: float  # 1 - squares left over / squares around the mean


def measured_features(loads: Load) -> dict[str, np.ndarray]:
    """f64[N] for each feature, of loads with a leading axis of N measurements."""
    work = jax.jit(jax.vmap(features))(loads)
    return {name: np.asarray(work._asdict()[name], np.float64) for name in work._fields}


def fit(
    measurements: Mapping[str, np.ndarray | Sequence[float]],
    seconds: np.ndarray | Sequence[float],
    *,
    relative: bool = False,
) -> tuple[Linear, FitReport]:
    """The cost model with the least squared error whose coefficients are at least 0.

    Args:
      measurements: for each feature that is to have a coefficient, by its name in
        `features.Features`, its value in each of N measured steps; the other
        coefficients are 0. `measured_features` computes them from loads.
      seconds: f[N], what each step took.
      relative: the errors are shares of what was measured, so that short steps count
        as much as long ones.

    Raises:
      ValueError: an unknown feature, lengths that differ, a number below 0 or not
        finite, fewer measurements than coefficients, or measurements that cannot tell
        the coefficients apart; the message names the features.
    """
    names = list(measurements)
    unknown = sorted(set(names) - set(Features._fields))
    if unknown or not names:
        raise ValueError(
            f"measurements: expected features among {', '.join(Features._fields)}, "
            f"got {', '.join(unknown) or 'none'}"
        )
    y = _numbers("seconds", seconds)
    columns = [_numbers(name, measurements[name]) for name in names]
    for name, column in zip(names, columns, strict=True):
        if column.shape != y.shape:
            raise ValueError(
                f"{name}: expected {len(y)} numbers, as many as seconds, got "
                f"{len(column)}"
            )
    if len(y) < len(names):
        raise ValueError(
            f"seconds: expected at least {len(names)} measurements for the features "
            f"{', '.join(names)}, got {len(y)}; measure more or name fewer"
        )
    if relative and not (y > 0).all():
        raise ValueError("seconds: expected more than 0 for a relative fit, got 0")
    matrix = np.stack(columns, axis=1)
    weights = 1 / y if relative else np.ones_like(y)
    scales = np.linalg.norm(matrix * weights[:, None], axis=0)
    _check_rank(names, matrix * weights[:, None], scales)
    scaled = matrix * weights[:, None] / scales
    solution = nnls(scaled, y * weights)[0] / scales
    coefficients = dict(zip(names, solution.tolist(), strict=True))
    model = Linear(Features(*(coefficients.get(f, 0.0) for f in Features._fields)))
    return model, report(coefficients, y, matrix @ solution)


def _numbers(name: str, values: np.ndarray | Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one number a step, got shape {array.shape}")
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        raise ValueError(
            f"{name}: expected numbers of at least 0, got {array[wrong[0]]} in "
            f"measurement {wrong[0]}"
        )
    return array


def _check_rank(names: list[str], matrix: np.ndarray, scales: np.ndarray) -> None:
    silent = [name for name, scale in zip(names, scales, strict=True) if scale == 0]
    if silent:
        raise ValueError(
            f"measurements: no step has any {', '.join(silent)}, so its seconds cannot "
            "be told; measure such steps or leave it out"
        )
    _, sizes, directions = np.linalg.svd(matrix / scales, full_matrices=False)
    if sizes[-1] < _RANK_SHARE * sizes[0]:
        mixed = [
            name
            for name, share in zip(names, np.abs(directions[-1]), strict=True)
            if share > 0.1
        ]
        raise ValueError(
            f"measurements: {', '.join(mixed)} rise and fall together in all of them, "
            "so their seconds cannot be told apart; measure other steps or name fewer"
        )


def report(
    coefficients: Mapping[str, float], y: np.ndarray, predicted: np.ndarray
) -> FitReport:
    """What is left of measurements f64[N] where a model predicts f64[N]."""
    residuals = y - predicted
    errors = np.abs(residuals) / np.maximum(y, 1e-300)
    around = float(np.sum((y - y.mean()) ** 2))
    left = float(np.sum(residuals**2))
    return FitReport(
        coefficients=coefficients,
        residuals=residuals,
        rms_s=float(np.sqrt(np.mean(residuals**2))),
        mean_error=float(errors.mean()),
        max_error=float(errors.max()),
        explained=1 - left / around if around else float(left == 0),
    )
