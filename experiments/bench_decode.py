"""Benchmarks decode steps of a model beside memory bandwidth and transformers.

    python -m experiments.bench_decode --model random:llama-3-8b
    python -m experiments.bench_decode --model tiny-python --batches 1,4 --context 64

Each line is a step in which every row decodes at the given mean context: milliseconds
(the median of rounds), tokens/s, and the share of the step that reading the weights and
all keys and values once takes at the measured bandwidth. jpaged runs `engine.run` with
scheduler and sampler, once for each implementation of attention. transformers runs its
own greedy loop with its own cache. Each contender has a separate process.

Time: three minutes and 60 GB for the shape of Llama-3-8B on an accelerator; seconds for
the bundled model. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import limits, processes, runner
from experiments.lib.attention.contenders import CONTENDERS, missing_modules
from experiments.lib.engine_loads import decoding_state, engine_steps
from experiments.lib.timing import time_in_turn
from jpaged.config import EngineConfig
from jpaged.models import ModelConfig
from jpaged.models.loading import checkpoint

FLAGS = flags.FLAGS
# "mosaic_gpu" before "triton": the one that serves fewer machines comes first.
_IMPLEMENTATIONS = ("mosaic_tpu", "mosaic_gpu", "triton", "cpu", "xla")
NAMES = (*_IMPLEMENTATIONS, "transformers")


def define_flags() -> None:
    """Defines the runner's flags."""
    processes.define_contender_flags(NAMES)
    flags.DEFINE_string(
        "model", "random:llama-3-8b", "Folder, GGUF file, name or random:NAME."
    )
    flags.DEFINE_string("dtype", "auto", "dtype of weights, keys and values.")
    flags.DEFINE_enum(
        "quantization", None, ["int8"], "Weights in 8 bits, for jpaged alone."
    )
    flags.DEFINE_list("batches", ["1", "8", "32", "128", "256"], "Rows of the steps.")
    flags.DEFINE_integer("context", 512, "Mean tokens of a row.", lower_bound=1)
    flags.DEFINE_integer("steps", 16, "Decode steps in a timed call.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_integer(
        "max_num_batched_tokens", 2048, "Tokens of a step with prompts.", lower_bound=1
    )
    flags.DEFINE_integer("repeats", 3, "Rounds; the median counts.", lower_bound=1)
    flags.DEFINE_float(
        "read_gb",
        None,
        "GB of the array that is read for the bandwidth; default: 1, or 8 on "
        "accelerators.",
        lower_bound=1e-3,
    )


@dataclasses.dataclass(frozen=True)
class FewShapes(EngineConfig):
    """An engine that compiles only the timed steps, and one step for prompts."""

    row_sizes: tuple[int, ...] = ()

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """The timed numbers of rows."""
        return self.row_sizes

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """One size, for prompts."""
        return (self.max_num_batched_tokens,)


def batch_sizes() -> list[int]:
    """The numbers of rows in ascending order.

    Raises:
      ValueError: One is not a positive number.
    """
    return sorted(runner.positive_integers("batches"))


def decode_config(implementation: str) -> EngineConfig:
    """An engine that holds the largest batch."""
    rows = batch_sizes()
    tokens = max(FLAGS.max_num_batched_tokens, rows[-1])
    longest = FLAGS.context + 2 * FLAGS.steps + rows[-1] * FLAGS.context // tokens + 8
    longest += -longest % FLAGS.block_size
    return FewShapes(
        num_blocks=rows[-1] * (longest // FLAGS.block_size),
        block_size=FLAGS.block_size,
        max_num_seqs=rows[-1],
        max_model_len=longest,
        max_num_batched_tokens=tokens,
        max_num_requests=rows[-1],
        enable_prefix_caching=False,
        attention=implementation,
        row_sizes=tuple(rows),
    )


def run_alone(name: str) -> None:
    """Measures one contender in this process; sends a result for each batch."""
    sizes = dict(context=FLAGS.context, steps=FLAGS.steps)
    if name == "transformers":
        from experiments.lib import transformers_decode as peer

        torch_model = peer.make_torch_model(FLAGS.model, timed_model_config().dtype)
        for rows in batch_sizes():
            taken = peer.step_seconds(
                torch_model, rows=rows, repeats=FLAGS.repeats, **sizes
            )
            processes.send_result({"seconds": float(np.median(taken))})
        return
    model = checkpoint.load_model(
        FLAGS.model, FLAGS.dtype, quantization=FLAGS.quantization
    )
    config = decode_config(name)
    for rows in batch_sizes():
        begin = time.monotonic()
        state = decoding_state(model, config, rows=rows, **sizes)
        steps = engine_steps(model, state, FLAGS.steps)
        prepared_s = time.monotonic() - begin  # includes compilation for the first
        times = time_in_turn({name: steps}, FLAGS.repeats)
        result = {"seconds": times[name].median, "prepared_s": prepared_s}
        processes.send_result(result)


def timed_model_config() -> ModelConfig:
    """Sizes of the model, with the dtype in which it computes."""
    config = checkpoint.load_config(FLAGS.model)
    dtype = FLAGS.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    return dataclasses.replace(config, dtype=dtype)


def _print_row(row: dict[str, Any]) -> None:
    name = f"{row['name']:<16}{row['rows']:>5}{row['context']:>9}"
    if "failed" in row:
        print(f"{name}  {row['failed']}", flush=True)
        return
    print(
        f"{name}{1e3 * row['seconds']:>10.2f}{row['tokens_per_s']:>11.0f}"
        f"{1e3 * row['limit_s']:>10.2f}{row['share']:>8.2f}",
        flush=True,
    )


def decode_rows(
    name: str, measured: list[dict[str, Any]], read_bytes_per_s: float
) -> list[dict[str, Any]]:
    """A contender's results with sizes, tokens/s and share of the limit."""
    config, found = timed_model_config(), []
    itemsize = jnp.dtype(config.dtype).itemsize
    for rows, one in zip(batch_sizes(), measured, strict=True):
        of_weight = 1 if FLAGS.quantization and name != "transformers" else itemsize
        size = limits.step_bytes(config, rows, FLAGS.context, itemsize, of_weight)
        row = {"name": name, "rows": rows, "context": FLAGS.context, "bytes": size}
        row |= {"limit_s": size / read_bytes_per_s, **one}
        if "seconds" in one:
            row["tokens_per_s"] = rows / one["seconds"]
            row["share"] = row["limit_s"] / one["seconds"]
        found.append(row)
    return found


def reason_against(name: str) -> str | None:
    """Returns why a contender cannot run on this machine, or None."""
    if name == "transformers":
        return missing_modules("torch", "transformers")
    return CONTENDERS[name][1]()


def main(argv: list[str]) -> int:
    """Measures all contenders and prints the results."""
    del argv
    begin = time.monotonic()
    processes.share_accelerator()
    with runner.user_errors("bench_decode"):
        names = runner.some_of("contenders", FLAGS.contenders, NAMES)
        batch_sizes()
        timed_model_config()
        if FLAGS.alone is not None:
            run_alone(FLAGS.alone)
            return 0
    size_gb = FLAGS.read_gb or limits.default_read_gb()
    bandwidths = limits.measure_bandwidths(size_gb, FLAGS.repeats)
    print(f"read bandwidth {bandwidths['read_bytes_per_s'] / 1e9:.1f} GB/s")
    print(
        f"{'':<16}{'rows':>5}{'context':>9}{'ms':>10}{'tokens/s':>11}{'limit ms':>10}"
        f"{'share':>8}",
        flush=True,
    )
    rows = []

    def on_results(name: str, measured: list[dict[str, Any]]) -> None:
        found = decode_rows(name, measured, bandwidths["read_bytes_per_s"])
        rows.extend(found)
        for row in found:
            _print_row(row)

    left_out = processes.measure_each(
        "bench_decode",
        names,
        sys.argv[1:],
        on_results,
        reason_of=reason_against,
        count_of=lambda _: len(batch_sizes()),
        limit_s=FLAGS.limit_s - (time.monotonic() - begin),
    )
    names = ("model", "dtype", "quantization", "steps")
    given = {name: getattr(FLAGS, name) for name in names}
    result = {"rows": rows, "left_out": left_out, "flags": given}
    runner.print_json(result | bandwidths)
    return 0


if __name__ == "__main__":
    runner.start(main, define_flags)
