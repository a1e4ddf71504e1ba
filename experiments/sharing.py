"""Measures the memory saved by sharing blocks, as in the paper's figure 15.

    python -m experiments.sharing
    python -m experiments.sharing --trace lengths.csv --plot sharing.png

Figure 15 of Kwon et al. 2023 (https://arxiv.org/abs/2309.06180) divides the blocks
saved by sharing by the blocks needed without sharing, for parallel sampling and beam
search with 2, 4 and 6 sequences. Here requests with the lengths of its two data sets
run on the real engine, with 16 tokens per block and the paper's pool of 983 blocks. The
share is `blocks_saved_by_sharing` of `LLM.stats`, the mean over the steps. Beside it
the runner prints the paper's numbers, and the mean over the steps in which requests
still wait; this excludes the end of the run, when only the longest outputs are left.

Differences from the paper: the model has one layer and random weights, because in
parallel sampling only the lengths decide what is shared. In beam search it depends on
the model, on how late the beams diverge: each factor in `--weight_scales` multiplies
the model's weights, and a larger factor makes its next-token distribution more
concentrated. All requests arrive at the start; in the paper 20 arrive per second (more
than it could serve with 6 sequences each). A batch has at most `--max_num_seqs`
sequences.

Lengths: without `--trace`, a table of 50 pairs per data set that has the same means as
the paper's ShareGPT lengths (from its artifact: input and output together below 2048
tokens, first round) and Stanford Alpaca's (5,000 sampled instructions, in GPT-2
tokens). `--trace` reads a CSV file with the columns input_tokens and output_tokens, and
uses the first rows that are below 2048 tokens.

Time: about 4 minutes on two CPU cores, one of them to compile the engine, once for all
runs. Expected on Alpaca's lengths: 5.3, 8.5 and 9.6 % for parallel sampling (the paper
has 6.09, 8.53 and 9.79), 38 to 61 % for beams (37.56 to 55.16).
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import runner
from experiments.lib.request_lengths import (
    LENGTHS,
    MAX_LEN,
    RequestLength,
    table_lengths,
    trace_lengths,
)
from experiments.lib.runner import Report, progress
from jpaged import engine, scheduler
from jpaged.config import EngineConfig
from jpaged.models import Decoder, ModelConfig, init_model
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.plot import style

# For ShareGPT the paper's text has ranges; their ends are taken for widths 2 and 6.
PAPER = {
    ("alpaca", "parallel"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("alpaca", "beam"): {2: 37.56, 4: 53.13, 6: 55.16},
    ("sharegpt", "parallel"): {2: 16.2, 6: 30.5},
    ("sharegpt", "beam"): {2: 44.3, 6: 66.3},
}
VOCAB_SIZE = 512

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_list(
        "datasets", ["alpaca", "sharegpt"], "Data sets whose lengths are used."
    )
    flags.DEFINE_string("trace", None, "CSV file of lengths, instead of the data sets.")
    flags.DEFINE_integer("num_requests", 100, "Requests of each run.", lower_bound=1)
    flags.DEFINE_list("methods", ["parallel", "beam"], "Methods, of parallel and beam.")
    flags.DEFINE_list("widths", ["2", "4", "6"], "Sequences of each request.")
    flags.DEFINE_list("weight_scales", ["1", "50"], "Factors of the model's weights.")
    flags.DEFINE_integer("num_blocks", 983, "Blocks of the pool.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 64, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of prompts, order, weights and samples.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


@dataclasses.dataclass(frozen=True)
class SharingResult:
    """Blocks saved by one run."""

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


def scaled_model(weight_scale: float, seed: int) -> Decoder:
    """Initialises a decoder of one layer and multiplies its matrices."""
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
    lengths: Sequence[RequestLength], method: str, width: int, seed: int
) -> tuple[list[list[int]], list[SamplingParams | BeamSearchParams]]:
    """Prompts of random tokens, and parameters that fix the outputs' lengths."""
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


def run_requests(
    model: Decoder, config: EngineConfig, prompts: list[Any], params: list[Any]
) -> tuple[engine.EngineState, float]:
    """Runs all requests.

    Returns:
      The final state, and the mean share of saved blocks while requests waited.
    """
    state = engine.init(model, config)
    state, _ = engine.submit(state, prompts, params, vocab_size=VOCAB_SIZE)
    share = 0.0
    while jnp.any(state.requests.queue.status == scheduler.WAITING):
        counters = jax.device_get(state.counters)
        share = counters.saved_share / max(counters.num_steps, 1)
        state = engine.run(model, state, jnp.int32(16))
    return engine.run(model, state, jnp.int32(2**30)), float(share)


def measure_sharing(
    lengths: Sequence[RequestLength],
    dataset: str,
    config: EngineConfig,
    widths: Sequence[int],
    methods: Sequence[str],
    weight_scales: Sequence[float],
    seed: int,
) -> Iterator[SharingResult]:
    """Yields the result of each run; parallel sampling uses the first scale only."""
    for method in methods:
        for scale in weight_scales if method == "beam" else weight_scales[:1]:
            model = scaled_model(scale, seed)
            for width in widths:
                prompts, params = requests_of(lengths, method, width, seed)
                begin = time.perf_counter()
                state, while_full = run_requests(model, config, prompts, params)
                counters = jax.device_get(state.counters)
                num_steps = int(counters.num_steps)
                yield SharingResult(
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


def sharing_config(widths: Sequence[int], methods: Sequence[str]) -> EngineConfig:
    """An engine for all runs, so that its program is compiled once.

    Raises:
      ValueError: Sizes do not go together.
    """
    beams = max(widths) if "beam" in methods else 0
    return EngineConfig(
        num_blocks=FLAGS.num_blocks,
        block_size=FLAGS.block_size,
        max_num_seqs=FLAGS.max_num_seqs,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=max(256, FLAGS.max_num_seqs),
        max_num_requests=num_table_entries(widths, beams),
        max_num_stop_ids=1,
        max_beam_width=beams,
    )


def num_table_entries(widths: Sequence[int], beams: int) -> int:
    """Entries of the request table: those of all requests, and never too few."""
    # A beam search also has entries for its finished hypotheses.
    needed = FLAGS.num_requests * max(max(widths), 2 * beams)
    return max(FLAGS.max_num_seqs + EngineConfig.max_num_prefixes, needed)


def check_fits(
    config: EngineConfig,
    lengths: Sequence[RequestLength],
    method: str,
    width: int,
    seed: int,
) -> None:
    """Checks that every request can run.

    Raises:
      ValueError: A request needs more blocks or rows than the engine has.
    """
    requests = requests_of(lengths, method, width, seed)
    for prompt, param in zip(*requests, strict=True):
        engine.check_request(config, prompt, param, vocab_size=VOCAB_SIZE)


DATASET_NAMES = {"alpaca": "Alpaca", "sharegpt": "ShareGPT"}
METHOD_NAMES = {"parallel": "samples", "beam": "beams"}


def plot_sharing(found: Sequence[SharingResult], path: str) -> None:
    """Draws the saved blocks as bars, beside the paper's numbers."""
    datasets = list(dict.fromkeys(one.dataset for one in found))
    figure, panels = style.new_figure(1, len(datasets), (5.8, 3.4), sharey=True)
    for axis, dataset in zip(panels[0], datasets, strict=True):
        _plot_dataset(axis, dataset, [one for one in found if one.dataset == dataset])
    panels[0][0].set_ylabel("blocks saved by sharing (%)")
    # The paper's bars last.
    names = sorted({t for ax in panels[0] for t in ax.get_legend_handles_labels()[1]})
    style.legend_beside(panels[0][-1], order=names)
    style.save(figure, path)


def _plot_dataset(axis: Any, dataset: str, found: Sequence[SharingResult]) -> None:
    """Draws a group of bars for each number of samples or beams."""
    groups = list(dict.fromkeys((one.method, one.width) for one in found))
    scales = list(dict.fromkeys(one.weight_scale for one in found))
    width = 0.8 / (len(scales) + 1)
    for number, (method, count) in enumerate(groups):
        mine = [one for one in found if (one.method, one.width) == (method, count)]
        papers = [one.paper_percent for one in mine if one.paper_percent is not None]
        bars = [
            (f"here, weights × {one.weight_scale:g}", one.saved_percent) for one in mine
        ]
        bars += [("paper, OPT-13B", paper) for paper in papers[:1]]
        for place, (label, height) in enumerate(bars):
            color = style.GREY
            if label.startswith("here"):
                color = (style.BLUE, style.SKY, style.PURPLE, style.GREEN)[place % 4]
            at = number + (place - (len(bars) - 1) / 2) * width
            axis.bar(at, height, 0.94 * width, color=color, label=label)
            axis.annotate(
                f"{height:.1f}", (at, height), ha="center", va="bottom", fontsize=6
            )
    names = [f"{count}\n{METHOD_NAMES[method]}" for method, count in groups]
    axis.set_xticks(range(len(groups)), names)
    axis.set_ylim(bottom=0)
    style.dress(axis, "sequences of a request", "", DATASET_NAMES.get(dataset, dataset))


def checked_flags() -> tuple[list[int], list[float], dict[str, list[RequestLength]]]:
    """Widths, weight scales, and the lengths of each data set.

    Raises:
      OSError: The trace cannot be read.
      ValueError: A flag or the trace is invalid.
    """
    widths = runner.positive_integers("widths")
    runner.some_of("methods", FLAGS.methods, ["parallel", "beam"])
    datasets = runner.some_of("datasets", FLAGS.datasets, list(LENGTHS))
    count, seed = FLAGS.num_requests, FLAGS.seed
    if FLAGS.trace is not None:
        path = pathlib.Path(FLAGS.trace)
        lengths = {path.stem: trace_lengths(path, count, seed)}
    else:
        lengths = {name: table_lengths(name, count, seed) for name in datasets}
    return widths, [float(scale) for scale in FLAGS.weight_scales] or [1.0], lengths


def main(argv: list[str]) -> None:
    """Runs all methods and widths and prints the results."""
    del argv
    runner.warn_if_small("sharing", "num_requests", FLAGS.num_requests, 50)
    with runner.user_errors("sharing"):
        widths, scales, lengths = checked_flags()
        config = sharing_config(widths, FLAGS.methods)
        for method in FLAGS.methods:
            for some in lengths.values():
                check_fits(config, some, method, max(widths), FLAGS.seed)
    report, found = Report(), []
    progress("compiling the engine")
    begin = time.perf_counter()
    model = scaled_model(1.0, FLAGS.seed)
    jax.block_until_ready(engine.run(model, engine.init(model, config), jnp.int32(1)))
    report.row("engine: compile", f"{time.perf_counter() - begin:.1f} s")
    for dataset, some in lengths.items():
        means = np.mean(some, axis=0)
        report.row(
            f"{dataset}: mean tokens", f"{means[0]:.1f} in", f"{means[1]:.1f} out"
        )
        for one in measure_sharing(
            some, dataset, config, widths, FLAGS.methods, scales, FLAGS.seed
        ):
            found.append(one)
            _print_result(report, one)
    report.details["runs"] = [dataclasses.asdict(one) for one in found]
    if FLAGS.plot is not None:
        plot_sharing(found, FLAGS.plot)
    report.last_line(runner.flag_values(__name__))


def _print_result(report: Report, one: SharingResult) -> None:
    name = f"{one.dataset}, {one.width} {METHOD_NAMES[one.method]}"
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


if __name__ == "__main__":
    runner.start(main, define_flags)
