"""Compares scheduling policies: latency against load, simulated and on the engine.

    python -m experiments.policies --plot policies.png
    python -m experiments.policies --loads=1,2,4 --seeds 10 --policies=fcfs,shortest_job

A cost model of this machine is fitted to a burst of requests on the real engine. Then
all policies, loads and seeds are simulated as the batch axis of one compiled program:
which policy decides is data, in the engine and in the simulator. The loads of
`--engine_loads` also run on the real engine, with the same arrivals. A load of 1 is the
rate at which the engine serves the burst.

Lengths are lognormal, most of them short and some long, up to `--longest` tokens.
`max_tokens` is the length of the output, so `shortest_job` knows it; `feedback` does
not use it. Half of the requests come from one of four users. Deadlines are 2 to 20
times the time that a request takes alone.

For each policy and load the runner prints means over the seeds, in seconds: latency,
time to the first token, time per output token, the share of missed deadlines, and the
mean latency of the other three users. The figure has them relative to `fcfs` on the
same workload, with 95 % intervals (Student's t).

Time: about 5 minutes on two CPU cores. Expected: under load, `shortest_job` has about
half the mean latency of `fcfs`, in the simulation and on the engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import calibration, runner
from experiments.lib.runner import progress
from jpaged.config import EngineConfig
from jpaged.models import load_model
from jpaged.plot import curves, style
from jpaged.policies import ADMISSION, BUDGET, PREEMPTION, Requests, Rows
from jpaged.simulator.optimum import alone_seconds
from jpaged.simulator.simulate import sweep
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload

FLAGS = flags.FLAGS


class Setting(NamedTuple):
    """The policies of a run, by name."""

    policy: str = "fcfs"
    preemption: str = "latest"
    budget: str = "decode_first"


QUANTA = (8.0, 32.0, 96.0)  # of "feedback", in tokens
CHUNK_SHARE = 0.25  # of "chunked"
SETTINGS = {
    "fcfs": Setting(),
    "shortest_prompt": Setting("shortest_prompt"),
    "shortest_job": Setting("shortest_job", "longest_job"),
    "feedback": Setting("feedback", "feedback"),
    "earliest_deadline": Setting(
        "earliest_deadline", "latest_deadline", "deadline_first"
    ),
    "fair_share": Setting("fair_share", "largest_share"),
    "prefill_first": Setting(budget="prefill_first"),
    "chunked": Setting(budget="chunked"),
    "fair_split": Setting(budget="fair_split"),
}
# Policies without parameters of another number than `QUANTA`.
_ADMISSION = [name for name in ADMISSION.policies if name != "weighted"]
_PREEMPTION, _BUDGET = list(PREEMPTION.policies), list(BUDGET.policies)
BASE = "fcfs"  # the policies that others are compared with
METRICS = {
    "latency_s": "mean latency",
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "missed": "missed deadlines, difference",
    "light_users_s": "latency of light users",
}


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "The model, as for jpaged.load_model.")
    flags.DEFINE_list("policies", None, f"Some of {', '.join(SETTINGS)}; default: all.")
    flags.DEFINE_list("loads", ["0.8", "1.5", "4"], "Loads to simulate.")
    flags.DEFINE_list("engine_loads", ["4"], "Loads to run on the engine, too.")
    flags.DEFINE_integer("seeds", 4, "Workloads for each load.", lower_bound=2)
    flags.DEFINE_integer("num_requests", 120, "Requests of each run.", lower_bound=2)
    flags.DEFINE_integer("longest", 400, "Most tokens of a prompt and of an output.")
    flags.DEFINE_integer("max_num_seqs", 8, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 200, "Blocks of the pool.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "First seed of lengths, arrivals and deadlines.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def _select(scores: Sequence[jax.Array], number: jax.Array) -> jax.Array:
    as_float = [score.astype(jnp.float32) for score in scores]
    return jnp.stack(as_float)[number.astype(jnp.int32)]


def any_admission(requests: Requests) -> jax.Array:
    """All admission policies in one program: the first parameter selects one."""
    view = requests._replace(parameters=requests.parameters[1:])
    scores = [ADMISSION.policies[name](view) for name in _ADMISSION]
    return _select(scores, requests.parameters[0])


def any_preemption(requests: Requests) -> jax.Array:
    """All preemption policies in one program."""
    view = requests._replace(parameters=requests.parameters[1:])
    scores = [PREEMPTION.policies[name](view) for name in _PREEMPTION]
    return _select(scores, requests.parameters[0])


def any_budget(rows: Rows) -> jax.Array:
    """All budget policies in one program."""
    view = rows._replace(parameters=rows.parameters[1:])
    tokens = [BUDGET.policies[name](view) for name in _BUDGET]
    return jnp.stack(tokens)[rows.parameters[0].astype(jnp.int32)]


def with_setting(config: EngineConfig, setting: Setting) -> EngineConfig:
    """The config with the parameters that select these policies."""
    return dataclasses.replace(
        config,
        policy_parameters=(float(_ADMISSION.index(setting.policy)), *QUANTA),
        preemption_parameters=(float(_PREEMPTION.index(setting.preemption)), *QUANTA),
        budget_parameters=(float(_BUDGET.index(setting.budget)), CHUNK_SHARE),
    )


def make_config(workloads: Sequence[Workload]) -> EngineConfig:
    """The engine, with all policies in one program; they are those of fcfs."""
    return calibration.calibration_config(
        workloads,
        max_num_seqs=FLAGS.max_num_seqs,
        num_blocks=FLAGS.num_blocks,
        enable_prefix_caching=True,
        policy=any_admission,
        policy_parameters=(0.0, *QUANTA),
        preemption_policy=any_preemption,
        preemption_parameters=(0.0, *QUANTA),
        budget_policy=any_budget,
        budget_parameters=(0.0, CHUNK_SHARE),
    )


def skewed_requests(count: int, longest: int, seed: int) -> Workload:
    """Requests that arrive at once, with lognormal lengths of up to `longest`."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (
        np.clip(np.rint(rng.lognormal(np.log(median), spread, count)), 1, longest)
        for median, spread in ((16, 1.2), (12, 1.6))
    )
    return Workload(np.zeros(count), prompts.astype(int), outputs.astype(int))


def with_users_and_deadlines(
    workload: Workload, alone_s: np.ndarray, seed: int
) -> Workload:
    """Returns the requests with deadlines and four users, one of which sends half."""
    rng = np.random.default_rng(seed)
    users = rng.choice(4, len(workload), p=[0.5, 0.2, 0.2, 0.1])
    slack = rng.uniform(2, 20, len(workload))
    deadlines = np.rint(alone_s * slack * 1000).astype(np.int64)
    return dataclasses.replace(workload, users=users, deadlines_ms=deadlines)


def measure(
    workload: Workload, first_times: np.ndarray, end_times: np.ndarray
) -> dict[str, float]:
    """The metrics of a run; times are f64[N], seconds from its start."""
    latencies, lens = end_times - workload.arrivals, workload.output_lens
    many = lens > 1
    is_light = workload.users != np.bincount(workload.users).argmax()
    return {
        "latency_s": float(np.mean(latencies)),
        "ttft_s": float(np.mean(first_times - workload.arrivals)),
        "tpot_s": float(np.mean(((end_times - first_times)[many]) / (lens[many] - 1))),
        "missed": float(np.mean(latencies * 1000 > workload.deadlines_ms)),
        "light_users_s": float(np.mean(latencies[is_light])),
    }


Results = dict[tuple[str, float], list[dict[str, float]]]


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and half of the 95 % interval of each metric, over seeds."""
    found = {}
    for name in METRICS:
        _, (mean,), (half,) = curves.mean_and_interval([(0, run[name]) for run in runs])
        found[name] = (float(mean), float(half))
    return found


def simulate_all(
    config: EngineConfig,
    names: Sequence[str],
    workloads: dict[tuple[float, int], Workload],
    cost_model: Any,
) -> Results:
    """Simulates all policies on all workloads, in one program."""
    runs = list(itertools.product(names, workloads))
    systems = [EngineSystem(with_setting(config, SETTINGS[name])) for name, _ in runs]
    given = [workloads[key] for _, key in runs]
    outcomes = sweep(systems, given, cost_model)
    found: Results = {}
    for (name, (load, _)), workload, one in zip(runs, given, outcomes, strict=True):
        result = measure(workload, one.first_times, one.end_times)
        found.setdefault((name, load), []).append(result)
    return found


def run_all(
    model: Any,
    config: EngineConfig,
    names: Sequence[str],
    workloads: dict[tuple[float, int], Workload],
) -> Results:
    """Runs all policies on the engine; they share one compiled program."""
    found: Results = {}
    # Policies take turns, so that other load of the machine disturbs all of them.
    for ((load, seed), workload), name in itertools.product(workloads.items(), names):
        progress(f"engine: load {load:g}, seed {seed}, {name}")
        params = with_setting(config, SETTINGS[name]).scheduler_params
        run = calibration.run_workload(model, config, workload, params)
        result = measure(workload, run.first_times, run.end_times)
        found.setdefault((name, load), []).append(result)
    return found


def print_table(title: str, results: Results) -> None:
    """Prints the means of all metrics."""
    heads = "".join(f"{name:>16}" for name in METRICS)
    print(f"\n{title:<20}{'load':>6}{heads}")
    for (name, load), runs in results.items():
        cells = "".join(f"{mean:>16.4g}" for mean, _ in summarise(runs).values())
        print(f"{name:<20}{load:>6g}{cells}", flush=True)


def draw(path: str, simulated: Results, measured: Results) -> None:
    """Draws a panel for each metric; lines are simulated, crosses measured.

    The first row has admission policies, the second one budget policies.
    """
    names = list(dict.fromkeys(name for name, _ in simulated))
    of_budget = [name for name in names if SETTINGS[name].policy == "fcfs"]
    rows = [[name for name in names if name not in of_budget], of_budget]
    rows = [[name for name in row if name != BASE] for row in rows]
    rows = [row for row in rows if row] or [[BASE]]
    figure, panels = style.new_figure(len(rows), len(METRICS), (3.4, 3.0))
    for row, axes_of_row in zip(rows, panels, strict=True):
        for axes, (metric, label) in zip(axes_of_row, METRICS.items(), strict=True):
            _draw_panel(axes, row, metric, label, simulated, measured)
        for axes in axes_of_row[:-1]:
            axes.get_legend().remove()
    style.save(figure, path)


def _draw_panel(
    axes: Any,
    names: Sequence[str],
    metric: str,
    label: str,
    simulated: Results,
    measured: Results,
) -> None:
    drawn = {name: relative(simulated, name, metric) for name in names}
    is_ratio = metric != "missed" and (BASE, next(iter(simulated))[1]) in simulated
    axes.axhline(1.0 if is_ratio else 0.0, color=style.GREY, linewidth=0.8)
    label = f"{label} / {BASE}" if is_ratio else label
    curves.lines(axes, drawn, x_label="load", y_label=label)
    for line, name in zip(axes.get_lines()[1:], names, strict=True):
        if points := relative(measured, name, metric):
            load, mean, half = curves.mean_and_interval(points)
            color = line.get_color()
            axes.errorbar(load * 1.03, mean, half, fmt="x", color=color, capsize=2)
    if is_ratio:
        axes.set_yscale("log")
        style.plain_y(axes)


def relative(results: Results, name: str, metric: str) -> list[tuple[float, float]]:
    """Pairs of load and metric, one for each run, relative to `BASE`.

    Each run is divided by that of `BASE` on the same workload, because workloads differ
    more than policies. Shares are subtracted. Without `BASE` the values stay as they
    are.
    """
    found = []
    for (one, load), runs in results.items():
        if one != name:
            continue
        bases = results.get((BASE, load), [{}] * len(runs))
        for run, base in zip(runs, bases, strict=True):
            value = run[metric]
            if base:
                is_share = metric == "missed"
                value = value - base[metric] if is_share else value / base[metric]
            found.append((load, value))
    return found


def checked_loads(flag: str) -> list[float]:
    """The values of a list flag as loads.

    Raises:
      ValueError: A value is not a number above 0.
    """
    try:
        found = [float(value) for value in getattr(FLAGS, flag)]
    except ValueError:
        found = [0.0]
    if not all(0 < load < np.inf for load in found):
        got = getattr(FLAGS, flag)
        raise ValueError(f"--{flag}: expected numbers above 0, got {got}")
    return found


def main(argv: list[str]) -> None:
    """Simulates and runs all policies and prints the results."""
    del argv
    count, seeds = FLAGS.num_requests, range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    with runner.user_errors("policies"):
        names = runner.some_of("policies", FLAGS.policies, list(SETTINGS))
        loads, engine_loads = checked_loads("loads"), checked_loads("engine_loads")
        plain = [
            skewed_requests(count, FLAGS.longest, seed)
            for seed in (FLAGS.seed - 1 + 2**20, *seeds)
        ]
        config = make_config(plain)
        model = load_model(FLAGS.model)
    burst, *others = plain
    progress("measuring steps: all requests at once")
    measured = [calibration.run_workload(model, config, burst) for _ in range(2)]
    cost_model, _ = calibration.fit_engine(config, burst, measured)
    rate = count / float(np.median([np.max(run.end_times) for run in measured]))

    workloads = {}
    for load in sorted({*loads, *engine_loads}):
        for seed, one in zip(seeds, others, strict=True):
            arriving = calibration.with_poisson_arrivals(one, rate * load, seed)
            alone_s = alone_seconds(arriving, cost_model)
            full = with_users_and_deadlines(arriving, alone_s, seed)
            workloads[load, seed] = full
    progress(f"simulating {len(names) * len(workloads)} runs")
    simulated = simulate_all(config, names, workloads, cost_model)
    print_table("simulated", simulated)
    some = {key: one for key, one in workloads.items() if key[0] in engine_loads}
    on_engine = run_all(model, config, names, some)
    print_table("engine", on_engine)
    if FLAGS.plot is not None:
        draw(FLAGS.plot, simulated, on_engine)
    report(simulated, on_engine, rate)


def report(simulated: Results, on_engine: Results, rate: float) -> None:
    """Prints the ratio of latencies to those of fcfs, and the JSON line."""
    kinds = {"simulated": simulated, "engine": on_engine}
    rows = [
        {"kind": kind, "policy": name, "load": load, **summarise(runs)}
        for kind, results in kinds.items()
        for (name, load), runs in results.items()
    ]
    most = max(load for _, load in on_engine)
    ratios: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for kind, results in kinds.items():
        for name, load in results:
            if load == most and (BASE, load) in results:
                found = [
                    r for at, r in relative(results, name, "latency_s") if at == load
                ]
                ratios[kind][name] = float(np.mean(found))
                print(
                    f"{kind}, load {load:g}: {name} / {BASE}, mean latency "
                    f"{ratios[kind][name]:>8.3f}"
                )
    values = runner.flag_values(__name__)
    runner.print_json(
        {"ratios": ratios, "requests_per_s": rate, "rows": rows, "flags": values}
    )


if __name__ == "__main__":
    runner.start(main, define_flags)
