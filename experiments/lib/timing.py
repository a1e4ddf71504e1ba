"""Timing: medians of things that are compared, run in turn and not one after another.

Beside the road. A machine's speed drifts by tens of percent within minutes, so whoever
is compared runs in the same round: A B A B, and not A A B B.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time: `run(*prepare())`, of which only `run` counts.

    `run` may donate what `prepare` gives, and returns arrays to wait for. `units` is
    what one run does: the time of a unit is reported.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    units: int = 1


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a unit, in each round: on the clock, and of all cores together."""

    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return float(np.median(self.seconds))

    @property
    def least(self) -> float:
        """The least of the rounds: for what is so short that noise outweighs it."""
        return min(self.seconds)

    @property
    def processor_median(self) -> float:
        """The median of the processor time, which others on the machine hardly move."""
        return float(np.median(self.processor_seconds))

    def summary_ms(self) -> dict[str, float]:
        """Median, least and most in milliseconds, for the JSON line."""
        return {
            "median_ms": self.median * 1e3,
            "processor_ms": self.processor_median * 1e3,
            "min_ms": self.least * 1e3,
            "max_ms": max(self.seconds) * 1e3,
        }


def once(contender: Contender) -> tuple[float, float]:
    """Seconds of one run, and of processor time."""
    arguments = jax.block_until_ready(contender.prepare())
    begin, processor_begin = time.perf_counter(), time.process_time()
    jax.block_until_ready(contender.run(*arguments))
    seconds = time.perf_counter() - begin
    return seconds, time.process_time() - processor_begin


def time_in_turn(
    contenders: Mapping[str, Contender], repeats: int, *, is_warm: bool = False
) -> dict[str, Times]:
    """The times of all contenders over `repeats` rounds.

    A round that does not count comes first, unless whoever calls says that all
    programs `is_warm`: compiled, with memory that was used before.
    """
    if not is_warm:
        for contender in contenders.values():
            once(contender)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            both = once(contender)
            taken[name].append((both[0] / contender.units, both[1] / contender.units))
    return {name: Times(*zip(*rounds, strict=True)) for name, rounds in taken.items()}


def environment() -> dict[str, Any]:
    """What a reader of a figure must know: device, cores' kind and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
        },
    }


def progress(message: str) -> None:
    """A line on stderr, so that stdout keeps tables and JSON."""
    print(message, file=sys.stderr, flush=True)


class Report:
    """Rows for people as they are measured, and everything for the JSON line."""

    def __init__(self) -> None:
        self.tokens_per_s: dict[str, float] = {}
        self.steps_per_s: dict[str, float] = {}
        self.roofline_share: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.details: dict[str, Any] = {}

    def row(self, name: str, measured: str, beside: str = "", share: str = "") -> None:
        """Prints a line of the table: what, its figure, what stands beside it."""
        line = f"{name:<34}{measured:>16}  {beside:<34}{share}"
        print(line.rstrip(), flush=True)

    def last_line(self, flags: dict[str, Any]) -> None:
        """Prints one JSON object with all figures, the flags and the environment."""
        found = {**vars(self), "flags": flags, **environment()}
        print(json.dumps(found), flush=True)
