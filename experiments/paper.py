"""Simulate the paper's figures and compare every number with the printed one.

    python -m experiments.paper --figure fig13 --out paper_figures
    python -m experiments.paper --figure all --out paper_figures --jobs 2

Runs the engine's own scheduler and block manager, and the baselines of the paper, on
the clock of a cost model (`jpaged.simulator`): figures 1, 2, 11 to 17, 18b and 19 of
Kwon et al., SOSP 2023. Figure 18a is timed on this device, and is not included in
`all`. `--figure fig12:sharegpt:opt-13b` is one panel of figure 12.

For each figure, the runner writes FIGURE.csv with the numbers and the paper's numbers,
FIGURE_runs.csv with a line for each simulation, and FIGURE.png (with the extra `plot`).
REPORT.md has all figures. Lengths are built-in distributions, unless --sharegpt and
--alpaca name files with input_tokens and output_tokens.

--scale is the share of the paper's hour in which requests arrive; the report states the
effect of a short time.

Time: half of a short run is compiling, about 10 s for each of 103 curves; a second run
on the same machine finds the programs in the cache. All figures took 23 minutes with
--jobs 2, on two cores that other processes used as well.

Expected: figure 13, ShareGPT: 7.00 requests for Orca (Max), as in the paper.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags

from experiments.lib import runner
from experiments.lib.option_flags import define_option_flags
from experiments.lib.paper import blocks, kernel, rates, report
from experiments.lib.paper import figures as basic_figures
from experiments.lib.paper.curves import PaperRow
from experiments.lib.paper.figures import FigureContent, FigureSettings, PaperFigure
from experiments.lib.paper.report import file_name
from experiments.lib.paper.runs import (
    CostChoice,
    PaperCase,
    PaperRun,
    cost_model_of,
    run_cases,
)
from experiments.lib.runner import progress
from jpaged import compilation_cache
from jpaged.simulator.costs import step_fits

FLAGS = flags.FLAGS
FIGURES: dict[str, PaperFigure] = dict(
    sorted((basic_figures.FIGURES | rates.FIGURES | blocks.FIGURES).items())
)
# Names of parts of figures; 18b is the simulated part of figure 18.
ALIASES = {"fig18b": "fig18", "fig19a": "fig19", "fig19b": "fig19"}
ALL = "all"


def define_flags() -> None:
    """Define the flags when the runner is the main program, not when it is imported."""
    flags.DEFINE_list(
        "figure", [ALL], f"Some of {', '.join(FIGURES)}, a panel, or {ALL}."
    )
    flags.DEFINE_string("out", "paper_figures", "Output folder.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of arrivals and lengths.")
    flags.DEFINE_float(
        "scale", 0.03, "Share of the paper's hour.", lower_bound=1e-5, upper_bound=1.0
    )
    flags.DEFINE_string("sharegpt", None, "CSV file of lengths; default: built-in.")
    flags.DEFINE_string("alpaca", None, "CSV file of lengths; default: built-in.")
    flags.DEFINE_integer("jobs", 1, "Processes.", lower_bound=1)
    define_option_flags(step_fits.ENTRY.options)
    flags.DEFINE_bool(
        "separate_prompts",
        True,
        "A step with prompts and decoding rows takes as long as two steps.",
    )


def chosen_figures(names: list[str]) -> dict[str, PaperFigure]:
    """Find figures by name.

    Raises:
      ValueError: a name is unknown, or there are no names.
    """
    known = FIGURES | kernel.FIGURES | rates.PANEL_FIGURES
    found: dict[str, PaperFigure] = {}
    for name in names:
        if name == ALL:
            found |= FIGURES
            continue
        name = ALIASES.get(name, name)
        if name not in known:
            raise ValueError(
                f"figure: expected some of {', '.join([ALL, *known])}, got {name!r}"
            )
        found[name] = known[name]
    if not found:
        raise ValueError("figure: expected at least one, got none")
    return found


def make_settings() -> FigureSettings:
    """Return the settings of all figures.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: seeds are not distinct integers of at least 0.
    """
    seeds = tuple(int(one) for one in FLAGS.seeds if one.isdecimal())
    if len(seeds) != len(FLAGS.seeds) or len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(
            f"seeds: expected distinct integers, got {','.join(FLAGS.seeds)!r}"
        )
    files = {"sharegpt": FLAGS.sharegpt, "alpaca": FLAGS.alpaca}
    for name, path in [*files.items(), ("step_fit", FLAGS.step_fit)]:
        if path is not None and not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{name}: expected a file, got {path}")
    cost = CostChoice(
        FLAGS.step_fit, FLAGS.decoding_factor or 1.0, FLAGS.separate_prompts
    )
    if cost.step_fit is None and cost.decoding != 1:
        raise ValueError(
            "decoding_factor: expected --step_fit, whose decoding steps it multiplies, "
            f"got {cost.decoding:g} without it"
        )
    return FigureSettings(seeds=seeds, scale=FLAGS.scale, files=files, cost=cost)


def check_cost(settings: FigureSettings, figures: dict[str, PaperFigure]) -> None:
    """Check that the cost model has all models of the figures.

    Raises:
      OSError: the file of step fits cannot be read.
      ValueError: it does not have a model.
    """
    cases = [case for figure in figures.values() for case in figure.cases(settings)]
    for model in dict.fromkeys(case.model for case in cases):
        try:
            cost_model_of(model, settings.cost)
        except ValueError as error:
            raise ValueError(
                f"step_fit: {error}; choose figures without {model}, such as fig13"
            ) from None


def simulate_figures(
    settings: FigureSettings, figures: dict[str, PaperFigure]
) -> dict[PaperCase, list[PaperRun]]:
    """Simulate the cases of all figures, each once, with progress on stderr."""
    cases = [case for figure in figures.values() for case in figure.cases(settings)]
    count, begin, done = len(set(cases)), time.perf_counter(), 0

    def on_done(case: PaperCase) -> None:
        nonlocal done
        done += 1
        what = f"{case.system}, {case.model}, {case.requests}"
        seconds = time.perf_counter() - begin
        progress(f"{done} of {count} curves, {seconds:.0f} s: {what}")

    return run_cases(cases, FLAGS.jobs, on_done)


def with_skipped(shown: FigureContent, runs: list[PaperRun]) -> FigureContent:
    """Add a remark on the requests that the runs skipped."""
    skipped = sum(run.num_skipped for run in runs)
    if not skipped:
        return shown
    count = sum(run.num_requests for run in runs)
    remark = (
        f"Skipped while reading the {count} requests of these runs: {skipped}, with "
        "2,048 tokens or more in all, or without output."
    )
    return dataclasses.replace(shown, remarks=[*shown.remarks, remark])


def write_figures(
    folder: pathlib.Path,
    settings: FigureSettings,
    figures: dict[str, PaperFigure],
    runs: dict[PaperCase, list[PaperRun]],
) -> list[PaperRow]:
    """Write all files; return the rows of all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, FigureContent] = {}
    has_plots = True
    for name, figure in figures.items():
        mine = [run for case in figure.cases(settings) for run in runs[case]]
        shown[name] = one = with_skipped(figure.show(settings, runs), mine)
        report.write_figure_csv(folder, file_name(name), one, mine)
        try:
            path = folder / f"{file_name(name)}.png"
            title = figure.title + " (simulated)" * bool(mine)
            report.draw(path, title, one.drawings)
        except ImportError:
            has_plots = False
    if not has_plots:
        progress("no PNG: matplotlib is missing; pip install 'jpaged[plot]'")
    text = report.report_markdown(settings, figures, shown, has_plots)
    (folder / "REPORT.md").write_text(text, "utf-8")
    return [row for one in shown.values() for row in one.rows]


def main(argv: list[str]) -> None:
    """Read the flags, simulate, write the files and print the rows."""
    del argv
    compilation_cache.turn_on()
    try:
        figures, settings = chosen_figures(FLAGS.figure), make_settings()
        if any(figure.cases(settings) for figure in figures.values()):
            runner.warn_if_small("paper", "scale", FLAGS.scale, 0.01)
        check_cost(settings, figures)
        runs = simulate_figures(settings, figures)
        rows = write_figures(pathlib.Path(FLAGS.out), settings, figures, runs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for name in dict.fromkeys(row.figure for row in rows):
        print(f"\n{name}")
        mine = [row for row in rows if row.figure == name]
        print("\n".join(report.table(mine)))
    print(f"\nwritten: {pathlib.Path(FLAGS.out) / 'REPORT.md'} and a table per figure")
    print(json.dumps([dataclasses.asdict(row) for row in rows]), flush=True)


if __name__ == "__main__":
    runner.start(main, define_flags)
