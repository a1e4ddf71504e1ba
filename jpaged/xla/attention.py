"""Paged attention in plain XLA, whose work follows the contexts, not the tables' width.

Place on the road: attention -> [xla.attention].

Both forms walk a sequence's blocks a tile at a time with the online softmax (Milakov
and Gimelshein 2018), in loops whose trip counts come from the context lengths. Tiles
stay small: what costs on a CPU is writing gathered pages to fresh memory, so a tile
should stay in the second-level cache. Tiles that every query of the loop sees whole
need no mask; only the others pay for one.

Letters as in `jpaged.attention`; R rows of a group, C blocks of a tile, B = batch of
the tile's products, Q queries of one product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.xla.online_softmax import finish, walk
from jpaged.xla.pages import Pools


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes; `docs/decisions/attention.md` has the measurements behind them."""

    decode_rows: int = 16  # rows of a decode group
    decode_tokens: int = 768  # tokens of a decode tile, over all of its rows
    decode_least: int = 32  # tokens of a decode tile, of one row, at least
    decode_most: int = 128  # and at most
    ragged_queries: int = 32  # queries of a prompt tile
    ragged_tokens: int = 128  # tokens of a prompt tile


def decode(
    q: jax.Array,
    pools: Pools,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    sliding_window: int | jax.Array | None,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    tiles: Tiles = Tiles(),
) -> tuple[jax.Array, jax.Array]:
    """Output [S, H, D] and log-sum-exp f32[S, H] of one query per row.

    Rows are walked in groups of similar context length, each to its own longest.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, block_size = pools.k.shape[1:3]
    rows = min(tiles.decode_rows, num_rows)
    num_groups = -(-num_rows // rows)
    tokens = tiles.decode_tokens // rows
    tokens = min(max(tokens, tiles.decode_least), tiles.decode_most)
    blocks = max(1, min(tokens // block_size, block_tables.shape[1]))

    pad = num_groups * rows - num_rows
    if num_groups > 1:
        order = jnp.argsort(-context_lens)
        order = jnp.pad(order, (0, pad))
        lens = jnp.pad(context_lens[order[:num_rows]], (0, pad))
    else:
        order, lens = None, context_lens

    def group(index, carry):
        out, lse = carry
        start = index * rows
        if order is None:
            group_q, group_tables, group_lens = q, block_tables, lens
        else:
            members = lax.dynamic_slice(order, (start,), (rows,))
            group_q, group_tables = q[members], block_tables[members]
            group_lens = lax.dynamic_slice(lens, (start,), (rows,))
        queries = group_q.reshape(rows * num_kv_heads, -1, head_dim)
        visible = jnp.repeat(group_lens, num_kv_heads)[:, None]
        state = walk(
            queries,
            pools,
            group_tables,
            visible,
            blocks=blocks,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        group_out, group_lse = finish(state, sinks, num_kv_heads, q.dtype)
        out = lax.dynamic_update_slice(
            out, group_out.reshape(rows, num_heads, head_dim), (start, 0, 0)
        )
        lse = lax.dynamic_update_slice(
            lse, group_lse.reshape(rows, num_heads), (start, 0)
        )
        return out, lse

    out = jnp.zeros((num_groups * rows, num_heads, head_dim), q.dtype)
    lse = jnp.full((num_groups * rows, num_heads), -jnp.inf, jnp.float32)
    if order is None:
        return group(0, (out, lse))
    num_live = (jnp.sum(lens > 0) + rows - 1) // rows
    out, lse = lax.fori_loop(0, num_live, group, (out, lse))
    back = jnp.argsort(order[:num_rows])
    return out[back], lse[back]


def ragged(
    q: jax.Array,
    pools: Pools,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array,
    *,
    scale: float,
    sliding_window: int | jax.Array | None,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    tiles: Tiles = Tiles(),
) -> tuple[jax.Array, jax.Array]:
    """Output [T, H, D] and log-sum-exp f32[T, H] of prompt chunks and decode tokens.

    Rows with one query are served together as in `decode`; the queries of the others
    in tiles, one row at a time.
    """
    options = dict(
        scale=scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        tiles=tiles,
    )
    num_queries = q.shape[0]
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts
    single = lengths == 1
    one_q = q[jnp.clip(starts, 0, num_queries - 1)]
    one_lens = jnp.where(single, context_lens, 0)
    one_out, one_lse = decode(one_q, pools, block_tables, one_lens, **options)
    chunk_lens = jnp.where(single, 0, lengths)
    out, lse = _chunks(
        q, pools, block_tables, context_lens, starts, chunk_lens, **options
    )

    query = jnp.arange(num_queries, dtype=jnp.int32)
    row = jnp.searchsorted(query_start_loc[1:], query, side="right")
    row = jnp.minimum(row, starts.shape[0] - 1)
    used = query < query_start_loc[-1]
    from_one = (single[row] & used)[:, None]
    out = jnp.where(from_one[..., None], one_out[row], out)
    lse = jnp.where(from_one, one_lse[row], lse)
    return (
        jnp.where(used[:, None, None], out, jnp.zeros((), q.dtype)),
        jnp.where(used[:, None], lse, -jnp.inf),
    )


def _chunks(
    q,
    pools,
    block_tables,
    context_lens,
    starts,
    lengths,
    *,
    scale,
    sliding_window,
    logits_soft_cap,
    sinks,
    tiles,
):
    """Output and log-sum-exp of the rows' chunks of queries, a tile at a time."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = pools.k.shape[1:3]
    group = num_heads // num_kv_heads
    size = min(tiles.ragged_queries, num_queries)
    blocks = max(1, min(tiles.ragged_tokens // block_size, block_tables.shape[1]))
    num_tiles, tile_at = query_tiles(starts, lengths, context_lens, size)

    # A tile may reach past its row's queries: tiles are walked in the order of the
    # queries, so the rows behind write over what it left there.
    padded_q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
    out = jnp.zeros((num_queries + size, num_heads, head_dim), q.dtype)
    lse = jnp.full((num_queries + size, num_heads), -jnp.inf, jnp.float32)

    def tile(index, carry):
        out, lse = carry
        row, start, visible = tile_at(index)
        state = walk(
            take(padded_q, start, size, num_kv_heads),
            pools,
            lax.dynamic_slice(block_tables, (row, 0), (1, block_tables.shape[1])),
            jnp.tile(visible, group)[None, :],
            blocks=blocks,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        tile_out, tile_lse = finish(state, sinks, num_kv_heads, q.dtype, size)
        return (
            lax.dynamic_update_slice(out, untake(tile_out, size), (start, 0, 0)),
            lax.dynamic_update_slice(lse, untake(tile_lse, size), (start, 0)),
        )

    out, lse = lax.fori_loop(0, num_tiles, tile, (out, lse))
    return out[:num_queries], lse[:num_queries]


def query_tiles(
    starts: jax.Array, lengths: jax.Array, context_lens: jax.Array, size: int
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    """The number of tiles of `size` queries, and a function of a tile's index: its row,
    its first query, and how many tokens each query sees, i32[size] with 0 behind the
    row's last.

    Row s has queries `starts[s]` to `starts[s] + lengths[s]`.
    """
    counts = (lengths + size - 1) // size
    ends = jnp.cumsum(counts)

    def tile_at(index):
        row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
        offset = (index - (ends[row] - counts[row])) * size
        index_in_row = offset + jnp.arange(size, dtype=jnp.int32)
        visible = context_lens[row] - lengths[row] + 1 + index_in_row
        visible = jnp.where(index_in_row < lengths[row], visible, 0)
        return row, starts[row] + offset, visible

    return ends[-1], tile_at


def take(rows: jax.Array, start: jax.Array, size: int, num_kv_heads: int) -> jax.Array:
    """`rows` [T, H, ...] from `start` on, by KV head: [K, G * size, ...]."""
    taken = lax.dynamic_slice_in_dim(rows, start, size)
    taken = taken.reshape(size, num_kv_heads, -1, *rows.shape[2:])
    taken = jnp.moveaxis(taken, 0, 2)  # [K, G, size, ...]
    return taken.reshape(num_kv_heads, -1, *rows.shape[2:])


def untake(taken: jax.Array, size: int) -> jax.Array:
    """[size, H, ...] of what `take` gave."""
    num_kv_heads, _, *rest = taken.shape
    rows = jnp.moveaxis(taken.reshape(num_kv_heads, -1, size, *rest), 2, 0)
    return rows.reshape(size, -1, *rest)
