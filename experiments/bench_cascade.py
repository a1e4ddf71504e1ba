"""Benchmarks cascade attention: a shared prefix is read once instead of by every row.

    python -m experiments.bench_cascade
    python -m experiments.bench_cascade --num_rows 4,16,64 --prefix_tokens 128,1024
    python -m experiments.bench_cascade --implementations=triton,mosaic_gpu ...

Each line has the implementation, the rows, the tokens of their shared prefix, the bytes
of keys and values that one layer reads without and with cascade attention, the median
of both times, and the largest difference of the outputs. Both ways run in turn in one
process, so that other load on the machine affects both. A `ratio` above 1 is a gain.

`model` is the ratio of a simple model: a call takes 3 us plus the time to read keys,
values and partial results at the measured bandwidth, or to compute the prefix's
products at the measured rate if that is longer; a merge takes 4 us more.

If an implementation fails, its line has the reason and the others still run.

Time: two minutes on a CPU core. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import limits as lib_limits
from experiments.lib import runner
from experiments.lib.limits import MachineLimits
from experiments.lib.timing import Contender, time_in_turn
from jpaged.arithmetic import cdiv
from jpaged.attention import paged_attention
from jpaged.kv import shared_prefix

FLAGS = flags.FLAGS
_CALL_S, _MERGE_S = 3e-6, 4e-6  # overheads of the model; assumed, for a GPU


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_list("implementations", ["xla"], "Implementations of paged_attention.")
    flags.DEFINE_list("num_rows", ["2", "4", "8", "16", "32"], "Batch rows.")
    flags.DEFINE_list(
        "prefix_tokens", ["64", "128", "256", "1024"], "Tokens of the shared prefix."
    )
    flags.DEFINE_integer(
        "own_tokens", 64, "Tokens of each row after the prefix.", lower_bound=1
    )
    flags.DEFINE_integer("num_heads", 12, "Query heads.", lower_bound=1)
    flags.DEFINE_integer("num_kv_heads", 4, "Key and value heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 64, "Size of a head.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "float16", "bfloat16"], "Of pages and queries."
    )
    flags.DEFINE_float(
        "read_gb",
        None,
        "GB of the array that is read for the bandwidth; default: 1, or 8 on "
        "accelerators.",
        lower_bound=1e-3,
    )
    flags.DEFINE_integer(
        "gemm_size", 1024, "Rows and columns of the GEMM's matrices.", lower_bound=1
    )
    flags.DEFINE_integer("num_layers", 4, "Calls in one timed program.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Rounds; the median counts.", lower_bound=1)


def make_step(num_rows: int, prefix: int) -> dict[str, jax.Array]:
    """Arguments of `paged_attention` for all layers, with shuffled block tables.

    Args:
      num_rows: Batch rows.
      prefix: Tokens of their shared prefix.
    """
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


def find_prefix(arguments: dict[str, Any]) -> shared_prefix.SharedPrefix:
    """Finds the rows' shared prefix, however short it is."""
    return shared_prefix.find_shared_prefix(
        arguments["block_tables"],
        arguments["context_lens"],
        FLAGS.block_size,
        min_prefix_tokens=1,
        min_saved_tokens=1,
    )


def attend_layers(
    arguments: dict[str, Any], implementation: Any, is_cascade: bool
) -> jax.Array:
    """Attends with q through all layers; each layer's output is the next one's q."""
    # One search for all layers, as in a decoder.
    shared = find_prefix(arguments) if is_cascade else None

    pages: dict[str, Any] = {k: v for k, v in arguments.items() if k != "q"}

    def layer(index: jax.Array, q: jax.Array) -> Any:
        return paged_attention(
            q,
            **pages,
            layer=index,
            shared_prefix=shared,
            implementation=implementation,
        )

    return jax.lax.fori_loop(0, FLAGS.num_layers, layer, arguments["q"])


def model_ratio(num_rows: int, prefix: int, limits: MachineLimits) -> float:
    """Ratio of plain to cascade time of one call, by the model of the module's text.

    The prefix's queries are read, and its outputs and log-sum-exps are written and
    read: 18 bytes for each number of the queries.
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


def measure_cascade(
    implementation: str, num_rows: int, prefix: int, limits: MachineLimits
) -> dict[str, Any]:
    """Measures plain and cascade attention at one size; returns the figures."""
    arguments = make_step(num_rows, prefix)
    call = jax.jit(attend_layers, static_argnums=(1, 2))
    plain, cascade = (call(arguments, implementation, way) for way in (False, True))
    contenders = {
        way: Contender(functools.partial(call, arguments, implementation, is_cascade))
        for way, is_cascade in (("plain", False), ("cascade", True))
    }
    times = time_in_turn(contenders, FLAGS.repeats)
    reads = shared_prefix.num_tokens_read(
        find_prefix(arguments), arguments["context_lens"], FLAGS.block_size
    )
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


def _print_row(row: dict[str, Any]) -> None:
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


def cascade_rows(
    num_rows: list[int], prefixes: list[int], limits: MachineLimits
) -> Iterator[dict[str, Any]]:
    """Yields the results of all sizes and implementations."""
    for rows, prefix in itertools.product(num_rows, prefixes):
        for name in FLAGS.implementations:
            row = {"name": name, "num_rows": rows, "prefix_tokens": prefix}
            try:
                yield row | measure_cascade(name, rows, prefix, limits)
            except Exception as error:  # any error of one; the others still run
                yield row | {"failed": f"{type(error).__name__}: {error}"[:300]}


def main(argv: list[str]) -> int:
    """Measures all sizes and prints the results."""
    del argv
    with runner.user_errors("bench_cascade"):
        num_rows = runner.positive_integers("num_rows")
        prefixes = runner.positive_integers("prefix_tokens")
    read_gb = FLAGS.read_gb or lib_limits.default_read_gb()
    limits = lib_limits.measure_limits(
        read_gb, FLAGS.gemm_size, FLAGS.repeats, FLAGS.dtype
    )
    print(
        "           rows prefix MB, plain  cascade ms, plain  cascade  ratio  "
        "model  change"
    )
    found = []
    for row in cascade_rows(num_rows, prefixes, limits):
        found.append(row)
        _print_row(row)
    names = ("own_tokens", "num_heads", "num_kv_heads", "head_dim", "dtype")
    result = {"rows": found, "flags": {name: getattr(FLAGS, name) for name in names}}
    runner.print_json(result | limits._asdict())
    return int(all("failed" in row for row in found))


if __name__ == "__main__":
    runner.start(main, define_flags)
