"""Decode steps of a whole model beside the memory's bandwidth and transformers.

    python -m experiments.bench_decode --model random:llama-3-8b
    python -m experiments.bench_decode --model tiny-python --batches 1,4 --context 64

Each line is a step in which every row decodes, at the given mean context: milliseconds
(the median of rounds), tokens/s, and the share of the step that reading the weights and
all rows' keys and values once takes at the measured bandwidth. jpaged is `engine.run`,
scheduler, sampler and all, by each implementation of attention; transformers runs its
own greedy loop, with its cache. Each is a process of its own. Time: three minutes and
60 GB for Llama-3-8B's shape on an accelerator; seconds for the bundled model. The last
line on stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib import limits as lib_limits
from experiments.lib.attention.contenders import CONTENDERS, has
from experiments.lib.engine_loads import decoding_state, engine_steps
from experiments.lib.processes import ask_each, chosen, tell
from experiments.lib.timing import environment, time_in_turn
from jpaged.config import EngineConfig
from jpaged.models import ModelConfig
from jpaged.models.loading import checkpoint

FLAGS = flags.FLAGS
# "mosaic_gpu" before "triton": what serves fewer machines first.
_IMPLEMENTATIONS = ("mosaic_tpu", "mosaic_gpu", "triton", "xla")
NAMES = (*_IMPLEMENTATIONS, "transformers")


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("model", "random:llama-3-8b", "Folder, bundled, random:NAME.")
    flags.DEFINE_string("dtype", "auto", "Of weights, keys and values.")
    flags.DEFINE_list("batches", ["1", "8", "32", "128", "256"], "Rows of the steps.")
    flags.DEFINE_integer("context", 512, "Mean tokens of a row.", lower_bound=1)
    flags.DEFINE_integer("steps", 16, "Decode steps in a timed call.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens of a block.", lower_bound=1)
    flags.DEFINE_integer(
        "max_num_batched_tokens", 2048, "Tokens of a prompt step.", lower_bound=1
    )
    flags.DEFINE_list("contenders", None, f"Some of {', '.join(NAMES)}; None: all.")
    flags.DEFINE_integer("repeats", 3, "Rounds; the median counts.", lower_bound=1)
    flags.DEFINE_float(
        "read_gb", None, "Array of the bandwidth; None: 1, or 8.", lower_bound=1e-3
    )
    flags.DEFINE_float(
        "limit_s", 3600, "Seconds after which nothing is measured.", lower_bound=0
    )
    flags.DEFINE_string("alone", None, "Used by this runner for each contender.")


@dataclasses.dataclass(frozen=True)
class FewShapes(EngineConfig):
    """An engine that compiles the steps which are timed, and one for prompts."""

    row_sizes: tuple[int, ...] = ()

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """The numbers of rows that are timed."""
        return self.row_sizes

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """One."""
        return (self.max_num_batched_tokens,)


def batches() -> list[int]:
    """The numbers of rows, rising.

    Raises:
      ValueError: one is no positive number.
    """
    if not all(value.isdecimal() and int(value) for value in FLAGS.batches):
        raise ValueError(f"--batches: wanted integers above 0, got {FLAGS.batches}")
    return sorted(map(int, FLAGS.batches))


def engine_config(implementation: str) -> EngineConfig:
    """Sizes that hold the largest batch, filled a prompt step at a time."""
    rows = batches()
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
    """Measures one contender, for the process that asked; a line for each batch."""
    sizes = dict(context=FLAGS.context, steps=FLAGS.steps)
    if name == "transformers":
        from experiments.lib import transformers_decode as peer

        torch_model = peer.make_model(FLAGS.model, model_config().dtype)
        for rows in batches():
            taken = peer.step_seconds(
                torch_model, rows=rows, repeats=FLAGS.repeats, **sizes
            )
            tell({"seconds": float(np.median(taken))})
        return
    model = checkpoint.load_model(FLAGS.model, FLAGS.dtype)
    config = engine_config(name)
    for rows in batches():
        begin = time.monotonic()
        state = decoding_state(model, config, rows=rows, **sizes)
        steps = engine_steps(model, state, FLAGS.steps)
        prepared_s = time.monotonic() - begin  # compilation is in the first
        times = time_in_turn({name: steps}, FLAGS.repeats)
        tell({"seconds": times[name].median, "prepared_s": prepared_s})


def model_config() -> ModelConfig:
    """The model's, with the dtype that it computes in."""
    config = checkpoint.load_config(FLAGS.model)
    dtype = FLAGS.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    return dataclasses.replace(config, dtype=dtype)


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    name = f"{row['name']:<16}{row['rows']:>5}{row['context']:>9}"
    if "failed" in row:
        print(f"{name}  {row['failed']}", flush=True)
        return
    print(
        f"{name}{1e3 * row['seconds']:>10.2f}{row['tokens_per_s']:>11.0f}"
        f"{1e3 * row['limit_s']:>10.2f}{row['share']:>8.2f}",
        flush=True,
    )


def rows_of(
    name: str, measured: list[dict[str, Any]], read_bytes_per_s: float
) -> list[dict[str, Any]]:
    """A row for each batch."""
    config, found = model_config(), []
    itemsize = jnp.dtype(config.dtype).itemsize
    for rows, one in zip(batches(), measured, strict=True):
        size = lib_limits.step_bytes(config, rows, FLAGS.context, itemsize)
        row = {"name": name, "rows": rows, "context": FLAGS.context, "bytes": size}
        row |= {"limit_s": size / read_bytes_per_s, **one}
        if "seconds" in one:
            row["tokens_per_s"] = rows / one["seconds"]
            row["share"] = row["limit_s"] / one["seconds"]
        found.append(row)
    return found


def reason(name: str) -> str | None:
    """What keeps a contender from this machine."""
    if name == "transformers":
        return has("torch", "transformers")
    return CONTENDERS[name][1]()


def main(argv: list[str]) -> int:
    """Reads the flags, measures, prints."""
    begin = time.monotonic()
    # Each contender's process takes what it needs, and this one leaves it there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        names = chosen("contenders", FLAGS.contenders, NAMES, argv)
        batches()
        model_config()
        if FLAGS.alone is not None:
            run_alone(FLAGS.alone)
            return 0
    except (ValueError, OSError) as error:
        print(f"bench_decode: {error}", file=sys.stderr)
        return 1
    size_gb = FLAGS.read_gb or lib_limits.bandwidth_gb()
    limits = lib_limits.bandwidths(size_gb, FLAGS.repeats)
    print(f"read bandwidth {limits['read_bytes_per_s'] / 1e9:.1f} GB/s")
    print(
        f"{'':<16}{'rows':>5}{'context':>9}{'ms':>10}{'tokens/s':>11}{'limit ms':>10}"
        f"{'share':>8}",
        flush=True,
    )
    rows, left_out = [], {}
    for name, measured in ask_each(
        "bench_decode",
        names,
        sys.argv[1:],
        reason_of=reason,
        count_of=lambda _: len(batches()),
        limit_s=FLAGS.limit_s - (time.monotonic() - begin),
    ):
        if isinstance(measured, str):
            left_out[name] = measured
            continue
        found = rows_of(name, measured, limits["read_bytes_per_s"])
        rows += found
        for row in found:
            show(row)
    for name, why in left_out.items():
        print(f"{name:<16} left out: {why}")
    given = {name: FLAGS[name].value for name in ("model", "dtype", "steps")}
    result = {"rows": rows, "left_out": left_out, "flags": given}
    print(json.dumps(result | limits | environment()))
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
