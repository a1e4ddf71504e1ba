"""Predict a measured run of a serving system from a profile of its device.

    python -m experiments.predict --workload workload.jsonl.gz --measured requests.csv \
        --dense dense.csv --attention attention.csv.gz --per_sequence per_sequence.csv

The engine's scheduler serves the workload on a clock that the profile drives. The
profile has the measured times of the operations of one layer
(`jpaged.simulator.costs.profiles`). The output compares the predicted means with those
of the measured requests. --step_s adds host time to each step, which such profiles do
not include; the default is 0. Nothing is fitted.

The workload is JSON lines with arrival_s, input_length, output_length and hash_ids. The
measured CSV file has a row per request with ttft_s (since the request was queued),
tpot_s and e2e_s.

Time: under a minute. Expected, for Llama-3.1-8B under vLLM 0.19 on an RTX PRO 6000 with
a profile of its operations: time per token and makespan within 5 %, and a time to the
first token that is 12 % too short, because all missing time adds up in the queue. With
2 ms of host time per step, all three are within 2 %.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from absl import flags

from experiments.lib import runner
from experiments.lib.option_flags import define_option_flags, given_options
from experiments.lib.runner import environment
from jpaged.simulator.costs import profiles
from jpaged.simulator.costs.base import Machine
from jpaged.simulator.costs.chips import CHIPS, find_chip
from jpaged.simulator.costs.load import CostModel
from jpaged.simulator.costs.profile_files import read_table
from jpaged.simulator.costs.served_models import kv_slots, served_model
from jpaged.simulator.simulate import Outcome, simulate
from jpaged.simulator.systems.engine_entries import make_engine_system
from jpaged.simulator.workloads import traces
from jpaged.simulator.workloads.workload import Workload

FLAGS = flags.FLAGS
OPTIONS = profiles.ENTRY.options
_COLUMNS = ("ttft_s", "tpot_s", "e2e_s")


def define_flags() -> None:
    """Define the flags when the runner is the main program, not when it is imported."""
    flags.DEFINE_string("workload", None, "Requests, with times and lengths.")
    define_option_flags(OPTIONS)
    for name in ("workload", "dense", "attention", "per_sequence"):
        flags.mark_flag_as_required(name)
    flags.DEFINE_string("measured", None, "Measured requests; default: no comparison.")
    flags.DEFINE_string("model", "llama-3-8b", "Name of a shape, or a folder.")
    flags.DEFINE_enum("gpu", "rtx-pro-6000", list(CHIPS), "For memory and copies.")
    flags.DEFINE_integer("num_slots", None, "Tokens of KV memory.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 128, "Most running sequences.", lower_bound=1)
    flags.DEFINE_integer(
        "max_num_batched_tokens", 2048, "Most tokens of a step.", lower_bound=1
    )


def read_measured(path: str, num_requests: int) -> dict[str, np.ndarray]:
    """Read the measured columns, f64[N] each.

    Raises:
      OSError: the file cannot be read.
      ValueError: a column is missing, a value is not a number of at least 0 (with its
        line), or the number of rows is not `num_requests`.
    """
    table = read_table(path)
    if len(table.lines) != num_requests:
        raise ValueError(
            f"measured: expected {num_requests} rows, one for each request of the "
            f"workload, got {len(table.lines)}"
        )
    return {name: table.numbers(name) for name in _COLUMNS}


def predict(
    workload: Workload, cost_model: CostModel, num_slots: int, **sizes: Any
) -> Outcome:
    """Simulate the engine with its prefix cache."""
    system = make_engine_system(
        workload, num_slots, enable_prefix_caching=True, **sizes
    )
    return simulate(system, workload, cost_model)


def compare_means(
    outcome: Outcome, measured: dict[str, np.ndarray] | None
) -> list[dict[str, Any]]:
    """Return a row for each mean: measured, predicted, and their ratio."""
    ends = outcome.end_times - outcome.workload.arrivals
    predicted = {
        "mean_ttft_s": float(np.mean(outcome.times_to_first_token)),
        "mean_tpot_s": float(np.mean(outcome.times_per_token)),
        "mean_e2e_s": float(np.mean(ends)),
        "makespan_s": outcome.makespan,
    }
    means: dict[str, float] = {}
    if measured is not None:
        arrivals = outcome.workload.arrivals
        means = {f"mean_{name}": float(np.mean(measured[name])) for name in _COLUMNS}
        means["makespan_s"] = float(np.max(arrivals + measured["e2e_s"]) - arrivals[0])
    return [
        {
            "quantity": name,
            "measured": means.get(name),
            "predicted": value,
            "ratio": value / means[name] if name in means else None,
        }
        for name, value in predicted.items()
    ]


def main(argv: list[str]) -> None:
    """Read the flags, predict, and print the table."""
    del argv
    try:
        workload = traces.read_trace(FLAGS.workload)
        if not isinstance(workload, Workload):
            raise ValueError(
                f"workload: expected a trace with times, got {FLAGS.workload}"
            )
        measured = None
        if FLAGS.measured is not None:
            measured = read_measured(FLAGS.measured, len(workload))
        model, chip = served_model(FLAGS.model), find_chip(FLAGS.gpu)
        options: dict[str, Any] = {"step_s": 0.0}
        options |= given_options("profile", "profile", {"profile": OPTIONS})
        profile = profiles.build(Machine(model, chip), **options)
        profile.check_range(
            max_tokens=FLAGS.max_num_batched_tokens,
            max_context=int(np.max(workload.prompt_lens + workload.output_lens)),
            max_rows=min(FLAGS.max_num_seqs, len(workload)),
        )
        outcome = predict(
            workload,
            profile,
            FLAGS.num_slots or kv_slots(model, chip),
            max_num_seqs=FLAGS.max_num_seqs,
            max_num_batched_tokens=FLAGS.max_num_batched_tokens,
        )
        rows = compare_means(outcome, measured)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{'':<14}{'measured':>12}{'predicted':>12}{'ratio':>8}")
    for row in rows:
        measured_text = "" if row["measured"] is None else f"{row['measured']:.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(
            f"{row['quantity']:<14}{measured_text:>12}{row['predicted']:>12.4g}{ratio:>8}"
        )
    print(json.dumps({"rows": rows, "step_s": options["step_s"]} | environment()))


if __name__ == "__main__":
    runner.start(main, define_flags)
