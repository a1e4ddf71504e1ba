"""Report: figures as CSV and PNG files, and a Markdown file of all numbers.

Pipeline: rows, drawings and runs -> [report] -> files. Host only. The same rows and
runs give the same bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lib.paper.curves import LEVELS, PaperRow
from experiments.lib.paper.figures import (
    Drawing,
    FigureContent,
    FigureSettings,
    PaperFigure,
)
from experiments.lib.paper.runs import WARMUP, CostChoice, PaperRun
from jpaged.plot import style
from jpaged.plot.curves import lines
from jpaged.simulator.costs.roofline import VLLM_2023_STEP_S
from jpaged.simulator.costs.served_models import PAPER_SETTINGS

_RUN_FIELDS = [field.name for field in dataclasses.fields(PaperRun)]
_ROW_FIELDS = [field.name for field in dataclasses.fields(PaperRow)]


def write_figure_csv(
    folder: pathlib.Path, name: str, shown: FigureContent, runs: Sequence[PaperRun]
) -> None:
    """Write NAME.csv with the rows, and NAME_runs.csv with a line per simulation."""
    _write_table(folder / f"{name}.csv", _ROW_FIELDS, shown.rows)
    if runs:
        _write_table(folder / f"{name}_runs.csv", _RUN_FIELDS, runs)


def _write_table(
    path: pathlib.Path, fields: list[str], rows: Sequence[PaperRow | PaperRun]
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(vars, rows))


def draw(path: pathlib.Path, title: str, drawings: Sequence[Drawing]) -> None:
    """Write a PNG file with a panel for each drawing.

    Raises:
      ImportError: matplotlib is not installed.
    """
    width = min(len(drawings), 3)
    height = math.ceil(len(drawings) / width)
    figure, axes = style.new_figure(height, width, (5.6, 3.3))
    for axis in axes.flat[len(drawings) :]:
        axis.remove()
    for axis, drawing in zip(axes.flat, drawings, strict=False):
        _panel(axis, drawing)
    figure.suptitle(title, fontsize=11)
    style.save(figure, path)


def _panel(axis: Any, drawing: Drawing) -> None:
    labels: dict[str, Any] = dict(
        x_label=drawing.x_label, y_label=drawing.y_label, title=drawing.title
    )
    if drawing.kind == "lines":
        points = {
            name: list(zip(*xy, strict=True)) for name, xy in drawing.series.items()
        }
        lines(axis, points, **labels)
        _paper_points(axis, drawing)
        style.legend_beside(axis)
    elif drawing.kind == "steps":
        _steps(axis, drawing)
    else:
        _bars(axis, drawing)
    if drawing.kind != "lines":
        style.dress(axis, **labels)
        style.legend_beside(axis)
    if drawing.log_x:
        axis.set_xscale("log", base=2)
        places = {x for xs, _ in drawing.series.values() for x in xs}
        style.plain_ticks(axis.xaxis, sorted(places))
    elif drawing.paper and drawing.kind == "lines":
        axis.set_xticks(sorted({x for xs, _ in drawing.series.values() for x in xs}))
    axis.set_ylim(0, drawing.y_max)


def _paper_points(axis: Any, drawing: Drawing) -> None:
    """Draw the paper's numbers beside lines: hollow points, or bars for ranges."""
    for number, (name, (xs, ys)) in enumerate(drawing.paper.items()):
        label = f"{name}, paper"
        mark = dict(color=style.COLORS[number], marker=style.MARKERS[number], zorder=4)
        both = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        ranges = [(x, y) for x, y in both if isinstance(y, tuple)]
        points = [(x, y) for x, y in both if not isinstance(y, tuple)]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, **mark, markersize=9, mfc="none", linestyle="", label=label)
        for x, (low, high) in ranges:
            middle, half = (low + high) / 2, (high - low) / 2
            axis.errorbar(
                x + 0.06 * (number + 1),
                middle,
                half,
                color=style.COLORS[number],
                capsize=4,
                linestyle="",
                alpha=0.6,
                label=f"{label}, range",
            )


def _steps(axis: Any, drawing: Drawing) -> None:
    """Draw histograms: x are the edges of the bins."""
    for number, (name, (edges, shares)) in enumerate(drawing.series.items()):
        axis.stairs(
            shares, edges, color=style.COLORS[number], linewidth=1.5, label=name
        )
        axis.set_xlim(0, edges[-1])
    for number, (name, x) in enumerate(drawing.verticals.items()):
        line = ":" if "paper" in name else "-"
        color = style.COLORS[number // 2]
        axis.axvline(x, color=color, linestyle=line, linewidth=1.2, label=name)


def _bars(axis: Any, drawing: Drawing) -> None:
    """Draw bars for each name of x, with the paper's bars beside them, hatched."""
    names = next(iter(drawing.series.values()))[0]
    count = 2 if drawing.paper else 1
    width = 0.72 / count
    for place, series in enumerate([drawing.series, drawing.paper][:count]):
        below = [0.0] * len(names)
        at = [n + (place - (count - 1) / 2) * (width + 0.03) for n in range(len(names))]
        for number, (legend, (_, heights)) in enumerate(series.items()):
            axis.bar(
                at,
                heights,
                width,
                bottom=below,
                color=style.COLORS[number],
                alpha=0.45 if place else 1.0,
                hatch="///" if place else None,
                edgecolor="white",
                linewidth=0.5,
                label=None if place else legend,
            )
            _bar_numbers(axis, at, heights, below, drawing.kind)
            below = [low + high for low, high in zip(below, heights, strict=True)]
    short = [name.replace(" (", "\n(") for name in names]
    axis.set_xticks(range(len(names)), short)
    if drawing.paper:
        # An empty bar for the legend.
        mark = dict(color=style.GREY, alpha=0.45, hatch="///", edgecolor="white")
        axis.bar([0], [0], 0, **mark, label="paper")


def _bar_numbers(
    axis: Any,
    at: Sequence[float],
    heights: Sequence[float],
    below: Sequence[float],
    kind: str,
) -> None:
    """Write the height of each bar into it, or above it where bars are not stacked."""
    for x, height, low in zip(at, heights, below, strict=True):
        if kind == "stacked" and height >= 6:
            y, options = low + height / 2, dict(va="center", color="black")
        elif kind == "bars" and height > 0:
            y, options = height, dict(va="bottom")
        else:
            continue
        text = axis.text(x, y, f"{height:.1f}", ha="center", fontsize=7, **options)
        if kind == "stacked":
            style.outline(text)


def _number(value: float | None) -> str:
    return (
        "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    )


def table(rows: Sequence[PaperRow]) -> list[str]:
    """Format rows as a Markdown table."""
    lines = [
        "| quantity | paper | here | ± 95 % | ratio | where | remark |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for one in rows:
        here = "none" if one.here is None else _number(one.here)
        numbers = (one.paper or "", here, _number(one.ci95), _number(one.ratio))
        cells = (one.quantity, *numbers, one.source or "", one.remark)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def constants(models: Sequence[str], cost: CostChoice) -> list[str]:
    """Format the constants of the machines and of the cost model as Markdown."""
    lines = [
        "| model | machine | KV slots, tokens | source of the slots |",
        "| --- | --- | ---: | --- |",
    ]
    chips = {}
    for name in models:
        setting = PAPER_SETTINGS[name]
        chips[setting.chip] = setting.sizes()[1]
        machine = f"{setting.num_chips} x {setting.chip}"
        lines.append(f"| {name} | {machine} | {setting.kv_slots} | {setting.source} |")
    for chip in chips.values():
        efficiency = dataclasses.asdict(chip.efficiency)
        source = efficiency.pop("source")
        reached = ", ".join(f"{key} {value:g}" for key, value in efficiency.items())
        lines += [
            "",
            f"{chip.name}: {chip.memory_bytes_per_s / 1e9:g} GB/s, "
            f"{chip.flops_per_s / 1e12:g} TFLOP/s, links "
            f"{chip.link_bytes_per_s / 1e9:g} GB/s, host "
            f"{chip.host_bytes_per_s / 1e9:g} GB/s ({chip.source}); {reached} "
            f"({source}).",
        ]
    lines += ["", _cost_line(cost)]
    return lines


def _cost_line(cost: CostChoice) -> str:
    text = (
        f"A step takes {VLLM_2023_STEP_S * 1e3:g} ms of host time "
        "(`roofline.VLLM_2023_STEP_S`)"
    )
    if cost.step_fit is not None:
        name = pathlib.Path(cost.step_fit).name
        text = (
            f"Steps take as long as vLLM's in {name}; decoding steps, without "
            f"{VLLM_2023_STEP_S * 1e3:g} ms of host time, are multiplied by "
            f"{cost.decoding:g}; copies, swapping and figure 19a use the roofline"
        )
    mixed = "takes as long as two steps"
    if not cost.is_separate:
        mixed = "reads the weights once"
    return (
        f"{text}. A step with prompts and decoding rows {mixed}. This holds for all "
        "systems."
    )


def report_markdown(
    settings: FigureSettings,
    figures: Mapping[str, PaperFigure],
    shown: Mapping[str, FigureContent],
    has_plots: bool,
) -> str:
    """Return REPORT.md: the settings, and the rows of each figure with the paper's."""
    files = ", ".join(
        f"{name}: {pathlib.Path(path).name if path else 'built-in distribution'}"
        for name, path in settings.files.items()
    )
    seeds = ", ".join(map(str, settings.seeds))
    lines = [
        "# The paper's figures, simulated",
        "",
        "Kwon et al., SOSP 2023, compared with `jpaged.simulator`: the engine's own "
        "scheduler and block manager, and the paper's baselines, on the clock of a "
        "cost model. Nothing here was measured on a GPU.",
        "",
        f"- Lengths: {files}.",
        f"- Seeds: {seeds}; `here` is their mean, `±` half its 95 % interval "
        "(Student's t). The interval of few seeds is wide.",
        f"- Arrivals: Poisson, {settings.scale:g} of the paper's hour "
        f"({settings.duration():g} s), or the duration of the figure if that is "
        "shorter. Short runs end before a queue has grown, so overloaded systems look "
        "better, most at high levels.",
        f"- Means over time leave out the first {WARMUP:.0%} and end with the last "
        "arrival; latencies include all requests.",
        f"- Sustained rate: the rate at which normalised latency crosses {LEVELS[0]:g} "
        f"(and {LEVELS[1]:g}) s/token, with its logarithm linear between two rates.",
        "- ratio: here / paper. For a range, the nearer end counts, and 1 within it.",
        "- No parameter was fitted to a number of the paper.",
        "",
        "## Constants",
        "",
        *constants(list(PAPER_SETTINGS), settings.cost),
    ]
    for name, one in shown.items():
        lines += ["", f"## {figures[name].title}", ""]
        if has_plots and one.drawings:
            lines += [f"![{figures[name].title}]({file_name(name)}.png)", ""]
        lines += table(one.rows)
        for remark in one.remarks:
            lines += ["", remark]
    return "\n".join(lines) + "\n"


def file_name(figure: str) -> str:
    """Return the name of a figure's files."""
    return figure.replace(":", "_")
