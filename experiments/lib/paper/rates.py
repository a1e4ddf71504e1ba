"""Figures of latency against rate: 12, 14, 16 and 17.

What they say is how many times the rate of a baseline the engine sustains at a level of
normalised latency (`lib_paper_curves.LEVELS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.lib.paper import numbers as numbers
from experiments.lib.paper.curves import (
    LEVELS,
    PaperRow,
    ratio_by_seed,
    row,
    sustained_by_seed,
)
from experiments.lib.paper.figures import Drawing, PaperFigure, FigureSettings, Shown
from experiments.lib.paper.runs import PaperCase, PaperRun

MODELS = ("opt-13b", "opt-66b", "opt-175b")
REQUESTS = ("sharegpt", "alpaca")
ORCAS = ("orca_oracle", "orca_pow2", "orca_max")
_AXES = ("requests per second", "normalised latency, s/token")


def curves(title: str, cases: Sequence[PaperCase], found: Mapping[PaperCase, list[PaperRun]]):
    """A drawing of mean latency over the seeds against rate."""
    series = {}
    for case in cases:
        rates = sorted({one.rate for one in found[case]})
        means = [
            float(np.mean([r.normalized_latency_s for r in found[case] if r.rate == x]))
            for x in rates
        ]
        series[numbers.TITLES[case.system]] = (rates, means)
    return Drawing(title, *_AXES, series, y_max=1.0)


def _sustained_rows(
    figure: str, name: str, cases: Sequence[PaperCase], found: Mapping[PaperCase, list[PaperRun]]
) -> list[PaperRow]:
    rows = []
    for case in cases:
        values = list(sustained_by_seed(found[case], LEVELS[0]).values())
        title = numbers.TITLES[case.system]
        text = f"{name}: {title}, req/s at {LEVELS[0]:g} s/token"
        rows.append(row(figure, text, values))
    return rows


def _ratio_rows(
    figure: str,
    name: str,
    ours: PaperCase,
    theirs: PaperCase,
    found: Mapping[PaperCase, list[PaperRun]],
    printed: tuple[str, ...],
) -> list[PaperRow]:
    """The engine's rate over the other's, at each level."""
    rows = []
    for level in LEVELS:
        values = ratio_by_seed(found[ours], found[theirs], level)
        text = f"{name}: rate over {numbers.TITLES[theirs.system]}'s at {level:g} s/tok"
        rows.append(row(figure, text, values, printed))
    return rows


def _panel_12(plan: FigureSettings, requests: str, model: str) -> list[PaperCase]:
    return [
        plan.case(
            system,
            requests,
            numbers.rates_12(requests, model, system),
            model=model,
            duration=plan.duration(model),
            levels=LEVELS,
        )
        for system in numbers.SYSTEMS
    ]


def _cases_12(plan: FigureSettings, panels: Sequence[tuple[str, str]]) -> list[PaperCase]:
    return [case for panel in panels for case in _panel_12(plan, *panel)]


def _show_12(
    plan: FigureSettings, found: Mapping[PaperCase, list[PaperRun]], panels: Sequence[tuple[str, str]]
) -> Shown:
    rows, drawings = [], []
    for requests, model in panels:
        cases = _panel_12(plan, requests, model)
        name = f"{model}, {requests}"
        ours = cases[0]
        for case in cases[1:]:
            key = ("fig12", requests, case.system)
            rows += _ratio_rows("fig12", name, ours, case, found, key)
        rows += _sustained_rows("fig12", name, cases, found)
        drawings.append(curves(name, cases, found))
    remark = (
        "The authors' rates first; where a curve does not cross a level, further ones, "
        "each 1.25 times the last. A system that is above a level at its lowest rate "
        "sustains none there: FasterTransformer's short answers wait for their batch's "
        "longest. The paper gives ranges over its models for ShareGPT, and none for "
        "Alpaca."
    )
    return Shown(rows, drawings, [remark])


def _figure_12(title: str, panels: Sequence[tuple[str, str]]) -> PaperFigure:
    return PaperFigure(
        title,
        lambda plan: _cases_12(plan, panels),
        lambda plan, found: _show_12(plan, found, panels),
    )


def _kinds_14(plan: FigureSettings) -> dict[str, list[PaperCase]]:
    found = {}
    duration = round(plan.duration() / 3, 2)
    rates = {"n 1": [numbers.rates_12("alpaca", "opt-13b", s) for s in _PAIR]}
    for name, each in (rates | numbers.RATES_14).items():
        kind, width = name.split()
        other = {("beam_width" if kind == "beam" else "num_samples"): int(width)}
        found[name] = [
            # The ends and the middle of the authors' rates: no curve is drawn finely.
            plan.case(
                system, "alpaca", own[::2], duration=duration, levels=LEVELS, **other
            )
            for system, own in zip(_PAIR, each, strict=True)
        ]
    return found


_PAIR = ("vllm", "orca_oracle")


def _cases_14(plan: FigureSettings) -> list[PaperCase]:
    return [case for cases in _kinds_14(plan).values() for case in cases]


def _show_14(plan: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]) -> Shown:
    rows, drawings = [], []
    for name, (ours, theirs) in _kinds_14(plan).items():
        rows += _ratio_rows("fig14", name, ours, theirs, found, ("fig14", name))
        drawings.append(curves(f"Alpaca, {name}", (ours, theirs), found))
    remark = (
        "A third of the duration of other figures, every second of the authors' rates. "
        "Which beams survive is a model of this simulator, of the engine's beams "
        "(`beam_concentration`) and of Orca's forks (`fork_probability`) alike."
    )
    return Shown(rows, drawings, [remark])


def _pairs_16(plan: FigureSettings) -> dict[str, list[PaperCase]]:
    duration = round(min(plan.duration("fig16"), plan.duration() / 3), 2)
    return {
        requests: [
            plan.case(
                system,
                requests,
                own,
                model="llama-13b",
                duration=duration,
                levels=LEVELS,
            )
            for system, own in zip(_PAIR, each, strict=True)
        ]
        for requests, each in numbers.RATES_16.items()
    }


def _cases_16(plan: FigureSettings) -> list[PaperCase]:
    return [case for cases in _pairs_16(plan).values() for case in cases]


def _show_16(plan: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]) -> Shown:
    rows, drawings = [], []
    for name, cases in _pairs_16(plan).items():
        rows += _ratio_rows("fig16", name, *cases, found, ("fig16", name))
        rows += _sustained_rows("fig16", name, cases, found)
        drawings.append(curves(f"LLaMA-13B, {name}", cases, found))
    remark = (
        "The prefix is shared by content in the engine's prefix cache, in whole blocks "
        "(80 and 336 tokens); built-in lengths of WMT16. A third of the duration of "
        "other figures."
    )
    return Shown(rows, drawings, [remark])


def _cases_17(plan: FigureSettings) -> list[PaperCase]:
    engine, orca = numbers.RATES_17
    return [
        plan.case(
            system, "chat", engine if system == "vllm" else orca, levels=LEVELS[:1] * 2
        )
        for system in ("vllm", *ORCAS)
    ]


def _show_17(plan: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]) -> Shown:
    rows, cases = [], _cases_17(plan)
    for case in cases[1:]:
        printed = ("fig17", case.system)
        rows += _ratio_rows("fig17", "chat", cases[0], case, found, printed)[:1]
    rows += _sustained_rows("fig17", "chat", cases, found)
    remark = (
        "Conversations are a model (`workloads.chat_rounds`, new ones with probability "
        "0.5 for all systems), for the paper's file is not public, and the artifact's "
        "scripts begin them with 0.5 for vLLM and 0.1 for Orca."
    )
    return Shown(rows, [curves("Chat, OPT-13B", cases, found)], [remark])


PANELS = tuple((requests, model) for requests in REQUESTS for model in MODELS)
FIGURES = {
    "fig12": _figure_12("Figure 12: latency against rate, one sequence", PANELS),
    "fig14": PaperFigure("Figure 14: samples and beams, Alpaca", _cases_14, _show_14),
    "fig16": PaperFigure("Figure 16: a shared prefix", _cases_16, _show_16),
    "fig17": PaperFigure("Figure 17: chat", _cases_17, _show_17),
}
# One panel of figure 12 alone, as "fig12:sharegpt:opt-13b".
PANEL_FIGURES = {
    f"fig12:{requests}:{model}": _figure_12(
        f"Figure 12, {requests} on {model}", [(requests, model)]
    )
    for requests, model in PANELS
}
