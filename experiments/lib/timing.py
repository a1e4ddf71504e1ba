"""Timing: medians of rounds in which the contenders run in turn.

The speed of a machine changes by tens of percent within minutes. Contenders that are
compared therefore run in the same round: A B A B, not A A B B.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time: `run(*prepare())`, of which only `run` is timed.

    Attributes:
      run: The timed function. It may donate its arguments. It returns arrays, and the
        time ends when they are ready.
      prepare: Returns the arguments of `run`.
      units: Units of work in one run; the time of one unit is reported.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    units: int = 1


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per unit of work in each round."""

    seconds: tuple[float, ...]  # wall-clock time
    processor_seconds: tuple[float, ...]  # processor time, summed over all cores

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return float(np.median(self.seconds))

    @property
    def least(self) -> float:
        """Shortest round, for work so short that noise is larger than differences."""
        return min(self.seconds)

    @property
    def processor_median(self) -> float:
        """Median processor time, which hardly depends on other processes."""
        return float(np.median(self.processor_seconds))

    def summary_ms(self) -> dict[str, float]:
        """Medians, minimum and maximum in milliseconds, for the JSON line."""
        return {
            "median_ms": self.median * 1e3,
            "processor_ms": self.processor_median * 1e3,
            "min_ms": self.least * 1e3,
            "max_ms": max(self.seconds) * 1e3,
        }


def once(contender: Contender) -> tuple[float, float]:
    """Runs a contender once; returns wall-clock and processor seconds."""
    arguments = jax.block_until_ready(contender.prepare())
    begin, processor_begin = time.perf_counter(), time.process_time()
    jax.block_until_ready(contender.run(*arguments))
    seconds = time.perf_counter() - begin
    return seconds, time.process_time() - processor_begin


def time_in_turn(
    contenders: Mapping[str, Contender], repeats: int, *, is_warm: bool = False
) -> dict[str, Times]:
    """Times all contenders over `repeats` rounds.

    Args:
      contenders: What to time, by name.
      repeats: Timed rounds. Each contender runs once in each round.
      is_warm: Whether all programs are compiled and their memory was used before.
        Otherwise one untimed round comes first.

    Returns:
      The times of each contender, by name.
    """
    if not is_warm:
        for contender in contenders.values():
            once(contender)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            both = once(contender)
            taken[name].append((both[0] / contender.units, both[1] / contender.units))
    return {
        name: Times(tuple(wall for wall, _ in rounds), tuple(cpu for _, cpu in rounds))
        for name, rounds in taken.items()
    }
