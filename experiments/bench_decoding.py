"""Decoding methods: beams and samples beside Hugging Face and plain JAX; their cost.

    python -m experiments.bench_decoding

On the random-weight Llama of `bench_throughput`, 110M parameters in float32, in one
run, each figure a median, and what is compared run in turn. Parts (`--parts`):
  beams      beam search of width 4 from a prompt of 256 tokens, 64 tokens out: first
             the matrix products of a step at as many rows, the limit; then whole calls
             of jpaged's engine, of Hugging Face `generate` and of plain JAX with a
             contiguous cache (`experiments/lib/decoding/baseline.py`), whose tokens are
             compared first. Aims: 3 times Hugging Face's steps/s, 1.5 times plain JAX's
  samples    8 samples of the same prompt, the same way. Aim: 4 times Hugging Face's
             tokens/s
  cost       a step of beams and of as many greedy requests inside the engine, and what
             parts the beam step has. Aim: fork and copies below 10 % of it
  programs   programs compiled by a call that uses every method, and by a second one.
             Aim: none by the second
`--smoke` makes everything tiny, to see that it runs. Where others use the machine too,
`taskset -c 1 python -m experiments.bench_decoding --clock processor` compares what each
contender takes of one core, which hardly depends on the others. Compilation is left out
of all figures. Takes about ten minutes on two CPU cores that are free, and 4 GB.
"""

import os
from collections.abc import Mapping

import numpy as np
from absl import app, flags

from experiments.lib import limits as limits_of
from experiments.lib.decoding import costs as costs
from experiments.lib.decoding.loads import (
    HAS_HUGGING_FACE,
    EngineDecoding,
    HuggingFaceDecoding,
    Load,
    PlainDecoding,
    decoding_engine,
)
from experiments.lib.decoding.programs import every_method, programs_of_passes
from experiments.lib.engine_loads import decoding_state, engine_steps, random_prompts
from experiments.lib.timing import (
    Contender,
    Report,
    Times,
    once,
    progress,
    time_in_turn,
)
from jpaged.attention import kv_cache
from jpaged.config import EngineConfig
from jpaged.models import Decoder, ModelConfig, init_model

PARTS = ("beams", "samples", "cost", "programs")
SMOKE = dict(
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate_size=128,
    vocab_size=256,
    initializer_range=0.3,  # so that tokens depend on what came before
    prompt_len=24,
    tokens=8,
    samples=3,
    cost_steps=4,
    max_num_batched_tokens=16,
    max_model_len=64,
    block_size=4,
    num_blocks=64,
    repeats=1,
)

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
    flags.DEFINE_bool("smoke", False, "Tiny sizes in place of all that are not given.")
    flags.DEFINE_integer("hidden_size", 768, "Of the model.")
    flags.DEFINE_integer("layers", 12, "Of the model.")
    flags.DEFINE_integer("heads", 12, "Query heads of the model.")
    flags.DEFINE_integer("kv_heads", 4, "Key and value heads of the model.")
    flags.DEFINE_integer("intermediate_size", 2048, "Of the model's MLP.")
    flags.DEFINE_integer("vocab_size", 32000, "Of the model.")
    flags.DEFINE_float("initializer_range", 0.02, "Of the model's random weights.")
    flags.DEFINE_integer("prompt_len", 256, "Tokens of the prompt.")
    flags.DEFINE_integer("tokens", 64, "Generated tokens.", lower_bound=3)
    flags.DEFINE_integer("beam_width", 4, "Beams.")
    flags.DEFINE_integer("samples", 8, "Samples.")
    flags.DEFINE_integer("cost_steps", 16, "Steps in a timed call of `cost`.")
    flags.DEFINE_integer("max_model_len", 512, "Of the engine.")
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("num_blocks", 256, "Blocks of the engine's pool.")
    flags.DEFINE_integer("max_num_batched_tokens", 512, "Of the engine.")
    flags.DEFINE_integer("repeats", 5, "Timed rounds of each part.", lower_bound=1)
    flags.DEFINE_enum(
        "clock", "wall", ["wall", "processor"], "What is read; processor: all cores'."
    )
    flags.DEFINE_integer("seed", 0, "Of weights and prompt.")


def engine_config() -> EngineConfig:
    """One engine, hence one compiled program, for all parts but `programs`."""
    rows = max(FLAGS.samples, FLAGS.beam_width)
    return EngineConfig(
        num_blocks=FLAGS.num_blocks,
        block_size=FLAGS.block_size,
        max_num_seqs=rows,
        max_model_len=FLAGS.max_model_len,
        max_num_batched_tokens=FLAGS.max_num_batched_tokens,
        max_num_requests=2 * rows,
        max_beam_width=FLAGS.beam_width,
    )


def make_load(method: str) -> Load:
    """The load of the flags."""
    (prompt,) = random_prompts([FLAGS.prompt_len], FLAGS.vocab_size, FLAGS.seed)
    rows = FLAGS.beam_width if method == "beams" else FLAGS.samples
    return Load(method, prompt, rows, FLAGS.tokens)


def timed(contenders: Mapping[str, Contender]) -> dict[str, Times]:
    """Times of the contenders by the clock of the flags."""
    times = time_in_turn(contenders, FLAGS.repeats)
    if FLAGS.clock == "wall":
        return times
    return {
        name: Times(value.processor_seconds, value.processor_seconds)
        for name, value in times.items()
    }


class Others:
    """Those that jpaged is compared with, made once for all loads."""

    def __init__(self, model: Decoder, report: Report) -> None:
        self.plain = PlainDecoding(model)
        self.hugging_face = HuggingFaceDecoding(model) if HAS_HUGGING_FACE else None
        if self.hugging_face is not None:
            report.details["hugging_face"] = self.hugging_face.about

    def equal_shares(self, load: Load, tokens: np.ndarray) -> dict[str, float]:
        """The share of jpaged's tokens that others give too; compiles what they run."""
        shares = {}
        for form, contender in self.plain.contenders(load).items():
            once(contender)
            shares[f"plain_{form}"] = float(np.mean(self.plain.tokens() == tokens))
        if self.hugging_face is not None:
            once(self.hugging_face.contender(load))
            equal = self.hugging_face.tokens() == tokens
            shares["hugging_face"] = float(np.mean(equal))
        return shares

    def contenders(self, load: Load) -> dict[str, Contender]:
        """Everybody's, for this load."""
        found = {
            f"plain_{form}": contender
            for form, contender in self.plain.contenders(load).items()
        }
        if self.hugging_face is not None:
            found["hugging_face"] = self.hugging_face.contender(load)
        return found


def measure_load(
    model: Decoder, ours: EngineDecoding, others: Others, method: str, report: Report
) -> None:
    """Whole calls of one method, jpaged's and the others'."""
    load = make_load(method)
    progress(f"{method}: compile, compare tokens")
    once(ours.contender(load))
    equal = others.equal_shares(load, ours.tokens())
    progress(f"{method}: time")
    calls = {"jpaged": ours.contender(load), **others.contenders(load)}
    prompts = {"jpaged": ours.contender(load.cut()), **others.contenders(load.cut())}
    prompts = {f"{name}_prompt": contender for name, contender in prompts.items()}
    products = {"products": limits_of.matrix_products(model, load.num_rows)}
    times = timed({**products, **calls, **prompts})
    form = min(("plain_calls", "plain_loop"), key=lambda name: times[name].median)
    report.details[method] = {
        "plain_form": form,
        **{name: value.summary_ms() for name, value in times.items()},
    }
    # Random numbers are everybody's own.
    if method == "beams":
        report.details[method]["equal_tokens_share"] = equal
        for name, share in equal.items():
            report.row(f"beams: tokens of {name}", f"{share:.1%} equal")
    _load_rows(load, times, form, report)


def _load_rows(load: Load, times: dict[str, Times], form: str, report: Report) -> None:
    """Table and figures of one method."""
    method, num_rows = load.method, load.num_rows
    is_beams = method == "beams"
    unit = "steps/s" if is_beams else "tokens/s"
    per_step = 1 if is_beams else num_rows
    title = f"beam {num_rows}" if is_beams else f"n = {num_rows}"
    figures = report.steps_per_s if is_beams else report.tokens_per_s
    products = times["products"].median
    figures[f"{method}_products"] = per_step / products
    report.row(
        f"{title}: products of a step",
        f"{products * 1e3:.1f} ms",
        f"{per_step / products:.0f} {unit}, no prompt",
    )
    own, own_step = times["jpaged"], _step_s(load, times, "jpaged")
    names = {"jpaged": "jpaged", "hugging_face": "hugging_face", "plain": form}
    for name, timed in names.items():
        if timed not in times:
            report.row(f"{title}: {name}", "not installed")
            continue
        whole, step = times[timed], _step_s(load, times, timed)
        speed = per_step * load.num_tokens / whole.median
        figures[f"{method}_{name}"] = speed
        share = f"{step / products:.2f} x products a step"
        if name != "jpaged":
            ratios = {
                "": whole.median / own.median,
                "_processor_time": whole.processor_median / own.processor_median,
                "_step": step / own_step,
            }
            for what, ratio in ratios.items():
                report.ratios[f"{method}_jpaged_over_{name}{what}"] = ratio
            share = f"jpaged {ratios['']:.2f} x as fast, {ratios['_step']:.2f} x a step"
        report.row(
            f"{title}: {name}",
            f"{speed:.1f} {unit}",
            f"{whole.median:.2f} s; a step {step * 1e3:.1f} ms",
            share,
        )


def _step_s(load: Load, times: dict[str, Times], name: str) -> float:
    """Seconds of a step: of the call, without what it takes up to the second token."""
    both = times[name].median - times[f"{name}_prompt"].median
    return both / (load.num_tokens - load.cut().num_tokens)


def measure_cost(model: Decoder, ours: EngineDecoding, report: Report) -> None:
    """A beam step beside a greedy step inside the engine, and its parts."""
    load, config, steps = make_load("beams"), engine_config(), FLAGS.cost_steps
    progress("cost: bytes copied in a whole search")
    state = ours.clear()
    before = ours.counters()
    ours.contender(load).run(state)
    after = ours.counters()
    block_bytes = kv_cache.bytes_per_block(
        num_layers=FLAGS.layers,
        num_kv_heads=FLAGS.kv_heads,
        block_size=FLAGS.block_size,
        head_dim=FLAGS.hidden_size // FLAGS.heads,
        dtype="float32",
    )
    copies = int(after.num_block_copies - before.num_block_copies) / load.num_tokens

    progress("cost: time")
    context = load.middle(steps)
    beams = decoding_engine(model, config, load, context)
    greedy = decoding_state(
        model,
        config,
        rows=load.num_rows,
        context=context + steps // 2,
        steps=steps,
    )
    contenders = {
        "products": limits_of.matrix_products(model, load.num_rows),
        "attention": limits_of.paged_attention(
            model.config,
            load.num_rows,
            context + steps // 2,
            FLAGS.block_size,
            config.max_blocks_per_seq,
        ),
        "greedy_step": engine_steps(model, greedy, steps),
        "step": engine_steps(model, beams, steps),
    }
    for number in range(len(costs.PARTS) + 1):
        parts = costs.PARTS[:number]
        name = parts[-1] if parts else "none"
        contenders[name] = costs.bookkeeping(beams, steps, parts, FLAGS.vocab_size)
    times = timed(contenders)
    parts = ("none", *costs.PARTS)
    seconds = {
        name: value.least if name in parts else value.median
        for name, value in times.items()
    }
    shares = costs.shares_of_step(seconds)
    report.details["cost"] = {
        "context": context + steps // 2,
        "shares_of_beam_step": shares,
        "block_copies_per_step": copies,
        "block_bytes": block_bytes,
        "bytes_copied_per_step": copies * block_bytes,
        **{name: value.summary_ms() for name, value in times.items()},
    }
    report.ratios |= {
        "beam_step_over_greedy_step": seconds["step"] / seconds["greedy_step"],
        "block_work_share_of_beam_step": shares["fork"] + shares["copies"],
        "algorithm_share_of_beam_step": shares["algorithm"],
    }
    report.row(
        f"a step, {load.num_rows} rows: beams",
        f"{seconds['step'] * 1e3:.1f} ms",
        f"greedy {seconds['greedy_step'] * 1e3:.1f} ms",
        f"{report.ratios['beam_step_over_greedy_step']:.2f} x greedy",
    )
    report.row(
        "  blocks: fork and copies",
        f"{shares['fork'] + shares['copies']:.1%}",
        f"fork {shares['fork']:.1%}, copies {shares['copies']:.1%}",
        f"{copies:.2f} blocks, {copies * block_bytes / 1e6:.2f} MB copied a step",
    )
    for name in ("algorithm", "scheduler", "attention", "products", "rest"):
        report.row(f"  {name}", f"{shares[name]:.1%}")


def measure_programs(report: Report) -> None:
    """Programs of a call that uses every method."""
    progress("programs: every method, twice")
    first, second = programs_of_passes(max_tokens=4 if FLAGS.smoke else 12)
    methods = list(every_method(2))
    report.details["programs"] = {"first": first, "second": second, "methods": methods}
    report.row(
        "programs of every method",
        f"{first['all']} compiled",
        f"{first['engine']} of them the engine's",
        f"{second['all']} by a second call",
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
        initializer_range=FLAGS.initializer_range,
        tie_word_embeddings=True,
    )
    return init_model(config, seed=FLAGS.seed)


def main(_: list[str]) -> None:
    """Reads the flags, prints a table, and one JSON object as the last line."""
    unknown = [part for part in FLAGS.parts if part not in PARTS]
    if unknown:
        raise app.UsageError(f"--parts: expected some of {PARTS}, got {unknown[0]!r}")
    if FLAGS.smoke:
        for name, value in SMOKE.items():
            if not FLAGS[name].present:
                setattr(FLAGS, name, value)
    report = Report()
    report.details["load_average"] = {"before": os.getloadavg()}
    model = make_model()
    ours = EngineDecoding(model, engine_config())
    loads = [method for method in ("beams", "samples") if method in FLAGS.parts]
    if loads:
        others = Others(model, report)
        for method in loads:
            measure_load(model, ours, others, method, report)
        del others
    if "cost" in FLAGS.parts:
        measure_cost(model, ours, report)
    if "programs" in FLAGS.parts:
        measure_programs(report)
    report.details["load_average"]["after"] = os.getloadavg()
    found = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in found})


if __name__ == "__main__":
    define_flags()
    app.run(main)
