"""A workload on a virtual clock: through the engine's own scheduler, or a baseline.

    python -m experiments.simulate
    python -m experiments.simulate --system orca_max --rate 2 --duration 900
    python -m experiments.simulate --trace lengths.csv --model opt-66b --gpu a100-40g \
        --num_chips 4 --rate 0.8

Replays requests through a serving system whose decoder is a cost model: `--system vllm`
is the engine itself (`jpaged.engine`: scheduler, block manager, preemption), the others
are the baselines of the paper. Without --trace, lengths come from built-in
distributions (--lengths). A trace is a CSV with input_tokens and output_tokens, and
with timestamp_s its own arrivals; or JSON lines as of Mooncake, whose prompts share
prefixes. Without times, arrivals are Poisson at --rate for --duration seconds, as the
paper's driver makes them. Outputs have the lengths that the trace says.

Requests that the memory could never hold are skipped and counted.

Seconds of a step come from a roofline of model and chips (`jpaged.simulator.roofline`):
data sheets and measured shares of them, `--step_s` being the host's part. The memory is
what the parameters leave. In the paper's settings, its models on its chips, the memory
is the paper's, and a step of prompts and decodes takes what two steps take, as in the
code of its figures; with `--noseparate_prompts` it reads the weights once, as the
engine does.

Time: an hour of ShareGPT at 2 requests a second takes the engine about 13 s, a baseline
2 s, after compiling (10 s), on one core. Expected: Orca (Max) batches 7.00 requests of
OPT-13B on an A100 with 40 GB (figure 13), the engine about four times as many.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.lib import runner
from experiments.lib.runner import environment
from jpaged.simulator.costs.chips import CHIPS, find_chip
from jpaged.simulator.costs.load import CostModel
from jpaged.simulator.costs.roofline import VLLM_2023_STEP_S, Roofline
from jpaged.simulator.costs.separate import Separate
from jpaged.simulator.costs.served_models import PAPER_SETTINGS, kv_slots, served_model
from jpaged.simulator.optimum import MOST_ORDERED, alone_seconds, best_order
from jpaged.simulator.simulate import Outcome, simulate
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.systems.registry import ENGINES, SYSTEMS, find_system
from jpaged.simulator.workloads import traces
from jpaged.simulator.workloads.lengths import BUILTIN_LENGTHS, Lengths
from jpaged.simulator.workloads.workload import Workload, paper_trace

FLAGS = flags.FLAGS
BASELINE_MAX_LEN = 2048  # tokens of a baseline's longest sequence (the paper's)


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_enum("system", "vllm", list(SYSTEMS), "Who serves.")
    flags.DEFINE_string("trace", None, "File of requests: .csv, .jsonl, or .gz of one.")
    flags.DEFINE_enum(
        "lengths", "sharegpt", list(BUILTIN_LENGTHS), "Without a trace: whose lengths."
    )
    flags.DEFINE_float("rate", 2.0, "Requests a second.", lower_bound=1e-6)
    flags.DEFINE_float("duration", 600.0, "Seconds of arrivals.", lower_bound=1e-2)
    flags.DEFINE_integer("seed", 0, "Of arrivals, lengths and their order.")
    flags.DEFINE_string(
        "model", "opt-13b", "Name of its shape, or a checkpoint folder."
    )
    flags.DEFINE_enum(
        "gpu", None, list(CHIPS), "Chip; the paper's for its models, else a100-80g."
    )
    flags.DEFINE_integer(
        "num_chips", None, "Tensor parallelism; the paper's, else 1.", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_slots", None, "Tokens of KV memory; None: see above.", lower_bound=1
    )
    flags.DEFINE_float(
        "step_s", VLLM_2023_STEP_S, "Seconds of a step on the host.", lower_bound=0.0
    )
    flags.DEFINE_bool(
        "separate_prompts",
        None,
        "A step of prompts and decodes takes what two take; None: in the paper's "
        "settings.",
    )
    flags.DEFINE_integer("n", 1, "Samples of each request.", lower_bound=1)
    flags.DEFINE_integer("beam_width", 0, "0: sampling.", lower_bound=0)
    flags.DEFINE_integer(
        "max_num_seqs",
        None,
        "Sequences at once; None: thrice the mean requests that memory holds, a power "
        "of two from 8 to 256.",
        lower_bound=1,
    )
    flags.DEFINE_integer("block_size", 16, "Of the engine.", lower_bound=1)
    flags.DEFINE_integer(
        "max_model_len", None, "Longer requests are skipped; None: what memory holds."
    )
    flags.DEFINE_bool("prefix_caching", None, "Of the engine; None: if prompts share.")
    flags.DEFINE_enum(
        "preemption", "recompute", ["recompute", "swap"], "Of the engine."
    )
    flags.DEFINE_string("policy", None, "Of the engine: who is admitted first.")
    flags.DEFINE_multi_float("policy_parameters", [], "A weight each, of 'weighted'.")
    flags.DEFINE_bool(
        "bounds", False, "Beside it: each request alone, and memory without limit."
    )
    flags.DEFINE_bool(
        "skip_empty", False, "Skip lengths of 0 instead of refusing them."
    )


def make_workload() -> Workload:
    """The requests that the flags ask for."""
    found: Workload | Lengths | str = FLAGS.lengths
    if FLAGS.trace is not None:
        found = traces.read(FLAGS.trace, skip_empty=FLAGS.skip_empty)
    if not isinstance(found, Workload):
        found = paper_trace(found, FLAGS.rate, FLAGS.duration, FLAGS.seed)
    if FLAGS.max_model_len is not None:
        found = found.limited(FLAGS.max_model_len)
    if FLAGS.beam_width:
        return found.with_beams(FLAGS.beam_width)
    return found.with_samples(FLAGS.n) if FLAGS.n > 1 else found


def fitting(workload: Workload, num_slots: int) -> Workload:
    """The requests that the system can serve at all; the others are counted.

    The engine has to hold each sequence alone, and beams together; a baseline's longest
    sequence is fixed.
    """
    if FLAGS.system not in ENGINES:
        return workload.limited(min(BASELINE_MAX_LEN, num_slots))
    blocks = num_slots // FLAGS.block_size // max(FLAGS.beam_width, 1)
    return workload.limited(blocks * FLAGS.block_size)


def max_num_seqs(workload: Workload, num_slots: int) -> int:
    """The flag, or rows that will not limit the batch where memory does."""
    if FLAGS.max_num_seqs is not None:
        return FLAGS.max_num_seqs
    mean = float(np.mean(workload.prompt_lens + workload.output_lens))
    wanted = max(3 * num_slots / mean, FLAGS.n, FLAGS.beam_width, 8)
    return min(1 << math.ceil(math.log2(wanted)), 256)


def make_machine() -> tuple[CostModel, int, dict[str, Any]]:
    """The cost model, the slots of the memory, and what to say of them."""
    setting = PAPER_SETTINGS.get(FLAGS.model.lower())
    chip_name = FLAGS.gpu or (setting.chip if setting else "a100-80g")
    is_papers = setting is not None and chip_name == setting.chip
    num_chips = FLAGS.num_chips or (setting.num_chips if is_papers else 1)
    is_papers = is_papers and num_chips == setting.num_chips
    model, chip = served_model(FLAGS.model), find_chip(chip_name)
    slots, source = FLAGS.num_slots, "--num_slots"
    if slots is None and is_papers:
        slots, source = setting.kv_slots, setting.source
    elif slots is None:
        slots, source = kv_slots(model, chip, num_chips), "what parameters leave of 0.9"
    cost_model: CostModel = Roofline.of(model, chip, num_chips, step_s=FLAGS.step_s)
    params = FLAGS.separate_prompts
    is_separate = is_papers if params is None else params
    if is_separate:
        cost_model = Separate(cost_model)
    said = {"gpu": chip_name, "num_chips": num_chips, "num_slots": slots}
    said |= {"num_slots_source": source, "separate_prompts": is_separate}
    return cost_model, slots, said


def make_system(workload: Workload, num_slots: int) -> Any:
    """The system that the flags ask for.

    Raises:
      ValueError: a flag of the engine beside another system.
    """
    sizes: dict[str, Any] = {"max_num_seqs": max_num_seqs(workload, num_slots)}
    own = (
        "block_size",
        "prefix_caching",
        "preemption",
        "policy",
        "policy_parameters",
    )
    if FLAGS.system not in ENGINES:
        for name in own:
            if FLAGS[name].present:
                raise ValueError(
                    f"--{name}: expected none with --system {FLAGS.system}, it is the "
                    f"engine's ({', '.join(ENGINES)}); got {FLAGS[name].value!r}"
                )
        return find_system(FLAGS.system, workload, num_slots, **sizes)
    sizes |= {"block_size": FLAGS.block_size, "preemption": FLAGS.preemption}
    if FLAGS.preemption == "swap":
        sizes["num_swap_blocks"] = num_slots // FLAGS.block_size
    if FLAGS.policy is not None:
        sizes["policy"] = FLAGS.policy
        sizes["policy_parameters"] = tuple(FLAGS.policy_parameters)
    shares = FLAGS.prefix_caching
    if shares is None and FLAGS.system == "vllm":
        shares = workload.contents is not None
    if shares is not None:
        sizes["enable_prefix_caching"] = shares
    return find_system(FLAGS.system, workload, num_slots, **sizes)


def bounds(
    system: Any, workload: Workload, cost_model: CostModel, outcome: Outcome
) -> dict:
    """Lines to measure the normalized latency by, and the shares of them it reaches.

    `alone`: no schedule passes it. `unlimited_memory`: the engine with a row and memory
    for everybody, up to 1,024 rows: the best batching of those that let all in at once.
    `best_order`, of an engine with few requests: the best of all orders of admission.
    """
    lens = workload.output_lens
    num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
    rows = min(1 << math.ceil(math.log2(max(int(np.sum(num_seqs)), 8))), 1024)
    longest = int(np.max(workload.prompt_lens + lens)) + FLAGS.block_size
    roomy = find_system("vllm", workload, rows * longest, max_num_seqs=rows)
    free = simulate(roomy, workload, cost_model).summary()["normalized_latency_s"]
    lines = {
        "alone": float(np.mean(alone_seconds(workload, cost_model) / lens)),
        "unlimited_memory": free,
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
    """The numbers for people."""
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
    """Reads the flags, simulates, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    try:
        cost_model, num_slots, said = make_machine()
        workload = fitting(make_workload(), num_slots)
        if not len(workload):
            raise ValueError(
                "no requests: nothing arrives, or none can be served, skipped "
                f"{dict(workload.skipped)}; raise --rate or --duration, or the memory"
            )
        system = make_system(workload, num_slots)
        begin = time.perf_counter()
        with tqdm(total=len(workload), unit="request", mininterval=2) as bar:
            outcome = simulate(
                system,
                workload,
                cost_model,
                on_progress=lambda done, _: bar.update(done - bar.n),
            )
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
    flags_given |= {"rate": FLAGS.rate, "duration": FLAGS.duration, "seed": FLAGS.seed}
    print(
        json.dumps(
            found | said | {"wall_s": wall_s, "flags": flags_given} | environment()
        )
    )


if __name__ == "__main__":
    runner.start(main, define_flags)
