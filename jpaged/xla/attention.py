"""Paged attention in plain XLA; its work depends on the contexts, not the table width.

Pipeline: xla.gradients -> [xla.attention] -> xla.chunks, xla.cascade.

Decode rows and prompt chunks both read a sequence's blocks tile by tile with the online
softmax (Milakov and Gimelshein 2018), in loops whose trip counts come from the context
lengths. Tiles are small: on a CPU most of the time goes into writing gathered pages to
fresh memory, so a tile should stay in the second-level cache. Tiles that every query of
the loop sees completely need no mask; only the other tiles pay for one.

Shape symbols as in `jpaged.attention`; R rows of a group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.pages.operands import AttentionOperands
from jpaged.xla import cascade
from jpaged.xla.chunks import TILES, XlaTiles, attend_chunks
from jpaged.xla.online_softmax import Result, finish, merge_states, walk


def attend_decode(operands: AttentionOperands, tiles: XlaTiles = TILES) -> Result:
    """Return attention of one query per row.

    Blocks of shared prefixes are read for `tiles.shared_rows` rows at a time, all other
    blocks by each row.

    Args:
      operands: plain pages of one layer; q `[S, H, D]`.
      tiles: tile sizes.

    Returns:
      Output `[S, H, D]` and log-sum-exp f32`[S, H]`.
    """
    if operands.shared_prefix is None:
        return _attend_rows(operands, tiles, operands.q.dtype)
    parts = cascade.split_prefixes(operands)
    # Every row has tokens outside of the prefix; its sink is counted once, with them.
    own_operands = operands._replace(
        block_tables=parts.own_tables, context_lens=parts.own_lens
    )
    own = _attend_rows(own_operands, tiles, jnp.dtype("float32"))

    def with_prefix(own: Result) -> Result:
        return merge_states(*own, *cascade.attend_prefixes(operands, parts, tiles))

    out, lse = when(jnp.any(parts.sizes > 0), with_prefix, own)
    return out.astype(operands.q.dtype), lse


class _Groups(NamedTuple):
    """Rows in groups of similar context length."""

    size: int  # R, rows of a group
    number: int
    order: jax.Array | None  # i32[number * R], rows by context; None: a single group
    lens: jax.Array  # i32[number * R], contexts in that order; 0 after the last row


def _group_rows(context_lens: jax.Array, max_rows: int) -> _Groups:
    (num_rows,) = context_lens.shape
    size = min(max_rows, num_rows)
    number = cdiv(num_rows, size)
    if number == 1:
        return _Groups(size, number, None, context_lens)
    pad = (0, number * size - num_rows)
    order = jnp.pad(jnp.argsort(-context_lens), pad)
    lens = jnp.pad(context_lens[order[:num_rows]], pad)
    return _Groups(size, number, order, lens)


def _attend_rows(
    operands: AttentionOperands, tiles: XlaTiles, dtype: jnp.dtype
) -> Result:
    """Return attention of one query per row, with the output in `dtype`.

    The loop of each group of rows ends at the longest context of the group.
    """
    num_rows, num_heads, head_dim = operands.q.shape
    groups = _group_rows(operands.context_lens, tiles.decode_rows)
    num_slots = groups.number * groups.size
    out = jnp.zeros((num_slots, num_heads, head_dim), dtype)
    lse = jnp.full((num_slots, num_heads), -jnp.inf, jnp.float32)
    group = functools.partial(_attend_group, operands, groups, tiles)
    if groups.order is None:
        return group(0, (out, lse))
    num_live = cdiv(jnp.sum(groups.lens > 0), groups.size)
    out, lse = lax.fori_loop(0, num_live, group, (out, lse))
    back = jnp.argsort(groups.order[:num_rows])
    return out[back], lse[back]


def _attend_group(
    operands: AttentionOperands,
    groups: _Groups,
    tiles: XlaTiles,
    index: jax.Array | int,
    results: Result,
) -> Result:
    """Return `results` with those of the rows of group `index`."""
    (out, lse), (rows, _, order, lens) = results, groups
    num_kv_heads, block_size = operands.pools.k.shape[1:3]
    q, tables, start = operands.q, operands.block_tables, index * rows
    if order is not None:
        members = lax.dynamic_slice(order, (start,), (rows,))
        q, tables = q[members], tables[members]
        lens = lax.dynamic_slice(lens, (start,), (rows,))
    tokens = tiles.decode_tokens // rows
    tokens = min(max(tokens, tiles.decode_least), tiles.decode_most)
    state = walk(
        operands,
        q.reshape(rows * num_kv_heads, -1, q.shape[-1]),
        tables,
        jnp.repeat(lens, num_kv_heads)[:, None],
        blocks=max(1, min(tokens // block_size, tables.shape[1])),
    )
    group_out, group_lse = finish(state, operands.sinks, num_kv_heads, out.dtype)
    group_out = group_out.reshape(rows, *out.shape[1:])
    group_lse = group_lse.reshape(rows, *lse.shape[1:])
    return (
        lax.dynamic_update_slice(out, group_out, (start, 0, 0)),
        lax.dynamic_update_slice(lse, group_lse, (start, 0)),
    )


def attend_ragged(operands: AttentionOperands, tiles: XlaTiles = TILES) -> Result:
    """Return attention of prompt chunks and decode tokens.

    Rows with one query are computed together, as by `attend_decode`. The queries of the
    other rows are computed in tiles, one row at a time.

    Args:
      operands: plain pages of one layer; q `[T, H, D]` with `query_start_loc`.
      tiles: tile sizes.

    Returns:
      Output `[T, H, D]` and log-sum-exp f32`[T, H]`; zeros and -inf after the last row.
    """
    q, query_start_loc = operands.q, operands.query_start_loc
    assert query_start_loc is not None
    num_queries = q.shape[0]
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts
    is_single = lengths == 1
    single = operands._replace(
        q=q[jnp.clip(starts, 0, num_queries - 1)],
        context_lens=jnp.where(is_single, operands.context_lens, 0),
        query_start_loc=None,
    )
    single_out, single_lse = attend_decode(single, tiles)
    chunk_lengths = jnp.where(is_single, 0, lengths)
    out, lse = attend_chunks(operands, starts, chunk_lengths, tiles=tiles)

    query = jnp.arange(num_queries, dtype=jnp.int32)
    row = jnp.searchsorted(query_start_loc[1:], query, side="right")
    row = jnp.minimum(row, starts.shape[0] - 1)
    is_used = query < query_start_loc[-1]
    from_single = (is_single[row] & is_used)[:, None]
    out = jnp.where(from_single[..., None], single_out[row], out)
    lse = jnp.where(from_single, single_lse[row], lse)
    return (
        jnp.where(is_used[:, None, None], out, jnp.zeros((), q.dtype)),
        jnp.where(is_used[:, None], lse, -jnp.inf),
    )
