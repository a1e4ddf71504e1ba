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
    """A panel of a figure: bars (x are names), or lines (x are numbers).

    Attributes:
      title: of the panel.
      x_label: label of x, with its unit.
      y_label: label of y, with its unit.
      series: x and y by the name in the legend. Equal x of a line are runs: their mean
        is drawn with its 95 % interval.
      kind: "lines", "steps" (a histogram), "bars" or "stacked".
      y_max: end of the axis; None shows all.
      log_x: whether x is logarithmic, with a tick at each x.
      paper: the paper's numbers, as `series`. A pair is a range.
      verticals: lines at an x, by the name in the legend; "paper" in it dashes them.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]]
    kind: str = "lines"
    y_max: float | None = None
    log_x: bool = False
    paper: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] = dataclasses.field(
        default_factory=dict
    )
    verticals: Mapping[str, float] = dataclasses.field(default_factory=dict)


def printed_number(*key: str) -> Any:
    """Return the paper's number, a pair for a range, or None."""
    found = numbers.PRINTED.get(key)
    if found is None:
        return None
    return found.low if found.low == found.high else (found.low, found.high)


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
    printed = {
        "parameters": printed_number("fig01", "parameters, % of memory"),
        "keys and values": printed_number("fig01", "keys and values, % of memory"),
    }
    printed["others"] = 100 - sum(printed.values())
    name = "OPT-13B on A100-40GB"
    drawing = Drawing(
        "",
        "",
        "share of the GPU's memory (%)",
        {part: ([name], [share]) for part, share in shares.items()},
        kind="stacked",
        paper={part: ([name], [share]) for part, share in printed.items()},
    )
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
    paper = {part: ([], []) for part in COMPOSITION}
    for case in _cases_2(settings):
        for part in COMPOSITION:
            values = by_seed(found[case], part, 100)
            title = numbers.TITLES[case.system]
            key = ("fig02", case.system, part)
            rows.append(make_row("fig02", f"{title}: {part}, %", values, key))
            bars[part][0].append(title)
            bars[part][1].append(float(np.mean(values)))
            paper[part][0].append(title)
            paper[part][1].append(printed_number(*key) or 0.0)
    names = numbers.PART_NAMES
    drawing = Drawing(
        "OPT-13B, ShareGPT",
        "",
        "share of the KV memory (%)",
        {names[part]: found for part, found in bars.items()},
        kind="stacked",
        paper={names[part]: found for part, found in paper.items()},
    )
    remark = (
        "Mean shares of the slots in use or lost, up to the last arrival. The paper "
        "has no numbers for the engine's reservation and internal parts."
    )
    return FigureContent(rows, [drawing], [remark])


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
        series, means = {}, {}
        for name, field in (("input", "prompt_lens"), ("output", "output_lens")):
            lens = getattr(works[0], field)
            counts, _ = np.histogram(lens, edges)
            series[name] = (edges.tolist(), (100 * counts / len(lens)).tolist())
            means[f"mean {name}, {np.mean(lens):.1f} tokens"] = float(np.mean(lens))
            printed = printed_number("fig11", requests, name)
            means[f"mean {name} in the paper, {printed:.1f}"] = printed
        drawings.append(
            Drawing(
                numbers.REQUEST_NAMES[requests],
                "length (tokens)",
                f"requests (% per {edges[1]:g} tokens)",
                series,
                kind="steps",
                verticals=means,
            )
        )
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
    paper = {requests: ([], []) for requests in numbers.RATES_13}
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
        paper[case.requests][0].append(title)
        key = ("fig13", case.requests, case.system)
        paper[case.requests][1].append(printed_number(*key) or 0.0)
    drawings = [
        Drawing(
            f"{numbers.REQUEST_NAMES[requests]}, {rate:g} requests/s, OPT-13B",
            "",
            "requests batched at a time",
            {"here": bars[requests]},
            kind="bars",
            paper={"here": paper[requests]},
        )
        for requests, rate in numbers.RATES_13.items()
    ]
    return FigureContent(rows, drawings)


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
    rows = []
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    papers: dict[str, dict[str, tuple[list[float], list[Any]]]] = {}
    for case in _cases_15(settings):
        kind = "beams" if case.beam_width else "samples"
        width = max(case.beam_width, case.num_samples)
        values = by_seed(found[case], "saved_share", 100)
        key = ("fig15", case.requests, kind, str(width))
        rows.append(
            make_row("fig15", f"{case.requests}, {width} {kind}: saved, %", values, key)
        )
        for found_points, numbers_of in (
            (lines, values),
            (papers, [printed_number(*key)]),
        ):
            x, y = found_points.setdefault(case.requests, {}).setdefault(kind, ([], []))
            x += [width] * len(numbers_of)
            y += numbers_of
    drawings = [
        Drawing(
            f"{numbers.REQUEST_NAMES[requests]}, OPT-13B",
            "sequences of a request",
            "blocks saved by sharing (%)",
            series,
            paper=papers[requests],
        )
        for requests, series in lines.items()
    ]
    remarks = [
        "Which beams survive is an assumption of this simulator (the default "
        "`beam_concentration` of `EngineSystem`) and not a result of OPT-13B, so the "
        "numbers of beams depend on it. Those of samples depend on lengths only.",
        "A third of the duration of other figures.",
    ]
    return FigureContent(rows, drawings, remarks)


FIGURES = {
    "fig01": PaperFigure(
        "Figure 1: memory of OPT-13B on an A100-40GB", _no_cases, _show_1
    ),
    "fig02": PaperFigure("Figure 2: what KV memory holds", _cases_2, _show_2),
    "fig11": PaperFigure("Figure 11: lengths of requests", _no_cases, _show_11),
    "fig13": PaperFigure("Figure 13: batched requests", _cases_13, _show_13),
    "fig15": PaperFigure("Figure 15: memory saved by sharing", _cases_15, _show_15),
}
