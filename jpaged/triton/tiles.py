"""Tile sizes of the Triton kernels, as data.

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


# (device kind, head_dim, heads of a key, block_size) -> Tiles that were measured there.
MEASURED: dict[tuple[str, int, int, int], Tiles] = {}


def choose(
    device_kind: str, head_dim: int, group: int, block_size: int, itemsize: int
) -> Tiles:
    """The measured tiles, or else such as need at most 16 KiB for a tile of keys."""
    measured = MEASURED.get((device_kind, head_dim, group, block_size))
    if measured is not None:
        return measured
    tokens = min(2**14 // (head_dim * itemsize), 128)
    return Tiles(tokens=max(tokens, 16), num_stages=2 if itemsize == 4 else 3)
