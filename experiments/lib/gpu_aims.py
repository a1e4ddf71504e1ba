"""Aims on a GPU: each with its figure, computed from the rows of the stages.

The input is plain records, so that this module is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_KERNELS = ("mosaic_gpu", "triton")
_LARGE = 128e6  # bytes of keys and values above which bandwidth decides the time
Rows = list[dict[str, Any]]
AimFigure = tuple[float, str] | None  # the figure, and which case it belongs to


def aims(stages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Evaluates every aim.

    Args:
      stages: Records of the stages, with "name" and "result", the stage's JSON or None.

    Returns:
      For each aim its name, the wanted and the measured value, and the case to which
      the measured value belongs.
    """
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


def _best_share(rows: Rows) -> AimFigure:
    large = [
        (row["share"], f"{row['name']}, {row['kv_bytes'] / 1e6:.0f} MB")
        for row in rows
        if row["name"] in _KERNELS and row["kv_bytes"] >= _LARGE
    ]
    return max(large, default=None)


def _over_flashinfer(rows: Rows) -> AimFigure:
    """Least ratio of FlashInfer's time to that of the better kernel, over all cases."""
    seconds = {(row["name"], _case_of(row)): row["seconds"] for row in rows}
    found = []
    for case in {_case_of(row) for row in rows if row["name"] == "flashinfer"}:
        ours = [
            (seconds[name, case], name) for name in _KERNELS if (name, case) in seconds
        ]
        if ours:
            least, name = min(ours)
            ratio = seconds["flashinfer", case] / least
            found.append((ratio, f"{name}, {case[0]} rows of {case[1]}"))
    return min(found, default=None)


def _case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("rows"), row.get("context"), row["block_size"]


def _spread(rows: Rows) -> AimFigure:
    """Time of the slowest block size divided by that of the fastest, better kernel."""
    found = []
    for name in _KERNELS:
        times = [row["seconds"] for row in rows if row["name"] == name]
        if len(times) > 1:
            found.append((min(times), max(times) / min(times), name))
    if not found:
        return None
    _, ratio, name = min(found)
    return ratio, name


def _beside_model(rows: Rows) -> AimFigure:
    """Least ratio of the measured gain to the model's gain, for the better kernel.

    Only cases in which the model predicts a gain count.
    """
    least = {}
    for row in rows:
        if row["model_ratio"] > 1:
            of = f"{row['name']}, {row['num_rows']} rows, prefix {row['prefix_tokens']}"
            figure = row["ratio"] / row["model_ratio"], of
            least[row["name"]] = min(figure, least.get(row["name"], figure))
    return max(least.values(), default=None)


def _best_update(name: str) -> Callable[[Rows], AimFigure]:
    def figure(rows: Rows) -> AimFigure:
        found = [
            (row["share"], f"{row['name']}, {row['moved_bytes'] / 1e6:.0f} MB")
            for row in rows
            if row["name"].startswith(name)
        ]
        return max(found, default=None)

    return figure


def _best_decode(rows: Rows) -> AimFigure:
    ours = [
        (row["share"], f"{row['name']}, {row['rows']} rows")
        for row in rows
        if row["name"] != "transformers"
    ]
    return max(ours, default=None)


def _over_transformers(rows: Rows) -> AimFigure:
    """Least ratio of transformers' time to that of jpaged's best implementation."""
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


# Name, wanted value, stage, and how the figure is computed from the stage's rows.
_AIMS: tuple[tuple[str, str, str, Callable[[Rows], AimFigure]], ...] = (
    (
        "attention, share of reading, 128 MB and more",
        ">= 0.9",
        "attention",
        _best_share,
    ),
    ("FlashInfer's time / ours, minimum", ">= 1", "attention", _over_flashinfer),
    ("slowest / fastest block size", "<= 1.05", "block sizes", _spread),
    ("cascade's gain / model's, minimum", ">= 0.85", "cascade", _beside_model),
    ("write_kv, share of copying", ">= 0.8", "attention", _best_update("write_kv")),
    ("copy_blocks, share of copying", ">= 0.8", "attention", _best_update("copy")),
    ("decode step, share of reading, best", "", "decode", _best_decode),
    ("transformers' step / ours, minimum", "", "decode", _over_transformers),
)
