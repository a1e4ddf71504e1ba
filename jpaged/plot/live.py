"""Live plots: memory, sequences and requests of an engine over time.

Pipeline: step records and outputs -> [live] -> axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jpaged.outputs import RequestOutput
from jpaged.plot import style
from jpaged.serving.metrics import StepRecord

_WAITING = ("queued", "preempted", "swapped")
_MARKS = {
    "first_token": ("first token", style.GREEN, "|"),
    "preempted": ("preempted", style.RED, "x"),
    "swapped": ("swapped out", style.PURPLE, "x"),
}


def _records(source: Any) -> list[StepRecord]:
    """Return the step records of an LLM, or those that are given."""
    records = list(source.timeline() if hasattr(source, "timeline") else source)
    if not records:
        raise ValueError(
            "source: expected at least one step, got none; generate something first"
        )
    return records


def _start_s(records: Sequence[StepRecord], start_s: float | None) -> float:
    return records[0].time_s if start_s is None else start_s


def _sizes(
    source: Any, num_blocks: int | None, block_size: int | None
) -> tuple[int | None, int | None]:
    """Return the sizes that are given, and those of an LLM in place of None."""
    config = getattr(source, "config", None)
    return (
        getattr(config, "num_blocks", None) if num_blocks is None else num_blocks,
        getattr(config, "block_size", None) if block_size is None else block_size,
    )


def occupancy(
    source: Any,
    *,
    num_blocks: int | None = None,
    block_size: int | None = None,
    start_s: float | None = None,
    ax: Any = None,
) -> Any:
    """Draw what the slots of the KV pool hold over time, as in the paper's figure 2.

    Slots with a token's keys and values, slots that are reserved for future tokens, and
    on top the memory that sharing saves.

    Args:
      source: an LLM, or the StepRecords of `LLM.timeline`.
      num_blocks: blocks of the pool; None is that of the LLM.
      block_size: slots per block; None is that of the LLM.
      start_s: time 0 of the plot on the clock of the records; None is the first record.
      ax: matplotlib axes; None creates a figure.

    Returns:
      The axes.

    Raises:
      ValueError: there are no steps, or a size is missing.
    """
    records = _records(source)
    num_blocks, block_size = _sizes(source, num_blocks, block_size)
    if num_blocks is None or block_size is None:
        raise ValueError(
            "num_blocks, block_size: expected both with step records, got "
            f"{num_blocks} and {block_size}"
        )
    ax = style.axes_or_new(ax)
    times = np.array([one.time_s for one in records]) - _start_s(records, start_s)
    percent = 100 / (num_blocks * block_size)
    parts = {
        "token states": (style.BLUE, [one.num_token_states for one in records]),
        "reserved": (style.ORANGE, [one.num_reserved_slots for one in records]),
        "saved by sharing": (
            style.LIGHT,
            [block_size * one.num_saved_blocks for one in records],
        ),
    }
    below = np.zeros(len(records))
    for label, (color, counts) in parts.items():
        top = below + percent * np.array(counts)
        hatch = "////" if label.startswith("saved") else None
        ax.fill_between(
            times,
            below,
            top,
            step="pre",
            facecolor=color,
            edgecolor="white" if hatch else color,
            hatch=hatch,
            linewidth=0.3,
            label=label,
        )
        below = top
    ax.axhline(100, color=style.BLACK, linewidth=1, linestyle="--", label="whole pool")
    ax.set_ylim(0, max(105.0, 1.05 * float(below.max())))
    ax.set_xlim(0, max(times[-1], 1e-3))
    style.dress(ax, "time (s)", "KV slots (% of the pool)")
    style.legend_beside(ax)
    return ax


def sequences(source: Any, *, start_s: float | None = None, ax: Any = None) -> Any:
    """Draw the numbers of running and waiting sequences over time.

    See `occupancy` for the arguments; returns the axes.
    """
    records = _records(source)
    ax = style.axes_or_new(ax)
    times = np.array([one.time_s for one in records]) - _start_s(records, start_s)
    for name, color, line in (
        ("running", style.BLUE, "-"),
        ("waiting", style.ORANGE, "--"),
    ):
        counts = [getattr(one, f"num_{name}") for one in records]
        ax.step(times, counts, color=color, linestyle=line, linewidth=1.5, label=name)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set_ylim(bottom=0)
    ax.set_xlim(0, max(times[-1], 1e-3))
    style.dress(ax, "time (s)", "sequences")
    style.legend_beside(ax)
    return ax


def timeline(
    outputs: Sequence[RequestOutput], *, start_s: float | None = None, ax: Any = None
) -> Any:
    """Draw each request from its arrival to its end: waiting, prompt, and decoding.

    Args:
      outputs: finished outputs with events, as `LLM.generate` returns them.
      start_s: time 0 of the plot on the clock of the events; None is the first arrival.
      ax: matplotlib axes; None creates a figure.

    Returns:
      The axes.

    Raises:
      ValueError: no output has events.
    """
    found = sorted(
        (one.events for one in outputs if one.events),
        key=lambda events: events[0].time_s,
    )
    if not found:
        raise ValueError("outputs: expected at least one output with events, got none")
    start = found[0][0].time_s if start_s is None else start_s
    ax = style.axes_or_new(ax, (style.PANEL[0], 1.2 + min(0.16 * len(found), 6)))
    kinds = {
        "waiting": style.LIGHT,
        "computing the prompt": style.SKY,
        "decoding": style.BLUE,
    }
    bars: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in kinds}
    for row, events in enumerate(found):
        for kind, begin, end in _phases(events):
            bars[kind].append((row, begin - start, end - begin))
    for kind, color in kinds.items():
        if bars[kind]:
            rows, lefts, widths = zip(*bars[kind], strict=True)
            ax.barh(rows, widths, left=lefts, height=0.7, color=color, label=kind)
    for name, (label, color, marker) in _MARKS.items():
        points = [
            (event.time_s - start, row)
            for row, events in enumerate(found)
            for event in events
            if event.name == name
        ]
        if points:
            x, y = zip(*points, strict=True)
            ax.scatter(x, y, c=color, marker=marker, s=26, zorder=3, label=label)
    ax.set_ylim(len(found) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.yaxis.get_major_locator().set_params(integer=True)
    style.dress(ax, "time (s)", "request, by arrival", grid="x")
    style.legend_beside(ax)
    return ax


def _phases(events: Sequence[Any]) -> Iterator[tuple[str, float, float]]:
    """Yield what a request did between its events: kind, begin and end in seconds."""
    has_token = False
    for event, after in itertools.pairwise(events):
        has_token |= event.name == "first_token"
        if event.name in _WAITING:
            kind = "waiting"
        else:
            kind = "decoding" if has_token else "computing the prompt"
        yield kind, event.time_s, after.time_s


def live_load(
    source: Any,
    outputs: Sequence[RequestOutput],
    *,
    num_blocks: int | None = None,
    block_size: int | None = None,
    start_s: float | None = None,
) -> Any:
    """Draw memory, sequences and requests of a load under one another.

    See `occupancy` and `timeline` for the arguments; returns the figure.
    """
    records = _records(source)
    if start_s is None:
        arrivals = [one.events[0].time_s for one in outputs if one.events]
        start_s = min([records[0].time_s, *arrivals])
    num_blocks, block_size = _sizes(source, num_blocks, block_size)
    figure, panels = style.new_figure(
        3, 1, (7.5, 2.8), sharex=True, height_ratios=(2, 1, 2)
    )
    memory, counts, requests = panels[:, 0]
    occupancy(
        records,
        num_blocks=num_blocks,
        block_size=block_size,
        start_s=start_s,
        ax=memory,
    )
    sequences(records, start_s=start_s, ax=counts)
    timeline(outputs, start_s=start_s, ax=requests)
    for ax in (memory, counts):
        ax.set_xlabel("")
    return figure
