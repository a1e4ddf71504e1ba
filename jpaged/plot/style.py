"""Style: what all plots share: colours, axes, legends beside the data, and files.

Source of the colours: Okabe and Ito 2008, Color Universal Design. Colour-blind readers
can tell them apart.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK = "#CC79A7", "#56B4E9", "#F0E442", "#000000"
GREY, LIGHT = "#8C8C8C", "#D9D9D9"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANEL = (5.2, 3.2)  # inches of a panel
_DPI = 200


def pyplot() -> Any:
    """Return `matplotlib.pyplot`.

    Raises:
      ImportError: matplotlib is missing; the message says what to install.
    """
    try:
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "jpaged.plot needs matplotlib: pip install 'jpaged[plot]'"
        ) from error
    return pyplot


def new_figure(
    num_rows: int = 1,
    num_columns: int = 1,
    panel: tuple[float, float] = PANEL,
    **options: Any,
) -> tuple[Any, Any]:
    """Return a figure, and an array [num_rows, num_columns] of its axes.

    Args:
      num_rows: rows of panels.
      num_columns: columns of panels.
      panel: width and height of a panel in inches.
      options: further arguments of `pyplot.subplots`.
    """
    size = (panel[0] * num_columns, panel[1] * num_rows)
    options = dict(figsize=size, layout="constrained", squeeze=False) | options
    return pyplot().subplots(num_rows, num_columns, **options)


def axes_or_new(ax: Any, panel: tuple[float, float] = PANEL) -> Any:
    """Return `ax`, or the axes of a new figure if it is None."""
    return new_figure(panel=panel)[1][0, 0] if ax is None else ax


def dress(
    ax: Any, x_label: str = "", y_label: str = "", title: str = "", grid: str = "y"
) -> Any:
    """Give axes their labels, light grid lines and no frame; returns them.

    Args:
      ax: the axes.
      x_label: what is on the horizontal axis, with its unit.
      y_label: what is on the vertical axis, with its unit.
      title: of the panel; empty for none.
      grid: axis with grid lines: "x", "y", "both" or "" for none.
    """
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelsize=9)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color=LIGHT, linewidth=0.6)
    ax.set_xlabel(x_label, fontsize=10)
    ax.set_ylabel(y_label, fontsize=10)
    if title:
        ax.set_title(title, fontsize=10, loc="left", fontweight="bold")
    return ax


def legend_beside(ax: Any, **options: Any) -> None:
    """Add a legend to the right of the data, if anything has a label.

    Args:
      ax: the axes.
      options: arguments of `ax.legend`; or `order`, the labels in order.
    """
    handles, labels = options.pop("handles", None), None
    order = options.pop("order", ())
    if handles is None:
        found = ax.get_legend_handles_labels()
        first = dict(zip(reversed(found[1]), reversed(found[0]), strict=True))
        labels = [
            label for label in dict.fromkeys([*order, *found[1]]) if label in first
        ]
        handles = [first[label] for label in labels]
    if not handles:
        return
    named = {"handles": handles} | ({} if labels is None else {"labels": labels})
    place = dict(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    ax.legend(**named, **(place | dict(frameon=False, fontsize=9) | options))


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Write ticks of a logarithmic axis at `values`, as plain numbers."""
    chosen = list(values)
    while len(chosen) > 9:
        chosen = chosen[::2]
    axis.set_ticks(chosen, [f"{value:,g}" for value in chosen])
    axis.set_ticks([], minor=True)


def outline(text: Any) -> None:
    """Outline text in white, so that it can be read on any colour."""
    from matplotlib import patheffects  # pyright: ignore[reportMissingImports]

    text.set_path_effects([patheffects.withStroke(linewidth=1.8, foreground="white")])


def plain_y(ax: Any) -> None:
    """Write the ticks of a logarithmic y axis as plain numbers, few of them."""
    _plain(ax.yaxis, ax.get_ylim())


def plain_x(ax: Any) -> None:
    """Write the ticks of a logarithmic x axis as plain numbers, few of them."""
    _plain(ax.xaxis, ax.get_xlim())


def _plain(axis: Any, limits: tuple[float, float]) -> None:
    from matplotlib import ticker  # pyright: ignore[reportMissingImports]

    subs = (1.0,) if limits[1] / limits[0] > 50 else (1.0, 2.0, 5.0)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure: Any, path: str | pathlib.Path) -> None:
    """Write a figure to a file and close it; the same figure gives the same bytes."""
    path = pathlib.Path(path)
    # Without a date and a version.
    known = {
        ".png": {"Software": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        ".svg": {"Date": None},
    }
    figure.savefig(path, dpi=_DPI, metadata=known.get(path.suffix))
    pyplot().close(figure)
