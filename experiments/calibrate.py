"""The engine on this machine beside a simulator that was fitted to it.

    python -m experiments.calibrate
    python -m experiments.calibrate --model random:gpt2

First a burst of requests runs on the real engine, a step a call, and a cost model is
fitted to the times of its steps (`jpaged.simulator.buckets`). Then other requests
arrive by chance, --load of what the burst got through, on the real engine's clock and
in the simulator: printed are the means of both. Nothing of the second part is fitted.

Time: about 20 s on two CPU cores for the bundled model, once the engine is compiled.
Expected on a machine with nothing else to do: mean latency and makespan within 5 %.
What other processes take is in the engine's numbers and not in the simulator's.
"""

from __future__ import annotations

import sys

import numpy as np
from absl import app, flags

from experiments.lib import calibration as calibration
from experiments.lib.timing import Report, progress
from jpaged.models import load_model
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.engine_system import EngineSystem

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("model", "tiny-python", "As for `jpaged.load_model`.")
    flags.DEFINE_integer("num_requests", 40, "Of each run.", lower_bound=2)
    flags.DEFINE_integer("longest", 150, "Tokens of a prompt, or of an output.")
    flags.DEFINE_integer("max_num_seqs", 16, "Sequences at once.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 256, "Of the pool.", lower_bound=1)
    flags.DEFINE_integer("bursts", 3, "Measured to fit.", lower_bound=1)
    flags.DEFINE_integer("runs", 3, "Compared, each with a seed of its own.")
    flags.DEFINE_float("load", 0.7, "Arrivals, of what the burst got through.")
    flags.DEFINE_integer("seed", 0, "Of lengths and arrivals.")


def main(argv: list[str]) -> int:
    """Reads flags, measures, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken but flags, got {argv[1]!r}")
    count, seed = FLAGS.num_requests, FLAGS.seed
    bursts = [
        calibration.short_requests(count, FLAGS.longest, seed + number)
        for number in range(1 + FLAGS.runs)
    ]
    try:
        config = calibration.engine_config(
            bursts, max_num_seqs=FLAGS.max_num_seqs, num_blocks=FLAGS.num_blocks
        )
        model = load_model(FLAGS.model)
    except (ValueError, OSError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    progress("measuring steps: all requests at once")
    measured = [
        calibration.serve(model, config, bursts[0]) for _ in range(FLAGS.bursts)
    ]
    cost_model, fitted = calibration.fit_engine(config, bursts[0], measured)
    report = Report()
    for name, seconds in fitted.coefficients.items():
        report.row(f"fitted: {name}", f"{1e3 * seconds:.4g} ms")
    report.row("left over, mean of a step", f"{100 * fitted.mean_error:.1f} %")
    took = np.median([np.max(run.end_times) for run in measured])
    rows = []
    for number, burst in enumerate(bursts[1:], 1):
        progress(f"run {number} of {FLAGS.runs}")
        workload = calibration.arriving(burst, FLAGS.load * count / took, seed + number)
        real = calibration.serve(model, config, workload)
        simulated = simulate(EngineSystem(config), workload, cost_model)
        rows.append(
            {
                "measured": calibration.means(
                    workload, real.first_times, real.end_times
                ),
                "simulated": calibration.means(
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
    used = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in used})
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
