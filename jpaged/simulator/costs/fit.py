"""Fit: a linear cost model from measurements of your own machine.

Pipeline: step loads and seconds -> [fit] -> cost model and residuals.

Shape symbols: N measured steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.load import StepLoad

# Singular values of the scaled columns below this share of the largest count as 0.
_RANK_SHARE = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearCost:
    """A cost model that is linear in a load's features; each coefficient is a leaf."""

    seconds: Features  # f32[] each, seconds per unit of the feature

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
        work = jnp.stack(features(load))
        return jnp.sum(work * jnp.stack([*map(jnp.float32, self.seconds)]))


@dataclasses.dataclass(frozen=True)
class FitReport:
    """The quality of a fit."""

    coefficients: Mapping[str, float]  # seconds per unit, by fitted feature
    residuals: np.ndarray  # f64[N], seconds, measured minus predicted
    rms_s: float  # root mean square of the residuals
    mean_error: float  # of |residual| / measured
    max_error: float
    explained: float  # 1 - residual squares / squares around the mean (R^2)


def measured_features(loads: StepLoad) -> dict[str, np.ndarray]:
    """Compute each feature, f64[N], of loads with a leading axis of N steps."""
    work = jax.jit(jax.vmap(features))(loads)
    return {name: np.asarray(work._asdict()[name], np.float64) for name in work._fields}


def fit(
    measurements: Mapping[str, np.ndarray | Sequence[float]],
    seconds: np.ndarray | Sequence[float],
    *,
    relative: bool = False,
) -> tuple[LinearCost, FitReport]:
    """Fit the cost model with the least squared error and no negative coefficient.

    Args:
      measurements: the value in each of N measured steps, f[N], of each feature to fit,
        by its name in `features.Features`. The coefficients of other features are 0.
        `measured_features` computes the values from loads.
      seconds: f[N], duration of each step.
      relative: errors are shares of the measured duration, so that short steps count as
        much as long ones.

    Returns:
      The cost model, and the quality of the fit.

    Raises:
      ValueError: an unknown feature, lengths that differ, a number that is negative or
        not finite, fewer measurements than coefficients, or measurements from which
        the coefficients cannot be told apart; the message names the features.
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
    model = LinearCost(Features(*(coefficients.get(f, 0.0) for f in Features._fields)))
    return model, fit_report(coefficients, y, matrix @ solution)


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
            f"measurements: expected steps with {', '.join(silent)}, got none, so its "
            "coefficient is unknown; measure such steps or leave it out"
        )
    _, sizes, directions = np.linalg.svd(matrix / scales, full_matrices=False)
    if sizes[-1] < _RANK_SHARE * sizes[0]:
        mixed = [
            name
            for name, share in zip(names, np.abs(directions[-1]), strict=True)
            if share > 0.1
        ]
        raise ValueError(
            f"measurements: expected independent features, got {', '.join(mixed)}, "
            "which rise and fall together; measure other steps or name fewer"
        )


def fit_report(
    coefficients: Mapping[str, float], y: np.ndarray, predicted: np.ndarray
) -> FitReport:
    """Compare measured seconds f64[N] with predicted ones f64[N]."""
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
