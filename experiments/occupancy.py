"""Measures KV memory under a live load: slots with tokens, reserved and shared slots.

    python -m experiments.occupancy
    python -m experiments.occupancy --num_blocks 40 --plot occupancy.png --csv steps.csv

Requests arrive at random, at `--rate` per second. As in a server, each has a coroutine
that waits for `llm.submit`. The runner prints the latencies of the requests and the
mean composition of the KV memory. `--plot` draws the memory over time, divided as in
the paper's figure 2 into slots with token states and slots reserved for future tokens,
with the memory that sharing saves on top, and the events of each request. `--csv`
writes a row for each step.

Lengths are those of Stanford Alpaca in `experiments/lib/request_lengths.py`. Prompts
are random tokens, and the model is the bundled one, since the tokens do not matter
here. Times are wall clock. The time of a step is interpolated within its slice of about
0.05 s.

Time: about 20 s on two CPU cores once the engine is compiled, which takes a minute.
Expected: more than 80 % of the used slots hold tokens, because only the last block of a
sequence has reserved slots. With 40 blocks some requests are preempted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.lib import runner
from experiments.lib.request_lengths import table_lengths
from experiments.lib.runner import Report, progress
from jpaged import plot
from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams
from jpaged.plot import style
from jpaged.serving.metrics import LATENCIES, StepRecord

FLAGS = flags.FLAGS
PERCENTILES = (50, 90, 99)


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "The model, as for jpaged.LLM.")
    flags.DEFINE_integer("num_requests", 60, "Requests of the load.", lower_bound=1)
    flags.DEFINE_float("rate", 10.0, "Mean requests per second.", lower_bound=1e-3)
    flags.DEFINE_integer("n", 2, "Samples of each request.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 60, "Blocks of the pool.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 8, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of arrivals, prompts and samples.")
    flags.DEFINE_string("csv", None, "File for a table of the steps.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def poisson_arrivals_s(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process in seconds, the first one at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


async def run_live(
    llm: LLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    arrivals: Sequence[float],
) -> list[RequestOutput]:
    """Submits each request at its arrival time; returns all outputs.

    Args:
      llm: The engine.
      prompts: Token ids of each request.
      params: Parameters of each request.
      arrivals: Arrival times in seconds from now.
    """

    async def submit_at(
        prompt: list[int], param: SamplingParams, at_s: float
    ) -> RequestOutput:
        await asyncio.sleep(at_s)
        return await llm.submit(prompt, param)

    return await asyncio.gather(*map(submit_at, prompts, params, arrivals))


def compile_programs(llm: LLM, n: int) -> None:
    """Compiles the programs that one request and several requests need."""
    params = SamplingParams(n=n, max_tokens=4, ignore_eos=True)
    for count in (1, 2, 4, 8, llm.config.max_num_seqs):
        requests = [llm.submit([1, 2, 3], params) for _ in range(count)]
        for request in requests:
            request.output()


def latency_table(outputs: Sequence[RequestOutput]) -> dict[str, dict[str, float]]:
    """Mean and percentiles of each latency over the requests that have it, in s."""
    table = {}
    for name in LATENCIES:
        found = [(output.metrics or {}).get(name) for output in outputs]
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
    """Mean shares of the pool's slots over the steps.

    "token_states", "reserved" and "free" add up to 1. "saved" is the memory that
    sharing saves, relative to the pool.
    """
    num_slots = num_blocks * block_size
    with_tokens = np.mean([step.num_token_states for step in steps]) / num_slots
    reserved = np.mean([step.num_reserved_slots for step in steps]) / num_slots
    saved = np.mean([step.num_saved_blocks for step in steps]) / num_blocks
    return {
        "token_states": float(with_tokens),
        "reserved": float(reserved),
        "free": float(1 - with_tokens - reserved),
        "saved": float(saved),
    }


def live_llm(longest: int) -> LLM:
    """Builds the engine of the flags, for sequences of up to `longest` tokens."""
    return LLM(
        FLAGS.model,
        block_size=FLAGS.block_size,
        num_blocks=FLAGS.num_blocks,
        max_num_seqs=FLAGS.max_num_seqs,
        max_num_batched_tokens=max(64, FLAGS.max_num_seqs),
        max_model_len=longest,
        seed=FLAGS.seed,
    )


def main(argv: list[str]) -> None:
    """Runs the load and prints the results."""
    del argv
    count, seed = FLAGS.num_requests, FLAGS.seed
    lengths = table_lengths("alpaca", count, seed)
    rng = np.random.default_rng(seed)
    runner.warn_if_small("occupancy", "num_requests", count, 30)
    with runner.user_errors("occupancy"):
        llm = live_llm(max(map(sum, lengths)))
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
    progress("compiling the engine")
    compile_programs(llm, FLAGS.n)
    begin_s = time.perf_counter()
    arrivals = poisson_arrivals_s(count, FLAGS.rate, seed)
    outputs = asyncio.run(run_live(llm, prompts, params, arrivals))
    steps = [step for step in llm.timeline() if step.time_s >= begin_s]
    report = Report()
    report.details = occupancy_summary(outputs, steps, llm)
    _print_summary(report)
    if FLAGS.csv is not None:
        runner.write_csv(FLAGS.csv, StepRecord._fields, steps)
    if FLAGS.plot is not None:
        sizes = dict(num_blocks=llm.config.num_blocks, block_size=llm.config.block_size)
        figure = plot.live_load(steps, outputs, start_s=begin_s, **sizes)
        style.save(figure, FLAGS.plot)
    report.last_line(runner.flag_values(__name__))


def occupancy_summary(
    outputs: Sequence[RequestOutput], steps: Sequence[StepRecord], llm: LLM
) -> dict[str, Any]:
    """The details of the last line."""
    preempted = [(output.metrics or {})["num_preemptions"] for output in outputs]
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


def _print_summary(report: Report) -> None:
    for name, found in report.details["latencies_s"].items():
        rest = ", ".join(f"{key} {1e3 * found[key]:.1f}" for key in list(found)[1:])
        report.row(name, f"{1e3 * found['mean']:.1f} ms", rest)
    for name, share in report.details["kv_composition"].items():
        label = {"token_states": "token states", "saved": "saved by sharing"}
        report.row(f"KV slots: {label.get(name, name)}", f"{100 * share:.1f} %")
    for name in ("num_steps", "num_preemptions"):
        report.row(name, str(report.details[name]))


if __name__ == "__main__":
    runner.start(main, define_flags)
