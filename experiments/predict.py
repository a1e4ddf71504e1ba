"""A measured run of a serving system, predicted from a profile of its device.

    python -m experiments.predict --workload workload.jsonl.gz --measured requests.csv \
        --dense dense.csv --attention attention.csv.gz --per_sequence per_sequence.csv

The engine's scheduler serves the workload on a clock that the profile drives: times of
operations of one layer, measured apart (`jpaged.simulator.profiles`). Beside it stand
the means of the measured requests. --step_s adds what the host needs for each step,
which no such profile has; the default is nothing, and nothing is fitted.

The workload is JSON lines with arrival_s, input_length, output_length and hash_ids; the
measured CSV has ttft_s (from when it was queued), tpot_s and e2e_s, a row a request.

Time: under a minute. Expected, for Llama-3.1-8B under vLLM 0.19 on an RTX PRO 6000 with
a profile of its operations: time per token and makespan within 5 %, and the time to the
first token, in which all that is missing piles up in a queue, 12 % too short; with 2 ms
of host time a step all three within 2 %.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from absl import app, flags

from experiments.lib import runner
from experiments.lib.runner import environment
from jpaged.simulator.costs.chips import CHIPS, find_chip
from jpaged.simulator.costs.profile_files import (
    read_attention,
    read_dense,
    read_per_sequence,
    read_table,
)
from jpaged.simulator.costs.profiles import Profile
from jpaged.simulator.costs.served_models import kv_slots, served_model
from jpaged.simulator.costs.transfers import Transfers
from jpaged.simulator.simulate import Outcome, simulate
from jpaged.simulator.systems.registry import engine_system
from jpaged.simulator.workloads import traces
from jpaged.simulator.workloads.workload import Workload

FLAGS = flags.FLAGS
_COLUMNS = ("ttft_s", "tpot_s", "e2e_s")


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    for name, text in (
        ("workload", "Requests, with times and lengths."),
        ("dense", "Profile: times of a layer's operations by tokens."),
        ("attention", "Profile: times of a layer's attention."),
        ("per_sequence", "Profile: logits and sampler by sequences."),
    ):
        flags.DEFINE_string(name, None, text, required=True)
    flags.DEFINE_string("measured", None, "The run's requests; None: only predicted.")
    flags.DEFINE_string("model", "llama-3-8b", "Name of its shape, or a folder.")
    flags.DEFINE_enum("gpu", "rtx-pro-6000", list(CHIPS), "For memory and copies.")
    flags.DEFINE_integer("num_slots", None, "Tokens of KV memory.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 128, "Sequences at once.", lower_bound=1)
    flags.DEFINE_integer(
        "max_num_batched_tokens", 2048, "Tokens of a step.", lower_bound=1
    )
    flags.DEFINE_float("step_s", 0.0, "Seconds of a step on the host.", lower_bound=0.0)


def read_measured(path: str) -> dict[str, np.ndarray]:
    """The measured columns, f64[N] each.

    Raises:
      OSError, ValueError: no such file; a column is missing, or a value is no number of
        at least 0 (with its line).
    """
    table = read_table(path)
    return {name: table.numbers(name) for name in _COLUMNS}


def predict(
    workload: Workload, cost_model: Any, num_slots: int, **sizes: int
) -> Outcome:
    """The engine, with its prefix cache, on the clock of the cost model."""
    system = engine_system(workload, num_slots, enable_prefix_caching=True, **sizes)
    return simulate(system, workload, cost_model)


def compare(
    outcome: Outcome, measured: dict[str, np.ndarray] | None
) -> list[dict[str, Any]]:
    """A row for each mean: what was measured, what is predicted, and the ratio."""
    ends = outcome.end_times - outcome.workload.arrivals
    here = {
        "mean_ttft_s": float(np.mean(outcome.times_to_first_token)),
        "mean_tpot_s": float(np.mean(outcome.times_per_token)),
        "mean_e2e_s": float(np.mean(ends)),
        "makespan_s": outcome.makespan,
    }
    there: dict[str, float] = {}
    if measured is not None:
        if len(measured["e2e_s"]) != len(outcome.workload):
            raise ValueError(
                f"measured: wanted {len(outcome.workload)} rows, one for each request "
                f"of the workload, got {len(measured['e2e_s'])}"
            )
        arrivals = outcome.workload.arrivals
        there = {f"mean_{name}": float(np.mean(measured[name])) for name in _COLUMNS}
        there["makespan_s"] = float(np.max(arrivals + measured["e2e_s"]) - arrivals[0])
    return [
        {
            "quantity": name,
            "measured": there.get(name),
            "predicted": value,
            "ratio": value / there[name] if name in there else None,
        }
        for name, value in here.items()
    ]


def main(argv: list[str]) -> None:
    """Reads the flags, predicts, prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    try:
        workload = traces.read(FLAGS.workload)
        if not isinstance(workload, Workload):
            raise ValueError(f"{FLAGS.workload}: wanted a trace with times")
        measured = None if FLAGS.measured is None else read_measured(FLAGS.measured)
        model, chip = served_model(FLAGS.model), find_chip(FLAGS.gpu)
        profile = Profile.of(
            model,
            name=FLAGS.dense,
            dense=read_dense(FLAGS.dense),
            attention=read_attention(FLAGS.attention),
            logits=read_per_sequence(FLAGS.per_sequence),
            transfers=Transfers.of(model, chip, 1),
            step_s=FLAGS.step_s,
        )
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
        rows = compare(outcome, measured)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{'':<14}{'measured':>12}{'predicted':>12}{'ratio':>8}")
    for row in rows:
        there = "" if row["measured"] is None else f"{row['measured']:.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(f"{row['quantity']:<14}{there:>12}{row['predicted']:>12.4g}{ratio:>8}")
    print(json.dumps({"rows": rows, "step_s": FLAGS.step_s} | environment()))


if __name__ == "__main__":
    runner.start(main, define_flags)
