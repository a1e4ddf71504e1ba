"""Decode attention where rows share a prefix: read by every row, and read once.

    python -m experiments.bench_cascade
    python -m experiments.bench_cascade --num_rows 4,16,64 --prefix_tokens 128,1024
    python -m experiments.bench_cascade --implementations=triton,mosaic_gpu ...

Each line: implementation, rows, tokens of the prefix that they share, bytes of keys and
values that a step reads in one layer without and with cascade attention, the medians of
both times, and the largest difference of their outputs. Times of both ways are taken in
turn in one process, so that other load on the machine falls on both. `ratio` above 1 is
a gain, and `model` what it would be if a call took what reading keys, values and
partial results takes at the measured bandwidth, or the prefix's products at the
measured rate where that is longer, and 3 us, a merge 4 us more. An implementation that
fails says why, and the others go on. Two minutes on a CPU core. The last line on stdout
is one JSON object.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib import limits as lib_limits
from experiments.lib.limits import Limits
from experiments.lib.timing import Contender, environment, time_in_turn
from jpaged.arithmetic import cdiv
from jpaged.attention import paged_attention
from jpaged.kv import shared_prefix

FLAGS = flags.FLAGS
_CALL_S, _MERGE_S = 3e-6, 4e-6  # beside reading and multiplying; of a GPU, assumed


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("implementations", ["xla"], "Of paged_attention.")
    flags.DEFINE_list("num_rows", ["2", "4", "8", "16", "32"], "Rows that share.")
    flags.DEFINE_list(
        "prefix_tokens", ["64", "128", "256", "1024"], "They share these."
    )
    flags.DEFINE_integer("own_tokens", 64, "Tokens of each row alone.", lower_bound=1)
    flags.DEFINE_integer("num_heads", 12, "Query heads.", lower_bound=1)
    flags.DEFINE_integer("num_kv_heads", 4, "Key/value heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 64, "Size of a head.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens of a block.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "float16", "bfloat16"], "Of pages and q."
    )
    flags.DEFINE_float(
        "read_gb", None, "Array of the bandwidth; None: 1, or 8.", lower_bound=1e-3
    )
    flags.DEFINE_integer("gemm_size", 1024, "Of the products' rate.", lower_bound=1)
    flags.DEFINE_integer("num_layers", 4, "Calls in one timed program.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Rounds; the median counts.", lower_bound=1)


def make_step(num_rows: int, prefix: int) -> dict[str, jax.Array]:
    """Arguments of `paged_attention` for all layers, tables shuffled."""
    size = FLAGS.block_size
    shared, own = prefix // size, cdiv(FLAGS.own_tokens, size)
    num_blocks = shared + num_rows * own
    rng = np.random.default_rng(0)
    order = rng.permutation(num_blocks).astype(np.int32)
    tables = np.concatenate(
        [
            np.tile(order[:shared], (num_rows, 1)),
            order[shared:].reshape(num_rows, own),
        ],
        axis=1,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (FLAGS.num_layers, num_blocks, FLAGS.num_kv_heads, size, FLAGS.head_dim)
    heads = (num_rows, FLAGS.num_heads, FLAGS.head_dim)
    return {
        "q": jax.random.normal(keys[0], heads, FLAGS.dtype),
        "k_pages": jax.random.normal(keys[1], sizes, FLAGS.dtype),
        "v_pages": jax.random.normal(keys[2], sizes, FLAGS.dtype),
        "block_tables": jnp.asarray(tables),
        "context_lens": jnp.full(num_rows, shared * size + FLAGS.own_tokens, jnp.int32),
    }


def attend_layers(
    arguments: dict[str, Any], implementation: Any, is_cascade: bool
) -> jax.Array:
    """q after all layers' attention, each reading what the last one gave."""
    shared = None
    if is_cascade:  # found once for all layers, as a decoder would
        tables, lens = arguments["block_tables"], arguments["context_lens"]
        shared = shared_prefix.find_shared_prefix(
            tables, lens, FLAGS.block_size, min_prefix_tokens=1, min_saved_tokens=1
        )

    def layer(index, q):
        return paged_attention(
            **(arguments | {"q": q}),
            layer=index,
            shared_prefix=shared,
            implementation=implementation,
        )

    return jax.lax.fori_loop(0, FLAGS.num_layers, layer, arguments["q"])


def measure_limits() -> Limits:
    """The machine's, in the dtype of the flags."""
    size, gemm = FLAGS.read_gb or lib_limits.bandwidth_gb(), FLAGS.gemm_size
    read = lib_limits.bandwidths(size, FLAGS.repeats)["read_bytes_per_s"]
    product = {"gemm": lib_limits.gemm(gemm, FLAGS.dtype)}
    seconds = time_in_turn(product, FLAGS.repeats)["gemm"].median
    return Limits(read, 2 * gemm**3 / seconds)


def model_ratio(num_rows: int, prefix: int, limits: Limits) -> float:
    """Plain time by cascade time, of one call, by the model above.

    The queries of a prefix are read, and what they attend and its log-sum-exps written
    and read: 18 bytes for each of their numbers.
    """
    heads = num_rows * FLAGS.num_heads * FLAGS.head_dim
    itemsize = jnp.dtype(FLAGS.dtype).itemsize
    token = 2 * FLAGS.num_kv_heads * FLAGS.head_dim * itemsize / limits.read_bytes_per_s
    own = num_rows * FLAGS.own_tokens * token
    plain = num_rows * prefix * token + own + _CALL_S
    products = 4 * heads * prefix / limits.gemm_flops_per_s
    partials = 18 * heads / limits.read_bytes_per_s
    shared = max(prefix * token, products)
    return plain / (shared + own + partials + _CALL_S + _MERGE_S)


def measure(
    implementation: str, num_rows: int, prefix: int, limits: Limits
) -> dict[str, Any]:
    """A row of the table, behind what names it."""
    arguments = make_step(num_rows, prefix)
    call = jax.jit(attend_layers, static_argnums=(1, 2))
    ways = (False, True)
    plain, cascade = (call(arguments, implementation, way) for way in ways)  # compiles
    times = time_in_turn(
        {
            way: Contender(
                functools.partial(call, arguments, implementation, is_cascade)
            )
            for way, is_cascade in (("plain", False), ("cascade", True))
        },
        FLAGS.repeats,
    )
    tables, lens = arguments["block_tables"], arguments["context_lens"]
    groups = shared_prefix.find_shared_prefix(
        tables, lens, FLAGS.block_size, min_prefix_tokens=1, min_saved_tokens=1
    )
    reads = shared_prefix.num_tokens_read(groups, lens, FLAGS.block_size)
    token_bytes = 2 * FLAGS.num_kv_heads * FLAGS.head_dim * plain.dtype.itemsize
    plain_s, cascade_s = times["plain"].median, times["cascade"].median
    return {
        "plain_bytes": int(reads[0]) * token_bytes,
        "cascade_bytes": int(reads[1]) * token_bytes,
        "plain_s": plain_s,
        "cascade_s": cascade_s,
        "ratio": plain_s / cascade_s,
        "model_ratio": model_ratio(num_rows, prefix, limits),
        "bytes_ratio": int(reads[0]) / int(reads[1]),
        "max_difference": float(jnp.max(jnp.abs(plain - cascade))),
    }


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    name = f"{row['name']:<10} {row['num_rows']:4} {row['prefix_tokens']:6} "
    if "failed" in row:
        print(f"{name} {row['failed']}", flush=True)
        return
    print(
        f"{name}{row['plain_bytes'] / 1e6:9.2f} {row['cascade_bytes'] / 1e6:8.2f} "
        f"{1e3 * row['plain_s']:9.2f} {1e3 * row['cascade_s']:8.2f} "
        f"{row['ratio']:6.2f} {row['model_ratio']:6.2f}  {row['max_difference']:.1e}",
        flush=True,
    )


def rows_of(limits: Limits) -> Iterator[dict[str, Any]]:
    """The rows of all sizes and implementations."""
    sizes = itertools.product(FLAGS.num_rows, FLAGS.prefix_tokens)
    for rows, prefix in [(int(rows), int(prefix)) for rows, prefix in sizes]:
        for name in FLAGS.implementations:
            row = {"name": name, "num_rows": rows, "prefix_tokens": prefix}
            try:
                yield row | measure(name, rows, prefix, limits)
            except Exception as error:  # whatever one raises: the others go on
                yield row | {"failed": f"{type(error).__name__}: {error}"[:300]}


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    # jax tells at this level which accelerators it did not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument: {argv[1]!r}")
    try:
        found, limits = [], measure_limits()
        print(
            "           rows prefix MB, plain  cascade ms, plain  cascade  ratio  "
            "model  change"
        )
        for row in rows_of(limits):
            found.append(row)
            show(row)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = ("own_tokens", "num_heads", "num_kv_heads", "head_dim", "dtype")
    result = {"rows": found, "flags": {name: FLAGS[name].value for name in names}}
    print(json.dumps(result | limits._asdict() | environment()))
    return int(all("failed" in row for row in found))


if __name__ == "__main__":
    define_flags()
    app.run(main)
