"""Figures: the cases of each figure of the paper, and its rows and drawings.

Pipeline: settings -> cases -> runs -> [figures] -> rows and drawings.

This module has figures 1, 2, 11, 13 and 15. `rates` has the figures of latency against
rate, and `blocks` those of block sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lib.paper import numbers
from experiments.lib.paper.curves import PaperRow, make_row
from experiments.lib.paper.runs import (
    PAPER_COST,
    CostChoice,
    PaperCase,
    PaperRun,
    workload_of,
)
from jpaged.simulator.costs.served_models import paper_setting
from jpaged.simulator.simulate import COMPOSITION

FOUR = ("orca_max", "orca_pow2", "orca_oracle", "vllm")


@dataclasses.dataclass(frozen=True)
class FigureSettings:
    """The settings of all figures, from flags."""

    seeds: tuple[int, ...]
    scale: float  # share of the paper's hour
    files: Mapping[str, str | None]  # files of lengths, by "sharegpt" and "alpaca"
    cost: CostChoice = PAPER_COST

    def duration(self, name: str = "") -> float:
        """Return the seconds of arrivals of a figure or model, at most the paper's."""
        own = numbers.DURATIONS.get(name, numbers.HOUR)
        return round(min(own, numbers.HOUR * self.scale), 2)

    def case(
        self, system: str, requests: str, rates: Sequence[float], **other: Any
    ) -> PaperCase:
        """Return a case of OPT-13B with these seeds and files; `other` overrides."""
        source = "sharegpt" if requests == "chat" else requests
        params: dict[str, Any] = {
            "model": "opt-13b",
            "duration": self.duration(),
            "seeds": self.seeds,
            "lengths_file": self.files.get(source),
            "cost": self.cost,
        }
        rates = tuple(map(float, rates))
        return PaperCase(
            system=system, requests=requests, rates=rates, **(params | other)
        )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A panel of a figure: bars (x are names), or lines (x are numbers)."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]]  # x and y, by legend
    kind: str = "lines"  # or "bars", "stacked"
    y_max: float | None = None
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class FigureContent:
    """The content of a figure: rows, drawings, and remarks for the report."""

    rows: list[PaperRow]
    drawings: list[Drawing]
    remarks: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper."""

    title: str
    cases: Callable[[FigureSettings], list[PaperCase]]
    show: Callable[[FigureSettings, Mapping[PaperCase, list[PaperRun]]], FigureContent]


def by_seed(runs: Sequence[PaperRun], field: str, factor: float = 1.0) -> list[float]:
    """Return a field of each run, multiplied by a factor."""
    return [getattr(one, field) * factor for one in runs]


def _no_cases(settings: FigureSettings) -> list[PaperCase]:
    del settings
    return []


def _show_1(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    del settings, found
    setting = paper_setting("opt-13b")
    model, chip = setting.sizes()
    kv = setting.kv_slots * model.kv_bytes_per_token
    here = {
        "parameters, GB": model.param_bytes / 1e9,
        "parameters, % of memory": 100 * model.param_bytes / chip.memory_bytes,
        "keys and values, % of memory": 100 * kv / chip.memory_bytes,
        "a token's keys and values, KB": model.kv_bytes_per_token / 1024,
        "a request of 2,048 tokens, GB": 2048 * model.kv_bytes_per_token / 2**30,
    }
    rows = [
        make_row("fig01", name, [value], ("fig01", name))
        for name, value in here.items()
    ]
    shares = {
        "parameters": here["parameters, % of memory"],
        "keys and values": here["keys and values, % of memory"],
    }
    shares["others"] = 100 - sum(shares.values())
    series = {name: (["OPT-13B, A100-40GB"], [share]) for name, share in shares.items()}
    drawing = Drawing("Memory", "", "% of memory", series, kind="stacked")
    remark = (
        "By arithmetic, without a simulation. The paper's 65 % are 26 of 40 GB. Here a "
        "GB of the data sheet is 2**30 bytes, as it must be for the 12 GB of keys and "
        "values."
    )
    return FigureContent(rows, [drawing], [remark])


def _cases_2(settings: FigureSettings) -> list[PaperCase]:
    duration = settings.duration("fig02")
    return [
        settings.case(system, "sharegpt", [numbers.RATE_2], duration=duration)
        for system in FOUR
    ]


def _show_2(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, bars = [], {part: ([], []) for part in COMPOSITION}
    for case in _cases_2(settings):
        for part in COMPOSITION:
            values = by_seed(found[case], part, 100)
            title = numbers.TITLES[case.system]
            key = ("fig02", case.system, part)
            rows.append(make_row("fig02", f"{title}: {part}, %", values, key))
            bars[part][0].append(title)
            bars[part][1].append(float(np.mean(values)))
    title = "Share of KV memory, OPT-13B, ShareGPT"
    remark = (
        "Mean shares of the slots in use or lost, up to the last arrival. The paper "
        "has no numbers for the engine's reservation and internal parts."
    )
    return FigureContent(
        rows, [Drawing(title, "", "%", bars, kind="stacked")], [remark]
    )


def _show_11(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    del found
    rows, drawings = [], []
    for requests in ("sharegpt", "alpaca"):
        case = settings.case("vllm", requests, [10.0], duration=2000.0)
        works = [workload_of(case, 10.0, seed) for seed in settings.seeds]
        for name, field in (("input", "prompt_lens"), ("output", "output_lens")):
            values = [float(np.mean(getattr(one, field))) for one in works]
            quantity = f"{requests}: mean {name}, tokens"
            rows.append(make_row("fig11", quantity, values, ("fig11", requests, name)))
        most = 2048 if requests == "sharegpt" else 512
        edges = np.linspace(0, most, 33)
        series = {}
        for name, field in (("input", "prompt_lens"), ("output", "output_lens")):
            counts, _ = np.histogram(getattr(works[0], field), edges, density=True)
            series[name] = (edges[:-1].tolist(), counts.tolist())
        drawings.append(Drawing(requests, "tokens", "density", series))
    remark = "Some 20,000 requests per seed, of fewer than 2,048 tokens in all."
    return FigureContent(rows, drawings, [remark])


def _cases_13(settings: FigureSettings) -> list[PaperCase]:
    duration = settings.duration("fig13")
    return [
        settings.case(system, requests, [rate], duration=duration)
        for requests, rate in numbers.RATES_13.items()
        for system in FOUR
    ]


def _show_13(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, bars = [], {requests: ([], []) for requests in numbers.RATES_13}
    for case in _cases_13(settings):
        values = by_seed(found[case], "mean_batched_requests")
        title = numbers.TITLES[case.system]
        waiting = np.mean(by_seed(found[case], "mean_waiting_requests"))
        rows.append(
            make_row(
                "fig13",
                f"{case.requests} at {case.rates[0]:g} req/s: {title}, requests",
                values,
                ("fig13", case.requests, case.system),
                remark="" if waiting >= 1 else "nobody waits: load, not memory, limits",
            )
        )
        bars[case.requests][0].append(title)
        bars[case.requests][1].append(float(np.mean(values)))
    title = "Requests batched at a time, OPT-13B"
    return FigureContent(rows, [Drawing(title, "", "requests", bars, kind="bars")])


def _cases_15(settings: FigureSettings) -> list[PaperCase]:
    found = []
    for requests in ("alpaca", "sharegpt"):
        for width in (2, 4, 6):
            # The artifact has a rate of Alpaca for one sequence per request. With more
            # sequences it fills the memory, as a twentieth of it does on ShareGPT.
            rate = numbers.RATE_15 if requests == "alpaca" else numbers.RATE_15 / 20
            duration = settings.duration("fig15") / 3
            for kind in ("num_samples", "beam_width"):
                other = {kind: width, "duration": round(duration, 2)}
                found.append(settings.case("vllm", requests, [rate], **other))
    return found


def _show_15(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, lines = [], {}
    for case in _cases_15(settings):
        kind = "beams" if case.beam_width else "samples"
        width = max(case.beam_width, case.num_samples)
        values = by_seed(found[case], "saved_share", 100)
        key = ("fig15", case.requests, kind, str(width))
        rows.append(
            make_row("fig15", f"{case.requests}, {width} {kind}: saved, %", values, key)
        )
        x, y = lines.setdefault(f"{case.requests}, {kind}", ([], []))
        x.append(width)
        y.append(float(np.mean(values)))
    title = "Blocks saved by sharing, of those without, OPT-13B"
    remarks = [
        "Which beams survive is an assumption of this simulator (the default "
        "`beam_concentration` of `EngineSystem`) and not a result of OPT-13B, so the "
        "numbers of beams depend on it. Those of samples depend on lengths only.",
        "A third of the duration of other figures.",
    ]
    return FigureContent(
        rows, [Drawing(title, "sequences of a request", "%", lines)], remarks
    )


FIGURES = {
    "fig01": PaperFigure(
        "Figure 1: memory of OPT-13B on an A100-40GB", _no_cases, _show_1
    ),
    "fig02": PaperFigure("Figure 2: what KV memory holds", _cases_2, _show_2),
    "fig11": PaperFigure("Figure 11: lengths of requests", _no_cases, _show_11),
    "fig13": PaperFigure("Figure 13: batched requests", _cases_13, _show_13),
    "fig15": PaperFigure("Figure 15: memory saved by sharing", _cases_15, _show_15),
}
