"""Sizes of one call of the TPU's attention kernel, and queries cut into tiles.

Place on the road: pallas.tpu_attention -> [pallas.tpu_plan].

Letters as in `jpaged.attention`; R rows of a tile of queries, C tokens of a tile of
keys, Kw heads of a walk.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Rows of queries are a multiple of this: a bfloat16 tile has 16 rows.
ROWS = 16
_SUBLANES = 8  # rows of a memory tile of float32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes; none is measured, for there was no TPU: the arithmetic is in
    `docs/decisions/tpu_kernel.md`."""

    query_rows: int = 128  # rows of a tile of queries: queries times heads of a key
    buffer_bytes: int = 2**20  # of one of the four buffers of keys and values
    tokens: int = 512  # of a tile of keys, at most; of packed pages so many rows
    kv_heads: int = 8  # served by one walk over the segments, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call, all static."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    width: int  # of the block tables
    tile_queries: int
    rows: int  # of a tile of queries, R
    few_rows: int  # of a tile that a single query needs; R where that is no less
    walk_heads: int  # kv heads of one walk, Kw
    tokens: int  # of a tile of keys
    tokens_of_row: int = 1  # of a page; more where it is packed

    @property
    def group(self) -> int:
        """Query heads that share a row of keys; of packed pages one for each token."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_rows(self) -> int:
        """Rows of a block's page."""
        return self.block_size // self.tokens_of_row

    @property
    def columns(self) -> int:
        """Rows of a tile of keys, C."""
        return self.tokens // self.tokens_of_row

    @property
    def blocks(self) -> int:
        """Of a tile of keys."""
        return self.tokens // self.block_size

    @property
    def scale_heads(self) -> int:
        """Kv heads whose scales a walk fetches, Ks: whole memory tiles have its own."""
        return self.num_kv_heads if self.walk_heads % _SUBLANES else self.walk_heads


def plan_of(
    q: jax.Array,
    k_pages: jax.Array,
    block_tables: jax.Array,
    *,
    is_ragged: bool,
    tiles: Tiles,
    tokens_of_row: int = 1,
) -> Plan:
    """The sizes for arguments of these shapes; `is_ragged`: rows have chunks.

    `tokens_of_row`: of a page, each with query heads of its own in q.
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
    rows = pl.cdiv(tile_queries * group, ROWS) * ROWS
    # A query's rows lie within so many, counted from a multiple of ROWS.
    few_rows = pl.cdiv(group, ROWS) * ROWS
    if ROWS % group:
        few_rows += ROWS
    heads = next(n for n in range(tiles.kv_heads, 0, -1) if num_kv_heads % n == 0)
    bytes_of_row = heads * head_dim * k_pages.dtype.itemsize
    rows_of_keys = min(tiles.buffer_bytes // bytes_of_row, tiles.tokens)
    tokens = min(rows_of_keys * tokens_of_row, width * block_size)
    return Plan(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        width=width,
        tile_queries=tile_queries,
        rows=rows,
        few_rows=min(few_rows, rows),
        walk_heads=heads,
        tokens=max(tokens // block_size, 1) * block_size,
        tokens_of_row=tokens_of_row,
    )


def to_tiles(q: jax.Array, plan: Plan, num_tiles: int) -> jax.Array:
    """[tiles, K, R, D'] of q [T, H, D]."""
    num_queries, _, head_dim = q.shape
    pad = num_tiles * plan.tile_queries - num_queries
    q = jnp.pad(q, ((0, pad), (0, 0), (0, plan.head_dim - head_dim)))
    q = q.reshape(num_tiles, plan.tile_queries, plan.num_kv_heads, plan.group, -1)
    q = q.transpose(0, 2, 1, 3, 4)
    q = q.reshape(num_tiles, plan.num_kv_heads, -1, plan.head_dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows - q.shape[2]), (0, 0)))


def from_tiles(tiles: jax.Array, plan: Plan, num_queries: int) -> jax.Array:
    """[T, H, D] of [tiles, K, R, D]."""
    num_tiles, _, _, size = tiles.shape
    tiles = tiles[:, :, : plan.tile_queries * plan.group]
    shape = (num_tiles, plan.num_kv_heads, plan.tile_queries, plan.group, size)
    queries = tiles.reshape(shape).transpose(0, 2, 1, 3, 4)
    return queries.reshape(-1, plan.num_heads, size)[:num_queries]
