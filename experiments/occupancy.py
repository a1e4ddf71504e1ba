"""KV memory over time under a live load: what holds tokens, what is reserved, shared.

    python -m experiments.occupancy
    python -m experiments.occupancy --num_blocks 40 --plot occupancy.png --csv steps.csv

Requests arrive by chance at --rate a second, each in a coroutine of its own that waits
for `llm.submit`, as in a server. Printed are the latencies of the requests and the mean
composition of the KV memory; --plot draws the memory over time, split as in the paper's
figure 2 into slots with token states and slots that are reserved for tokens to come,
with what sharing saves above it, and what happened to each request. --csv writes a row
for each step.

Lengths are those of Stanford Alpaca in `experiments.sharing`, prompts are random
tokens, and the model is the bundled one: which tokens come does not matter here. Times
are those of this machine's clock. A step's place in time is interpolated within its
slice, about 0.05 s.

Time: about 20 s on two CPU cores once the engine is compiled, which takes a minute.
Expected: more than 80 % of the used slots hold tokens, for only the last block of a
sequence has reserved slots; with 40 blocks some requests are preempted.
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import sharing
from experiments.lib.timing import Report, progress
from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams
from jpaged.serving.metrics import LATENCIES, StepRecord

FLAGS = flags.FLAGS
PERCENTILES = (50, 90, 99)


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("model", "tiny-python", "As for `jpaged.LLM`.")
    flags.DEFINE_integer("num_requests", 60, "Of the load.", lower_bound=1)
    flags.DEFINE_float("rate", 10.0, "Requests a second, on average.", lower_bound=1e-3)
    flags.DEFINE_integer("n", 2, "Samples of each request.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 60, "Of the pool.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 8, "Sequences at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of arrivals, prompts and samples.")
    flags.DEFINE_string("csv", None, "File for a table of the steps.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def arrivals_s(count: int, rate: float, seed: int) -> list[float]:
    """When each of `count` requests arrives: a Poisson process, the first one at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


async def replay(
    llm: LLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    arrivals: Sequence[float],
) -> list[RequestOutput]:
    """The outputs of requests that each come at their time, in seconds from now."""

    async def one(prompt: list[int], param: SamplingParams, at: float) -> RequestOutput:
        await asyncio.sleep(at)
        return await llm.submit(prompt, param)

    return await asyncio.gather(*map(one, prompts, params, arrivals))


def warm_up(llm: LLM, n: int) -> None:
    """Compiles what one request needs, and what many need."""
    params = SamplingParams(n=n, max_tokens=4, ignore_eos=True)
    for count in (1, 2, 4, 8, llm.config.max_num_seqs):
        requests = [llm.submit([1, 2, 3], params) for _ in range(count)]
        for request in requests:
            request.output()


def latency_table(outputs: Sequence[RequestOutput]) -> dict[str, dict[str, float]]:
    """Of each latency the mean and percentiles over the requests that have it."""
    table = {}
    for name in LATENCIES:
        found = [output.metrics[name] for output in outputs]
        found = [value for value in found if value is not None]
        if found:
            ranks = np.percentile(found, PERCENTILES)
            table[name] = {"mean": float(np.mean(found))} | {
                f"p{percent}": float(value)
                for percent, value in zip(PERCENTILES, ranks, strict=True)
            }
    return table


def composition(
    steps: Sequence[StepRecord], num_blocks: int, block_size: int
) -> dict[str, float]:
    """Mean shares of the pool's slots over steps; `saved`, beside them, is what sharing
    spares."""
    num_slots = num_blocks * block_size
    held = np.mean([step.num_token_states for step in steps]) / num_slots
    reserved = np.mean([step.num_reserved_slots for step in steps]) / num_slots
    saved = np.mean([step.num_saved_blocks for step in steps]) / num_blocks
    return {
        "token_states": float(held),
        "reserved": float(reserved),
        "free": float(1 - held - reserved),
        "saved": float(saved),
    }


def write_csv(steps: Sequence[StepRecord], path: str) -> None:
    """Writes a table with a row for each step."""
    with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([StepRecord._fields, *steps])


def plot(
    steps: Sequence[StepRecord],
    outputs: Sequence[RequestOutput],
    llm: LLM,
    begin_s: float,
    path: str,
) -> None:
    """Writes the figure: memory, sequences, and each request's life, over time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, 1, figsize=(9, 9), sharex=True, height_ratios=(2, 1, 2)
    )
    _plot_memory(axes[0], steps, llm.config.num_blocks, llm.config.block_size, begin_s)
    times = [step.time_s - begin_s for step in steps]
    for name in ("num_running", "num_waiting"):
        axes[1].step(times, [getattr(step, name) for step in steps], label=name[4:])
    axes[1].set_ylabel("sequences")
    axes[1].legend(loc="upper left")
    _plot_requests(axes[2], outputs, begin_s)
    axes[2].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_memory(axis: Any, steps, num_blocks: int, size: int, begin_s: float) -> None:
    times = [step.time_s - begin_s for step in steps]
    percent = 100 / (num_blocks * size)
    held = percent * np.array([step.num_token_states for step in steps])
    reserved = percent * np.array([step.num_reserved_slots for step in steps])
    saved = percent * size * np.array([step.num_saved_blocks for step in steps])
    axis.stackplot(
        times,
        [held, reserved, saved],
        labels=["token states", "reserved", "saved by sharing"],
        colors=["tab:blue", "tab:orange", "lightgrey"],
        step="pre",
    )
    axis.axhline(100, color="black", linewidth=0.8)
    axis.set_ylabel("KV slots, % of the pool")
    axis.legend(loc="upper left")


def _plot_requests(axis: Any, outputs, begin_s: float) -> None:
    """A line for each request: grey where it waits, blue where it runs."""
    marks = {
        "first_token": ("tab:green", "|"),
        "preempted": ("tab:red", "x"),
        "swapped": ("tab:orange", "x"),
    }
    for line, output in enumerate(outputs):
        for event, after in itertools.pairwise(output.events):
            waits = event.name in ("queued", "preempted", "swapped")
            axis.plot(
                [event.time_s - begin_s, after.time_s - begin_s],
                [line, line],
                color="lightgrey" if waits else "tab:blue",
                linewidth=2,
            )
    for name, (color, marker) in marks.items():
        found = [
            (event.time_s - begin_s, line)
            for line, output in enumerate(outputs)
            for event in output.events
            if event.name == name
        ]
        if found:
            at = list(zip(*found, strict=True))
            axis.scatter(*at, c=color, marker=marker, zorder=3, label=name)
            axis.legend(loc="lower right")
    axis.set_ylabel("requests; grey: waiting")


def make_llm(longest: int) -> LLM:
    """The engine of the flags, for sequences up to `longest` tokens."""
    return LLM(
        FLAGS.model,
        block_size=FLAGS.block_size,
        num_blocks=FLAGS.num_blocks,
        max_num_seqs=FLAGS.max_num_seqs,
        max_num_batched_tokens=max(64, FLAGS.max_num_seqs),
        max_model_len=longest,
        seed=FLAGS.seed,
    )


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken but flags, got {argv[1]!r}")
    count, seed = FLAGS.num_requests, FLAGS.seed
    lengths = sharing.table_lengths("alpaca", count, seed)
    rng = np.random.default_rng(seed)
    try:
        llm = make_llm(max(map(sum, lengths)))
        vocab_size = llm.model.config.vocab_size
        prompts = [
            rng.integers(0, vocab_size, one.num_input).tolist() for one in lengths
        ]
        params = [
            SamplingParams(
                n=FLAGS.n,
                max_tokens=one.num_output,
                ignore_eos=True,
                seed=seed + number,
            )
            for number, one in enumerate(lengths)
        ]
        errors = [error for error in llm.check(prompts, params) if error is not None]
        if errors:
            raise ValueError(errors[0])
    except (ValueError, OSError) as error:
        print(f"occupancy: {error}", file=sys.stderr)
        return 1
    progress("compiling the engine")
    warm_up(llm, FLAGS.n)
    begin_s = time.perf_counter()
    arrivals = arrivals_s(count, FLAGS.rate, seed)
    outputs = asyncio.run(replay(llm, prompts, params, arrivals))
    steps = [step for step in llm.timeline() if step.time_s >= begin_s]
    report = Report()
    report.details = summary(outputs, steps, llm)
    show(report)
    if FLAGS.csv is not None:
        write_csv(steps, FLAGS.csv)
    if FLAGS.plot is not None:
        plot(steps, outputs, llm, begin_s, FLAGS.plot)
    used = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in used})
    return 0


def summary(
    outputs: Sequence[RequestOutput], steps: Sequence[StepRecord], llm: LLM
) -> dict[str, Any]:
    """What the last line says."""
    preempted = [output.metrics["num_preemptions"] for output in outputs]
    return {
        "latencies_s": latency_table(outputs),
        "kv_composition": composition(
            steps, llm.config.num_blocks, llm.config.block_size
        ),
        "num_requests": len(outputs),
        "num_steps": len(steps),
        "num_generated": sum(step.num_generated for step in steps),
        "num_preemptions": sum(preempted),
        "num_lost_events": llm.stats()["num_lost_events"],
    }


def show(report: Report) -> None:
    """Prints the summary as a table."""
    for name, found in report.details["latencies_s"].items():
        rest = ", ".join(f"{key} {1e3 * found[key]:.1f}" for key in list(found)[1:])
        report.row(name, f"{1e3 * found['mean']:.1f} ms", rest)
    for name, share in report.details["kv_composition"].items():
        report.row(f"KV slots: {name}", f"{100 * share:.1f} %")
    for name in ("num_steps", "num_preemptions"):
        report.row(name, str(report.details[name]))


if __name__ == "__main__":
    define_flags()
    app.run(main)
