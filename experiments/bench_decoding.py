"""Benchmarks beam search and parallel sampling beside Hugging Face and plain JAX.

    python -m experiments.bench_decoding

The model is the Llama of `bench_throughput`, 110M parameters in float32 with random
weights. All figures are medians, and contenders run in turn. Parts (`--parts`):
  beams      beam search of width 4 from a prompt of 256 tokens, 64 tokens out. First
             the limit: matrix products of a step with as many rows. Then whole calls of
             jpaged's engine, of Hugging Face `generate` and of plain JAX with a
             contiguous cache (`experiments/lib/decoding/baseline.py`), whose tokens are
             compared first. Aims: 3 times Hugging Face's steps/s, 1.5 times plain JAX's
  samples    8 samples of the same prompt, likewise. Aim: 4 times Hugging Face's
             tokens/s
  cost       a step of beams and a step of as many greedy requests in the engine, and
             the parts of the beam step. Aim: fork and copies below 10 % of it
  programs   programs compiled by a call that uses every method, and by a second such
             call. Aim: none by the second
`--smoke` makes everything tiny, to see that the runner works. If other processes use
the machine, `taskset -c 1 python -m experiments.bench_decoding --clock processor`
compares processor time on one core, which hardly depends on them. Compilation is part
of no figure.

Time: about ten minutes on two idle CPU cores, and 4 GB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from absl import flags

from experiments.lib import limits as lib_limits
from experiments.lib import random_model, runner
from experiments.lib.decoding import costs
from experiments.lib.decoding.loads import (
    HAS_HUGGING_FACE,
    DecodingLoad,
    EngineDecoding,
    HuggingFaceDecoding,
    PlainDecoding,
    load_in_progress,
)
from experiments.lib.decoding.programs import every_method, programs_of_calls
from experiments.lib.engine_loads import decoding_state, engine_steps, random_prompts
from experiments.lib.runner import Report, progress
from experiments.lib.timing import Contender, Times, once, time_in_turn
from jpaged.attention import kv_cache
from jpaged.config import EngineConfig
from jpaged.models import Decoder

PARTS = ("beams", "samples", "cost", "programs")
SMOKE = dict(
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate_size=128,
    vocab_size=256,
    initializer_range=0.3,  # large, so that tokens depend on the tokens before them
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
    """Defines the runner's flags."""
    flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
    flags.DEFINE_bool("smoke", False, "Tiny values for all sizes that are not given.")
    random_model.define_flags()
    flags.DEFINE_float(
        "initializer_range", 0.02, "Standard deviation of the model's random weights."
    )
    flags.DEFINE_integer("prompt_len", 256, "Tokens of the prompt.")
    flags.DEFINE_integer("tokens", 64, "Tokens of an output.", lower_bound=3)
    flags.DEFINE_integer("beam_width", 4, "Beams.")
    flags.DEFINE_integer("samples", 8, "Samples.")
    flags.DEFINE_integer("cost_steps", 16, "Steps in a timed call of `cost`.")
    flags.DEFINE_integer("max_model_len", 512, "Tokens of the longest sequence.")
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("num_blocks", 256, "Blocks of the engine's pool.")
    flags.DEFINE_integer(
        "max_num_batched_tokens", 512, "Token budget of the engine's steps."
    )
    flags.DEFINE_integer("repeats", 5, "Timed rounds of each part.", lower_bound=1)
    flags.DEFINE_enum(
        "clock",
        "wall",
        ["wall", "processor"],
        "Clock to read; processor: the time of all cores together.",
    )
    flags.DEFINE_integer("seed", 0, "Seed of weights and prompt.")


def decoding_config() -> EngineConfig:
    """One engine, and so one compiled program, for all parts but `programs`."""
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


def make_load(method: str) -> DecodingLoad:
    """The load of the flags for a method."""
    (prompt,) = random_prompts([FLAGS.prompt_len], FLAGS.vocab_size, FLAGS.seed)
    rows = FLAGS.beam_width if method == "beams" else FLAGS.samples
    return DecodingLoad(method, prompt, rows, FLAGS.tokens)


def timed(contenders: Mapping[str, Contender]) -> dict[str, Times]:
    """Times the contenders by the clock of the flags."""
    times = time_in_turn(contenders, FLAGS.repeats)
    if FLAGS.clock == "wall":
        return times
    return {
        name: Times(value.processor_seconds, value.processor_seconds)
        for name, value in times.items()
    }


class Peers:
    """What jpaged is compared with; made once for all loads."""

    def __init__(self, model: Decoder, report: Report) -> None:
        self.plain = PlainDecoding(model)
        self.hugging_face = HuggingFaceDecoding(model) if HAS_HUGGING_FACE else None
        if self.hugging_face is not None:
            report.details["hugging_face"] = self.hugging_face.about

    def equal_shares(self, load: DecodingLoad, tokens: np.ndarray) -> dict[str, float]:
        """Share of jpaged's tokens that each peer returns too; compiles the peers."""
        shares = {}
        for form, contender in self.plain.contenders(load).items():
            once(contender)
            shares[f"plain_{form}"] = float(np.mean(self.plain.tokens() == tokens))
        if self.hugging_face is not None:
            once(self.hugging_face.contender(load))
            equal = self.hugging_face.tokens() == tokens
            shares["hugging_face"] = float(np.mean(equal))
        return shares

    def contenders(self, load: DecodingLoad) -> dict[str, Contender]:
        """The contenders of all peers for this load."""
        found = {
            f"plain_{form}": contender
            for form, contender in self.plain.contenders(load).items()
        }
        if self.hugging_face is not None:
            found["hugging_face"] = self.hugging_face.contender(load)
        return found


def measure_method(
    model: Decoder, ours: EngineDecoding, peers: Peers, method: str, report: Report
) -> None:
    """Measures whole calls of one method, by jpaged and its peers."""
    load = make_load(method)
    progress(f"{method}: compile, compare tokens")
    once(ours.contender(load))
    equal = peers.equal_shares(load, ours.tokens())
    progress(f"{method}: time")
    calls = {"jpaged": ours.contender(load), **peers.contenders(load)}
    prompts = {"jpaged": ours.contender(load.cut()), **peers.contenders(load.cut())}
    prompts = {f"{name}_prompt": contender for name, contender in prompts.items()}
    products = {"products": lib_limits.matrix_products(model, load.num_rows)}
    times = timed({**products, **calls, **prompts})
    form = min(("plain_calls", "plain_loop"), key=lambda name: times[name].median)
    report.details[method] = {
        "plain_form": form,
        **{name: value.summary_ms() for name, value in times.items()},
    }
    # Samples differ, because each contender has its own random numbers.
    if method == "beams":
        report.details[method]["equal_tokens_share"] = equal
        for name, share in equal.items():
            report.row(f"beams: tokens of {name}", f"{share:.1%} equal")
    _report_method(load, times, form, report)


def _report_method(
    load: DecodingLoad, times: dict[str, Times], form: str, report: Report
) -> None:
    """Prints the rows of one method; `form` is plain JAX's faster form."""
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
    for name, timed_name in names.items():
        if timed_name not in times:
            report.row(f"{title}: {name}", "not installed")
            continue
        whole, step = times[timed_name], _step_s(load, times, timed_name)
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


def _step_s(load: DecodingLoad, times: dict[str, Times], name: str) -> float:
    """Seconds of a step: of the call without its first two tokens."""
    both = times[name].median - times[f"{name}_prompt"].median
    return both / (load.num_tokens - load.cut().num_tokens)


def copies_per_step(ours: EngineDecoding, load: DecodingLoad) -> tuple[float, int]:
    """Blocks copied per step in a whole search, and the bytes of a block."""
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
    num_copies = int(after.num_block_copies - before.num_block_copies)
    return num_copies / load.num_tokens, block_bytes


def cost_contenders(
    model: Decoder, load: DecodingLoad, context: int
) -> dict[str, Contender]:
    """Whole steps, the model's parts, and steps without the decoder.

    Args:
      model: The model.
      load: A load of beams.
      context: Tokens of each row when the timed steps begin.
    """
    config, steps = decoding_config(), FLAGS.cost_steps
    middle = context + steps // 2
    beams = load_in_progress(model, config, load, context)
    greedy = decoding_state(
        model, config, rows=load.num_rows, context=middle, steps=steps
    )
    contenders = {
        "products": lib_limits.matrix_products(model, load.num_rows),
        "attention": lib_limits.paged_attention_layers(
            model.config,
            load.num_rows,
            middle,
            FLAGS.block_size,
            config.max_blocks_per_seq,
        ),
        "greedy_step": engine_steps(model, greedy, steps),
        "step": engine_steps(model, beams, steps),
    }
    for number in range(len(costs.PARTS) + 1):
        parts = costs.PARTS[:number]
        name = parts[-1] if parts else "none"
        contenders[name] = costs.partial_steps(beams, steps, parts, FLAGS.vocab_size)
    return contenders


def measure_cost(model: Decoder, ours: EngineDecoding, report: Report) -> None:
    """Measures a beam step and its parts beside a greedy step in the engine."""
    load = make_load("beams")
    copies, block_bytes = copies_per_step(ours, load)
    progress("cost: time")
    context = load.middle(FLAGS.cost_steps)
    times = timed(cost_contenders(model, load, context))
    parts = ("none", *costs.PARTS)
    seconds = {
        name: value.least if name in parts else value.median
        for name, value in times.items()
    }
    shares = costs.shares_of_step(seconds)
    report.details["cost"] = {
        "context": context + FLAGS.cost_steps // 2,
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
    """Counts the programs of two calls that use every method."""
    progress("programs: every method, twice")
    first, second = programs_of_calls(max_tokens=4 if FLAGS.smoke else 12)
    methods = list(every_method(2))
    report.details["programs"] = {"first": first, "second": second, "methods": methods}
    report.row(
        "programs of every method",
        f"{first['all']} compiled",
        f"{first['engine']} of them the engine's",
        f"{second['all']} by a second call",
    )


def main(argv: list[str]) -> None:
    """Measures the parts of the flags and prints the results."""
    del argv
    with runner.user_errors("bench_decoding"):
        parts = runner.some_of("parts", FLAGS.parts, PARTS)
    if FLAGS.smoke:
        for name, value in SMOKE.items():
            if not FLAGS[name].present:
                setattr(FLAGS, name, value)
    report = Report()
    report.details["load_average"] = {"before": os.getloadavg()}
    model = random_model.make_random_model(
        FLAGS.max_model_len, FLAGS.seed, initializer_range=FLAGS.initializer_range
    )
    ours = EngineDecoding(model, decoding_config())
    methods = [method for method in ("beams", "samples") if method in parts]
    if methods:
        peers = Peers(model, report)
        for method in methods:
            measure_method(model, ours, peers, method, report)
        del peers
    if "cost" in parts:
        with runner.user_errors("bench_decoding"):
            make_load("beams").middle(FLAGS.cost_steps)
        measure_cost(model, ours, report)
    if "programs" in parts:
        measure_programs(report)
    report.details["load_average"]["after"] = os.getloadavg()
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
