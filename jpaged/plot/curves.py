"""Curve plots: hit ratio against capacity, and latency against rate.

Pipeline: points -> [curves] -> axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jpaged.plot import style

Points = Sequence[tuple[float, float]]  # pairs of x and y; x may repeat


def mean_and_interval(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, the mean of y at each x, and half its 95 % confidence interval.

    The interval is Student's t; it is 0 where an x has one point only.

    Args:
      points: pairs of x and y, as many per x as there are runs.
    """
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(float(x), []).append(float(y))
    if not by_x:
        raise ValueError("points: expected at least one pair of x and y, got none")
    xs = sorted(by_x)
    means = np.array([np.mean(by_x[x]) for x in xs])
    halves = []
    for x in xs:
        values, count = by_x[x], len(by_x[x])
        half = 0.0
        if count > 1:
            error = np.std(values, ddof=1) / np.sqrt(count)
            half = float(stats.t.ppf(0.975, count - 1) * error)
        halves.append(half)
    return np.array(xs), means, np.array(halves)


def lines(
    ax: Any,
    curves: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    factor: float = 1.0,
) -> Any:
    """Draw a line with markers per curve, with bands of 95 % intervals; returns axes.

    Args:
      ax: matplotlib axes.
      curves: points of each curve by its name in the legend.
      x_label: label of x with its unit.
      y_label: label of y with its unit.
      title: of the panel.
      factor: multiplies y.
    """
    if not curves:
        raise ValueError("curves: expected at least one curve, got none")
    for number, (name, points) in enumerate(curves.items()):
        color = style.COLORS[number % len(style.COLORS)]
        marker = style.MARKERS[number % len(style.MARKERS)]
        x, y, half = mean_and_interval(points)
        y, half = factor * y, factor * half
        ax.plot(
            x, y, color=color, marker=marker, markersize=4, linewidth=1.5, label=name
        )
        if half.any():
            ax.fill_between(x, y - half, y + half, color=color, alpha=0.18, linewidth=0)
    style.dress(ax, x_label, y_label, title, grid="both")
    style.legend_beside(ax)
    return ax


def hit_ratio(
    curves: Mapping[str, Points] | Points,
    *,
    optimum: Points | None = None,
    unit: str = "blocks",
    title: str = "",
    ax: Any = None,
) -> Any:
    """Draw hit ratios of a prefix cache against its capacity.

    Args:
      curves: (capacity, hit ratio from 0 to 1) pairs by the name of each curve, or the
        pairs of one curve. Several pairs of one capacity are runs: their mean is drawn
        with its 95 % interval.
      optimum: pairs of the best possible ratios, drawn as a dashed line.
      unit: unit of the capacity.
      title: of the panel.
      ax: matplotlib axes; None creates a figure.

    Returns:
      The axes.

    Raises:
      ValueError: there are no points.
    """
    if not isinstance(curves, Mapping):
        curves = {"hit ratio": curves}
    ax = style.axes_or_new(ax)
    if optimum is not None:
        x, y, _ = mean_and_interval(optimum)
        name = "best possible"
        ax.plot(
            x, 100 * y, color=style.BLACK, linestyle="--", linewidth=1.2, label=name
        )
    labels = dict(x_label=f"capacity ({unit})", y_label="hit ratio (%)")
    lines(ax, curves, **labels, title=title, factor=100)
    capacities = sorted({float(x) for points in curves.values() for x, _ in points})
    if len(capacities) > 1 and capacities[0] > 0:
        ax.set_xscale("log")
        style.plain_ticks(ax.xaxis, capacities)
    ax.set_ylim(bottom=0)
    return ax


def latency_rate(
    curves: Mapping[str, Points],
    *,
    y_max: float | None = None,
    level: float | None = None,
    y_label: str = "normalised latency (s/token)",
    title: str = "",
    ax: Any = None,
) -> Any:
    """Draw latency against request rate, as in the paper's figure 12.

    Args:
      curves: (requests per second, seconds) pairs by the name of each system. Several
        pairs of one rate are runs: their mean is drawn with its 95 % interval.
      y_max: largest latency that is shown; None shows all.
      level: a latency to mark, for example a target.
      y_label: what the latency is, with its unit.
      title: of the panel.
      ax: matplotlib axes; None creates a figure.

    Returns:
      The axes.

    Raises:
      ValueError: there are no points.
    """
    ax = style.axes_or_new(ax)
    if level is not None:
        name = f"{level:g} s"
        ax.axhline(level, color=style.GREY, linestyle=":", linewidth=1.2, label=name)
    x_label = "request rate (requests/s)"
    lines(ax, curves, x_label=x_label, y_label=y_label, title=title)
    ax.set_xlim(left=0)
    ax.set_ylim(0, y_max)
    return ax
