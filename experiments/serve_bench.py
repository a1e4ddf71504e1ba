"""Measures latency against request rate through the HTTP server, as in figure 12.

    python -m experiments.serve_bench
    python -m experiments.serve_bench --plot latency.png --csv latency.csv
    python -m experiments.serve_bench --mode overhead --model random

The server runs in this process. An open-loop client in another one sends requests to
it: Poisson arrivals, lengths of ShareGPT (`--scale` shortens them). First all requests
are sent at once. This gives the highest rate, and the times of the engine's steps, to
which a cost model is fitted. Then requests arrive at `--loads` times that rate, on the
live engine, and in the simulator with the fitted costs. Nothing is fitted to these
runs. The latency is normalized: a request's seconds from the time that it was due until
its end, divided by its output tokens.

`--mode overhead` compares the throughput of `--streams` streams through the server with
that of `LLM.generate` on the same requests, in alternation. "random" is a Llama of 110M
parameters with random weights, and other models are named as for `jpaged.LLM`.

Time: about half a minute on two CPU cores for the bundled model once the engine is
compiled. Expected on an idle machine: the latency rises steeply near the highest rate;
the prediction is within a fifth up to a load of 0.7. The client shares the cores.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments.lib import random_model, runner
from experiments.lib.engine_loads import random_prompts
from experiments.lib.open_loop import Timing, run_open_loop
from experiments.lib.request_lengths import LENGTHS, RequestLength, table_lengths
from experiments.lib.runner import Report, progress
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.plot import curves, style
from jpaged.serving.metrics import StepRecord
from jpaged.simulator.costs.fit import LinearCost, fit
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.engine_entries import make_engine_system
from jpaged.simulator.workloads.workload import Workload

FLAGS = flags.FLAGS
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=16)


class Row(NamedTuple):
    """Latencies at one rate, in seconds."""

    load: float
    rate: float  # requests per second
    normalized_latency_s: float
    predicted_s: float
    ttft_s: float
    ttft_p99_s: float
    tpot_s: float
    tokens_per_s: float


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_enum("mode", "rates", ["rates", "overhead"], "What to measure.")
    flags.DEFINE_string("model", "tiny-python", "The model; random: 110M parameters.")
    flags.DEFINE_string("url", None, "A server that runs already; no prediction then.")
    flags.DEFINE_list("loads", ["0.3", "0.5", "0.7", "0.9"], "Shares of the top rate.")
    flags.DEFINE_integer("num_requests", 60, "Requests of each run.", lower_bound=2)
    flags.DEFINE_enum("lengths", "sharegpt", list(LENGTHS), "Lengths of requests.")
    flags.DEFINE_float("scale", 0.1, "Factor of the lengths.", lower_bound=1e-3)
    flags.DEFINE_integer("max_num_seqs", 32, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer("num_blocks", 1024, "Blocks of the pool.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of lengths, prompts and arrivals.")
    flags.DEFINE_integer("streams", 32, "overhead: streams at a time.", lower_bound=1)
    flags.DEFINE_integer("tokens", 64, "overhead: tokens per stream.", lower_bound=2)
    flags.DEFINE_float("slice_s", None, "Seconds between updates.", lower_bound=0.0)
    flags.DEFINE_integer("runs", 5, "overhead: repetitions.", lower_bound=1)
    flags.DEFINE_string("csv", None, "File for the table.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")
    random_model.define_flags()


@contextlib.contextmanager
def served(llm: LLM) -> Iterator[str]:
    """Runs the server in a thread; yields its URL.

    Raises:
      ValueError: the extra `server` is not installed.
    """
    try:
        import uvicorn

        from jpaged.server.app import create_app
        from jpaged.server.command import Server
        from jpaged.server.settings import ServerSettings
    except ImportError as error:
        raise ValueError(
            f'{error}: install the extra: pip install "jpaged[server]"'
        ) from error
    app = create_app(
        llm, ServerSettings(max_open_sequences=100_000, slice_s=FLAGS.slice_s)
    )
    config = uvicorn.Config(app, port=0, log_config=None)
    server = Server(config, app.state.bridge, drain_s=5.0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise OSError("the server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def make_llm(longest: int) -> LLM:
    """Builds the engine of the flags, for sequences of up to `longest` tokens."""
    model: Any = FLAGS.model
    if model == "random":
        model = random_model.make_random_model(longest, FLAGS.seed)
    llm = LLM(
        model,
        max_num_seqs=FLAGS.max_num_seqs,
        num_blocks=FLAGS.num_blocks,
        max_num_batched_tokens=max(256, FLAGS.max_num_seqs),
        max_model_len=longest,
        # Prompts are random, so nothing is shared.
        enable_prefix_caching=False,
        seed=FLAGS.seed,
    )
    progress("compiling the engine")
    llm.warm_up(GREEDY)
    return llm


def scaled_lengths() -> list[RequestLength]:
    """The lengths of the requests."""
    lengths = table_lengths(FLAGS.lengths, FLAGS.num_requests, FLAGS.seed)
    return [
        RequestLength(*(max(round(FLAGS.scale * size), 1) for size in length))
        for length in lengths
    ]


def fit_costs(steps: Sequence[StepRecord]) -> tuple[LinearCost, float]:
    """Fits the time of a step to its prompt tokens and its decode rows.

    A coefficient that a short run cannot tell from the others is 0: all prompts may be
    in its first step, or all steps have as many rows.

    Returns:
      The cost model, and its mean relative error.
    """
    numbers = np.array(
        [
            (before.time_s, step.time_s, step.num_tokens, step.num_generated)
            for before, step in itertools.pairwise(steps)
        ]
    )
    seconds = numbers[:, 1] - numbers[:, 0]
    rows = numbers[:, 3]
    work = {
        "steps": np.ones_like(rows),
        "prompt_tokens": np.maximum(numbers[:, 2] - rows, 0),
        "decode_rows": rows,
    }
    known: dict[str, np.ndarray] = {}
    for name, column in work.items():
        columns = np.stack([*known.values(), column]).astype(float)
        if np.linalg.matrix_rank(columns) == len(columns):
            known[name] = column
    cost, report = fit(known, seconds)
    return cost, report.mean_error


def predicted_s(
    cost: LinearCost, lengths: Sequence[RequestLength], arrivals: Sequence[float]
) -> float:
    """The mean normalized latency of the same requests in the simulator."""
    inputs, outputs = np.array(lengths, np.int32).T
    workload = Workload(np.array(arrivals), inputs, outputs)
    system = make_engine_system(
        workload,
        FLAGS.num_blocks * 16,
        block_size=16,
        max_num_seqs=FLAGS.max_num_seqs,
        max_num_batched_tokens=max(256, FLAGS.max_num_seqs),
    )
    return simulate(system, workload, cost).summary()["normalized_latency_s"]


def row_of(load: float, timings: Sequence[Timing], predicted: float) -> Row:
    """The latencies of one run."""
    due, first, end, tokens, _ = np.array(timings, np.float64).T
    between = (end - first)[tokens > 1] / (tokens[tokens > 1] - 1)
    span = due.max() - due.min()
    return Row(
        load=load,
        rate=(len(due) - 1) / span if span else float("inf"),
        normalized_latency_s=float(np.mean((end - due) / tokens)),
        predicted_s=predicted,
        ttft_s=float(np.mean(first - due)),
        ttft_p99_s=float(np.percentile(first - due, 99)),
        tpot_s=float(np.mean(between)) if len(between) else float("nan"),
        tokens_per_s=float(tokens.sum() / end.max()),
    )


def measure_rates(report: Report, url: str, llm: LLM | None) -> list[Row]:
    """Measures a burst, and then each load."""
    lengths = scaled_lengths()
    vocab_size = 1000 if llm is None else llm.model.config.vocab_size
    prompts = random_prompts([one.num_input for one in lengths], vocab_size, FLAGS.seed)
    outputs = [one.num_output for one in lengths]
    fields: dict[str, Any] = {"temperature": 0}
    start = time.perf_counter()
    burst = run_open_loop(url, prompts, outputs, [0.0] * len(prompts), **fields)
    top = len(burst) / max(timing.end_s for timing in burst)
    report.details |= {"top_rate": top, "mean_step_error": None}
    report.row("highest rate", f"{top:.2f} requests/s")
    cost = None
    if llm is not None:
        steps = [step for step in llm.timeline() if step.time_s >= start]
        cost, error = fit_costs(steps)
        report.details["mean_step_error"] = error
    rows = []
    for load in map(float, FLAGS.loads):
        rng = np.random.default_rng(FLAGS.seed)
        arrivals = np.cumsum(rng.exponential(1 / (load * top), len(prompts)))
        arrivals = (arrivals - arrivals[0]).tolist()
        timings = run_open_loop(url, prompts, outputs, arrivals, **fields)
        predicted = float("nan")
        if cost is not None:
            predicted = predicted_s(cost, lengths, arrivals)
        row = row_of(load, timings, predicted)
        rows.append(row)
        report.row(
            f"load {load:g}, {row.rate:.2f} requests/s",
            f"{1e3 * row.normalized_latency_s:.2f} ms/token",
            f"simulator: {1e3 * predicted:.2f} ms/token",
            f"first token {1e3 * row.ttft_s:.0f} ms, p99 {1e3 * row.ttft_p99_s:.0f} ms",
        )
    return rows


def measure_overhead(report: Report, llm: LLM, url: str) -> None:
    """Compares the server with `LLM.generate`, in alternation."""
    lengths = [FLAGS.tokens // 2] * FLAGS.streams
    prompts = random_prompts(lengths, llm.model.config.vocab_size, FLAGS.seed)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=FLAGS.tokens)
    total = FLAGS.streams * FLAGS.tokens
    alone, through = [], []
    for number in range(FLAGS.runs + 1):  # the first one warms up
        start = time.perf_counter()
        llm.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - start
        timings = run_open_loop(
            url,
            prompts,
            [FLAGS.tokens] * len(prompts),
            [0.0] * len(prompts),
            temperature=0,
        )
        if number:
            alone.append(total / seconds)
            through.append(total / max(timing.end_s for timing in timings))
    ratios = [one / other for one, other in zip(through, alone, strict=True)]
    report.tokens_per_s = {
        "llm": statistics.median(alone),
        "server": statistics.median(through),
    }
    report.ratios = {"server/llm": statistics.median(ratios)}
    report.details |= {"ratios": ratios, "llm": alone, "server": through}
    for name, value in report.tokens_per_s.items():
        report.row(f"{FLAGS.streams} streams, {name}", f"{value:.0f} tokens/s")
    report.row("server/llm", f"{report.ratios['server/llm']:.3f}")


def plot_rows(rows: Sequence[Row], path: str) -> None:
    """Draws the latency of the engine and of the simulator against the rate."""
    figure, panels = style.new_figure()
    measured = [(row.rate, row.normalized_latency_s) for row in rows]
    predicted = [(row.rate, row.predicted_s) for row in rows]
    curves.latency_rate({"server": measured, "simulator": predicted}, ax=panels[0, 0])
    style.save(figure, path)


def main(argv: list[str]) -> None:
    """Runs the server and the client, and prints the results."""
    del argv
    report = Report()
    with (
        runner.user_errors("serve_bench", ImportError),
        contextlib.ExitStack() as stack,
    ):
        is_overhead = FLAGS.mode == "overhead"
        longest = 2 * FLAGS.tokens if is_overhead else max(map(sum, scaled_lengths()))
        llm = None
        url = FLAGS.url
        if url is None or is_overhead:
            llm = make_llm(longest + 1)
            url = stack.enter_context(served(llm))
        if is_overhead:
            assert llm is not None
            measure_overhead(report, llm, url)
        else:
            rows = measure_rates(report, url, llm)
            report.details["rows"] = [row._asdict() for row in rows]
            if FLAGS.csv is not None:
                runner.write_csv(FLAGS.csv, Row._fields, rows)
            if FLAGS.plot is not None:
                plot_rows(rows, FLAGS.plot)
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
