"""Memory saved by sharing blocks, as in the paper's figure 15.

    python -m experiments.sharing
    python -m experiments.sharing --trace lengths.csv --plot sharing.png

Figure 15 of Kwon et al. 2023 (https://arxiv.org/abs/2309.06180) divides the blocks that
are saved by sharing by the blocks that would be needed without it, for parallel
sampling and beam search with 2, 4 and 6 sequences. Here requests with the lengths of
its two data sets go through the real engine, 16 tokens a block, in the paper's pool of
983 blocks; the share is `blocks_saved_by_sharing` of `LLM.stats`, the mean over steps.
Printed beside it are the paper's numbers, and the mean over the steps in which requests
still wait, which leaves out the end of the run, when the longest outputs are alone.

What differs from the paper: the model is a random one of one layer, for what is shared
in parallel sampling depends on lengths alone. In beam search it depends on how late the
beams part, so on the model: each factor in --weight_scales makes the random model's
weights larger, which makes it surer of its next token. All requests wait from the
beginning, where the paper has them arrive at 20 a second (more than it could serve
with 6 sequences each), and a batch has at most --max_num_seqs sequences.

Lengths: without --trace from a table of 50 pairs per data set that keeps its means, a
fact about the paper's ShareGPT lengths (its artifact: input and output together below
2048 tokens, first round) and about Stanford Alpaca's (5,000 drawn instructions, in
GPT-2 tokens). --trace reads a CSV file with the columns input_tokens and output_tokens,
of which the first rows are taken that fit 2048 tokens.

Time: about 4 minutes on two CPU cores, one of them to compile the engine, once for all
runs. Expected, on Alpaca's lengths: 5.3, 8.5 and 9.6 % for parallel sampling (the paper
has 6.09, 8.53 and 9.79), 38 to 61 % for beams (37.56 to 55.16).
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib.timing import Report, progress
from jpaged import engine, scheduler
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.models import Decoder, ModelConfig, init_model
from jpaged.params import BeamSearchParams, SamplingParams

# Ten groups of equally many requests by input length: the mean input, and of five
# groups of its requests by output length the mean output.
LENGTHS = {
    "alpaca": (
        (8, (10, 30, 59, 85, 140)),
        (10, (12, 28, 49, 71, 126)),
        (12, (16, 54, 79, 99, 160)),
        (13, (7, 22, 54, 98, 187)),
        (15, (13, 46, 73, 98, 169)),
        (17, (5, 12, 35, 73, 157)),
        (19, (5, 10, 24, 63, 136)),
        (23, (4, 9, 18, 46, 130)),
        (28, (5, 11, 16, 41, 125)),
        (49, (5, 15, 29, 53, 131)),
    ),
    "sharegpt": (
        (6, (11, 39, 96, 200, 461)),
        (11, (58, 141, 218, 302, 540)),
        (15, (70, 175, 266, 357, 648)),
        (21, (72, 200, 295, 408, 721)),
        (29, (67, 197, 309, 454, 813)),
        (44, (60, 187, 305, 459, 873)),
        (73, (59, 192, 320, 483, 898)),
        (139, (65, 194, 333, 521, 951)),
        (333, (71, 194, 333, 530, 955)),
        (945, (42, 160, 290, 484, 837)),
    ),
}
# Of ShareGPT the paper's text gives the ends of a range, taken as those of 2 and 6.
PAPER = {
    ("alpaca", "parallel"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("alpaca", "beam"): {2: 37.56, 4: 53.13, 6: 55.16},
    ("sharegpt", "parallel"): {2: 16.2, 6: 30.5},
    ("sharegpt", "beam"): {2: 44.3, 6: 66.3},
}
MAX_LEN = 2048
VOCAB_SIZE = 512

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("datasets", ["alpaca", "sharegpt"], "Lengths, by data set.")
    flags.DEFINE_string("trace", None, "CSV of lengths, in place of the data sets'.")
    flags.DEFINE_integer("num_requests", 100, "Of each run.", lower_bound=1)
    flags.DEFINE_list("methods", ["parallel", "beam"], "Of parallel and beam.")
    flags.DEFINE_list("widths", ["2", "4", "6"], "Sequences of a request.")
    flags.DEFINE_list("weight_scales", ["1", "50"], "Factors for the model's weights.")
    flags.DEFINE_integer("num_blocks", 983, "Of the pool.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 64, "Sequences at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of prompts, order, weights and samples.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


class Length(NamedTuple):
    """Tokens of a request."""

    num_input: int
    num_output: int


@dataclasses.dataclass(frozen=True)
class Saved:
    """What one run saved."""

    dataset: str
    method: str
    width: int
    weight_scale: float
    saved_percent: float  # mean over all steps
    saved_percent_full: float  # mean over the steps in which requests wait
    paper_percent: float | None
    mean_num_seqs: float  # sequences that got a token, per step
    num_steps: int
    num_preemptions: int
    num_block_copies: int
    run_s: float


def table_lengths(dataset: str, count: int, seed: int) -> list[Length]:
    """`count` lengths: whole rounds of the 50 pairs, and of the last round a part."""
    pairs = [
        Length(num_input, num_output)
        for num_input, outputs in LENGTHS[dataset]
        for num_output in outputs
    ]
    rng = np.random.default_rng(seed)
    rounds = cdiv(count, len(pairs))
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(rounds)])
    return [pairs[at] for at in order[:count]]


def trace_lengths(path: pathlib.Path, count: int, seed: int) -> list[Length]:
    """The first `count` lengths of a file that fit, shuffled.

    Raises:
      OSError, ValueError: no such file, a column is missing, or too few rows fit.
    """
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                length = Length(int(row["input_tokens"]), int(row["output_tokens"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"trace: wanted integers in the columns input_tokens and "
                    f"output_tokens of {path}, got {row!r:.80}"
                ) from error
            if min(length) > 0 and sum(length) < MAX_LEN:
                found.append(length)
            if len(found) == count:
                break
    if len(found) < count:
        raise ValueError(
            f"trace: wanted {count} requests below {MAX_LEN} tokens, {path} has "
            f"{len(found)}; lower --num_requests"
        )
    order = np.random.default_rng(seed).permutation(count)
    return [found[at] for at in order]


def make_model(weight_scale: float, seed: int) -> Decoder:
    """A random decoder of one layer, its matrices times `weight_scale`."""
    sizes = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=MAX_LEN,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = init_model(ModelConfig.from_hf(sizes), seed)
    return jax.tree.map(lambda x: x * weight_scale if x.ndim > 1 else x, model)


def requests_of(
    lengths: Sequence[Length], method: str, width: int, seed: int
) -> tuple[list[list[int]], list[SamplingParams | BeamSearchParams]]:
    """Prompts of random tokens, and parameters that force the outputs' lengths."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB_SIZE, one.num_input).tolist() for one in lengths]
    params = []
    for number, one in enumerate(lengths):
        ends: dict[str, Any] = dict(max_tokens=one.num_output, ignore_eos=True)
        if method == "beam":
            params.append(BeamSearchParams(beam_width=width, **ends))
        else:
            params.append(SamplingParams(n=width, seed=seed + number, **ends))
    return prompts, params


def replay(
    model: Decoder, config: EngineConfig, prompts: list[Any], params: list[Any]
) -> tuple[engine.EngineState, float]:
    """The engine after all requests, and the mean share saved while some waited."""
    state = engine.init(model, config)
    state, _ = engine.submit(state, prompts, params, vocab_size=VOCAB_SIZE)
    share = 0.0
    while jnp.any(state.requests.queue.status == scheduler.WAITING):
        counters = jax.device_get(state.counters)
        share = counters.saved_share / max(counters.num_steps, 1)
        state = engine.run(model, state, jnp.int32(16))
    return engine.run(model, state, jnp.int32(2**30)), float(share)


def measure(
    lengths: Sequence[Length],
    dataset: str,
    config: EngineConfig,
    widths: Sequence[int],
    methods: Sequence[str],
    weight_scales: Sequence[float],
    seed: int,
) -> Iterator[Saved]:
    """One run after the other; of parallel sampling only one per width."""
    for method in methods:
        for scale in weight_scales if method == "beam" else weight_scales[:1]:
            model = make_model(scale, seed)
            for width in widths:
                prompts, params = requests_of(lengths, method, width, seed)
                begin = time.perf_counter()
                state, while_full = replay(model, config, prompts, params)
                counters = jax.device_get(state.counters)
                num_steps = int(counters.num_steps)
                yield Saved(
                    dataset=dataset,
                    method=method,
                    width=width,
                    weight_scale=scale,
                    saved_percent=100 * float(counters.saved_share) / num_steps,
                    saved_percent_full=100 * while_full,
                    paper_percent=PAPER.get((dataset, method), {}).get(width),
                    mean_num_seqs=int(counters.num_generated) / num_steps,
                    num_steps=num_steps,
                    num_preemptions=int(counters.num_preemptions),
                    num_block_copies=int(counters.num_block_copies),
                    run_s=time.perf_counter() - begin,
                )


def make_config(widths: Sequence[int], methods: Sequence[str]) -> EngineConfig:
    """An engine for all runs, so that its program is compiled once.

    Raises:
      ValueError: sizes that do not go together.
    """
    beams = max(widths) if "beam" in methods else 0
    return EngineConfig(
        num_blocks=FLAGS.num_blocks,
        block_size=FLAGS.block_size,
        max_num_seqs=FLAGS.max_num_seqs,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=max(256, FLAGS.max_num_seqs),
        # Of a beam search also the sequences that it holds.
        max_num_requests=FLAGS.num_requests * max(max(widths), 2 * beams),
        max_num_stop_ids=1,
        max_beam_width=beams,
    )


def check_fits(
    config: EngineConfig, lengths: Sequence[Length], method: str, width: int, seed: int
) -> None:
    """Raises ValueError for a request that the pool or the rows could never hold."""
    requests = requests_of(lengths, method, width, seed)
    for prompt, param in zip(*requests, strict=True):
        engine.check_request(config, prompt, param, vocab_size=VOCAB_SIZE)


def plot(found: Sequence[Saved], path: str) -> None:
    """Writes bars of what was saved, with the paper's numbers as marks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    datasets = list(dict.fromkeys(one.dataset for one in found))
    figure, axes = pyplot.subplots(
        1, len(datasets), figsize=(6 * len(datasets), 4), squeeze=False, sharey=True
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        mine = [one for one in found if one.dataset == dataset]
        seq_indices = range(len(mine))
        axis.bar(seq_indices, [one.saved_percent for one in mine], color="tab:blue")
        marks = [(at, one.paper_percent) for at, one in enumerate(mine)]
        marks = [(at, percent) for at, percent in marks if percent is not None]
        if marks:
            axis.scatter(*zip(*marks, strict=True), color="black", zorder=3)
        names = [
            f"{one.method} {one.width}"
            + (f"\n× {one.weight_scale:g}" if one.method == "beam" else "")
            for one in mine
        ]
        axis.set_xticks(seq_indices, names, fontsize=7)
        axis.set_title(f"{dataset}; dots: OPT-13B in the paper")
    axes[0][0].set_ylabel("blocks saved by sharing, %")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_flags() -> tuple[list[int], list[float], dict[str, list[Length]]]:
    """Widths, scales, and the lengths of each data set.

    Raises:
      OSError, ValueError: a flag that is wrong.
    """
    widths = [int(width) for width in FLAGS.widths if width.isdecimal()]
    if len(widths) != len(FLAGS.widths) or not widths or min(widths) < 1:
        raise ValueError(f"widths: wanted numbers of at least 1, got {FLAGS.widths}")
    if not FLAGS.methods or set(FLAGS.methods) - {"parallel", "beam"}:
        raise ValueError(f"methods: wanted parallel or beam, got {FLAGS.methods}")
    if unknown := set(FLAGS.datasets) - set(LENGTHS):
        raise ValueError(f"datasets: wanted some of {list(LENGTHS)}, got {unknown}")
    count, seed = FLAGS.num_requests, FLAGS.seed
    if FLAGS.trace is not None:
        path = pathlib.Path(FLAGS.trace)
        lengths = {path.stem: trace_lengths(path, count, seed)}
    else:
        lengths = {name: table_lengths(name, count, seed) for name in FLAGS.datasets}
    return widths, [float(scale) for scale in FLAGS.weight_scales] or [1.0], lengths


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken but flags, got {argv[1]!r}")
    try:
        widths, scales, lengths = check_flags()
        config = make_config(widths, FLAGS.methods)
        for method in FLAGS.methods:
            for some in lengths.values():
                check_fits(config, some, method, max(widths), FLAGS.seed)
    except (ValueError, OSError) as error:
        print(f"sharing: {error}", file=sys.stderr)
        return 1
    report, found = Report(), []
    progress("compiling the engine")
    begin = time.perf_counter()
    model = make_model(1.0, FLAGS.seed)
    jax.block_until_ready(engine.run(model, engine.init(model, config), jnp.int32(1)))
    report.row("engine: compile", f"{time.perf_counter() - begin:.1f} s")
    for dataset, some in lengths.items():
        means = np.mean(some, axis=0)
        report.row(
            f"{dataset}: mean tokens", f"{means[0]:.1f} in", f"{means[1]:.1f} out"
        )
        runs = measure(some, dataset, config, widths, FLAGS.methods, scales, FLAGS.seed)
        for one in runs:
            found.append(one)
            name = f"{one.dataset}, {one.method} {one.width}"
            if one.method == "beam":
                name += f", weights x {one.weight_scale:g}"
            paper = "-" if one.paper_percent is None else f"{one.paper_percent:.2f}"
            report.row(
                name,
                f"{one.saved_percent:.2f} %",
                f"while full {one.saved_percent_full:.2f}, paper {paper}",
                f"{one.num_steps} steps, {one.mean_num_seqs:.0f} rows, "
                f"{one.num_preemptions} preempted, {one.run_s:.0f} s",
            )
    report.details["runs"] = [dataclasses.asdict(one) for one in found]
    if FLAGS.plot is not None:
        plot(found, FLAGS.plot)
    used = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in used})
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
