"""Figures of latency against rate: 12, 14, 16 and 17.

Pipeline: settings -> cases -> runs -> [rates] -> rows and drawings.

Their main result is the rate that the engine sustains at a level of normalised latency
(`curves.LEVELS`), divided by the rate of a baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.lib.paper import numbers
from experiments.lib.paper.curves import (
    LEVELS,
    PaperRow,
    make_row,
    ratio_by_seed,
    sustained_by_seed,
)
from experiments.lib.paper.figures import (
    Drawing,
    FigureContent,
    FigureSettings,
    PaperFigure,
)
from experiments.lib.paper.runs import PaperCase, PaperRun

MODELS = ("opt-13b", "opt-66b", "opt-175b")
REQUESTS = ("sharegpt", "alpaca")
ORCAS = ("orca_oracle", "orca_pow2", "orca_max")
_AXES = ("request rate (requests/s)", "normalised latency (s/token)")


def latency_curves(
    title: str, cases: Sequence[PaperCase], found: Mapping[PaperCase, list[PaperRun]]
) -> Drawing:
    """Draw the latency against the rate: means over the seeds, and intervals."""
    series = {
        numbers.TITLES[case.system]: (
            [one.rate for one in found[case]],
            [one.normalized_latency_s for one in found[case]],
        )
        for case in cases
    }
    return Drawing(title, *_AXES, series, y_max=1.0)


def _sustained_rows(
    figure: str,
    name: str,
    cases: Sequence[PaperCase],
    found: Mapping[PaperCase, list[PaperRun]],
) -> list[PaperRow]:
    rows = []
    for case in cases:
        values = list(sustained_by_seed(found[case], LEVELS[0]).values())
        title = numbers.TITLES[case.system]
        text = f"{name}: {title}, req/s at {LEVELS[0]:g} s/token"
        rows.append(make_row(figure, text, values))
    return rows


def _ratio_rows(
    figure: str,
    name: str,
    ours: PaperCase,
    theirs: PaperCase,
    found: Mapping[PaperCase, list[PaperRun]],
    printed: tuple[str, ...],
) -> list[PaperRow]:
    """Return rows of the engine's rate over the other system's, at each level."""
    rows = []
    for level in LEVELS:
        values = ratio_by_seed(found[ours], found[theirs], level)
        text = f"{name}: rate over {numbers.TITLES[theirs.system]}'s at {level:g} s/tok"
        rows.append(make_row(figure, text, values, printed))
    return rows


def _panel_12(settings: FigureSettings, requests: str, model: str) -> list[PaperCase]:
    return [
        settings.case(
            system,
            requests,
            numbers.rates_12(requests, model, system),
            model=model,
            duration=settings.duration(model),
            levels=LEVELS,
        )
        for system in numbers.SYSTEMS
    ]


def _cases_12(
    settings: FigureSettings, panels: Sequence[tuple[str, str]]
) -> list[PaperCase]:
    return [case for panel in panels for case in _panel_12(settings, *panel)]


def _show_12(
    settings: FigureSettings,
    found: Mapping[PaperCase, list[PaperRun]],
    panels: Sequence[tuple[str, str]],
) -> FigureContent:
    rows, drawings = [], []
    for requests, model in panels:
        cases = _panel_12(settings, requests, model)
        name = f"{model}, {requests}"
        ours = cases[0]
        for case in cases[1:]:
            key = ("fig12", requests, case.system)
            rows += _ratio_rows("fig12", name, ours, case, found, key)
        rows += _sustained_rows("fig12", name, cases, found)
        title = f"{numbers.MODEL_NAMES[model]}, {numbers.REQUEST_NAMES[requests]}"
        drawings.append(latency_curves(title, cases, found))
    remark = (
        "The authors' rates first. Where a curve does not cross a level, further rates "
        "follow, each 1.25 times the previous one. A system that is above a level at "
        "its lowest rate sustains no rate there: short answers of FasterTransformer "
        "wait for the longest of their batch. For ShareGPT the paper has ranges over "
        "its models, and for Alpaca no numbers."
    )
    return FigureContent(rows, drawings, [remark])


def _figure_12(title: str, panels: Sequence[tuple[str, str]]) -> PaperFigure:
    return PaperFigure(
        title,
        lambda settings: _cases_12(settings, panels),
        lambda settings, found: _show_12(settings, found, panels),
    )


def _kinds_14(settings: FigureSettings) -> dict[str, list[PaperCase]]:
    found = {}
    duration = round(settings.duration() / 3, 2)
    rates = {"n 1": [numbers.rates_12("alpaca", "opt-13b", s) for s in _PAIR]}
    for name, each in (rates | numbers.RATES_14).items():
        kind, width = name.split()
        other = {("beam_width" if kind == "beam" else "num_samples"): int(width)}
        found[name] = [
            # Every second of the authors' rates: enough for the levels.
            settings.case(
                system, "alpaca", own[::2], duration=duration, levels=LEVELS, **other
            )
            for system, own in zip(_PAIR, each, strict=True)
        ]
    return found


_PAIR = ("vllm", "orca_oracle")


def _kind_14(name: str) -> str:
    """Return a kind of request for people: "beam 6" is "6 beams"."""
    kind, width = name.split()
    plural = "s" * (width != "1")
    return f"{width} {'beam' if kind == 'beam' else 'sample'}{plural}"


def _cases_14(settings: FigureSettings) -> list[PaperCase]:
    return [case for cases in _kinds_14(settings).values() for case in cases]


def _show_14(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, drawings = [], []
    for name, (ours, theirs) in _kinds_14(settings).items():
        rows += _ratio_rows("fig14", name, ours, theirs, found, ("fig14", name))
        drawings.append(
            latency_curves(f"Alpaca, {_kind_14(name)}", (ours, theirs), found)
        )
    remark = (
        "A third of the duration of other figures, every second of the authors' rates. "
        "Which beams survive is an assumption of this simulator, for the engine "
        "(`beam_concentration`) and for Orca (`fork_probability`)."
    )
    return FigureContent(rows, drawings, [remark])


def _pairs_16(settings: FigureSettings) -> dict[str, list[PaperCase]]:
    duration = round(min(settings.duration("fig16"), settings.duration() / 3), 2)
    return {
        requests: [
            settings.case(
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


def _cases_16(settings: FigureSettings) -> list[PaperCase]:
    return [case for cases in _pairs_16(settings).values() for case in cases]


def _show_16(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, drawings = [], []
    for name, cases in _pairs_16(settings).items():
        rows += _ratio_rows("fig16", name, cases[0], cases[1], found, ("fig16", name))
        rows += _sustained_rows("fig16", name, cases, found)
        drawings.append(
            latency_curves(f"LLaMA-13B, {numbers.REQUEST_NAMES[name]}", cases, found)
        )
    remark = (
        "The prefix is shared by content in the engine's prefix cache, in whole blocks "
        "(80 and 336 tokens); built-in lengths of WMT16. A third of the duration of "
        "other figures."
    )
    return FigureContent(rows, drawings, [remark])


def _cases_17(settings: FigureSettings) -> list[PaperCase]:
    engine, orca = numbers.RATES_17
    return [
        settings.case(
            system, "chat", engine if system == "vllm" else orca, levels=LEVELS[:1] * 2
        )
        for system in ("vllm", *ORCAS)
    ]


def _show_17(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, cases = [], _cases_17(settings)
    for case in cases[1:]:
        printed = ("fig17", case.system)
        rows += _ratio_rows("fig17", "chat", cases[0], case, found, printed)[:1]
    rows += _sustained_rows("fig17", "chat", cases, found)
    remark = (
        "Conversations are a model (`workload.chat_rounds`, which starts new ones with "
        "probability 0.5 for all systems), as the paper's file is not public. The "
        "artifact's scripts start them with 0.5 for vLLM and 0.1 for Orca."
    )
    return FigureContent(
        rows, [latency_curves("Chat, OPT-13B", cases, found)], [remark]
    )


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
