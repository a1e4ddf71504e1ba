"""Huge pages: moves large arrays of a CPU to memory pages of 2 MiB, on Linux.

Pipeline: models and engine state -> [huge_pages].

A decode step reads all weights and many scattered blocks once. The processor looks up
an address for each memory page, and pages of 4 KiB are many. The measurements are in
docs/decisions/cpu_kernels.md. JAX copies nothing and no value changes: the operating
system moves the memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import sys
import threading
from typing import Any

import jax
from jax.core import Tracer

_HUGE = 2**21  # bytes of a huge page
_LEAST = 2 * _HUGE  # a smaller array may not contain a whole huge page
_PIECE = 16 * _HUGE  # bytes moved by one call
_HUGE_PAGES, _COLLAPSE = 14, 25  # MADV_HUGEPAGE and MADV_COLLAPSE of Linux
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@functools.cache
def is_possible() -> bool:
    """Whether the system has huge pages and the user has not turned them off."""
    if sys.platform != "linux" or os.environ.get("JPAGED_HUGE_PAGES") == "off":
        return False
    try:
        return "[never]" not in _SETTING.read_text("utf-8")
    except OSError:
        return False


def move(tree: Any) -> int:
    """Move the large arrays of a pytree to huge pages, if the system has them.

    Args:
      tree: any pytree; small or deleted arrays, arrays on other devices than a CPU, and
        leaves that are not arrays are ignored.

    Returns:
      Number of bytes that were moved.
    """
    if not is_possible():
        return 0
    return sum(_advise(*region) for region in _regions(tree))


def move_in_background(tree: Any) -> threading.Thread | None:
    """Call `move` in a thread that keeps no array alive.

    The arrays can be used, donated or freed at the same time. The system rejects an
    address that is no longer mapped, and moving other memory does not change it.

    Args:
      tree: as for `move`.

    Returns:
      The thread; None if there is nothing to move.
    """
    regions = _regions(tree) if is_possible() else []
    if not regions:
        return None

    def advise_all() -> None:
        for region in regions:
            _advise(*region)

    thread = threading.Thread(target=advise_all, name="jpaged-huge-pages", daemon=True)
    thread.start()
    return thread


def _regions(tree: Any) -> list[tuple[int, int]]:
    """Start and end address of the whole huge pages in each large array."""
    found = []
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            continue
        if leaf.is_deleted() or leaf.nbytes < _LEAST:
            continue
        for shard in leaf.addressable_shards:
            if shard.device.platform != "cpu" or shard.data.nbytes < _LEAST:
                continue
            start = shard.data.unsafe_buffer_pointer()
            stop = start + shard.data.nbytes
            found.append((-(-start // _HUGE) * _HUGE, stop // _HUGE * _HUGE))
    return found


def _advise(start: int, stop: int) -> int:
    """Move the memory between two addresses; return the number of bytes moved."""
    madvise = _madvise()
    moved = 0
    for first in range(start, stop, _PIECE):
        size = min(_PIECE, stop - first)
        madvise(first, size, _HUGE_PAGES)
        moved += size * (madvise(first, size, _COLLAPSE) == 0)
    return moved


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
