"""Compares the engine on this machine with a simulator that was fitted to it.

    python -m experiments.calibrate
    python -m experiments.calibrate --model random:gpt2

First a burst of requests runs on the real engine, one step per call, and a cost model
is fitted to the times of the steps (`jpaged.simulator.costs.buckets`). Then other
requests arrive at random, at `--load` times the rate that the burst reached: on the
real engine's clock, and in the simulator. The mean times of both are printed. Nothing
is fitted to the second part.

Time: about 20 s on two CPU cores for the bundled model, once the engine is compiled.
Expected on an idle machine: mean latency and makespan within 5 %. Time that other
processes take is part of the measured times, but not of the simulated ones.
"""

from __future__ import annotations

import numpy as np
from absl import flags

from experiments.lib import calibration, runner
from experiments.lib.runner import Report, progress
from jpaged.models import load_model
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.engine_system import EngineSystem

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "The model, as for jpaged.load_model.")
    flags.DEFINE_integer("num_requests", 40, "Requests of each run.", lower_bound=2)
    flags.DEFINE_integer("longest", 150, "Most tokens of a prompt and of an output.")
    flags.DEFINE_integer("max_num_seqs", 16, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 256, "Blocks of the pool.", lower_bound=1)
    flags.DEFINE_integer("bursts", 3, "Measured bursts for the fit.", lower_bound=1)
    flags.DEFINE_integer("runs", 3, "Compared runs, each with another seed.")
    flags.DEFINE_float("load", 0.7, "Arrival rate as a share of the burst's rate.")
    flags.DEFINE_integer("seed", 0, "Seed of lengths and arrivals.")


def main(argv: list[str]) -> None:
    """Fits the cost model, compares the runs and prints the results."""
    del argv
    count, seed = FLAGS.num_requests, FLAGS.seed
    bursts = [
        calibration.short_requests(count, FLAGS.longest, seed + number)
        for number in range(1 + FLAGS.runs)
    ]
    with runner.user_errors("calibrate"):
        config = calibration.calibration_config(
            bursts, max_num_seqs=FLAGS.max_num_seqs, num_blocks=FLAGS.num_blocks
        )
        model = load_model(FLAGS.model)
    progress("measuring steps: all requests at once")
    measured = [
        calibration.run_workload(model, config, bursts[0]) for _ in range(FLAGS.bursts)
    ]
    cost_model, fitted = calibration.fit_engine(config, bursts[0], measured)
    report = Report()
    for name, seconds in fitted.coefficients.items():
        report.row(f"fitted: {name}", f"{1e3 * seconds:.4g} ms")
    report.row("mean residual of a step", f"{100 * fitted.mean_error:.1f} %")
    took = np.median([np.max(run.end_times) for run in measured])
    rate = float(FLAGS.load * count / took)
    rows = []
    for number, burst in enumerate(bursts[1:], 1):
        progress(f"run {number} of {FLAGS.runs}")
        workload = calibration.with_poisson_arrivals(burst, rate, seed + number)
        real = calibration.run_workload(model, config, workload)
        simulated = simulate(EngineSystem(config), workload, cost_model)
        rows.append(
            {
                "measured": calibration.mean_times(
                    workload, real.first_times, real.end_times
                ),
                "simulated": calibration.mean_times(
                    workload, simulated.first_times, simulated.end_times
                ),
                "submissions_s": real.host_seconds,
                "num_steps": [len(real.step_seconds), simulated.num_steps],
            }
        )
    for name in rows[0]["measured"]:
        mine = np.mean([row["measured"][name] for row in rows])
        theirs = np.mean([row["simulated"][name] for row in rows])
        report.ratios[name] = float(theirs / mine)
        report.row(
            name, f"{mine:.4g}", f"simulated {theirs:.4g}", f"{theirs / mine:.3f}"
        )
    report.details = {"runs": rows, "coefficients": dict(fitted.coefficients)}
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
