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
    import matplotlib  # pyright: ignore[reportMissingImports] (extra `plot`)

    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    width = min(len(drawings), 3)
    height = math.ceil(len(drawings) / width)
    figure, axes = pyplot.subplots(
        height, width, figsize=(5.5 * width, 4 * height), squeeze=False
    )
    for axis in axes.flat[len(drawings) :]:
        axis.remove()
    for axis, drawing in zip(axes.flat, drawings, strict=False):
        _panel(axis, drawing)
    figure.suptitle(f"{title} (simulated)")
    figure.tight_layout()
    # Without a date and a version, so that the same figure has the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _panel(axis: Any, drawing: Drawing) -> None:
    if drawing.kind == "lines":
        for name, (x, y) in drawing.series.items():
            axis.plot(x, y, marker="o", markersize=3, label=name)
    else:
        _bars(axis, drawing)
    if drawing.log_x:
        axis.set_xscale("log", base=2)
    if drawing.y_max is not None:
        axis.set_ylim(0, drawing.y_max)
    axis.set_title(drawing.title)
    axis.set_xlabel(drawing.x_label)
    axis.set_ylabel(drawing.y_label)
    axis.legend(fontsize=7)


def _bars(axis: Any, drawing: Drawing) -> None:
    names = next(iter(drawing.series.values()))[0]
    positions, below = list(range(len(names))), [0.0] * len(names)
    width = 0.6 if drawing.kind == "stacked" else 0.8 / len(drawing.series)
    for number, (legend, (_, heights)) in enumerate(drawing.series.items()):
        shift = 0.0 if drawing.kind == "stacked" else number * width
        at = [position + shift for position in positions]
        axis.bar(at, heights, width, bottom=below, label=legend)
        if drawing.kind == "stacked":
            below = [low + high for low, high in zip(below, heights, strict=True)]
    axis.set_xticks(positions, names, fontsize=7)


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
