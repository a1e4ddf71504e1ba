"""Chunks of queries in plain XLA: one tile of queries of one row at a time.

Pipeline: xla.attention, xla.cascade -> [xla.chunks] -> xla.online_softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.pages.operands import AttentionOperands
from jpaged.xla.online_softmax import Result, finish, walk


@dataclasses.dataclass(frozen=True)
class XlaTiles:
    """Tile sizes; `docs/decisions/attention.md` has the measurements behind them.

    `jpaged.pages.tuned` has other sizes for some devices.
    """

    decode_rows: int = 16  # rows of a decode group
    decode_tokens: int = 768  # tokens of a decode tile, over all rows of the group
    decode_least: int = 32  # tokens of a decode tile, per row, at least
    decode_most: int = 128  # tokens of a decode tile, per row, at most
    ragged_queries: int = 32  # queries of a prompt tile
    ragged_tokens: int = 128  # tokens of a prompt tile
    shared_rows: int = 16  # rows that read a tile of a shared prefix together


TILES = XlaTiles()

# (row i32[], its first query of the tile i32[], tokens that each query sees i32[size]).
QueryTile = tuple[jax.Array, jax.Array, jax.Array]


def attend_chunks(
    operands: AttentionOperands,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    tiles: XlaTiles,
    is_causal: bool = True,
    dtype: jnp.dtype | None = None,
) -> Result:
    """Return attention of the rows' chunks of queries.

    Args:
      operands: plain pages of one layer; q `[T, H, D]`. `query_start_loc` is not used.
      starts: i32`[S]`; row s owns queries `starts[s] : starts[s] + lengths[s]`, in
        rising order of rows.
      lengths: i32`[S]`, number of queries of each row.
      tiles: tile sizes.
      is_causal: the last query of row s sees `context_lens[s]` tokens, the one before
        it one fewer. If False, all queries of the row see `context_lens[s]` tokens.
      dtype: of the output; None: that of q.

    Returns:
      Output `[T, H, D]` and log-sum-exp f32`[T, H]`; zeros and -inf for queries that no
      row owns.
    """
    q, tables = operands.q, operands.block_tables
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = operands.pools.k.shape[1:3]
    size = min(tiles.ragged_queries if is_causal else tiles.shared_rows, num_queries)
    dtype = q.dtype if dtype is None else dtype
    blocks = max(1, min(tiles.ragged_tokens // block_size, tables.shape[1]))
    num_tiles, tile_at = query_tiles(
        starts, lengths, operands.context_lens, size, is_causal=is_causal
    )

    # A tile may reach past its row's queries. Tiles are computed in the order of the
    # queries, so the tiles of later rows overwrite what it left there.
    padded_q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
    out = jnp.zeros((num_queries + size, num_heads, head_dim), dtype)
    lse = jnp.full((num_queries + size, num_heads), -jnp.inf, jnp.float32)

    def tile(index: jax.Array, results: Result) -> Result:
        out, lse = results
        row, start, visible = tile_at(index)
        state = walk(
            operands,
            take_queries(padded_q, start, size, num_kv_heads),
            lax.dynamic_slice(tables, (row, 0), (1, tables.shape[1])),
            jnp.tile(visible, num_heads // num_kv_heads)[None, :],
            blocks=blocks,
        )
        tile_out, tile_lse = finish(state, operands.sinks, num_kv_heads, dtype, size)
        tile_out, tile_lse = (put_back(x, size) for x in (tile_out, tile_lse))
        return (
            lax.dynamic_update_slice(out, tile_out, (start, 0, 0)),
            lax.dynamic_update_slice(lse, tile_lse, (start, 0)),
        )

    out, lse = lax.fori_loop(0, num_tiles, tile, (out, lse))
    return out[:num_queries], lse[:num_queries]


def query_tiles(
    starts: jax.Array,
    lengths: jax.Array,
    context_lens: jax.Array,
    size: int,
    *,
    is_causal: bool = True,
) -> tuple[jax.Array, Callable[[jax.Array], QueryTile]]:
    """Return the number of tiles of `size` queries, and a function of a tile's index.

    Args: as `attend_chunks`. Queries after the row's last one see 0 tokens.
    """
    counts = cdiv(lengths, size)
    ends = jnp.cumsum(counts)

    def tile_at(index: jax.Array) -> QueryTile:
        row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
        offset = (index - (ends[row] - counts[row])) * size
        index_in_row = offset + jnp.arange(size, dtype=jnp.int32)
        visible = context_lens[row]
        if is_causal:
            visible += 1 + index_in_row - lengths[row]
        visible = jnp.where(index_in_row < lengths[row], visible, 0)
        return row, starts[row] + offset, visible

    return ends[-1], tile_at


def take_queries(
    array: jax.Array, start: jax.Array, size: int, num_kv_heads: int
) -> jax.Array:
    """Return `size` queries of `array` [T, H, ...] by KV head: [K, G * size, ...]."""
    taken = lax.dynamic_slice_in_dim(array, start, size)
    taken = taken.reshape(size, num_kv_heads, -1, *array.shape[2:])
    taken = jnp.moveaxis(taken, 0, 2)  # [K, G, size, ...]
    return taken.reshape(num_kv_heads, -1, *array.shape[2:])


def put_back(taken: jax.Array, size: int) -> jax.Array:
    """Undo the reordering of `take_queries`: return [size, H, ...]."""
    num_kv_heads, _, *rest = taken.shape
    rows = jnp.moveaxis(taken.reshape(num_kv_heads, -1, size, *rest), 2, 0)
    return rows.reshape(size, -1, *rest)
