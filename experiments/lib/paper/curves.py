"""Curves: sustained rates, ratios and confidence intervals from runs.

Pipeline: runs -> [curves] -> rows. Host only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.lib.paper.numbers import PRINTED, Printed
from experiments.lib.paper.runs import PaperRun

# Seconds per token at which systems are compared: three to four times the latency of a
# single request of OPT-13B, and half of the paper's axis (figure 12, up to 1).
LEVELS = (0.1, 0.5)
# Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1 to 10. The last
# one is used for more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A number and the paper's number; None where there is none."""

    figure: str
    quantity: str
    paper: str | None
    here: float | None
    ci95: float | None  # half the width of the interval over seeds; None for one seed
    ratio: float | None  # here / paper; for a range its nearer end, 1 within it
    source: str | None
    remark: str = ""


def make_row(
    figure: str,
    quantity: str,
    values: Sequence[float | None],
    printed: tuple[str, ...] | Printed | None = None,
    remark: str = "",
) -> PaperRow:
    """Return the row of a number: its mean over seeds, and the paper's number.

    Args:
      figure: name of the figure, as in flags.
      quantity: name of the number, with its unit.
      values: one for each seed; None if a seed has none.
      printed: a key of `PRINTED`, or the paper's number itself.
      remark: shown after the numbers.
    """
    paper = PRINTED.get(printed) if isinstance(printed, tuple) else printed
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        lost = f"none for {len(values) - len(known)} of {len(values)} seeds"
        remark = f"{remark}; {lost}" if remark else lost
    here = float(np.mean(known)) if known else None
    return PaperRow(
        figure=figure,
        quantity=quantity,
        paper=paper and paper.text,
        here=here,
        ci95=half_width(known),
        ratio=paper.ratio(here) if paper and here is not None else None,
        source=paper and paper.source,
        remark=remark,
    )


def half_width(values: Sequence[float]) -> float | None:
    """Return half the 95 % confidence interval of a mean; None below two values.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    if len(values) < 2:
        return None
    quantile = _T[min(len(values) - 1, len(_T)) - 1]
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def sustained(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """Return the highest rate up to which the latency is at most `level`.

    The logarithm of the latency is linear in the rate between the last rate below the
    level and the first rate above it.

    Args:
      points: pairs of rate and latency.
      level: seconds per token.

    Returns:
      The rate; None if the lowest rate is above the level, or no rate is.

    >>> sustained([(1, 0.01), (2, 0.1), (3, 10)], 1.0)
    2.5
    """
    ordered = sorted(points)
    for number, (rate, latency) in enumerate(ordered):
        if latency <= level:
            continue
        if number == 0:
            return None
        before, low = ordered[number - 1]
        share = (math.log(level) - math.log(low)) / (math.log(latency) - math.log(low))
        return before + share * (rate - before)
    return None


def sustained_by_seed(
    runs: Sequence[PaperRun], level: float
) -> dict[int, float | None]:
    """Return the sustained rate of each seed."""
    return {
        seed: sustained(
            [(one.rate, one.normalized_latency_s) for one in runs if one.seed == seed],
            level,
        )
        for seed in sorted({one.seed for one in runs})
    }


def ratio_by_seed(
    ours: Sequence[PaperRun], theirs: Sequence[PaperRun], level: float
) -> list[float | None]:
    """Return the ratio of two systems' sustained rates, for each seed."""
    other_rates = sustained_by_seed(theirs, level)
    ratios: list[float | None] = []
    for seed, rate in sustained_by_seed(ours, level).items():
        other = other_rates[seed]
        if rate is None or other is None:
            ratios.append(None)
        else:
            ratios.append(rate / other)
    return ratios
