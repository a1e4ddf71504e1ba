"""Throughput: decode steps and a mixed workload beside the limits and a baseline.

    python -m experiments.bench_throughput

On a random-weight Llama of 110M parameters in float32 (flags set other sizes), in one
run, each figure a median, and what is compared run in turn. Parts (`--parts`):
  limits     read bandwidth, and float32 GEMM: the machine's
  step       a decode step at batch 1, 8, 32 and context 96: its matrix products alone,
             jpaged's `engine.run`, and the baseline, the researcher's afternoon of
             `lib/baseline.py`. Aims: at most 1.15 times the products at batch
             1 and 1.3 times at 32; 3 times the baseline's tokens/s at 32
  attention  all layers' attention over pages, and on contiguous memory. Aim: the
             difference is at most 10 % of a step
  overhead   the step without pages, decoder and sampler at 64 rows, prefix cache
             included. Aim: 3 % of a step
  w32        32 requests at once, lognormal lengths of mean 64 in and 64 out: the engine
             in one device call, and the baseline's static batch, at no more KV memory.
             Useful output tokens only. Aim: 3.5 times
Takes about five minutes and 3 GB on two CPU cores. Compilation is left out of all
figures but `compile`; docs/results.md has the figures of one machine.
"""

from absl import app, flags

from experiments.lib import limits as limits_of
from experiments.lib.engine_loads import (
    BaselineRun,
    EngineRun,
    Workload,
    bookkeeping,
    compile_s,
    decoding_state,
    engine_steps,
    lognormal_workload,
    random_prompts,
)
from experiments.lib.limits import Limits
from experiments.lib.timing import Contender, Report, progress, time_in_turn
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.models import Decoder, ModelConfig, init_model

PARTS = ("limits", "step", "attention", "overhead", "w32")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
    flags.DEFINE_integer("hidden_size", 768, "Of the model.")
    flags.DEFINE_integer("layers", 12, "Of the model.")
    flags.DEFINE_integer("heads", 12, "Query heads of the model.")
    flags.DEFINE_integer("kv_heads", 4, "Key and value heads of the model.")
    flags.DEFINE_integer("intermediate_size", 2048, "Of the model's MLP.")
    flags.DEFINE_integer("vocab_size", 32000, "Of the model.")
    flags.DEFINE_list("batches", ["1", "8", "32"], "Rows of the decode steps.")
    flags.DEFINE_integer("context", 96, "Mean tokens of a row in the decode steps.")
    flags.DEFINE_integer("steps", 16, "Decode steps in a timed call.", lower_bound=1)
    flags.DEFINE_bool("prefix_caching", True, "Keep blocks for prompts that begin so.")
    flags.DEFINE_integer("overhead_rows", 64, "Rows of the part `overhead`.")
    flags.DEFINE_integer(
        "max_model_len", 512, "Tokens for which the baseline allocates."
    )
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("num_blocks", 512, "Blocks of the engine's pool.")
    flags.DEFINE_integer("max_num_batched_tokens", 512, "Of the engine.")
    flags.DEFINE_integer("requests", 32, "Of the part `w32`.")
    flags.DEFINE_integer("mean_len", 64, "Mean prompt and mean output of `w32`.")
    flags.DEFINE_float("sigma", 0.6, "Of the lognormal lengths of `w32`.")
    flags.DEFINE_integer("least_len", 8, "Shortest prompt and output of `w32`.")
    flags.DEFINE_integer("most_len", 256, "Longest prompt and output of `w32`.")
    flags.DEFINE_integer("repeats", 7, "Timed rounds of each part.", lower_bound=1)
    flags.DEFINE_integer("w32_repeats", 3, "Timed rounds of `w32`.", lower_bound=1)
    flags.DEFINE_float("read_gb", 1.0, "Array that is summed for the bandwidth.")
    flags.DEFINE_integer("gemm_size", 2048, "Rows and columns of the GEMM's matrices.")
    flags.DEFINE_integer("seed", 0, "Of weights, prompts and lengths.")


def engine_config(rows: int, num_blocks: int) -> EngineConfig:
    """Sizes of an engine for so many rows."""
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
    """One engine, hence one compiled program, for all parts but `overhead`."""
    rows = max(FLAGS.requests, *map(int, FLAGS.batches))
    return engine_config(rows, FLAGS.num_blocks)


def measure_limits(report: Report) -> Limits:
    """The machine's limits."""
    progress("limits: read bandwidth and GEMM")
    size_bytes = int(FLAGS.read_gb * 1e9) // 4 * 4
    times = time_in_turn(
        {"read": limits_of.read(size_bytes), "gemm": limits_of.gemm(FLAGS.gemm_size)},
        FLAGS.repeats,
    )
    limits = Limits(
        size_bytes / times["read"].median,
        2 * FLAGS.gemm_size**3 / times["gemm"].median,
    )
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


def measure_step(model: Decoder, limits: Limits | None, report: Report) -> None:
    """Decode steps: products alone, jpaged, baseline."""
    for rows in map(int, FLAGS.batches):
        progress(f"step: batch {rows}")
        state = decoding_state(
            model,
            shared_config(),
            rows=rows,
            context=FLAGS.context,
            steps=FLAGS.steps,
        )
        prompt_len = max(1, FLAGS.context - FLAGS.steps // 2)
        lengths = [prompt_len] * rows
        prompts = random_prompts(lengths, model.config.vocab_size, FLAGS.seed)
        plain = BaselineRun(model, Workload(prompts, [1] * rows), FLAGS.max_model_len)
        forms = plain.decoders(FLAGS.steps)
        times = time_in_turn(
            {
                "products": limits_of.matrix_products(model, rows),
                "jpaged": engine_steps(model, state, FLAGS.steps),
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

        def line(name: str, seconds: float, beside: str, share: str, rows=rows):
            measured = f"{seconds * 1e3:.1f} ms"
            speed = f"{rows / seconds:.0f} tokens/s"
            report.row(
                f"step, batch {rows}: {name}", measured, f"{speed}{beside}", share
            )

        beside = ""
        if limits is not None:
            least = limits_of.step_limit_s(model.config, limits, rows, FLAGS.context)
            report.roofline_share[f"step_{rows}"] = least / ours
            beside = f", limit {rows / least:.0f}"
        line("products", products, beside, "")
        line("jpaged", ours, beside, f"{ours / products:.2f} x products")
        line("baseline", theirs, beside, f"jpaged {theirs / ours:.2f} x as fast")


def measure_attention(model: Decoder, report: Report) -> None:
    """Attention over pages and on contiguous memory, beside a step."""
    rows = max(map(int, FLAGS.batches))
    progress(f"attention: batch {rows}")
    config, context = model.config, FLAGS.context
    state = decoding_state(
        model, shared_config(), rows=rows, context=context, steps=FLAGS.steps
    )
    times = time_in_turn(
        {
            "paged": limits_of.paged_attention(
                config, rows, context, FLAGS.block_size, state.config.max_blocks_per_seq
            ),
            "contiguous": limits_of.contiguous_attention(config, rows, context),
            "step": engine_steps(model, state, FLAGS.steps),
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
    """The engine's step without the model, beside a step."""
    rows = FLAGS.overhead_rows
    progress(f"overhead: {rows} rows")
    prefill_steps = rows * FLAGS.context // FLAGS.max_num_batched_tokens + 2
    longest = FLAGS.context + FLAGS.steps + prefill_steps
    num_blocks = rows * cdiv(longest, FLAGS.block_size)
    config = engine_config(rows, num_blocks)
    if rows == shared_config().max_num_seqs:  # one program less to compile
        config = shared_config()
    state = decoding_state(
        model, config, rows=rows, context=FLAGS.context, steps=FLAGS.steps
    )
    times = time_in_turn(
        {
            "bookkeeping": bookkeeping(state, FLAGS.steps),
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


def measure_w32(model: Decoder, limits: Limits | None, report: Report) -> None:
    """The mixed workload: the engine in one call, and a static batch."""
    progress(f"w32: {FLAGS.requests} requests")
    load = lognormal_workload(
        num_requests=FLAGS.requests,
        mean=FLAGS.mean_len,
        sigma=FLAGS.sigma,
        least=FLAGS.least_len,
        most=FLAGS.most_len,
        vocab_size=model.config.vocab_size,
        seed=FLAGS.seed,
    )
    config = shared_config()
    ours, theirs = (
        EngineRun(model, config, load),
        BaselineRun(model, load, FLAGS.max_model_len),
    )
    theirs_compile_s = theirs.compile_s()
    ours.run(*ours.prepare())
    statistics = ours.statistics()
    equal = ours.equal_tokens_share(theirs.run())
    with_prompts = int(statistics["steps_with_prompts"])
    # The baseline's better form, found on a few steps.
    forms = time_in_turn(theirs.decoders(min(8, theirs.steps)), 3)
    form = min(forms, key=lambda name: forms[name].median)
    theirs.form = form
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
    useful = sum(load.output_lens)
    kv_bytes = limits_of.kv_bytes_per_token(model.config)
    bytes_of = {
        "jpaged": config.num_blocks * config.block_size * kv_bytes,
        "baseline": FLAGS.requests * FLAGS.max_model_len * kv_bytes,
    }
    total = {name: times[name].median for name in bytes_of}
    prompts = {name: times[f"{name}_prompts"].median / total[name] for name in bytes_of}
    report.ratios["w32_jpaged_over_baseline"] = total["baseline"] / total["jpaged"]
    report.details["w32"] = {
        "prompt_tokens": sum(map(len, load.prompts)),
        "output_tokens": useful,
        "kv_bytes": bytes_of,
        "prefill_share": prompts,
        "equal_tokens_share": equal,
        "baseline_form": form,
        "baseline_compile_s": theirs_compile_s,
        "baseline_steps": theirs.steps + 1,
        "jpaged_statistics": statistics,
        **{name: value.summary_ms() for name, value in times.items()},
    }
    beside = ""
    if limits is not None:
        least = limits_of.workload_limit_s(
            model.config, limits, list(map(len, load.prompts)), load.output_lens
        )
        report.roofline_share["w32"] = least / total["jpaged"]
        beside = f", limit {useful / least:.0f}"
    ratio = f"{report.ratios['w32_jpaged_over_baseline']:.2f} x baseline"
    for name, share in (("jpaged", ratio), ("baseline", f"as {form}")):
        report.tokens_per_s[f"w32_{name}"] = useful / total[name]
        report.row(
            f"W{FLAGS.requests}: {name}",
            f"{total[name]:.2f} s",
            f"{useful / total[name]:.0f} tokens/s{beside}",
            f"{share}; {prompts[name]:.0%} with prompts, "
            f"KV {bytes_of[name] / 1e6:.0f} MB",
        )
    report.row(
        f"W{FLAGS.requests}: jpaged's steps",
        f"{statistics['steps']}",
        f"{with_prompts} with prompts; baseline {theirs.steps + 1}",
        f"KV slots in use {statistics['kv_token_share']:.1%}; "
        f"{equal:.1%} of tokens equal",
    )


def make_model() -> Decoder:
    """The random-weight model of the flags."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=FLAGS.vocab_size,
        hidden_size=FLAGS.hidden_size,
        num_layers=FLAGS.layers,
        num_heads=FLAGS.heads,
        num_kv_heads=FLAGS.kv_heads,
        head_dim=FLAGS.hidden_size // FLAGS.heads,
        intermediate_size=FLAGS.intermediate_size,
        max_position_embeddings=FLAGS.max_model_len,
        tie_word_embeddings=True,
    )
    return init_model(config, seed=FLAGS.seed)


def main(_: list[str]) -> None:
    """Reads the flags, prints a table, and one JSON object as the last line."""
    unknown = [part for part in FLAGS.parts if part not in PARTS]
    if unknown:
        raise app.UsageError(f"--parts: expected some of {PARTS}, got {unknown[0]!r}")
    report = Report()
    limits = measure_limits(report) if "limits" in FLAGS.parts else None
    model = make_model()
    if {"step", "attention", "w32"} & set(FLAGS.parts):
        progress("engine: compile")
        seconds = compile_s(model, shared_config())
        report.details["compile_s"] = seconds
        report.row("engine: compile and first step", f"{seconds:.1f} s")
    if "step" in FLAGS.parts:
        measure_step(model, limits, report)
    if "attention" in FLAGS.parts:
        measure_attention(model, report)
    if "overhead" in FLAGS.parts:
        measure_overhead(model, report)
    if "w32" in FLAGS.parts:
        measure_w32(model, limits, report)
    found = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in found})


if __name__ == "__main__":
    define_flags()
    app.run(main)
