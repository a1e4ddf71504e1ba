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

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.kv.shared_prefix import SharedPrefix
from jpaged.xla import cascade
from jpaged.xla.chunks import TILES, Tiles, chunks
from jpaged.xla.online_softmax import finish, merge, walk
from jpaged.xla.pages import Pools


def decode(
    q: jax.Array,
    pools: Pools,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    shared: SharedPrefix | None = None,
    tiles: Tiles = TILES,
    sinks: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Output [S, H, D] and log-sum-exp f32[S, H] of one query per row.

    Blocks of `shared` prefixes are read for `tiles.shared_rows` rows at a time, the
    others by each row. `options` are `scale`, `sliding_window`, `logits_soft_cap`.
    """
    options["tiles"] = tiles
    if shared is None:
        args = (q, pools, block_tables, context_lens)
        return _rows(*args, sinks=sinks, dtype=q.dtype, **options)
    window, block_size = options["sliding_window"], pools.k.shape[2]
    parts = cascade.split(shared, block_tables, context_lens, block_size, window)
    # Every row has tokens of its own, so that its sink counts once, there.
    args = (q, pools, parts.own_tables, parts.own_lens)
    own = _rows(*args, sinks=sinks, dtype=jnp.float32, **options)

    def with_prefix(own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return merge(*own, *cascade.attend(q, pools, block_tables, parts, **options))

    out, lse = when(jnp.any(parts.sizes > 0), with_prefix, own)
    return out.astype(q.dtype), lse


def _rows(
    q: jax.Array,
    pools: Pools,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    sliding_window: int | jax.Array | None,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    tiles: Tiles,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Output [S, H, D] in `dtype` and log-sum-exp f32[S, H] of one query per row.

    Rows are walked in groups of similar context length, each to its own longest.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, block_size = pools.k.shape[1:3]
    rows = min(tiles.decode_rows, num_rows)
    num_groups = cdiv(num_rows, rows)
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
        group_out, group_lse = finish(state, sinks, num_kv_heads, dtype)
        out = lax.dynamic_update_slice(
            out, group_out.reshape(rows, num_heads, head_dim), (start, 0, 0)
        )
        lse = lax.dynamic_update_slice(
            lse, group_lse.reshape(rows, num_heads), (start, 0)
        )
        return out, lse

    out = jnp.zeros((num_groups * rows, num_heads, head_dim), dtype)
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
    shared: SharedPrefix | None = None,
    tiles: Tiles = TILES,
) -> tuple[jax.Array, jax.Array]:
    """Output [T, H, D] and log-sum-exp f32[T, H] of prompt chunks and decode tokens.

    Rows with one query are served together as in `decode`, which reads `shared`
    prefixes once; the queries of the others in tiles, one row at a time.
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
    one_out, one_lse = decode(
        one_q, pools, block_tables, one_lens, shared=shared, **options
    )
    chunk_lens = jnp.where(single, 0, lengths)
    out, lse = chunks(
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
