"""What came of the aims on a GPU: one line for each, from what the stages found.

Beside the road; of plain records, so that it can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_KERNELS = ("mosaic_gpu", "triton")
_LARGE = 128e6  # bytes of keys and values from which time is a matter of bandwidth
Rows = list[dict[str, Any]]
Found = tuple[float, str] | None  # the figure, and of what


def aims(stages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each aim, what was wanted, what was found and of what."""
    rows: dict[str, Rows] = {}
    for stage in stages:
        result = stage["result"] or {}
        rows[stage["name"]] = [
            row for row in result.get("rows", []) if "failed" not in row
        ]
    lines = []
    for aim, wanted, stage, figure in _AIMS:
        found = figure(rows[stage]) if rows.get(stage) else None
        here, of = (
            ("not measured", "") if found is None else (f"{found[0]:.2f}", found[1])
        )
        lines.append({"aim": aim, "wanted": wanted, "here": here, "of": of})
    return lines


def _best_share(rows: Rows) -> Found:
    large = [
        (row["share"], f"{row['name']}, {row['kv_bytes'] / 1e6:.0f} MB")
        for row in rows
        if row["name"] in _KERNELS and row["kv_bytes"] >= _LARGE
    ]
    return max(large, default=None)


def _over_flashinfer(rows: Rows) -> Found:
    """FlashInfer's time by that of the better kernel, where it is least."""
    seconds = {(row["name"], _insert(row)): row["seconds"] for row in rows}
    found = []
    for seq_index in {_insert(row) for row in rows if row["name"] == "flashinfer"}:
        ours = [
            (seconds[name, seq_index], name)
            for name in _KERNELS
            if (name, seq_index) in seconds
        ]
        if ours:
            least, name = min(ours)
            ratio = seconds["flashinfer", seq_index] / least
            found.append((ratio, f"{name}, {seq_index[0]} rows of {seq_index[1]}"))
    return min(found, default=None)


def _insert(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("rows"), row.get("context"), row["block_size"]


def _spread(rows: Rows) -> Found:
    """The slowest block size by the fastest, of the better kernel."""
    found = []
    for name in _KERNELS:
        times = [row["seconds"] for row in rows if row["name"] == name]
        if len(times) > 1:
            found.append((min(times), max(times) / min(times), name))
    if not found:
        return None
    _, ratio, name = min(found)
    return ratio, name


def _beside_model(rows: Rows) -> Found:
    """The gain by the model's, where it is least, of gains that the model promises; of
    the better kernel."""
    least = {}
    for row in rows:
        if row["model_ratio"] > 1:
            of = f"{row['name']}, {row['num_rows']} rows, prefix {row['prefix_tokens']}"
            figure = row["ratio"] / row["model_ratio"], of
            least[row["name"]] = min(figure, least.get(row["name"], figure))
    return max(least.values(), default=None)


def _best_update(name: str) -> Callable[[Rows], Found]:
    def figure(rows: Rows) -> Found:
        found = [
            (row["share"], f"{row['name']}, {row['moved_bytes'] / 1e6:.0f} MB")
            for row in rows
            if row["name"].startswith(name)
        ]
        return max(found, default=None)

    return figure


def _best_decode(rows: Rows) -> Found:
    ours = [
        (row["share"], f"{row['name']}, {row['rows']} rows")
        for row in rows
        if row["name"] != "transformers"
    ]
    return max(ours, default=None)


def _over_transformers(rows: Rows) -> Found:
    """transformers' time by that of jpaged's best, where it is least."""
    found = []
    for peer in (row for row in rows if row["name"] == "transformers"):
        ours = [
            (row["seconds"], row["name"])
            for row in rows
            if row["name"] != "transformers" and row["rows"] == peer["rows"]
        ]
        if ours:
            least, name = min(ours)
            found.append((peer["seconds"] / least, f"{name}, {peer['rows']} rows"))
    return min(found, default=None)


# What, wanted, of which stage, and its figure.
_AIMS: tuple[tuple[str, str, str, Callable[[Rows], Found]], ...] = (
    (
        "attention, share of reading, 128 MB and more",
        ">= 0.9",
        "attention",
        _best_share,
    ),
    ("FlashInfer's time by ours, least", ">= 1", "attention", _over_flashinfer),
    ("slowest block size by fastest", "<= 1.05", "block sizes", _spread),
    ("cascade's gain by the model's, least", ">= 0.85", "cascade", _beside_model),
    ("write_kv, share of copying", ">= 0.8", "attention", _best_update("write_kv")),
    ("copy_blocks, share of copying", ">= 0.8", "attention", _best_update("copy")),
    ("decode step, share of reading, best", "", "decode", _best_decode),
    ("transformers' step by ours, least", "", "decode", _over_transformers),
)
