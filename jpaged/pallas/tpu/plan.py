"""Sizes of one call of the TPU's attention kernel, and queries arranged in tiles.

Pipeline: pallas.tpu.attention -> [pallas.tpu.plan].

Shape symbols as in `jpaged.attention`; R rows of a tile of queries, C rows of a tile of
keys, Kw key/value heads of a pass over the segments.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jpaged.arithmetic import cdiv

# Rows of queries are a multiple of this: a bfloat16 tile has 16 rows.
ROWS = 16
_SUBLANES = 8  # rows of a memory tile of float32


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Tile sizes of the attention kernel.

    No size is measured, because no TPU was available; the arithmetic is in
    `docs/decisions/tpu_kernel.md`.

    Attributes:
      query_rows: rows per tile of queries: queries times heads per key.
      buffer_bytes: bytes of each of the four buffers of keys and values.
      tokens: the most tokens per tile of keys; in packed pages the most page rows.
      kv_heads: the most key/value heads of one pass over the segments.
    """

    query_rows: int = 128
    buffer_bytes: int = 2**20
    tokens: int = 512
    kv_heads: int = 8


@dataclasses.dataclass(frozen=True)
class TpuCallPlan:
    """The sizes of one call, all static.

    Attributes:
      width: Columns of the block tables.
      tile_queries: Queries per tile.
      rows: R, rows per tile of queries.
      few_rows: The rows of a tile that a single query needs, at most R.
      pass_heads: Kw, key/value heads per pass over the segments.
      tokens: Tokens per tile of keys.
      tokens_of_row: Tokens per page row; above 1 if pages are packed.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    width: int
    tile_queries: int
    rows: int
    few_rows: int
    pass_heads: int
    tokens: int
    tokens_of_row: int = 1
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def group(self) -> int:
        """Query heads per key/value head, counting each copy for packed pages."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_rows(self) -> int:
        """Page rows per block."""
        return self.block_size // self.tokens_of_row

    @property
    def columns(self) -> int:
        """C, page rows per tile of keys."""
        return self.tokens // self.tokens_of_row

    @property
    def blocks(self) -> int:
        """Blocks per tile of keys."""
        return self.tokens // self.block_size

    @property
    def scale_heads(self) -> int:
        """Ks, heads whose scales a pass fetches: copies move whole memory tiles."""
        return self.num_kv_heads if self.pass_heads % _SUBLANES else self.pass_heads

    def num_tiles(self, num_queries: int) -> int:
        """Return the number of tiles of queries."""
        return cdiv(num_queries, self.tile_queries)


def plan_call(
    q: jax.Array,
    k_pages: jax.Array,
    block_tables: jax.Array,
    *,
    is_ragged: bool,
    tiles: TpuTiles,
    tokens_of_row: int = 1,
    scale: float = 1.0,
    soft_cap: float | None = None,
) -> TpuCallPlan:
    """Return the sizes of a call.

    Args:
      q: [T, H, D], with a head for each copy of a query over packed pages.
      k_pages: [L, N, K, page rows, D'].
      block_tables: i32[S, M].
      is_ragged: Whether rows have any number of queries.
      tiles: Tile sizes.
      tokens_of_row: Tokens per page row.
      scale: Factor of the scores.
      soft_cap: Soft cap of the scores, or None.
    """
    num_queries, num_heads, _ = q.shape
    _, _, num_kv_heads, block_rows, head_dim = k_pages.shape
    block_size = block_rows * tokens_of_row
    width = block_tables.shape[1]
    group = num_heads // num_kv_heads
    tile_queries = 1
    if is_ragged:
        most = min(max(tiles.query_rows // group, 1), pl.next_power_of_2(num_queries))
        tile_queries = 1 << (most.bit_length() - 1)
    rows = cdiv(tile_queries * group, ROWS) * ROWS
    # The rows of one query lie within this many rows from a multiple of ROWS.
    few_rows = cdiv(group, ROWS) * ROWS
    if ROWS % group:
        few_rows += ROWS
    heads = next(n for n in range(tiles.kv_heads, 0, -1) if num_kv_heads % n == 0)
    bytes_of_row = heads * head_dim * k_pages.dtype.itemsize
    rows_of_keys = min(tiles.buffer_bytes // bytes_of_row, tiles.tokens)
    tokens = min(rows_of_keys * tokens_of_row, width * block_size)
    return TpuCallPlan(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        width=width,
        tile_queries=tile_queries,
        rows=rows,
        few_rows=min(few_rows, rows),
        pass_heads=heads,
        tokens=max(tokens // block_size, 1) * block_size,
        tokens_of_row=tokens_of_row,
        scale=scale,
        soft_cap=soft_cap,
    )


def to_query_tiles(q: jax.Array, plan: TpuCallPlan) -> jax.Array:
    """Arrange q [T, H, D] as [tiles, K, R, D']."""
    num_queries, _, head_dim = q.shape
    num_tiles = plan.num_tiles(num_queries)
    pad = num_tiles * plan.tile_queries - num_queries
    q = jnp.pad(q, ((0, pad), (0, 0), (0, plan.head_dim - head_dim)))
    q = q.reshape(num_tiles, plan.tile_queries, plan.num_kv_heads, plan.group, -1)
    q = q.transpose(0, 2, 1, 3, 4)
    q = q.reshape(num_tiles, plan.num_kv_heads, -1, plan.head_dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows - q.shape[2]), (0, 0)))


def from_query_tiles(
    tiles: jax.Array, plan: TpuCallPlan, num_queries: int
) -> jax.Array:
    """Arrange [tiles, K, R, D] as [T, H, D]."""
    num_tiles, _, _, size = tiles.shape
    tiles = tiles[:, :, : plan.tile_queries * plan.group]
    shape = (num_tiles, plan.num_kv_heads, plan.tile_queries, plan.group, size)
    queries = tiles.reshape(shape).transpose(0, 2, 1, 3, 4)
    return queries.reshape(-1, plan.num_heads, size)[:num_queries]
