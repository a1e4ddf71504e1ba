"""Searches scheduler settings in simulation and runs the winner on the real engine.

    python -m experiments.search_policy
    python -m experiments.search_policy --settings 200 --objective ttft_s

A cost model of this machine is fitted to a burst of requests on the real engine. Then
`--settings` combinations of weights of the policy `weighted`, watermark, prompt chunk
and number of rows run as the batch axis of one compiled simulation, on requests that
arrive faster than they are served. The best setting, and first come first served, then
run on the real engine with the same arrivals.

Setting 0 is first come first served with the engine's defaults. A policy knows prompts
and generated tokens, but not the lengths of outputs.

Time: about a minute on two CPU cores once the engine is compiled. Expected: the winner
admits short prompts first, and its mean is about 0.9 of that of setting 0 in the
simulation. On the real engine it is similar, up to the noise of the machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.lib import calibration, runner
from experiments.lib.runner import Report, progress
from jpaged.config import EngineConfig
from jpaged.models import Decoder, load_model
from jpaged.policies import WEIGHTED
from jpaged.simulator.simulate import sweep
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload

FLAGS = flags.FLAGS
OBJECTIVES = ("normalized_latency_s", "latency_s", "ttft_s")


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "The model, as for jpaged.load_model.")
    flags.DEFINE_integer("settings", 100, "Settings to simulate.", lower_bound=2)
    flags.DEFINE_enum(
        "objective", "normalized_latency_s", OBJECTIVES, "Time whose mean is minimised."
    )
    flags.DEFINE_integer("num_requests", 60, "Requests of each run.", lower_bound=2)
    flags.DEFINE_integer("longest", 150, "Most tokens of a prompt and of an output.")
    flags.DEFINE_integer("max_num_seqs", 8, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 64, "Blocks of the pool.", lower_bound=1)
    flags.DEFINE_float("load", 4.0, "Arrival rate as a multiple of the burst's rate.")
    flags.DEFINE_integer("seed", 0, "Seed of settings, lengths and arrivals.")


def sample_settings(count: int, config: EngineConfig, seed: int) -> list[EngineConfig]:
    """The config itself and `count` - 1 configs with random scheduler parameters."""
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
    """The parameters that differ between settings."""
    weights = dict(zip(WEIGHTED, config.policy_parameters, strict=True))
    return {
        "weights": {name: round(value, 3) for name, value in weights.items() if value},
        "watermark": round(config.watermark, 3),
        "max_prompt_chunk": config.max_prompt_chunk,
        "max_num_seqs": config.max_num_seqs,
    }


def print_best(
    report: Report, settings: Sequence[EngineConfig], scores: np.ndarray
) -> None:
    """Prints the five best settings and the first one."""
    for index in [*np.argsort(scores, kind="stable")[:5].tolist(), 0]:
        about = describe(settings[index])
        weights = ", ".join(f"{k} {v:g}" for k, v in about.pop("weights").items())
        rest = ", ".join(f"{k} {v}" for k, v in about.items())
        about = f"{weights or 'fcfs'}; {rest}"
        report.row(f"setting {index}", f"{scores[index]:.4g}", about)


def run_winner(
    report: Report,
    model: Decoder,
    settings: dict[str, EngineConfig],
    workload: Workload,
    simulated: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Runs settings on the real engine and prints both sides.

    Args:
      report: Gets the rows and the ratios.
      model: The model.
      settings: The settings "fcfs" and "winner".
      workload: The requests.
      simulated: Simulated mean times of each setting.

    Returns:
      For each setting its parameters, simulated and measured times.
    """
    found, objective = {}, FLAGS.objective
    for name, setting in settings.items():
        progress(f"{name}: on the real engine")
        run = calibration.run_workload(model, setting, workload)
        real = calibration.mean_times(workload, run.first_times, run.end_times)
        found[name] = {
            "setting": describe(setting),
            "simulated": simulated[name],
            "measured": real,
        }
        report.row(
            f"{name}: mean {objective}",
            f"{real[objective]:.4g}",
            f"simulated {simulated[name][objective]:.4g}",
        )
    for kind in ("simulated", "measured"):
        before, after = (found[name][kind][objective] for name in ("fcfs", "winner"))
        report.ratios[kind] = after / before
        report.row(f"winner / fcfs, {kind}", f"{after / before:.3f}")
    return found


def main(argv: list[str]) -> None:
    """Searches the settings, runs the winner and prints the results."""
    del argv
    count, seed = FLAGS.num_requests, FLAGS.seed
    burst, other = (
        calibration.short_requests(count, FLAGS.longest, number)
        for number in (seed, seed + 1)
    )
    with runner.user_errors("search_policy"):
        config = calibration.calibration_config(
            [burst, other],
            max_num_seqs=FLAGS.max_num_seqs,
            num_blocks=FLAGS.num_blocks,
            policy="weighted",
            policy_parameters=(0.0,) * len(WEIGHTED),
        )
        model = load_model(FLAGS.model)
    report = Report()
    progress("measuring steps: all requests at once")
    measured = [calibration.run_workload(model, config, burst) for _ in range(2)]
    cost_model, _ = calibration.fit_engine(config, burst, measured)
    took = np.median([np.max(run.end_times) for run in measured])
    rate = float(FLAGS.load * count / took)
    workload = calibration.with_poisson_arrivals(other, rate, seed + 1)

    progress(f"simulating {FLAGS.settings} settings")
    settings = sample_settings(FLAGS.settings, config, seed)
    begin = time.perf_counter()
    outcomes = sweep([EngineSystem(one) for one in settings], workload, cost_model)
    sweep_s = time.perf_counter() - begin
    simulated = [
        calibration.mean_times(workload, one.first_times, one.end_times)
        for one in outcomes
    ]
    scores = np.array([one[FLAGS.objective] for one in simulated])
    print_best(report, settings, scores)
    report.row("simulating all, with compiling", f"{sweep_s:.1f} s")

    chosen = {"fcfs": 0, "winner": int(np.argmin(scores))}
    found = run_winner(
        report,
        model,
        {name: settings[index] for name, index in chosen.items()},
        workload,
        {name: simulated[index] for name, index in chosen.items()},
    )
    report.details = found | {"sweep_s": sweep_s, "num_settings": len(settings)}
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
