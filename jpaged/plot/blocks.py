"""Block plots: block tables as they change.

Pipeline: block states -> [blocks] -> figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jpaged.kv.block_state import NO_BLOCK
from jpaged.plot import style

_OWNERS = ("#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")  # 0 to 4 or more
_HEIGHT = 0.8  # of a row of a table, which is 1 apart from the next
_POOL = 0.8  # from a row of the pool to the next


def _states(states: Any) -> list[Any]:
    """Return block states; those of engine states are in their field `blocks`."""
    if hasattr(states, "block_tables") or hasattr(states, "blocks"):
        states = [states]
    return [getattr(one, "blocks", one) for one in states]


def block_tables(
    states: Any,
    *,
    titles: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    num_columns: int = 3,
) -> Any:
    """Draw block tables, one panel per state, as they change.

    Each row is a sequence, and each cell one of its blocks with the number of the
    physical block. The colour says how many sequences share the block. The filled part
    of a cell is the share of its slots with a token. A red frame marks an entry that
    differs from the previous state: a new block, a copy, or another sequence's. Below
    are all blocks of the pool.

    Args:
      states: a state of `jpaged.block_manager` or of `jpaged.engine`, or several in
        order.
      titles: one per state; None numbers the states.
      names: names of the rows; None numbers them.
      num_columns: panels beside each other.

    Returns:
      The figure.

    Raises:
      ValueError: there are no states, or not as many titles as states.
    """
    found = _states(states)
    if not found:
        raise ValueError("states: expected at least one state, got none")
    if titles is None:
        titles = [f"state {number}" for number in range(len(found))] * (len(found) > 1)
    if titles and len(titles) != len(found):
        raise ValueError(
            f"titles: expected one for each of {len(found)} states, got {len(titles)}"
        )
    tables = [_Table(one) for one in found]
    rows = sorted(set().union(*(one.used_rows for one in tables))) or [0]
    width = max(one.num_columns for one in tables)
    num_columns = min(num_columns, len(found))
    num_lines = -(-len(found) // num_columns)
    drawn = max(width, min(tables[0].num_blocks, _pool_width(width)))
    height = len(rows) + 1.2 + _POOL * _lines(tables[0], width)
    panel = (0.9 + 0.34 * drawn, 0.35 + 0.3 * height)
    figure, panels = style.new_figure(num_lines, num_columns, panel)
    before: _Table | None = None
    for number, ax in enumerate(panels.flat):
        if number >= len(tables):
            ax.axis("off")
            continue
        table = tables[number]
        _draw_table(ax, table, before, rows, width, names)
        if titles:
            ax.set_title(titles[number], fontsize=10, loc="left", fontweight="bold")
        before = table
    _legend(figure, max(int(one.ref_counts.max()) for one in tables), len(found) > 1)
    return figure


class _Table:
    """A block state as NumPy arrays."""

    def __init__(self, state: Any):
        self.tables = np.asarray(state.block_tables)
        if self.tables.ndim != 2:
            raise ValueError(
                "states: expected block tables i32[S, M], got the shape "
                f"{self.tables.shape}; choose a replica"
            )
        self.lens = np.asarray(state.context_lens)
        self.ref_counts = np.asarray(state.ref_counts)
        self.block_size = int(state.block_size)
        self.num_blocks = len(self.ref_counts)
        self.used_rows = [int(row) for row in np.flatnonzero(self.lens > 0)]
        # Blocks in front of a sliding window are gone.
        used = np.flatnonzero((self.tables != NO_BLOCK).any(axis=0))
        self.num_columns = 1 + int(used.max(initial=0))
        self.group_width = self.tables.shape[1] // len(state.windows)

    def fill(self, row: int, column: int) -> float:
        """Share of a block's slots with a token of this row."""
        tokens = self.lens[row] - column % self.group_width * self.block_size
        return float(np.clip(tokens / self.block_size, 0, 1))


def _pool_width(width: int) -> int:
    return max(width, 8)


def _lines(table: _Table, width: int) -> int:
    return -(-table.num_blocks // _pool_width(width))


def _color(owners: int) -> str:
    return _OWNERS[min(owners, len(_OWNERS) - 1)]


def _cell(
    ax: Any,
    x: float,
    y: float,
    text: str,
    owners: int,
    fill: float = 1.0,
    height: float = _HEIGHT,
) -> None:
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    ax.add_patch(Rectangle((x, y), 1, height, facecolor="white", edgecolor="none"))
    ax.add_patch(
        Rectangle((x, y), fill, height, facecolor=_color(owners), edgecolor="none")
    )
    ax.add_patch(
        Rectangle((x, y), 1, height, fill=False, edgecolor=style.GREY, linewidth=0.8)
    )
    dark = owners >= 3 and fill > 0.5
    ax.text(
        x + 0.5,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=8,
        color="white" if dark else "black",
    )


def _draw_table(
    ax: Any,
    table: _Table,
    before: _Table | None,
    rows: Sequence[int],
    width: int,
    names: Sequence[str] | None,
) -> None:
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    for line, row in enumerate(rows):
        for column, block in enumerate(table.tables[row]):
            if block == NO_BLOCK:
                continue
            owners = int(table.ref_counts[block])
            _cell(ax, column, line, str(block), owners, table.fill(row, column))
            if before is not None and before.tables[row, column] != block:
                ax.add_patch(
                    Rectangle(
                        (column + 0.04, line + 0.04),
                        0.92,
                        _HEIGHT - 0.08,
                        fill=False,
                        edgecolor=style.RED,
                        linewidth=1.8,
                        zorder=3,
                    )
                )
        name = str(row) if names is None else names[row]
        length = f"{name}: {table.lens[row]}" if table.lens[row] else f"{name}: –"
        ax.text(-0.2, line + _HEIGHT / 2, length, ha="right", va="center", fontsize=8)
    top = len(rows) + 0.9
    pool_width = _pool_width(width)
    ax.text(0, top - 0.1, "pool", ha="left", va="bottom", fontsize=8, color=style.GREY)
    for block, owners in enumerate(table.ref_counts):
        x, y = block % pool_width, top + _POOL * (block // pool_width)
        _cell(ax, x, y, str(block), int(owners), height=_POOL)
    lines = _lines(table, width)
    ax.set_xlim(-0.1, max(width, min(table.num_blocks, pool_width)) + 0.1)
    ax.set_ylim(top + _POOL * lines + 0.1, -0.1)
    ax.axis("off")
    ax.text(
        -0.2,
        -0.15,
        "row: tokens",
        ha="right",
        va="bottom",
        fontsize=7,
        color=style.GREY,
    )


def _legend(figure: Any, most: int, has_changes: bool) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    last = len(_OWNERS) - 1
    labels = ["free", "1 sequence", *(f"shared by {n}" for n in range(2, last + 1))]
    if most > last:
        labels[last] += " or more"
    handles = [
        Patch(facecolor=_color(n), edgecolor=style.GREY, label=labels[n])
        for n in range(min(most, last) + 1)
    ]
    if has_changes:
        handles.append(
            Patch(fill=False, edgecolor=style.RED, linewidth=1.8, label="changed")
        )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
