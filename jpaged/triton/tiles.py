"""Default tile sizes of the Triton kernels; `jpaged.pages.tuned` has others.

Pipeline: triton.attention -> [triton.tiles].

No size is measured, because no GPU was available. They follow from arithmetic and from
what the compiler reports: `docs/decisions/triton_kernel.md`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TritonTiles:
    """Sizes of the attention kernel's tiles and of its parts.

    Attributes:
      query_rows: rows per tile of prompt queries: queries times heads per key.
      tokens: tokens per tile of keys.
      num_warps: warps per program.
      num_stages: stages of Triton's pipeline.
      programs: programs that all decode rows together are split into: two for each
        multiprocessor of an H200.
      least_chunk: the fewest tokens of a part of a decode row.
    """

    query_rows: int = 64
    tokens: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 264
    least_chunk: int = 256


def query_rows(q_itemsize: int) -> int:
    """Return the rows per tile of queries; 64 rows of float32 would spill registers."""
    return 32 if q_itemsize == 4 else 64


def default_tiles(head_dim: int, itemsize: int, q_itemsize: int) -> TritonTiles:
    """Return sizes with at most 16 KiB per tile of keys, after conversion to 16 bits.

    Args:
      head_dim: D of the pages.
      itemsize: bytes per number of the pages.
      q_itemsize: bytes per number of q.
    """
    rows = query_rows(q_itemsize)
    if itemsize == 1:  # a stage has half the bytes, so there is one more
        tokens = max(min(2**13 // head_dim, 64), 16)
        return TritonTiles(query_rows=rows, tokens=tokens, num_stages=4)
    tokens = max(min(2**14 // (head_dim * itemsize), 128), 16)
    stages = 2 if itemsize == 4 else 3
    return TritonTiles(query_rows=rows, tokens=tokens, num_stages=stages)
