"""Curves: normalised latency against rate, what rate a system sustains, and intervals.

Host only: arithmetic on numbers that runs gave.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.lib.paper.numbers import PRINTED, Printed
from experiments.lib.paper.runs import PaperRun

# Seconds per token at which systems are compared: three to four times what a lone
# request of OPT-13B takes, and half of the paper's axis (figure 12, up to 1).
LEVELS = (0.1, 0.5)
# Two-sided 95 % quantiles of Student's t, by degrees of freedom; beyond, the last.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """One number beside the paper's; None where there is none."""

    figure: str
    quantity: str
    paper: str | None
    here: float | None
    ci95: float | None  # half the width of the interval over seeds; None: one seed
    ratio: float | None  # here / paper; of a range its nearer end, 1 within
    source: str | None
    remark: str = ""


def row(
    figure: str,
    quantity: str,
    values: Sequence[float | None],
    printed: tuple[str, ...] | Printed | None = None,
    remark: str = "",
) -> PaperRow:
    """The mean of a number over seeds, beside the paper's.

    Args:
      figure: as in flags.
      quantity: what, with its unit.
      values: one for each seed; None where a seed gave none.
      printed: a key of `PRINTED`, or the paper's number itself.
      remark: shown behind the numbers.
    """
    paper = PRINTED.get(printed) if isinstance(printed, tuple) else printed
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        lost = f"none for {len(values) - len(there)} of {len(values)} seeds"
        remark = f"{remark}; {lost}" if remark else lost
    here = float(np.mean(there)) if there else None
    return PaperRow(
        figure=figure,
        quantity=quantity,
        paper=paper and paper.text,
        here=here,
        ci95=half_width(there),
        ratio=paper.ratio(here) if paper and here is not None else None,
        source=paper and paper.source,
        remark=remark,
    )


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % confidence interval of a mean; None for fewer than two values.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    if len(values) < 2:
        return None
    quantile = _T[min(len(values) - 1, len(_T)) - 1]
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def sustained(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """The highest rate up to which the latency stays at a level or below.

    Between the last rate below and the first above, the logarithm of the latency is
    taken as linear in the rate. None: the lowest rate is above already, or no rate is.

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


def sustained_by_seed(runs: Sequence[PaperRun], level: float) -> dict[int, float | None]:
    """`sustained` of each seed's curve."""
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
    """How many times the rate of the other system one sustains, for each seed."""
    one, other = sustained_by_seed(ours, level), sustained_by_seed(theirs, level)
    return [
        mine / other[seed] if mine is not None and other[seed] is not None else None
        for seed, mine in one.items()
    ]
