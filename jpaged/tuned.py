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
    head_dim: int | None  # of the pages
    group: int | None  # query heads that share a key
    block_size: int | None
    itemsize: int | None  # bytes of a number of the pages
    sizes: Mapping[str, int]  # those that differ from the implementation's own
    measured: str = ""  # when and with what; empty: not measured


TABLE: list[Entry] = [
    Entry("xla", "cpu", 64, 3, 16, 4, {}, "2026-11-20, docs/decisions/attention.md"),
    # Not measured. A trip of a loop is a dozen kernels of some microseconds each and
    # there is no second-level cache to stay in, so: few trips, large tiles.
    Entry(
        "xla",
        "NVIDIA",
        None,
        None,
        None,
        None,
        {
            "decode_rows": 256,
            "decode_tokens": 32768,
            "decode_most": 512,
            "ragged_queries": 128,
            "ragged_tokens": 1024,
        },
    ),
    # Not measured: the kernels' own sizes.
    Entry("mosaic_gpu", "NVIDIA", None, None, None, None, {}),
    Entry("triton", "NVIDIA", None, None, None, None, {}),
    Entry("mosaic_tpu", "TPU", None, None, None, None, {}),
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
            wanted = entry[2:6]
            if all(a in (None, b) for a, b in zip(wanted, shape, strict=True)):
                return entry
    return None
