"""Measures tile sizes of attention on this machine, for `jpaged.pages.tuned.TABLE`.

    python -m experiments.tune_attention
    python -m experiments.tune_attention --implementations triton --head_dim 64

The runner tunes decode rows of the given shape; tile sizes of prompts are not tuned.
Each implementation that supports this machine runs in a separate process. It starts
with its present sizes, varies one size after another, and keeps the best value of each.
A line is one trial: the geometric mean of the median times over all rows and contexts,
and the speed relative to the first trial. Outputs are compared with float64 before they
are timed. The first and the best sizes are then measured twice more, in turn. The best
sizes are worth a row of the table if they are 3 % faster in these runs; otherwise the
row has the first sizes. Rows are printed as source code of the table.

Time: a minute on two CPU cores. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import bench_attention
from experiments.lib import processes, runner
from experiments.lib.attention import contenders
from experiments.lib.attention.cases import AttentionCase, AttentionShape, make_case
from jpaged.attention import backends
from jpaged.pages import packed as packed_pages
from jpaged.pages import tuned

FLAGS = flags.FLAGS
# The values to try, in this order; one size is varied at a time.
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
_LEAST_SPEEDUP = 1.03  # over the present sizes, for a new row of the table


def define_flags() -> None:
    """Defines the runner's flags: those of bench_attention, and its own."""
    bench_attention.define_flags()
    flags.adopt_module_key_flags(bench_attention)
    names = ", ".join(CANDIDATES)
    flags.DEFINE_list(
        "implementations", None, f"What to tune, of {names}; default: all."
    )


def tuned_cases() -> list[AttentionCase]:
    """Inputs for the shapes of the flags, which differ in rows and contexts only."""
    shapes = bench_attention.sizes_for("xla")
    return [make_case(shape) for shape in shapes if isinstance(shape, AttentionShape)]


def mean_seconds(name: str, cases: list[AttentionCase], sizes: dict[str, int]) -> float:
    """Geometric mean of an implementation's times over all cases, with these sizes.

    Raises:
      ValueError: The implementation cannot serve a case, or its output is wrong.
    """
    device = jax.devices()[0].device_kind
    entry = tuned.Entry(name, device, sizes)
    tuned.TABLE.insert(0, entry)
    try:
        found = [
            contenders.measure_case(name, case, FLAGS.repeats, FLAGS.round_s)["seconds"]
            for case in cases
        ]
    finally:
        tuned.TABLE.remove(entry)
    return float(np.exp(np.mean(np.log(found))))


def trials(name: str, cases: list[AttentionCase]) -> Iterator[dict[str, Any]]:
    """Yields each trial: its sizes, and "seconds" or the reason why it "failed".

    The first trial has the present sizes. At the end the first and the best sizes are
    measured twice more in turn, because the speed of a machine drifts.
    """
    first = best = present_sizes(cases[0].shape, name)
    least = mean_seconds(name, cases, best)
    yield {"sizes": best, "seconds": least}
    for size, values in CANDIDATES[name].items():
        start = best
        for value in values:
            sizes = start | {size: value}
            if sizes == start:
                continue
            try:
                taken = mean_seconds(name, cases, sizes)
            except Exception as error:  # also a compiler's; other sizes may work
                reason = f"{type(error).__name__}: {error}"[:200]
                yield {"sizes": sizes, "failed": reason}
                continue
            yield {"sizes": sizes, "seconds": taken}
            if taken < least:
                least, best = taken, sizes
    for _ in range(2):
        for sizes in (first, best):
            yield {"sizes": sizes, "seconds": mean_seconds(name, cases, sizes)}


def present_sizes(shape: AttentionShape, name: str) -> dict[str, int]:
    """The table's sizes for this device and shape."""
    entry = tuned.find_entry(
        name, jax.devices()[0].device_kind, *table_key(shape, name)
    )
    return {} if entry is None else dict(entry.sizes)


def table_key(shape: AttentionShape, name: str) -> tuple[int, int, int, int]:
    """head_dim, group, block_size and itemsize, as in the table."""
    itemsize = {"float32": 4}.get(shape.dtype, 2)
    sizes = (shape.block_size, shape.head_dim, shape.dtype)
    page = backends.layout(name).page_shape(*sizes)
    pages: Any = jax.ShapeDtypeStruct(page, shape.dtype)
    head_dim = packed_pages.plain_shape(pages, shape.head_dim)[-1]
    group = shape.num_heads // shape.num_kv_heads
    return head_dim, group, shape.block_size, itemsize


def row_of(name: str, shape: AttentionShape, found: list[dict[str, Any]]) -> str:
    """The row of the table: the best sizes, or the first if none is clearly faster."""
    timed = [one for one in found if "seconds" in one]
    first, best = timed[0]["sizes"], timed[-1]["sizes"]
    least = {
        json.dumps(sizes): min(one["seconds"] for one in timed if one["sizes"] == sizes)
        for sizes in (first, best)
    }
    if least[json.dumps(first)] < _LEAST_SPEEDUP * least[json.dumps(best)]:
        best = first
    device = jax.devices()[0].device_kind
    measured = f"{time.strftime('%Y-%m-%d')}, tune_attention, jax {jax.__version__}"
    fields = (name, device, best, *table_key(shape, name))
    text = ", ".join(json.dumps(field) for field in fields)
    return f"Entry({text}, measured={json.dumps(measured)}),"


def main(argv: list[str]) -> int:
    """Tunes all implementations and prints rows of the table."""
    del argv
    processes.share_accelerator()
    with runner.user_errors("tune_attention"):
        names = runner.some_of("implementations", FLAGS.implementations, [*CANDIDATES])
        shape = bench_attention.sizes_for("xla")[0]
        if len(FLAGS.block_sizes) > 1 or FLAGS.kv_dtypes != ["auto"]:
            raise ValueError(
                "--block_sizes: expected one value, and --kv_dtypes=auto, because a "
                f"row of the table is for one shape; got {FLAGS.block_sizes} and "
                f"{FLAGS.kv_dtypes}"
            )
    if FLAGS.alone is not None:
        for one in trials(FLAGS.alone, tuned_cases()):
            processes.send_result(one)
        return 0
    rows, everything = [], {}
    assert isinstance(shape, AttentionShape)

    def on_results(name: str, found: list[dict[str, Any]]) -> None:
        everything[name] = found
        _print_trials(name, found)
        if any("seconds" in one for one in found):
            rows.append(row_of(name, shape, found))

    left_out = processes.measure_each(
        "tune_attention",
        names,
        bench_attention.given_flags(),
        on_results,
        reason_of=lambda name: contenders.CONTENDERS[name][1](),
        count_of=lambda _: 1,
        limit_s=FLAGS.limit_s,
    )
    print("\n".join(["", *rows]))
    result = {"rows": rows, "tries": everything, "left_out": left_out}
    runner.print_json(result | {"shape": dataclasses.asdict(shape)})
    return 0


def _print_trials(name: str, found: list[dict[str, Any]]) -> None:
    first = found[0].get("seconds")
    for one in found:
        sizes = json.dumps(one.get("sizes", {}))
        if first is None or "failed" in one:
            print(f"{name:<12}{'':>18}  {sizes}  {one.get('failed', '')}", flush=True)
            continue
        ratio = first / one["seconds"]
        print(f"{name:<12}{1e6 * one['seconds']:>9.1f} us{ratio:>7.2f}  {sizes}")


if __name__ == "__main__":
    runner.start(main, define_flags)
