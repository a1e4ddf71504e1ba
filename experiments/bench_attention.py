"""Decode attention of one layer beside the memory's bandwidth and what else there is.

    python -m experiments.bench_attention
    python -m experiments.bench_attention --rows 1,64 --contexts 8192 --dtype bfloat16
    python -m experiments.bench_attention --contenders xla --kv_dtypes auto,int8

First the bandwidth of reading and of copying is measured. Then every implementation
that serves this machine, and every peer that is installed, each in a process of its
own, attends rows of equal contexts over a shuffled pool: its numbers are compared with
float64, and only then its time is taken. `share` is the time that reading keys and
values would take, at the measured bandwidth, of the time taken; caches that hold them
all can take it above 1. The peers `jax_contiguous` and `torch_sdpa` read contiguous
memory and have no tables to follow, `torch_flex` too, which is compiled on GPUs only.

`write_kv` and `copy_blocks` are compared with numpy bit for bit, and their share is
that of the bandwidth of copying: bytes read and written, of keys and of values.

Defaults are for the machine: a 110M shape in float32 on CPUs, Llama-3-8B's in bfloat16
elsewhere. --plot writes a figure. Time: about two minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from experiments.lib import limits as lib_limits
from experiments.lib.attention import contenders as contenders
from experiments.lib.attention import page_updates
from experiments.lib.attention.cases import Shape
from experiments.lib.attention.contenders import CONTENDERS
from experiments.lib.attention.page_updates import UPDATES, Update
from experiments.lib.processes import ask_each, chosen, tell
from experiments.lib.timing import environment

FLAGS = flags.FLAGS
_SIZES = ("num_heads", "num_kv_heads", "head_dim")
_CPU = dict(num_heads=12, num_kv_heads=4, head_dim=64, dtype="float32")
_ACCELERATOR = dict(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
_KINDS = ("float32", "float16", "bfloat16")
NAMES = [*CONTENDERS, *UPDATES]


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list(
        "rows", None, "Sequences; None: 1,8,32, on accelerators 1,16,128."
    )
    flags.DEFINE_list("contexts", None, "Tokens of each; None: 128,1024 or 1024,8192.")
    flags.DEFINE_list("block_sizes", ["16"], "Tokens per block.")
    for name in _SIZES:
        flags.DEFINE_integer(name, None, "None: of the machine's shape.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, _KINDS, "None: the machine's.")
    flags.DEFINE_list("kv_dtypes", ["auto"], "Of pages: auto (as dtype), int8, fp8.")
    flags.DEFINE_list(
        "updates", None, "Tokens written, blocks copied; None: 256, or 256,8192."
    )
    flags.DEFINE_list("contenders", None, f"Some of {', '.join(NAMES)}; None: all.")
    flags.DEFINE_integer("repeats", 5, "Rounds; the median counts.", lower_bound=1)
    flags.DEFINE_float("round_s", 0.1, "Seconds of a round.", lower_bound=1e-3)
    flags.DEFINE_float(
        "read_gb", None, "Array of the bandwidths; None: 1, or 8.", lower_bound=1e-3
    )
    flags.DEFINE_float(
        "limit_s", 3600, "Seconds after which nothing is measured.", lower_bound=0
    )
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")
    flags.DEFINE_string("alone", None, "Used by this runner for each contender.")


def lines_of(name: str) -> list[Shape] | list[Update]:
    """The lines of a contender.

    Raises:
      ValueError: a flag that is no positive number, or heads that do not divide.
    """
    is_cpu = jax.default_backend() == "cpu"
    sizes: dict[str, Any] = {
        name: FLAGS[name].value or value
        for name, value in (_CPU if is_cpu else _ACCELERATOR).items()
    }
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ValueError(
            f"--num_heads: wanted a multiple of --num_kv_heads "
            f"({sizes['num_kv_heads']}), got {sizes['num_heads']}"
        )
    rows = _numbers("rows", ["1", "8", "32"] if is_cpu else ["1", "16", "128"])
    contexts = _numbers("contexts", ["128", "1024"] if is_cpu else ["1024", "8192"])
    numbers = _numbers("updates", ["256"] if is_cpu else ["256", "8192"])
    blocks = _numbers("block_sizes", [])
    if name in UPDATES:
        del sizes["num_heads"]
        kind = UPDATES[name][0]
        return [
            Update(kind, number, block_size=p, **sizes)
            for p in blocks
            for number in numbers
        ]
    kinds = {"auto": None, "int8": "int8", "fp8": "fp8"}
    if unknown := [kind for kind in FLAGS.kv_dtypes if kind not in kinds]:
        raise ValueError(f"--kv_dtypes: wanted auto, int8, fp8, got {unknown[0]!r}")
    return [
        Shape(rows=n, context=c, block_size=p, kv_dtype=kinds[kind], **sizes)
        for kind in FLAGS.kv_dtypes
        for p in blocks
        for c in contexts
        for n in rows
    ]


def read_gb() -> float:
    """Size of the array that is read, and of the pools that are updated."""
    return FLAGS.read_gb or lib_limits.bandwidth_gb()


def _numbers(name: str, default: list[str]) -> list[int]:
    values = FLAGS[name].value or default
    if not all(value.isdecimal() and int(value) for value in values):
        raise ValueError(f"--{name}: wanted integers above 0, got {values}")
    return list(map(int, values))


def run_alone(name: str) -> None:
    """Measures one contender, for the process that asked; a line for each shape."""
    pool_bytes = int(read_gb() * 1e9)
    for line in lines_of(name):
        try:
            if isinstance(line, Update):
                rounds = (pool_bytes, FLAGS.repeats, FLAGS.round_s)
                found = page_updates.measure(name, line, *rounds)
            else:
                found = contenders.measure(name, line, FLAGS.repeats, FLAGS.round_s)
        except Exception as error:  # whatever a peer raises: the others go on
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        tell(found)


def rows_of(
    name: str, measured: list[dict[str, Any]], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each shape."""
    rows = []
    for line, found in zip(lines_of(name), measured, strict=True):
        row = dataclasses.asdict(line) | {"name": name}
        if isinstance(line, Update):
            size, limit = line.moved_bytes, limits["copy_bytes_per_s"]
            row["moved_bytes"] = size
        else:
            size, limit = line.kv_bytes, limits["read_bytes_per_s"]
            row["kv_bytes"] = size
        row |= found
        if "seconds" in found:
            row["bytes_per_s"] = size / found["seconds"]
            row["share"] = row["bytes_per_s"] / limit
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
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


def plot(rows: list[dict[str, Any]], limits: dict[str, float], path: str) -> None:
    """Writes the figure: bandwidth over the bytes of keys and values."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    timed = [row for row in rows if "seconds" in row and "kv_bytes" in row]
    for name in dict.fromkeys(row["name"] for row in timed):
        mine = sorted(
            (row["kv_bytes"] / 1e6, row["bytes_per_s"] / 1e9)
            for row in timed
            if row["name"] == name
        )
        axes.plot(*zip(*mine, strict=True), marker="o", label=name)
    axes.axhline(limits["read_bytes_per_s"] / 1e9, color="black", linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("keys and values, MB")
    axes.set_ylabel("GB/s; dashed: reading alone")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    """Reads the flags, measures, prints."""
    begin = time.monotonic()
    # Each contender's process takes what it needs, and this one leaves it there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        names = chosen("contenders", FLAGS.contenders, NAMES, argv)
        for name in names:
            lines_of(name)
    except ValueError as error:
        print(f"bench_attention: {error}", file=sys.stderr)
        return 1
    if FLAGS.alone is not None:
        run_alone(FLAGS.alone)
        return 0
    limits = lib_limits.bandwidths(read_gb(), FLAGS.repeats)
    for name, value in limits.items():
        print(f"{name:<20}{value / 1e9:>8.1f} GB/s")
    print(
        f"{'':<22}{'rows':>5}{'context':>8}{'block':>6}{'MB':>10}{'us':>12}"
        f"{'GB/s':>9}{'share':>8}{'error':>10}",
        flush=True,
    )
    rows, left_out = [], {}
    for name, measured in ask_each(
        "bench_attention",
        names,
        given_flags(),
        reason_of=lambda name: reasons()[name](),
        count_of=lambda name: len(lines_of(name)),
        limit_s=FLAGS.limit_s - (time.monotonic() - begin),
        share=0.5,  # one that hangs must not cost all the others
    ):
        if isinstance(measured, str):
            left_out[name] = measured
            continue
        found = rows_of(name, measured, limits)
        rows += found
        for row in found:
            show(row)
    for name, reason in left_out.items():
        print(f"{name:<22} left out: {reason}")
    if FLAGS.plot is not None:
        plot(rows, limits, FLAGS.plot)
    print(json.dumps({"rows": rows, "left_out": left_out} | limits | environment()))
    return 0


def reasons() -> dict[str, Callable[[], str | None]]:
    """Of each contender, what keeps it from this machine."""
    found = {name: reason for name, (_, reason) in CONTENDERS.items()}
    return found | {name: reason for name, (*_, reason) in UPDATES.items()}


def given_flags() -> list[str]:
    """The flags of this process that decide what is measured."""
    names = ("rows", "contexts", "block_sizes", "updates", "dtype", "kv_dtypes")
    names += ("repeats", "round_s", "read_gb", *_SIZES)
    found = []
    for name in names:
        value = FLAGS[name].value
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else value
            found.append(f"--{name}={text}")
    return found


if __name__ == "__main__":
    define_flags()
    app.run(main)
