"""A scheduler's settings searched in simulation, and the winner run on the real engine.

    python -m experiments.search_policy
    python -m experiments.search_policy --settings 200 --objective ttft_s

A burst of requests on the real engine gives a cost model of this machine. Then
--settings settings of the policy `weighted`, the watermark, the prompt chunk and the
rows run side by side as the batch axis of one compiled simulation, on requests that
arrive faster than they are served. The best of them, and first come first served, are
then run on the real engine with the same arrivals, on this machine's clock.

Setting 0 is first come first served with the engine's defaults. A policy sees prompts
and what is known so far, never the lengths of outputs.

Time: about a minute on two CPU cores once the engine is compiled. Expected: the mean of
the winner is about 0.9 of that of setting 0 in the simulation, with short prompts
first, and on the real engine as well, within what else the machine does.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments.lib import calibration as calibration
from experiments.lib.timing import Report, progress
from jpaged.config import EngineConfig
from jpaged.models import load_model
from jpaged.policies import WEIGHTED
from jpaged.simulator.simulate import sweep
from jpaged.simulator.systems.engine_system import EngineSystem

FLAGS = flags.FLAGS
OBJECTIVES = ("normalized_latency_s", "latency_s", "ttft_s")


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("model", "tiny-python", "As for `jpaged.load_model`.")
    flags.DEFINE_integer("settings", 100, "That are tried.", lower_bound=2)
    flags.DEFINE_enum(
        "objective", "normalized_latency_s", OBJECTIVES, "Its mean is to be least."
    )
    flags.DEFINE_integer("num_requests", 60, "Of each run.", lower_bound=2)
    flags.DEFINE_integer("longest", 150, "Tokens of a prompt, or of an output.")
    flags.DEFINE_integer("max_num_seqs", 8, "Sequences at once.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 64, "Of the pool.", lower_bound=1)
    flags.DEFINE_float("load", 4.0, "Arrivals, of what a burst gets through.")
    flags.DEFINE_integer("seed", 0, "Of settings, lengths and arrivals.")


def draw_settings(count: int, config: EngineConfig, seed: int) -> list[EngineConfig]:
    """The config itself, and `count` - 1 others with scheduler's numbers drawn."""
    rng = np.random.default_rng(seed)
    found = [config]
    for _ in range(count - 1):
        weights = dict.fromkeys(WEIGHTED, 0.0)
        weights["arrivals"] = float(rng.choice([0.0, 1.0]))
        weights["prompt_lens"] = float(rng.normal())
        weights["num_tokens"] = float(rng.normal())
        weights["num_preemptions"] = float(rng.normal(scale=10))
        found.append(
            dataclasses.replace(
                config,
                policy_parameters=tuple(weights[name] for name in WEIGHTED),
                watermark=float(rng.uniform(0, 0.3)),
                max_prompt_chunk=int(rng.choice([8, 16, 32, 64])),
                max_num_seqs=int(rng.integers(1, config.max_num_seqs + 1)),
            )
        )
    return found


def describe(config: EngineConfig) -> dict[str, Any]:
    """What a setting decides."""
    weights = dict(zip(WEIGHTED, config.policy_parameters, strict=True))
    return {
        "weights": {name: round(value, 3) for name, value in weights.items() if value},
        "watermark": round(config.watermark, 3),
        "max_prompt_chunk": config.max_prompt_chunk,
        "max_num_seqs": config.max_num_seqs,
    }


def show(report: Report, settings: Sequence[EngineConfig], scores: np.ndarray) -> None:
    """Prints the best settings and the first one."""
    for index in [*np.argsort(scores, kind="stable")[:5].tolist(), 0]:
        about = describe(settings[index])
        weights = ", ".join(f"{k} {v:g}" for k, v in about.pop("weights").items())
        rest = ", ".join(f"{k} {v}" for k, v in about.items())
        about = f"{weights or 'fcfs'}; {rest}"
        report.row(f"setting {index}", f"{scores[index]:.4g}", about)


def main(argv: list[str]) -> int:
    """Reads flags, searches, runs, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken but flags, got {argv[1]!r}")
    count, seed, objective = FLAGS.num_requests, FLAGS.seed, FLAGS.objective
    burst, other = (
        calibration.short_requests(count, FLAGS.longest, number)
        for number in (seed, seed + 1)
    )
    try:
        config = calibration.engine_config(
            [burst, other],
            max_num_seqs=FLAGS.max_num_seqs,
            num_blocks=FLAGS.num_blocks,
            policy="weighted",
            policy_parameters=(0.0,) * len(WEIGHTED),
        )
        model = load_model(FLAGS.model)
    except (ValueError, OSError) as error:
        print(f"search_policy: {error}", file=sys.stderr)
        return 1
    report = Report()
    progress("measuring steps: all requests at once")
    measured = [calibration.serve(model, config, burst) for _ in range(2)]
    cost_model, _ = calibration.fit_engine(config, burst, measured)
    took = np.median([np.max(run.end_times) for run in measured])
    workload = calibration.arriving(other, FLAGS.load * count / took, seed + 1)

    progress(f"simulating {FLAGS.settings} settings")
    settings = draw_settings(FLAGS.settings, config, seed)
    begin = time.perf_counter()
    outcomes = sweep([EngineSystem(one) for one in settings], workload, cost_model)
    sweep_s = time.perf_counter() - begin
    simulated = [
        calibration.means(workload, one.first_times, one.end_times) for one in outcomes
    ]
    scores = np.array([one[objective] for one in simulated])
    winner = int(np.argmin(scores))
    show(report, settings, scores)
    report.row("simulating all, with compiling", f"{sweep_s:.1f} s")

    found = {}
    for name, index in (("fcfs", 0), ("winner", winner)):
        progress(f"{name}: on the real engine")
        run = calibration.serve(model, settings[index], workload)
        real = calibration.means(workload, run.first_times, run.end_times)
        found[name] = {
            "setting": describe(settings[index]),
            "simulated": simulated[index],
            "measured": real,
        }
        report.row(
            f"{name}: mean {objective}",
            f"{real[objective]:.4g}",
            f"simulated {scores[index]:.4g}",
        )
    for kind in ("simulated", "measured"):
        before, after = (found[name][kind][objective] for name in ("fcfs", "winner"))
        report.ratios[kind] = after / before
        report.row(f"winner / fcfs, {kind}", f"{after / before:.3f}")
    report.details = found | {"sweep_s": sweep_s, "num_settings": len(settings)}
    used = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in used})
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
