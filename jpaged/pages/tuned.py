"""Tuned tile sizes: one table for all attention backends.

Pipeline: xla, pallas, triton -> [tuned].

A backend has default sizes that work everywhere. An entry of the table has better sizes
for a device and a shape, and says how they were measured. If its `measured` is empty,
the sizes are computed by hand, or the backend's defaults. The first matching entry is
used. This command measures, and prints the entries to add:

    python -m experiments.tune_attention
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax

T = TypeVar("T")


class Entry(NamedTuple):
    """Tile sizes for a device and a shape; None fits every value."""

    implementation: str  # name of the backend
    device: str  # prefix of jax's name of the device kind: "NVIDIA H200", "cpu"
    sizes: Mapping[str, int]  # those that differ from the backend's own
    head_dim: int | None = None  # of the pages
    group: int | None = None  # query heads per key/value head
    block_size: int | None = None
    itemsize: int | None = None  # bytes of a number of the pages
    measured: str = ""  # when and with what; empty: not measured


# For the loops of "xla" on a GPU, not measured. A trip is a dozen kernels of some
# microseconds each, and there is no second-level cache to stay in; so few, large tiles.
_FEW_TRIPS = dict(
    decode_rows=256,
    decode_tokens=32768,
    decode_most=512,
    ragged_queries=128,
    ragged_tokens=1024,
)
_MEASURED = "2026-11-20, docs/decisions/attention.md"

TABLE: list[Entry] = [
    Entry("xla", "cpu", {}, 64, 3, 16, 4, measured=_MEASURED),
    Entry("xla", "NVIDIA", _FEW_TRIPS),
    # Not measured: the kernels' own sizes.
    Entry("mosaic_gpu", "NVIDIA", {}),
    Entry("triton", "NVIDIA", {}),
    Entry("mosaic_tpu", "TPU", {}),
]


def tiles(implementation: str, default: T, num_heads: int, k_pages: Any) -> T:
    """Return `default`, a dataclass of sizes, with those of the first entry that fits.

    Args:
      implementation: name of the backend.
      default: its sizes that work everywhere.
      num_heads: query heads.
      k_pages: `[..., K, P, D]`.
    """
    *_, num_kv_heads, block_size, head_dim = k_pages.shape
    shape = (head_dim, num_heads // num_kv_heads, block_size, k_pages.dtype.itemsize)
    entry = find_entry(implementation, jax.devices()[0].device_kind, *shape)
    found: Any = default
    return found if entry is None else dataclasses.replace(found, **entry.sizes)


def find_entry(implementation: str, device: str, *shape: int) -> Entry | None:
    """Return the first entry for a backend, a device and a shape, or None.

    `shape` is head_dim, group, block_size and itemsize.
    """
    for entry in TABLE:
        if entry.implementation == implementation and device.startswith(entry.device):
            own = (entry.head_dim, entry.group, entry.block_size, entry.itemsize)
            if all(a in (None, b) for a, b in zip(own, shape, strict=True)):
                return entry
    return None
