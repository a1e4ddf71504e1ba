"""Benchmarks decode steps and a burst of requests beside the limits and a baseline.

    python -m experiments.bench_throughput

The model is a Llama of 110M parameters in float32 with random weights; flags set other
sizes. All figures are medians, and contenders run in turn. Parts (`--parts`):
  limits     read bandwidth and float32 GEMM rate of the machine
  step       a decode step at batch 1, 8 and 32 and context 96: its matrix products
             alone, jpaged's `engine.run`, and the baseline of `lib/baseline.py`. Aims:
             at most 1.15 times the products at batch 1 and 1.3 times at 32; 3 times
             the baseline's tokens/s at 32
  attention  attention of all layers over pages, and on contiguous memory. Aim: the
             difference is at most 10 % of a step
  overhead   a step without pages, decoder and sampler at 64 rows, with the prefix
             cache. Aim: 3 % of a step
  w32        32 requests that arrive at once, with lognormal lengths of mean 64 in and
             64 out: the engine in one device call, and the baseline's static batch with
             no less KV memory. Only requested output tokens count. Aim: 3.5 times
Compilation is part of no figure but `compile`. docs/results.md has the figures of one
machine.

Time: about five minutes and 3 GB on two CPU cores.
"""

from __future__ import annotations

from absl import flags

from experiments.lib import limits as lib_limits
from experiments.lib import random_model, runner
from experiments.lib.bursts import BaselineBurst, Burst, EngineBurst, lognormal_burst
from experiments.lib.engine_loads import (
    bookkeeping_steps,
    compile_seconds,
    decoding_state,
    engine_steps,
    random_prompts,
)
from experiments.lib.limits import MachineLimits
from experiments.lib.runner import Report, progress
from experiments.lib.timing import Contender, Times, time_in_turn
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.models import Decoder

PARTS = ("limits", "step", "attention", "overhead", "w32")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
    random_model.define_flags()
    flags.DEFINE_list("batches", ["1", "8", "32"], "Rows of the decode steps.")
    flags.DEFINE_integer("context", 96, "Mean tokens of a row in the decode steps.")
    flags.DEFINE_integer("steps", 16, "Decode steps in a timed call.", lower_bound=1)
    flags.DEFINE_bool("prefix_caching", True, "Whether the engine caches prefixes.")
    flags.DEFINE_integer("overhead_rows", 64, "Rows of the part `overhead`.")
    flags.DEFINE_integer(
        "max_model_len", 512, "Tokens per sequence in the baseline's cache."
    )
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("num_blocks", 512, "Blocks of the engine's pool.")
    flags.DEFINE_integer(
        "max_num_batched_tokens", 512, "Token budget of the engine's steps."
    )
    flags.DEFINE_integer("requests", 32, "Requests of the part `w32`.")
    flags.DEFINE_integer("mean_len", 64, "Mean prompt and mean output of `w32`.")
    flags.DEFINE_float("sigma", 0.6, "Sigma of the lognormal lengths of `w32`.")
    flags.DEFINE_integer("least_len", 8, "Shortest prompt and output of `w32`.")
    flags.DEFINE_integer("most_len", 256, "Longest prompt and output of `w32`.")
    flags.DEFINE_integer("repeats", 7, "Timed rounds of each part.", lower_bound=1)
    flags.DEFINE_integer("w32_repeats", 3, "Timed rounds of `w32`.", lower_bound=1)
    flags.DEFINE_float(
        "read_gb", 1.0, "GB of the array that is read for the bandwidth."
    )
    flags.DEFINE_integer("gemm_size", 2048, "Rows and columns of the GEMM's matrices.")
    flags.DEFINE_integer("seed", 0, "Seed of weights, prompts and lengths.")


def throughput_config(rows: int, num_blocks: int) -> EngineConfig:
    """An engine with this many rows and blocks."""
    return EngineConfig(
        num_blocks=num_blocks,
        block_size=FLAGS.block_size,
        max_num_seqs=rows,
        max_model_len=FLAGS.max_model_len,
        max_num_batched_tokens=max(FLAGS.max_num_batched_tokens, rows),
        max_num_requests=rows,
        enable_prefix_caching=FLAGS.prefix_caching,
    )


def shared_config() -> EngineConfig:
    """One engine, and so one compiled program, for all parts but `overhead`."""
    rows = max(FLAGS.requests, *runner.positive_integers("batches"))
    return throughput_config(rows, FLAGS.num_blocks)


def report_limits(report: Report) -> MachineLimits:
    """Measures and prints the machine's limits."""
    progress("limits: read bandwidth and GEMM")
    limits = lib_limits.measure_limits(FLAGS.read_gb, FLAGS.gemm_size, FLAGS.repeats)
    report.row("read bandwidth", f"{limits.read_bytes_per_s / 1e9:.1f} GB/s")
    report.row(
        f"float32 GEMM, {FLAGS.gemm_size}",
        f"{limits.gemm_flops_per_s / 1e9:.0f} GFLOP/s",
    )
    report.details["limits"] = {
        "read_gb_per_s": limits.read_bytes_per_s / 1e9,
        "gemm_gflop_per_s": limits.gemm_flops_per_s / 1e9,
    }
    return limits


def _shared_state(model: Decoder, rows: int) -> tuple[Contender, int]:
    """Steps of the shared engine with this many rows, and the blocks of its tables."""
    config = shared_config()
    state = decoding_state(
        model, config, rows=rows, context=FLAGS.context, steps=FLAGS.steps
    )
    return engine_steps(model, state, FLAGS.steps), config.max_blocks_per_seq


def measure_step(
    model: Decoder, rows: int, limits: MachineLimits | None, report: Report
) -> None:
    """Measures a decode step: products alone, jpaged and the baseline."""
    progress(f"step: batch {rows}")
    steps, _ = _shared_state(model, rows)
    lengths = [max(1, FLAGS.context - FLAGS.steps // 2)] * rows
    prompts = random_prompts(lengths, model.config.vocab_size, FLAGS.seed)
    plain = BaselineBurst(model, Burst(prompts, [1] * rows), FLAGS.max_model_len)
    forms = plain.decoders(FLAGS.steps)
    times = time_in_turn(
        {
            "products": lib_limits.matrix_products(model, rows),
            "jpaged": steps,
            "baseline_calls": forms["calls"],
            "baseline_loop": forms["loop"],
        },
        FLAGS.repeats,
    )
    report.details[f"step_{rows}"] = {
        name: value.summary_ms() for name, value in times.items()
    }
    products, ours = times["products"].median, times["jpaged"].median
    theirs = min(times["baseline_calls"].median, times["baseline_loop"].median)
    report.tokens_per_s |= {
        f"products_{rows}": rows / products,
        f"jpaged_{rows}": rows / ours,
        f"baseline_{rows}": rows / theirs,
    }
    report.ratios |= {
        f"step_over_products_{rows}": ours / products,
        f"jpaged_over_baseline_{rows}": theirs / ours,
    }
    limit = ""
    if limits is not None:
        least = lib_limits.step_limit_s(model.config, limits, rows, FLAGS.context)
        report.roofline_share[f"step_{rows}"] = least / ours
        limit = f", limit {rows / least:.0f}"
    for name, seconds, share in (
        ("products", products, ""),
        ("jpaged", ours, f"{ours / products:.2f} x products"),
        ("baseline", theirs, f"jpaged {theirs / ours:.2f} x as fast"),
    ):
        report.row(
            f"step, batch {rows}: {name}",
            f"{seconds * 1e3:.1f} ms",
            f"{rows / seconds:.0f} tokens/s{limit}",
            share,
        )


def measure_attention(model: Decoder, report: Report) -> None:
    """Measures attention over pages and on contiguous memory beside a step."""
    rows = max(runner.positive_integers("batches"))
    progress(f"attention: batch {rows}")
    config, context = model.config, FLAGS.context
    steps, max_blocks = _shared_state(model, rows)
    times = time_in_turn(
        {
            "paged": lib_limits.paged_attention_layers(
                config, rows, context, FLAGS.block_size, max_blocks
            ),
            "contiguous": lib_limits.contiguous_attention_layers(config, rows, context),
            "step": steps,
        },
        FLAGS.repeats,
    )
    paged, contiguous = times["paged"].median, times["contiguous"].median
    step = times["step"].median
    report.details["attention"] = {k: v.summary_ms() for k, v in times.items()}
    report.ratios["paged_attention_share_of_step"] = paged / step
    report.ratios["paging_cost_share_of_step"] = (paged - contiguous) / step
    report.row(
        f"attention, batch {rows}: paged",
        f"{paged * 1e3:.2f} ms",
        f"contiguous {contiguous * 1e3:.2f} ms",
        f"paging costs {(paged - contiguous) / step:.1%} of a step",
    )


def measure_overhead(model: Decoder, report: Report) -> None:
    """Measures the engine's step without the model beside a whole step."""
    rows = FLAGS.overhead_rows
    progress(f"overhead: {rows} rows")
    prefill_steps = rows * FLAGS.context // FLAGS.max_num_batched_tokens + 2
    longest = FLAGS.context + FLAGS.steps + prefill_steps
    config = throughput_config(rows, rows * cdiv(longest, FLAGS.block_size))
    if rows == shared_config().max_num_seqs:  # needs no further program
        config = shared_config()
    state = decoding_state(
        model, config, rows=rows, context=FLAGS.context, steps=FLAGS.steps
    )
    times = time_in_turn(
        {
            "bookkeeping": bookkeeping_steps(state, FLAGS.steps),
            "step": engine_steps(model, state, FLAGS.steps),
        },
        FLAGS.repeats,
    )
    own, step = times["bookkeeping"].median, times["step"].median
    report.details["overhead"] = {k: v.summary_ms() for k, v in times.items()}
    report.ratios["bookkeeping_share_of_step"] = own / step
    report.row(
        f"scheduler, blocks; {rows} rows",
        f"{own * 1e3:.3f} ms",
        f"step {step * 1e3:.1f} ms",
        f"{own / step:.1%} of a step",
    )


def measure_w32(model: Decoder, limits: MachineLimits | None, report: Report) -> None:
    """Measures a burst: the engine in one call, and the baseline's static batch."""
    progress(f"w32: {FLAGS.requests} requests")
    burst = lognormal_burst(
        num_requests=FLAGS.requests,
        mean=FLAGS.mean_len,
        sigma=FLAGS.sigma,
        least=FLAGS.least_len,
        most=FLAGS.most_len,
        vocab_size=model.config.vocab_size,
        seed=FLAGS.seed,
    )
    config = shared_config()
    ours = EngineBurst(model, config, burst)
    theirs = BaselineBurst(model, burst, FLAGS.max_model_len)
    compile_s = theirs.compile_seconds()
    ours.run(*ours.prepare())
    statistics = ours.statistics()
    equal = ours.equal_tokens_share(theirs.run())
    # A few steps show which form of the baseline is faster.
    forms = time_in_turn(theirs.decoders(min(8, theirs.steps)), 3)
    theirs.form = min(forms, key=lambda name: forms[name].median)
    with_prompts = int(statistics["steps_with_prompts"])
    times = time_in_turn(
        {
            "jpaged": Contender(ours.run, ours.prepare),
            "baseline": Contender(theirs.run),
            "jpaged_prompts": Contender(
                lambda state: ours.run(state, with_prompts), ours.prepare
            ),
            "baseline_prompts": Contender(theirs.prefill),
        },
        FLAGS.w32_repeats,
        is_warm=True,
    )
    kv_bytes = lib_limits.kv_bytes_per_token(model.config)
    report.details["w32"] = {
        "prompt_tokens": sum(map(len, burst.prompts)),
        "output_tokens": sum(burst.output_lens),
        "kv_bytes": {
            "jpaged": config.num_blocks * config.block_size * kv_bytes,
            "baseline": FLAGS.requests * FLAGS.max_model_len * kv_bytes,
        },
        "prefill_share": {
            name: times[f"{name}_prompts"].median / times[name].median
            for name in ("jpaged", "baseline")
        },
        "equal_tokens_share": equal,
        "baseline_form": theirs.form,
        "baseline_compile_s": compile_s,
        "baseline_steps": theirs.steps + 1,
        "jpaged_statistics": statistics,
        **{name: value.summary_ms() for name, value in times.items()},
    }
    lens = list(map(len, burst.prompts)), burst.output_lens
    least = limits and lib_limits.burst_limit_s(model.config, limits, *lens)
    _report_w32(times, least, report)


def _report_w32(times: dict[str, Times], least: float | None, report: Report) -> None:
    """Prints the rows of `w32`; `least` is its limit in seconds, or None."""
    details = report.details["w32"]
    useful, statistics = details["output_tokens"], details["jpaged_statistics"]
    total = {name: times[name].median for name in ("jpaged", "baseline")}
    speedup = total["baseline"] / total["jpaged"]
    report.ratios["w32_jpaged_over_baseline"] = speedup
    limit = ""
    if least is not None:
        report.roofline_share["w32"] = least / total["jpaged"]
        limit = f", limit {useful / least:.0f}"
    for name, share in (
        ("jpaged", f"{speedup:.2f} x baseline"),
        ("baseline", f"as {details['baseline_form']}"),
    ):
        report.tokens_per_s[f"w32_{name}"] = useful / total[name]
        report.row(
            f"W{FLAGS.requests}: {name}",
            f"{total[name]:.2f} s",
            f"{useful / total[name]:.0f} tokens/s{limit}",
            f"{share}; {details['prefill_share'][name]:.0%} with prompts, "
            f"KV {details['kv_bytes'][name] / 1e6:.0f} MB",
        )
    report.row(
        f"W{FLAGS.requests}: jpaged's steps",
        f"{statistics['steps']}",
        f"{int(statistics['steps_with_prompts'])} with prompts; "
        f"baseline {details['baseline_steps']}",
        f"KV slots in use {statistics['kv_token_share']:.1%}; "
        f"{details['equal_tokens_share']:.1%} of tokens equal",
    )


def main(argv: list[str]) -> None:
    """Measures the parts of the flags and prints the results."""
    del argv
    with runner.user_errors("bench_throughput"):
        parts = runner.some_of("parts", FLAGS.parts, PARTS)
        batches = runner.positive_integers("batches")
    report = Report()
    limits = report_limits(report) if "limits" in parts else None
    model = random_model.make_random_model(FLAGS.max_model_len, FLAGS.seed)
    if {"step", "attention", "w32"} & set(parts):
        progress("engine: compile")
        seconds = compile_seconds(model, shared_config())
        report.details["compile_s"] = seconds
        report.row("engine: compile and first step", f"{seconds:.1f} s")
    if "step" in parts:
        for rows in batches:
            measure_step(model, rows, limits, report)
    if "attention" in parts:
        measure_attention(model, report)
    if "overhead" in parts:
        measure_overhead(model, report)
    if "w32" in parts:
        measure_w32(model, limits, report)
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
