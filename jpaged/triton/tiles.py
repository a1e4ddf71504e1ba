"""Tile sizes of the Triton kernels that serve everywhere; `jpaged.tuned` has others.

None is measured, for there was no GPU. What stands here is arithmetic and what the
compiler reports: `docs/decisions/triton_kernel.md`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's tiles."""

    query_rows: int = 64  # of a tile of prompt queries: queries times heads of a key
    tokens: int = 64  # of a tile of keys
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 264  # that decode rows are split into, together: two for each SM
    least_chunk: int = 256  # tokens of a split, at least


def query_rows(q_itemsize: int) -> int:
    """Rows of a tile of queries; 64 of float32 spill registers."""
    return 32 if q_itemsize == 4 else 64


def choose(head_dim: int, itemsize: int, q_itemsize: int) -> Tiles:
    """Such as need at most 16 KiB for a tile of keys, or as much once it is widened.

    Bytes of a number of the pages and of q.
    """
    rows = query_rows(q_itemsize)
    if itemsize == 1:  # each stage is half as large, so one more is under way
        tokens = max(min(2**13 // head_dim, 64), 16)
        return Tiles(query_rows=rows, tokens=tokens, num_stages=4)
    tokens = max(min(2**14 // (head_dim * itemsize), 128), 16)
    stages = 2 if itemsize == 4 else 3
    return Tiles(query_rows=rows, tokens=tokens, num_stages=stages)
