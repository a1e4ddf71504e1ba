"""Tile sizes as data: one table for all implementations of attention.

Place on the road: xla, pallas, triton -> [tuned].

An implementation has sizes that serve everywhere. An entry says what is better on one
device for one shape, and how that was measured; one that says nothing of it was not:
its sizes are arithmetic, or the implementation's own. The first entry that fits counts.

    python -m experiments.tune_attention

measures, and prints the rows to put here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax

T = TypeVar("T")


class Entry(NamedTuple):
    """Sizes for a device and a shape; None fits every one."""

    implementation: str
    device: str  # how jax's name of its kind begins: "NVIDIA H200", "cpu"
    sizes: Mapping[str, int]  # those that differ from the implementation's own
    head_dim: int | None = None  # of the pages
    group: int | None = None  # query heads that share a key
    block_size: int | None = None
    itemsize: int | None = None  # bytes of a number of the pages
    measured: str = ""  # when and with what; empty: not measured


# What XLA's loops take on a GPU, not measured: a trip is a dozen kernels of some
# microseconds each, and no second-level cache is to be stayed in; so few, large tiles.
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
    Entry("mosaic_gpu", "NVIDIA", {}),  # nor the kernels' own sizes
    Entry("triton", "NVIDIA", {}),
    Entry("mosaic_tpu", "TPU", {}),
]


def tiles(implementation: str, default: T, num_heads: int, k_pages: Any) -> T:
    """`default`, a dataclass of sizes, with those of the first entry that fits.

    Args:
      implementation: whose.
      default: its sizes that serve everywhere.
      num_heads: query heads.
      k_pages: `[..., K, P, D]`.
    """
    *_, num_kv_heads, block_size, head_dim = k_pages.shape
    shape = (head_dim, num_heads // num_kv_heads, block_size, k_pages.dtype.itemsize)
    entry = find(implementation, jax.devices()[0].device_kind, *shape)
    found: Any = default
    return found if entry is None else dataclasses.replace(found, **entry.sizes)


def find(implementation: str, device: str, *shape: int) -> Entry | None:
    """The first entry for head_dim, group, block_size and itemsize on the device."""
    for entry in TABLE:
        if entry.implementation == implementation and device.startswith(entry.device):
            wanted = (entry.head_dim, entry.group, entry.block_size, entry.itemsize)
            if all(a in (None, b) for a, b in zip(wanted, shape, strict=True)):
                return entry
    return None
