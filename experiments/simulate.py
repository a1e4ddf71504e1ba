"""Simulate a workload on the engine's own scheduler, or on a baseline.

    python -m experiments.simulate
    python -m experiments.simulate --system orca_max --rate 2 --duration 900
    python -m experiments.simulate --trace lengths.csv --model opt-66b --gpu a100-40g \
        --num_chips 4 --rate 0.8

Runs requests through a serving system with a cost model in place of the decoder.
`--system vllm` is the engine itself (`jpaged.engine`: scheduler, block manager,
preemption); most other systems are the baselines of the paper. Without --trace, lengths
come from built-in distributions (--lengths). A trace is a CSV file with input_tokens
and output_tokens, and optionally timestamp_s; or JSON lines in the format of Mooncake,
whose prompts share prefixes. Without times, arrivals are Poisson at --rate for
--duration seconds, as in the paper's driver. Outputs have the lengths of the trace.

Requests that do not fit into the memory at all are skipped and counted.

The duration of a step comes from --cost_model. The default is a roofline of the model
and its chips (`jpaged.simulator.costs.roofline`), from data sheets and measured
efficiency; `--step_s` is the host's part. KV memory is the memory that the parameters
leave free. In the paper's settings (its models on its chips), the memory is the
paper's, and a step with prompts and decoding rows takes as long as two steps, as in the
code of its figures. With `--noseparate_prompts`, such a step reads the weights once, as
the engine does.

Time: an hour of ShareGPT at 2 requests per second takes about 13 s for the engine and
2 s for a baseline, after compiling (10 s), on one core. Expected: Orca (Max) batches
7.00 requests of OPT-13B on an A100 with 40 GB (figure 13), and the engine about four
times as many.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.lib import runner
from experiments.lib.option_flags import define_option_flags, given_options
from experiments.lib.runner import environment
from experiments.plan import find_model_config
from jpaged.simulator.costs.adjusted import SeparatePrompts
from jpaged.simulator.costs.base import Machine
from jpaged.simulator.costs.chips import CHIPS, find_chip
from jpaged.simulator.costs.load import CostModel
from jpaged.simulator.costs.registry import COST_MODELS, find_cost_model
from jpaged.simulator.costs.served_models import PAPER_SETTINGS, kv_slots, served_model
from jpaged.simulator.optimum import MOST_ORDERED, alone_seconds, best_order
from jpaged.simulator.simulate import Outcome, simulate
from jpaged.simulator.systems.base import System
from jpaged.simulator.systems.engine_entries import PAPER_BLOCK_SIZE
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.systems.registry import SYSTEMS, find_system
from jpaged.simulator.workloads import traces
from jpaged.simulator.workloads.lengths import BUILTIN_LENGTHS, Lengths
from jpaged.simulator.workloads.workload import Workload, paper_trace

FLAGS = flags.FLAGS
SYSTEM_OPTIONS = {name: entry.options for name, entry in SYSTEMS.items()}
COST_OPTIONS = {name: entry.options for name, entry in COST_MODELS.items()}


def define_flags() -> None:
    """Define the flags when the runner is the main program, not when it is imported."""
    flags.DEFINE_enum("system", "vllm", list(SYSTEMS), "Serving system.")
    flags.DEFINE_enum(
        "cost_model", "roofline", list(COST_MODELS), "What computes a step's duration."
    )
    define_option_flags(
        option
        for options in [*SYSTEM_OPTIONS.values(), *COST_OPTIONS.values()]
        for option in options
    )
    flags.DEFINE_string("trace", None, "File of requests: .csv, .jsonl, or .gz of one.")
    flags.DEFINE_enum(
        "lengths", "sharegpt", list(BUILTIN_LENGTHS), "Lengths if there is no trace."
    )
    flags.DEFINE_float("rate", 2.0, "Requests per second.", lower_bound=1e-6)
    flags.DEFINE_float("duration", 600.0, "Seconds of arrivals.", lower_bound=1e-2)
    flags.DEFINE_integer("seed", 0, "Of arrivals, lengths and their order.")
    flags.DEFINE_string("model", "opt-13b", "Name of a shape, or a checkpoint folder.")
    flags.DEFINE_enum(
        "gpu", None, list(CHIPS), "Chip; default: the paper's for its models, a100-80g."
    )
    flags.DEFINE_integer(
        "num_chips", None, "Tensor parallelism; default: the paper's, 1.", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_slots", None, "Tokens of KV memory; default: see above.", lower_bound=1
    )
    flags.DEFINE_bool(
        "separate_prompts",
        None,
        "A step with prompts and decoding rows takes as long as two steps; default: in "
        "the paper's settings.",
    )
    flags.DEFINE_integer("n", 1, "Samples of each request.", lower_bound=1)
    flags.DEFINE_integer("beam_width", 0, "Beam width; 0: sampling.", lower_bound=0)
    flags.DEFINE_integer(
        "max_num_seqs",
        None,
        "Most running sequences; default: three times the mean number of requests that "
        "fit into memory, as a power of two from 8 to 256.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "max_model_len", None, "Skip longer requests; default: what fits into memory."
    )
    flags.DEFINE_bool(
        "cache_groups",
        True,
        "Layers with a sliding window give blocks back, as in `LLM`; of the engine.",
    )
    flags.DEFINE_bool("bounds", False, "Also compute bounds of the normalized latency.")
    flags.DEFINE_bool("skip_empty", False, "Skip lengths of 0 instead of failing.")


def make_workload() -> Workload:
    """Return the requests that the flags describe."""
    found: Workload | Lengths | str = FLAGS.lengths
    if FLAGS.trace is not None:
        found = traces.read_trace(FLAGS.trace, skip_empty=FLAGS.skip_empty)
    if not isinstance(found, Workload):
        found = paper_trace(found, FLAGS.rate, FLAGS.duration, FLAGS.seed)
    if FLAGS.max_model_len is not None:
        found = found.limited(FLAGS.max_model_len)
    if FLAGS.beam_width:
        return found.with_beams(FLAGS.beam_width)
    return found.with_samples(FLAGS.n) if FLAGS.n > 1 else found


def default_num_seqs(workload: Workload, num_slots: int) -> int:
    """Return enough running sequences that memory limits the batch, up to 256."""
    mean = float(np.mean(workload.prompt_lens + workload.output_lens))
    least = max(3 * num_slots / mean, FLAGS.n, FLAGS.beam_width, 8)
    return min(1 << math.ceil(math.log2(least)), 256)


def make_cost_model() -> tuple[CostModel, int, dict[str, Any]]:
    """Return the cost model, the KV slots, and the values to report about them."""
    setting = PAPER_SETTINGS.get(FLAGS.model.lower())
    chip_name = FLAGS.gpu or (setting.chip if setting else "a100-80g")
    if setting is not None and chip_name != setting.chip:
        setting = None
    num_chips = FLAGS.num_chips or (setting.num_chips if setting else 1)
    if setting is not None and num_chips != setting.num_chips:
        setting = None
    machine = Machine(served_model(FLAGS.model), find_chip(chip_name), num_chips)
    slots, source = FLAGS.num_slots, "--num_slots"
    if slots is None and setting is not None:
        slots, source = setting.kv_slots, setting.source
    elif slots is None:
        slots = kv_slots(machine.model, machine.chip, num_chips)
        source = "what parameters leave of 0.9"
    options = given_options("cost_model", FLAGS.cost_model, COST_OPTIONS)
    cost_model = find_cost_model(FLAGS.cost_model, machine, **options)
    is_separate = FLAGS.separate_prompts
    if is_separate is None:
        is_separate = setting is not None
    if is_separate:
        cost_model = SeparatePrompts(cost_model)
    report = {"gpu": chip_name, "num_chips": num_chips, "num_slots": slots}
    report |= {"num_slots_source": source, "separate_prompts": is_separate}
    return cost_model, slots, report


def make_system(workload: Workload, num_slots: int) -> tuple[System, Workload]:
    """Return the system that the flags describe, and the requests that it can serve.

    Raises:
      ValueError: a flag of another system is given, or no requests remain.
    """
    entry = SYSTEMS[FLAGS.system]
    options = given_options("system", FLAGS.system, SYSTEM_OPTIONS)
    num_beams = max(FLAGS.beam_width, 1)
    workload = workload.limited(entry.max_request_len(num_slots, num_beams, options))
    if not len(workload):
        raise ValueError(
            "trace: expected requests that fit into memory, got no requests (skipped: "
            f"{dict(workload.skipped)}); raise --rate or --duration, or the memory"
        )
    sizes: dict[str, Any] = {
        "max_num_seqs": FLAGS.max_num_seqs or default_num_seqs(workload, num_slots)
    }
    if entry.is_engine and FLAGS.cache_groups:
        sizes["layer_windows"] = find_model_config(FLAGS.model).windows
    return entry.from_options(workload, num_slots, options, **sizes), workload


def bounds(
    system: System, workload: Workload, cost_model: CostModel, outcome: Outcome
) -> dict[str, dict[str, float]]:
    """Compute bounds of the normalized latency, and the share of each that is reached.

    `alone`: each request runs alone; no schedule is faster. `unlimited_memory`: the
    engine with a batch row and memory for every request, up to 1,024 rows; no system
    that admits all requests at once batches better. `best_order`, only for the engine
    with few requests: the best of all orders of admission.
    """
    lens = workload.output_lens
    num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
    rows = min(1 << math.ceil(math.log2(max(int(np.sum(num_seqs)), 8))), 1024)
    block_size = FLAGS.block_size or PAPER_BLOCK_SIZE
    longest = int(np.max(workload.prompt_lens + lens)) + block_size
    large = find_system("vllm", workload, rows * longest, max_num_seqs=rows)
    unlimited = simulate(large, workload, cost_model).summary()["normalized_latency_s"]
    lines = {
        "alone": float(np.mean(alone_seconds(workload, cost_model) / lens)),
        "unlimited_memory": unlimited,
    }
    if isinstance(system, EngineSystem) and len(workload) <= MOST_ORDERED:
        _, best = best_order(system, workload, cost_model)
        lines["best_order"] = best.summary()["normalized_latency_s"]
    mine = outcome.summary()["normalized_latency_s"]
    return {
        name: {"normalized_latency_s": value, "share": value / mine}
        for name, value in lines.items()
    }


def print_table(found: dict[str, Any], outcome: Outcome) -> None:
    """Print the numbers as a table."""
    for name in (
        "num_requests",
        "num_skipped",
        "mean_batched_requests",
        "mean_waiting_requests",
        "normalized_latency_s",
        "mean_ttft_s",
        "mean_tpot_s",
        "output_tokens_per_s",
        "num_preemptions",
        "prefix_hit_ratio",
        "kv_saved_share",
        "makespan_s",
    ):
        value = found[name]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:<26}{text:>14}")
    print("KV memory in use or lost, over time:")
    for name, share in outcome.composition.items():
        print(f"  {name:<24}{share:>13.1%}")
    for reason, count in outcome.workload.skipped.items():
        print(f"skipped: {count} requests of {reason}")


def main(argv: list[str]) -> None:
    """Read the flags, simulate, and print the results."""
    del argv
    try:
        cost_model, num_slots, report = make_cost_model()
        system, workload = make_system(make_workload(), num_slots)
        begin = time.perf_counter()
        with tqdm(total=len(workload), unit="request", mininterval=2) as bar:

            def on_progress(done: int, _: int) -> None:
                bar.update(done - bar.n)

            outcome = simulate(system, workload, cost_model, on_progress=on_progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    wall_s = time.perf_counter() - begin
    found = outcome.summary()
    print_table(found, outcome)
    if FLAGS.bounds:
        found["bounds"] = bounds(system, workload, cost_model, outcome)
        for name, line in found["bounds"].items():
            value, share = line["normalized_latency_s"], line["share"]
            print(f"{name:<26}{value:>12.4g} s/token, {share:.1%} of it reached")
    print(f"{outcome.num_steps} steps in {wall_s:.1f} s, compiling included")
    flags_given = {name: FLAGS[name].value for name in ("system", "model", "trace")}
    if isinstance(system, EngineSystem):
        report["group_windows"] = system.config.group_windows
    flags_given |= {"rate": FLAGS.rate, "duration": FLAGS.duration, "seed": FLAGS.seed}
    print(
        json.dumps(
            found | report | {"wall_s": wall_s, "flags": flags_given} | environment()
        )
    )


if __name__ == "__main__":
    runner.start(main, define_flags)
