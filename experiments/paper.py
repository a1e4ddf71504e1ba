"""The paper's figures, simulated: every number beside the one that is printed.

    python -m experiments.paper --figure fig13 --out paper_figures
    python -m experiments.paper --figure all --out paper_figures --jobs 2

Runs the engine's own scheduler and block manager, and the baselines of the paper, on
the clock of a cost model (`jpaged.simulator`): figures 1, 2, 11 to 17, 18b and 19 of
Kwon et al., SOSP 2023. Figure 18a is timed on this device, and is not of `all`. Written
are, for each figure, FIGURE.csv with its numbers beside the paper's, FIGURE_runs.csv
with a line for each simulation, and FIGURE.png (with the extra `plot`); and REPORT.md
for all. `--figure fig12:sharegpt:opt-13b` is one panel of figure 12. Lengths are
built-in distributions unless --sharegpt and --alpaca name files with input_tokens and
output_tokens.

--scale is the share of the paper's hour that requests arrive for; the report says what
follows from a short one.

Time: half of a short run is compiling, about 10 s for each of 103 curves, which the
second run of a machine finds in the cache. All figures took 23 minutes with --jobs 2,
on two cores that others used as well.

Expected: figure 13, ShareGPT: 7.00 requests for Orca (Max), as in the paper.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time

from absl import app, flags

from experiments.lib import runner
from experiments.lib.paper import (
    blocks,
    kernel,
    rates,
    report,
)
from experiments.lib.paper import (
    figures as lib_paper_figures,
)
from experiments.lib.paper.curves import Row
from experiments.lib.paper.figures import Figure, Plan, Shown
from experiments.lib.paper.report import file_name
from experiments.lib.paper.runs import Case, Clock, Run, cost_model_of, run_all
from experiments.lib.runner import progress
from jpaged import compilation_cache

FLAGS = flags.FLAGS
FIGURES: dict[str, Figure] = dict(
    sorted((lib_paper_figures.FIGURES | rates.FIGURES | blocks.FIGURES).items())
)
# Figures of the paper whose number says more: 18b is all of 18 that is simulated.
ALIASES = {"fig18b": "fig18", "fig19a": "fig19", "fig19b": "fig19"}
ALL = "all"


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("figure", [ALL], f"Of {', '.join(FIGURES)}, a panel, or {ALL}.")
    flags.DEFINE_string("out", "paper_figures", "Folder for what is written.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of arrivals and lengths.")
    flags.DEFINE_float(
        "scale", 0.03, "Share of the paper's hour.", lower_bound=1e-5, upper_bound=1.0
    )
    flags.DEFINE_string("sharegpt", None, "CSV of lengths; None: built-in ones.")
    flags.DEFINE_string("alpaca", None, "CSV of lengths; None: built-in ones.")
    flags.DEFINE_integer("jobs", 1, "Processes.", lower_bound=1)
    flags.DEFINE_string(
        "step_fit", None, "JSON of vLLM's measured steps; None: a roofline."
    )
    flags.DEFINE_float(
        "decoding_factor", 1.0, "Times the measured decoding steps.", lower_bound=0.01
    )
    flags.DEFINE_bool(
        "separate_prompts", True, "A step with prompts and decodes takes what two take."
    )


def chosen_figures(names: list[str]) -> dict[str, Figure]:
    """The figures of those names.

    Raises:
      ValueError: there is none of a name.
    """
    known = FIGURES | kernel.FIGURES | rates.PANEL_FIGURES
    found: dict[str, Figure] = {}
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


def make_plan() -> Plan:
    """What the flags decide for all figures.

    Raises:
      ValueError, OSError: seeds that are no different whole numbers; no such file.
    """
    seeds = tuple(int(one) for one in FLAGS.seeds if one.isdecimal())
    if len(seeds) != len(FLAGS.seeds) or len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(
            f"seeds: expected different whole numbers, got {','.join(FLAGS.seeds)!r}"
        )
    files = {"sharegpt": FLAGS.sharegpt, "alpaca": FLAGS.alpaca}
    for name, path in [*files.items(), ("step_fit", FLAGS.step_fit)]:
        if path is not None and not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{name}: no such file: {path}")
    clock = Clock(FLAGS.step_fit, FLAGS.decoding_factor, FLAGS.separate_prompts)
    if clock.step_fit is None and clock.decoding != 1:
        raise ValueError(
            "decoding_factor: expected --step_fit beside it, whose decoding steps it "
            f"multiplies, got {clock.decoding:g} alone"
        )
    return Plan(seeds=seeds, scale=FLAGS.scale, files=files, clock=clock)


def check_clock(plan: Plan, figures: dict[str, Figure]) -> None:
    """Before anything is simulated, that there is a time for all models.

    Raises:
      ValueError, OSError: the step fits lack one, or cannot be read.
    """
    cases = [case for figure in figures.values() for case in figure.cases(plan)]
    for model in dict.fromkeys(case.model for case in cases):
        try:
            cost_model_of(model, plan.clock)
        except ValueError as error:
            raise ValueError(
                f"step_fit: {error}; take --figure's without {model}, such as fig13"
            ) from None


def simulate(plan: Plan, figures: dict[str, Figure]) -> dict[Case, list[Run]]:
    """The runs of all figures, each case once, with progress on stderr."""
    cases = [case for figure in figures.values() for case in figure.cases(plan)]
    count, begin, done = len(set(cases)), time.perf_counter(), 0

    def on_done(case: Case) -> None:
        nonlocal done
        done += 1
        what = f"{case.system}, {case.model}, {case.requests}"
        seconds = time.perf_counter() - begin
        progress(f"{done} of {count} curves, {seconds:.0f} s: {what}")

    return run_all(cases, FLAGS.jobs, on_done)


def with_skipped(shown: Shown, runs: list[Run]) -> Shown:
    """The same, with a remark on the requests that the runs left out."""
    skipped = sum(run.num_skipped for run in runs)
    if not skipped:
        return shown
    count = sum(run.num_requests for run in runs)
    remark = (
        f"Left out on the way to these runs' {count} requests: {skipped}, of 2,048 "
        "tokens or more in all, or of no output."
    )
    return dataclasses.replace(shown, remarks=[*shown.remarks, remark])


def write(
    folder: pathlib.Path,
    plan: Plan,
    figures: dict[str, Figure],
    runs: dict[Case, list[Run]],
) -> list[Row]:
    """All files; returns the rows of all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, Shown] = {}
    has_plots = True
    for name, figure in figures.items():
        mine = [run for case in figure.cases(plan) for run in runs[case]]
        shown[name] = one = with_skipped(figure.show(plan, runs), mine)
        report.write_csv(folder, file_name(name), one, mine)
        try:
            path = folder / f"{file_name(name)}.png"
            report.draw(path, figure.title, one.drawings)
        except ImportError:
            has_plots = False
    if not has_plots:
        progress("no PNG: matplotlib is missing; pip install 'jpaged[plot]'")
    text = report.markdown(plan, figures, shown, has_plots)
    (folder / "REPORT.md").write_text(text, "utf-8")
    return [row for one in shown.values() for row in one.rows]


def main(argv: list[str]) -> None:
    """Reads the flags, simulates, writes, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    compilation_cache.turn_on()
    try:
        figures, plan = chosen_figures(FLAGS.figure), make_plan()
        check_clock(plan, figures)
        runs = simulate(plan, figures)
        rows = write(pathlib.Path(FLAGS.out), plan, figures, runs)
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
