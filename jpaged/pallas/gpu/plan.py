"""Sizes of one call of the GPU's attention kernel, and its views of the arguments.

Pipeline: pallas.gpu.calls, pallas.gpu.attention -> [pallas.gpu.plan].

Shape symbols as in `jpaged.attention`; R = 64 rows of a tile of queries, Q tiles.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.pallas.gpu.work import QueryTiles

ROWS = 64  # of one wgmma
# Columns of the output that fit in a warpgroup's registers.
_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """Sizes of the kernel's tiles and items.

    No size is measured, because no GPU was available; the arithmetic is in
    `docs/decisions/mosaic_gpu_kernel.md`.

    Attributes:
      tokens: tokens per tile of keys. More need more registers, and spill.
      shared_bytes: bytes of all tiles of keys and values that are in flight.
      blocks: thread blocks of all heads together: two for each core of an H200.
      part_tokens: the fewest tokens of an item that is not the last of its tile.
    """

    tokens: int = 64
    shared_bytes: int = 2**17
    blocks: int = 264
    part_tokens: int = 512


GPU_TILES = GpuTiles()


@dataclasses.dataclass(frozen=True)
class GpuCallPlan:
    """The sizes of one call, all static.

    Attributes:
      width: Columns of the block tables.
      tile_queries: Queries per tile.
      tokens: C, tokens per tile of keys.
      stages: Tiles of keys, and of values, that shared memory holds.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    num_blocks: int
    width: int
    tile_queries: int
    tokens: int
    stages: int
    scale: float
    soft_cap: float | None

    @property
    def unit(self) -> int:
        """Tokens per copy: a block, or a part of a large block."""
        return min(self.block_size, self.tokens)

    @property
    def units(self) -> int:
        """Copies per tile of keys."""
        return self.tokens // self.unit

    @property
    def warpgroups(self) -> int:
        """W, the warpgroups that compute; one more fetches."""
        return max(self.head_dim // _COLUMNS, 1)

    @property
    def columns(self) -> int:
        """Columns of the output per warpgroup."""
        return self.head_dim // self.warpgroups

    @property
    def rows(self) -> int:
        """Rows of a tile that hold queries."""
        return self.tile_queries * self.group


def plan_call(
    q: jax.Array,
    k_pages: jax.Array,
    block_tables: jax.Array,
    scale: float,
    soft_cap: float | None,
    is_ragged: bool,
    sizes: GpuTiles,
) -> GpuCallPlan:
    """Return the sizes for arguments of these shapes; `is_ragged`: rows have chunks."""
    num_blocks, num_kv_heads, block_size, head_dim = k_pages.shape[-4:]
    group = q.shape[1] // num_kv_heads
    token_bytes = head_dim * k_pages.dtype.itemsize
    return GpuCallPlan(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        width=block_tables.shape[1],
        tile_queries=ROWS // group if is_ragged else 1,
        tokens=sizes.tokens,
        stages=max(sizes.shared_bytes // (2 * sizes.tokens * token_bytes), 2),
        scale=scale,
        soft_cap=soft_cap,
    )


def page_units(pages: jax.Array, plan: GpuCallPlan) -> jax.Array:
    """View pages as [L * N * K * P / unit, unit, D]: one index for each copy."""
    return pages.reshape(-1, plan.unit, plan.head_dim)


def to_query_tiles(q: jax.Array, tiles: QueryTiles, plan: GpuCallPlan) -> jax.Array:
    """Arrange q [T, H, D] as [Q, K, R, D]; unused rows hold copies of other queries."""
    query = jnp.arange(plan.tile_queries, dtype=jnp.int32)
    query = jnp.clip(tiles.first[:, None] + query[None, :], 0, q.shape[0] - 1)
    found = q.reshape(-1, plan.num_kv_heads, plan.group, plan.head_dim)[query]
    found = found.transpose(0, 2, 1, 3, 4)
    found = found.reshape(*found.shape[:2], plan.rows, plan.head_dim)
    pad = ROWS - plan.rows
    return jnp.pad(found, ((0, 0), (0, 0), (0, pad), (0, 0)))
