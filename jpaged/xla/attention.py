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
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Below every score that a float32 model gives, and finite: -inf - -inf is NaN.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes; `docs/decisions/attention.md` has the measurements behind them."""

    decode_rows: int = 16  # rows of a decode group
    decode_tokens: int = 768  # tokens of a decode tile, over all of its rows
    decode_least: int = 32  # tokens of a decode tile, of one row, at least
    decode_most: int = 128  # and at most
    ragged_queries: int = 32  # queries of a prompt tile
    ragged_tokens: int = 128  # tokens of a prompt tile


class _Softmax(NamedTuple):
    """The running state of the online softmax."""

    maximum: jax.Array  # f32[B, Q]
    total: jax.Array  # f32[B, Q]
    out: jax.Array  # f32[B, Q, D]


def decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
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
    num_kv_heads, block_size = k_pages.shape[1:3]
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
        state = _walk(
            queries,
            k_pages,
            v_pages,
            group_tables,
            visible,
            blocks=blocks,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        group_out, group_lse = _finish(state, sinks, num_kv_heads, q.dtype)
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
    k_pages: jax.Array,
    v_pages: jax.Array,
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
    pages = (k_pages, v_pages, block_tables)
    one_out, one_lse = decode(one_q, *pages, one_lens, **options)
    chunk_lens = jnp.where(single, 0, lengths)
    out, lse = _chunks(q, *pages, context_lens, starts, chunk_lens, **options)

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
    k_pages,
    v_pages,
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
    num_kv_heads, block_size = k_pages.shape[1:3]
    group = num_heads // num_kv_heads
    size = min(tiles.ragged_queries, num_queries)
    blocks = max(1, min(tiles.ragged_tokens // block_size, block_tables.shape[1]))
    tile_ends = jnp.cumsum((lengths + size - 1) // size)

    # A tile may reach past its row's queries: tiles are walked in the order of the
    # queries, so the rows behind write over what it left there.
    padded_q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
    out = jnp.zeros((num_queries + size, num_heads, head_dim), q.dtype)
    lse = jnp.full((num_queries + size, num_heads), -jnp.inf, jnp.float32)

    def tile(index, carry):
        out, lse = carry
        row = jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32)
        first = tile_ends[row] - (lengths[row] + size - 1) // size
        offset = (index - first) * size
        start = starts[row] + offset
        queries = lax.dynamic_slice(
            padded_q, (start, 0, 0), (size, num_heads, head_dim)
        )
        # [Bq, K, G, D] -> [K, G * Bq, D]
        queries = queries.reshape(size, num_kv_heads, group, head_dim)
        queries = queries.transpose(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
        index_in_row = offset + jnp.arange(size, dtype=jnp.int32)
        visible = context_lens[row] - lengths[row] + 1 + index_in_row
        visible = jnp.where(index_in_row < lengths[row], visible, 0)
        state = _walk(
            queries,
            k_pages,
            v_pages,
            lax.dynamic_slice(block_tables, (row, 0), (1, block_tables.shape[1])),
            jnp.tile(visible, group)[None, :],
            blocks=blocks,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        tile_out, tile_lse = _finish(state, sinks, num_kv_heads, q.dtype, size)
        tile_out = tile_out.reshape(num_kv_heads, group, size, head_dim)
        tile_out = tile_out.transpose(2, 0, 1, 3).reshape(size, num_heads, head_dim)
        tile_lse = tile_lse.reshape(num_heads, size).T
        return (
            lax.dynamic_update_slice(out, tile_out, (start, 0, 0)),
            lax.dynamic_update_slice(lse, tile_lse, (start, 0)),
        )

    out, lse = lax.fori_loop(0, tile_ends[-1], tile, (out, lse))
    return out[:num_queries], lse[:num_queries]


def _walk(
    queries,
    k_pages,
    v_pages,
    tables,
    visible,
    *,
    blocks,
    scale,
    sliding_window,
    logits_soft_cap,
) -> _Softmax:
    """The online softmax of `queries` over the tables' tiles that they see.

    Args:
      queries: [B, Q, D] with B = R * K.
      tables: i32[R, M].
      visible: i32[R * K, 1] or [1, Q], tokens that each query sees; 0 for none.
    """
    num_batch, num_queries, head_dim = queries.shape
    block_size = k_pages.shape[2]
    tokens = blocks * block_size
    pad = -tables.shape[1] % blocks
    tables = jnp.clip(jnp.pad(tables, ((0, 0), (0, pad))), 0, k_pages.shape[0] - 1)

    least = jnp.min(jnp.where(visible > 0, visible, jnp.iinfo(jnp.int32).max))
    most = jnp.max(visible)
    end = (most + tokens - 1) // tokens
    # Tiles from `first` up to `last` are seen whole by every query; those before and
    # behind need a mask. An idle row or query never blocks them: its result is dropped.
    begin = first = jnp.int32(0)
    if sliding_window is not None:
        begin = jnp.minimum(jnp.maximum(least - sliding_window, 0) // tokens, end)
        first = (jnp.maximum(most - sliding_window, 0) + tokens - 1) // tokens
        first = jnp.minimum(first, end)
    last = jnp.clip(least // tokens, first, end)

    step = functools.partial(
        _tile,
        queries,
        k_pages,
        v_pages,
        tables,
        blocks=blocks,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )

    def masked(index, state):
        index += begin
        index += jnp.where(index < first, 0, last - first)
        position = index * tokens + jnp.arange(tokens, dtype=jnp.int32)
        position = position[None, None, :]
        mask = position < visible[..., None]
        if sliding_window is not None:
            mask &= position >= visible[..., None] - sliding_window
        return step(index, state, mask)

    state = _Softmax(
        jnp.full((num_batch, num_queries), _LOWEST, jnp.float32),
        jnp.zeros((num_batch, num_queries), jnp.float32),
        jnp.zeros((num_batch, num_queries, head_dim), jnp.float32),
    )
    state = lax.fori_loop(first, last, lambda i, s: step(i, s, None), state)
    num_masked = (first - begin) + (end - last)
    state = lax.fori_loop(0, num_masked, masked, state)
    # Idle rows walked along without a mask: they saw nothing.
    idle = jnp.broadcast_to(visible <= 0, state.total.shape)
    return _Softmax(
        jnp.where(idle, _LOWEST, state.maximum),
        jnp.where(idle, 0.0, state.total),
        jnp.where(idle[..., None], 0.0, state.out),
    )


def _tile(
    queries,
    k_pages,
    v_pages,
    tables,
    index,
    state,
    mask,
    *,
    blocks,
    scale,
    logits_soft_cap,
):
    """One tile's step of the online softmax; `mask` bool[B or 1, Q or 1, tokens]."""
    num_rows = tables.shape[0]
    columns = lax.dynamic_slice(tables, (0, index * blocks), (num_rows, blocks))
    keys = _gather(k_pages, columns)
    values = _gather(v_pages, columns)
    product = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = product("bqd,btd->bqt", queries.astype(keys.dtype), keys) * scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
        # Unused slots may hold NaN, and 0 * NaN is NaN.
        seen = jnp.any(mask, axis=1)[..., None]
        values = jnp.where(seen, values, jnp.zeros((), values.dtype))
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    keep = jnp.exp(state.maximum - maximum)
    total = state.total * keep + jnp.sum(weights, axis=-1)
    update = product("bqt,btd->bqd", weights.astype(values.dtype), values)
    return _Softmax(maximum, total, state.out * keep[..., None] + update)


def _gather(pages: jax.Array, columns: jax.Array) -> jax.Array:
    """[R * K, C * P, D]: the blocks `columns` i32[R, C] of `pages` [N, K, P, D].

    Gathers (block, head) slabs, so that the result needs no transpose, as flat rows
    behind a barrier: fused into the product, the CPU of jax 0.12 gathers it slower.
    """
    num_blocks, num_kv_heads, block_size, head_dim = pages.shape
    num_rows, blocks = columns.shape
    head = jnp.arange(num_kv_heads, dtype=columns.dtype)
    slab = columns[:, None, :] * num_kv_heads + head[None, :, None]
    flat = pages.reshape(num_blocks * num_kv_heads, block_size * head_dim)
    tile = flat.at[slab.reshape(-1)].get(mode="promise_in_bounds")
    tile = lax.optimization_barrier(tile)
    return tile.reshape(num_rows * num_kv_heads, blocks * block_size, head_dim)


def _finish(state, sinks, num_kv_heads, dtype, queries_per_head=1):
    """The output in `dtype` and the log-sum-exp from the running state."""
    empty = state.total == 0
    lse = jnp.where(
        empty, -jnp.inf, state.maximum + jnp.log(jnp.where(empty, 1.0, state.total))
    )
    scale = 1.0 / jnp.where(empty, 1.0, state.total)
    if sinks is not None:
        num_batch = lse.shape[0]
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)
        sink = jnp.repeat(sink, queries_per_head, axis=1)
        sink = jnp.tile(sink, (num_batch // num_kv_heads, 1))
        with_sink = jnp.where(empty, -jnp.inf, jnp.logaddexp(lse, sink))
        scale = jnp.where(empty, 0.0, scale * jnp.exp(lse - with_sink))
        lse = with_sink
    return (state.out * scale[..., None]).astype(dtype), lse
