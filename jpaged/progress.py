"""Progress: bars for long work, where a terminal or a notebook can show them.

Pipeline: long work -> [progress] -> stderr, or a notebook's output. Host only.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

Progress = bool | Callable[..., Any]  # whether to show a bar, or what makes one


def progress_bar(
    total: int, description: str, unit: str, shown: Progress = True, **options: Any
) -> Any:
    """Return a tqdm bar, which appears after half a second.

    Args:
      total: number of units.
      description: what is done.
      unit: name of a unit.
      shown: False disables the bar; True shows it if stderr is a terminal or this is a
        notebook. A function, such as a subclass of tqdm, is called in place of tqdm.
      options: further arguments of tqdm.
    """
    options = (
        dict(total=total, desc=description, unit=unit, dynamic_ncols=True) | options
    )
    if callable(shown) and not isinstance(shown, bool):
        return shown(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of notebooks without ipywidgets
        from tqdm.auto import tqdm
    # tqdm's None disables the bar unless stderr is a terminal. A notebook's stderr is
    # not a terminal, but can show a bar.
    is_notebook = "ipykernel" in sys.modules
    disable = (False if is_notebook else None) if shown else True
    return tqdm(delay=0.5, disable=disable, **options)
