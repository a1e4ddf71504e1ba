"""Benchmarks decode attention of one layer beside memory bandwidth and peer kernels.

    python -m experiments.bench_attention
    python -m experiments.bench_attention --rows 1,64 --contexts 8192 --dtype bfloat16
    python -m experiments.bench_attention --contenders xla --kv_dtypes auto,int8

The runner first measures the bandwidth of reading and of copying an array. Then every
implementation that supports this machine, and every installed peer, runs in a separate
process: it attends over rows of equal contexts in a shuffled pool of blocks. Its output
is compared with float64 before it is timed. `share` is the time of reading the keys and
values at the measured bandwidth, divided by the measured time; it can exceed 1 if
caches hold all of them. The peers `jax_contiguous`, `torch_sdpa` and `torch_flex` read
contiguous memory without block tables; `torch_flex` is compiled on GPUs only.

`write_kv` and `copy_blocks` are compared with numpy bit for bit. Their share is
relative to the bandwidth of copying, and counts bytes read and written, of keys and
values.

The default sizes depend on the machine: the shape of a 110M model in float32 on CPUs,
of Llama-3-8B in bfloat16 on accelerators. `--plot` writes a figure.

Time: about two minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from experiments.lib import limits, processes, runner
from experiments.lib.attention import contenders, page_updates
from experiments.lib.attention.cases import AttentionShape
from experiments.lib.attention.contenders import CONTENDERS
from experiments.lib.attention.page_updates import UPDATES, PageUpdate
from jpaged.plot import style

FLAGS = flags.FLAGS
_SIZES = ("num_heads", "num_kv_heads", "head_dim")
_CPU = dict(num_heads=12, num_kv_heads=4, head_dim=64, dtype="float32")
_ACCELERATOR = dict(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
_DTYPES = ("float32", "float16", "bfloat16")
_KV_DTYPES = {"auto": None, "int8": "int8", "fp8": "fp8"}
NAMES = [*CONTENDERS, *UPDATES]


def define_flags() -> None:
    """Defines the runner's flags."""
    processes.define_contender_flags(NAMES)
    flags.DEFINE_list(
        "rows", None, "Batch rows; default: 1,8,32, or 1,16,128 on accelerators."
    )
    flags.DEFINE_list(
        "contexts",
        None,
        "Tokens of each row; default: 128,1024, or 1024,8192 on accelerators.",
    )
    flags.DEFINE_list("block_sizes", ["16"], "Tokens per block.")
    for name in _SIZES:
        flags.DEFINE_integer(
            name,
            None,
            f"Default: {_CPU[name]}, or {_ACCELERATOR[name]} on accelerators.",
            lower_bound=1,
        )
    flags.DEFINE_enum(
        "dtype", None, _DTYPES, "Default: float32, or bfloat16 on accelerators."
    )
    flags.DEFINE_list(
        "kv_dtypes", ["auto"], "dtypes of the pages, of auto (as --dtype), int8, fp8."
    )
    flags.DEFINE_list(
        "updates",
        None,
        "Tokens to write, blocks to copy; default: 256, or 256,8192 on accelerators.",
    )
    flags.DEFINE_integer("repeats", 5, "Rounds; the median counts.", lower_bound=1)
    flags.DEFINE_float("round_s", 0.1, "Seconds of a round.", lower_bound=1e-3)
    flags.DEFINE_float(
        "read_gb",
        None,
        "GB of the array that is read for the bandwidth, and of the updated pools; "
        "default: 1, or 8 on accelerators.",
        lower_bound=1e-3,
    )
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def sizes_for(name: str) -> list[AttentionShape] | list[PageUpdate]:
    """The sizes at which a contender is measured.

    Raises:
      ValueError: A flag is not a positive number, or the heads do not divide.
    """
    is_cpu = jax.default_backend() == "cpu"
    sizes: dict[str, Any] = {
        size: getattr(FLAGS, size) or value
        for size, value in (_CPU if is_cpu else _ACCELERATOR).items()
    }
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ValueError(
            f"--num_heads: expected a multiple of --num_kv_heads "
            f"({sizes['num_kv_heads']}), got {sizes['num_heads']}"
        )
    rows, contexts, numbers, block_sizes = (
        runner.positive_integers(flag, on_cpu if is_cpu else on_accelerator)
        for flag, on_cpu, on_accelerator in (
            ("rows", ["1", "8", "32"], ["1", "16", "128"]),
            ("contexts", ["128", "1024"], ["1024", "8192"]),
            ("updates", ["256"], ["256", "8192"]),
            ("block_sizes", [], []),
        )
    )
    if name in UPDATES:
        del sizes["num_heads"]
        kind = UPDATES[name][0]
        return [
            PageUpdate(kind, number, block_size=block_size, **sizes)
            for block_size in block_sizes
            for number in numbers
        ]
    kv_dtypes = runner.some_of("kv_dtypes", FLAGS.kv_dtypes, [*_KV_DTYPES])
    return [
        AttentionShape(
            rows=n,
            context=context,
            block_size=block_size,
            kv_dtype=_KV_DTYPES[kv_dtype],
            **sizes,
        )
        for kv_dtype in kv_dtypes
        for block_size in block_sizes
        for context in contexts
        for n in rows
    ]


def read_gb() -> float:
    """GB of the array that is read, and of the pools that are updated."""
    return FLAGS.read_gb or limits.default_read_gb()


def run_alone(name: str) -> None:
    """Measures one contender in this process; sends a result for each size."""
    pool_bytes = int(read_gb() * 1e9)
    rounds = (FLAGS.repeats, FLAGS.round_s)
    for sizes in sizes_for(name):
        try:
            if isinstance(sizes, PageUpdate):
                found = page_updates.measure_update(name, sizes, pool_bytes, *rounds)
            else:
                found = contenders.measure_shape(name, sizes, *rounds)
        except Exception as error:  # any error of a peer; the other sizes still run
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        processes.send_result(found)


def attention_rows(
    name: str, measured: list[dict[str, Any]], bandwidths: dict[str, float]
) -> list[dict[str, Any]]:
    """A contender's results with its sizes, bandwidth and share of the limit."""
    rows = []
    for sizes, found in zip(sizes_for(name), measured, strict=True):
        row = dataclasses.asdict(sizes) | {"name": name}
        if isinstance(sizes, PageUpdate):
            size, limit = sizes.moved_bytes, bandwidths["copy_bytes_per_s"]
            row["moved_bytes"] = size
        else:
            size, limit = sizes.kv_bytes, bandwidths["read_bytes_per_s"]
            row["kv_bytes"] = size
        row |= found
        if "seconds" in found:
            row["bytes_per_s"] = size / found["seconds"]
            row["share"] = row["bytes_per_s"] / limit
        rows.append(row)
    return rows


def _print_row(row: dict[str, Any]) -> None:
    number = row.get("rows", row.get("number"))
    name = f"{row['name']} {row.get('kv_dtype') or ''}"
    name = f"{name:<22}{number:>5}{row.get('context', ''):>8}"
    name += f"{row['block_size']:>6}"
    if "failed" in row:
        print(f"{name}  {row['failed']}", flush=True)
        return
    size = row["kv_bytes"] if "kv_bytes" in row else row["moved_bytes"]
    print(
        f"{name}{size / 1e6:>10.2f}"
        f"{1e6 * row['seconds']:>12.1f}{row['bytes_per_s'] / 1e9:>9.1f}"
        f"{row['share']:>8.2f}{row['error']:>10.1e}",
        flush=True,
    )


def plot_bandwidth(
    rows: list[dict[str, Any]], bandwidths: dict[str, float], path: str
) -> None:
    """Draws each contender's bandwidth over the bytes of keys and values."""
    timed = [row for row in rows if "seconds" in row and "kv_bytes" in row]
    figure, panels = style.new_figure()
    axes = panels[0, 0]
    names = list(dict.fromkeys(row["name"] for row in timed))
    for number, name in enumerate(names):
        points = sorted(
            (row["kv_bytes"] / 1e6, row["bytes_per_s"] / 1e9)
            for row in timed
            if row["name"] == name
        )
        axes.plot(
            *zip(*points, strict=True),
            color=style.COLORS[number % len(style.COLORS)],
            marker=style.MARKERS[number % len(style.MARKERS)],
            linestyle="-" if number < len(style.COLORS) else ":",
            markersize=4,
            label=name,
        )
    read = bandwidths["read_bytes_per_s"] / 1e9
    label = "measured read bandwidth"
    axes.axhline(read, color=style.BLACK, linestyle="--", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    style.dress(axes, "keys and values (MB)", "bandwidth (GB/s)", grid="both")
    style.legend_beside(axes)
    style.save(figure, path)


def main(argv: list[str]) -> int:
    """Measures all contenders and prints the results."""
    del argv
    begin = time.monotonic()
    processes.share_accelerator()
    with runner.user_errors("bench_attention"):
        names = runner.some_of("contenders", FLAGS.contenders, NAMES)
        for name in names:
            sizes_for(name)
    if FLAGS.alone is not None:
        run_alone(FLAGS.alone)
        return 0
    bandwidths = limits.measure_bandwidths(read_gb(), FLAGS.repeats)
    for name, value in bandwidths.items():
        print(f"{name:<20}{value / 1e9:>8.1f} GB/s")
    print(
        f"{'':<22}{'rows':>5}{'context':>8}{'block':>6}{'MB':>10}{'us':>12}"
        f"{'GB/s':>9}{'share':>8}{'error':>10}",
        flush=True,
    )
    rows = []

    def on_results(name: str, measured: list[dict[str, Any]]) -> None:
        found = attention_rows(name, measured, bandwidths)
        rows.extend(found)
        for row in found:
            _print_row(row)

    left_out = processes.measure_each(
        "bench_attention",
        names,
        given_flags(),
        on_results,
        reason_of=lambda name: reasons()[name](),
        count_of=lambda name: len(sizes_for(name)),
        limit_s=FLAGS.limit_s - (time.monotonic() - begin),
        share=0.5,  # a contender that hangs leaves time for the others
    )
    if FLAGS.plot is not None:
        plot_bandwidth(rows, bandwidths, FLAGS.plot)
    runner.print_json({"rows": rows, "left_out": left_out} | bandwidths)
    return 0


def reasons() -> dict[str, Callable[[], str | None]]:
    """For each contender, a function that returns why it cannot run here, or None."""
    found = {name: reason for name, (_, reason) in CONTENDERS.items()}
    return found | {name: reason for name, (*_, reason) in UPDATES.items()}


def given_flags() -> list[str]:
    """This process's flags that decide what is measured, as command-line arguments."""
    names = ("rows", "contexts", "block_sizes", "updates", "dtype", "kv_dtypes")
    names += ("repeats", "round_s", "read_gb", *_SIZES)
    found = []
    for name in names:
        value = getattr(FLAGS, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else value
            found.append(f"--{name}={text}")
    return found


if __name__ == "__main__":
    runner.start(main, define_flags)
