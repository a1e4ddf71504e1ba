"""Huge pages: moves large arrays of a CPU to memory pages of 2 MiB, on Linux.

Pipeline: models and engine state -> [huge_pages].

A decode step reads all weights and many scattered blocks once. With pages of 4 KiB, the
processor looks up an address for each of them. docs/decisions/cpu_kernels.md has the
gain. Nothing is copied by JAX and no value changes: the kernel moves the memory.
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
_LEAST = 2 * _HUGE  # smaller arrays may hold no whole huge page
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
    """Move the large arrays of a pytree to huge pages, where the system can.

    Args:
      tree: arrays; those on other devices than a CPU, and deleted ones, stay.

    Returns:
      Bytes that were moved.
    """
    if not is_possible():
        return 0
    return sum(_advise(*region) for region in _regions(tree))


def move_in_background(tree: Any) -> threading.Thread | None:
    """Call `move` in a thread that keeps no array alive.

    The arrays may be used, donated or freed meanwhile: an address that is no longer
    theirs is refused by the system, or its memory is moved without any change.

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
    """The first and the last address of whole huge pages in each large array."""
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
