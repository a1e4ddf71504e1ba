"""Tile sizes of attention on this machine, measured: rows for `jpaged.tuned.TABLE`.

    python -m experiments.tune_attention
    python -m experiments.tune_attention --implementations triton --head_dim 64

For decode rows of the given shape. Each implementation that serves this machine begins
with the sizes that it has now; one size after another is tried at other values, and the
best is kept. A line is a try: the geometric mean of the medians over all rows and
contexts, and how many times as fast it is as the first. Numbers are compared with
float64 before they are timed. The first and the best are measured twice more, in turn:
what is then 3 % faster is worth a row. Rows are printed as they stand in the table,
those of sizes that none beat too. Sizes of prompt tiles are
not tuned. Each implementation runs in a process of its own. Time: a minute on two CPU
cores. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import bench_attention
from experiments.lib.attention import contenders as contenders
from experiments.lib.attention.cases import Case, Shape, make_case
from experiments.lib.processes import ask_each, chosen, tell
from experiments.lib.timing import environment
from jpaged.attention import backends
from jpaged.pages import packed as packed_pages
from jpaged.pages import tuned

FLAGS = flags.FLAGS
# What is tried, of each implementation and in this order; a size alone after another.
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "xla": {
        "decode_rows": (4, 8, 16, 32, 64, 256),
        "decode_tokens": (512, 768, 1536, 8192, 32768),
        "decode_most": (64, 128, 256, 512),
    },
    "mosaic_tpu": {
        "buffer_bytes": (2**19, 2**20, 2**21),
        "tokens": (256, 512, 1024),
        "kv_heads": (1, 2, 4, 8),
    },
    "mosaic_gpu": {
        "shared_bytes": (2**16, 3 * 2**15, 2**17, 5 * 2**15),
        "blocks": (132, 264, 528),
        "part_tokens": (256, 512, 1024),
    },
    "triton": {
        "tokens": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5),
        "programs": (132, 264, 528, 1056),
        "least_chunk": (128, 256, 512),
    },
}
_WORTH = 1.03  # times as fast


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    bench_attention.define_flags()
    names = ", ".join(CANDIDATES)
    flags.DEFINE_list("implementations", None, f"Some of {names}; None: all.")


def cases() -> list[Case]:
    """Numbers for each line of the flags, which differ in rows and contexts alone."""
    lines = bench_attention.lines_of("xla")
    return [make_case(line) for line in lines if isinstance(line, Shape)]


def seconds(name: str, given: list[Case], sizes: dict[str, int]) -> float:
    """The geometric mean over all cases, of the implementation with these sizes.

    Raises:
      ValueError: it cannot serve them, or its numbers are wrong.
    """
    device = jax.devices()[0].device_kind
    entry = tuned.Entry(name, device, sizes)
    tuned.TABLE.insert(0, entry)
    try:
        found = [
            contenders.measure_case(name, case, FLAGS.repeats, FLAGS.round_s)["seconds"]
            for case in given
        ]
    finally:
        tuned.TABLE.remove(entry)
    return float(np.exp(np.mean(np.log(found))))


def tries(name: str, given: list[Case]) -> Iterator[dict[str, Any]]:
    """Each try's sizes, and its seconds or why it has none.

    The first is what is; it and the best are measured again in turn, for a machine
    drifts.
    """
    first = best = current(given[0].shape, name)
    least = seconds(name, given, best)
    yield {"sizes": best, "seconds": least}
    for size, values in CANDIDATES[name].items():
        start = best
        for value in values:
            sizes = start | {size: value}
            if sizes == start:
                continue
            try:
                taken = seconds(name, given, sizes)
            except Exception as error:  # of a compiler too: other sizes may do
                reason = f"{type(error).__name__}: {error}"[:200]
                yield {"sizes": sizes, "failed": reason}
                continue
            yield {"sizes": sizes, "seconds": taken}
            if taken < least:
                least, best = taken, sizes
    for _ in range(2):
        for sizes in (first, best):
            yield {"sizes": sizes, "seconds": seconds(name, given, sizes)}


def current(shape: Shape, name: str) -> dict[str, int]:
    """What the table says now of this device and shape."""
    entry = tuned.find_entry(name, jax.devices()[0].device_kind, *key(shape, name))
    return {} if entry is None else dict(entry.sizes)


def key(shape: Shape, name: str) -> tuple[int, int, int, int]:
    """head_dim, group, block_size and itemsize, as the table has them."""
    itemsize = {"float32": 4}.get(shape.dtype, 2)
    sizes = (shape.block_size, shape.head_dim, shape.dtype)
    page = backends.layout(name).page_shape(*sizes)
    pages = jax.ShapeDtypeStruct(page, shape.dtype)
    head_dim = packed_pages.plain_shape(pages, shape.head_dim)[-1]
    group = shape.num_heads // shape.num_kv_heads
    return head_dim, group, shape.block_size, itemsize


def row_of(name: str, shape: Shape, found: list[dict[str, Any]]) -> str:
    """The best try as a row of the table, or the first where none is worth it."""
    timed = [one for one in found if "seconds" in one]
    first, best = timed[0]["sizes"], timed[-1]["sizes"]
    least = {
        json.dumps(sizes): min(one["seconds"] for one in timed if one["sizes"] == sizes)
        for sizes in (first, best)
    }
    if least[json.dumps(first)] < _WORTH * least[json.dumps(best)]:
        best = first
    device = jax.devices()[0].device_kind
    measured = f"{time.strftime('%Y-%m-%d')}, tune_attention, jax {jax.__version__}"
    fields = (name, device, best, *key(shape, name))
    fields = ", ".join(json.dumps(field) for field in fields)
    return f"Entry({fields}, measured={json.dumps(measured)}),"


def main(argv: list[str]) -> int:
    """Reads the flags, measures, prints."""
    # Each implementation's process takes what it needs, and this one leaves it there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        names = chosen("implementations", FLAGS.implementations, [*CANDIDATES], argv)
        lines = bench_attention.lines_of("xla")
        if len(FLAGS.block_sizes) > 1 or FLAGS.kv_dtypes != ["auto"]:
            raise ValueError(
                "--block_sizes: wanted one, and --kv_dtypes=auto: a row of the table "
                f"is for one shape, got {FLAGS.block_sizes} and {FLAGS.kv_dtypes}"
            )
    except ValueError as error:
        print(f"tune_attention: {error}", file=sys.stderr)
        return 1
    if FLAGS.alone is not None:
        for one in tries(FLAGS.alone, cases()):
            tell(one)
        return 0
    shape, rows, left_out, everything = lines[0], [], {}, {}
    assert isinstance(shape, Shape)
    for name, found in ask_each(
        "tune_attention",
        names,
        bench_attention.given_flags(),
        reason_of=lambda name: contenders.CONTENDERS[name][1](),
        count_of=lambda _: 1,
        limit_s=FLAGS.limit_s,
    ):
        if isinstance(found, str):
            left_out[name] = found
            continue
        everything[name] = found
        show(name, found)
        if any("seconds" in one for one in found):
            rows.append(row_of(name, shape, found))
    for name, reason in left_out.items():
        print(f"{name:<12} nothing to tune here: {reason}")
    print("\n".join(["", *rows]))
    result = {"rows": rows, "tries": everything, "left_out": left_out}
    print(json.dumps(result | {"shape": dataclasses.asdict(shape)} | environment()))
    return 0


def show(name: str, found: list[dict[str, Any]]) -> None:
    """Prints an implementation's tries."""
    first = found[0].get("seconds")
    for one in found:
        sizes = json.dumps(one.get("sizes", {}))
        if "failed" in one:
            print(f"{name:<12}{'':>18}  {sizes}  {one['failed']}", flush=True)
            continue
        ratio = first / one["seconds"]
        print(f"{name:<12}{1e6 * one['seconds']:>9.1f} us{ratio:>7.2f}  {sizes}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
