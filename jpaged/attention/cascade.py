"""Cascade attention: a kernel reads the blocks that rows share only once.

Pipeline: attention.api -> [cascade] -> the backend's `attend`.

Attention over a row's keys is attention over the prefix that its group shares, merged
with attention over the row's own blocks (Juravsky et al. 2024,
https://arxiv.org/abs/2402.05099). A *virtual row* reads the prefix: it is one query
whose heads per key/value head are those of all its members. No member sees more of the
prefix than another, so the kernel needs no mask and no knowledge of groups.

Shape symbols as in `jpaged.attention`; V virtual rows, R members of a virtual row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.compat import when
from jpaged.kv.shared_prefix import behind, joined
from jpaged.pages.backend import Attend, CascadeOptions
from jpaged.pages.operands import AttentionOperands
from jpaged.xla.online_softmax import merge_states

# Rows of a kernel's tile of queries that a virtual row fills: its members times the
# query heads per key/value head. A product of a Hopper GPU has 64 rows, a prompt tile
# of the other kernels 64 or 128.
TILE_ROWS = 64

State = tuple[jax.Array, jax.Array]  # output and log-sum-exp


class CascadePlan(NamedTuple):
    """Which blocks are read together, and which by each row alone."""

    own_tables: jax.Array  # i32[S, M], blocks after those that are read together
    own_lens: jax.Array  # i32[S], tokens in them
    members: jax.Array  # i32[V, R], batch rows; unused entries hold any row
    tables: jax.Array  # i32[V, M], block table of each virtual row
    lens: jax.Array  # i32[V], tokens of the prefix; 0 for an unused virtual row
    member_index: jax.Array  # i32[S], index of the row in V * R members; V * R if alone


def num_members(
    num_heads: int, num_kv_heads: int, num_rows: int, tile_rows: int | None = None
) -> int:
    """Return R, the members of a virtual row.

    R below 2 means that one row's heads fill a tile; then no rows are read together.
    """
    tile_rows = TILE_ROWS if tile_rows is None else tile_rows
    return min(tile_rows // (num_heads // num_kv_heads), num_rows)


def attend(
    plain: Attend, operands: AttentionOperands, options: CascadeOptions
) -> State:
    """Return attention with shared prefixes read once.

    Args:
      plain: a backend's attention, which adds sinks to the operands that have them.
      operands: with `shared_prefix`.
      options: of the backend. With `options.branches`, a step in which nothing is
        shared skips the prefixes by a branch. Without, the prefixes' part then reads no
        key and costs its launches.

    Returns:
      Output `[T, H, D]` in the dtype of q, and log-sum-exp f32`[T, H]`.
    """
    q, query_start_loc = operands.q, operands.query_start_loc
    num_rows, num_queries = operands.context_lens.shape[0], q.shape[0]
    num_kv_heads = operands.pools.k.shape[-3]
    tile_rows = options.tile_rows(q.dtype) if options.tile_rows else None
    size = num_members(q.shape[1], num_kv_heads, num_rows, tile_rows)
    if size < 2:
        return plain(operands, return_lse=True)
    plan = make_cascade_plan(operands, num_members=size)
    # Every row has tokens outside of the prefix; its sink is counted once, with them.
    own_operands = operands._replace(
        block_tables=plan.own_tables, context_lens=plan.own_lens
    )
    own = plain(own_operands, return_lse=True, dtype=jnp.float32)
    is_member = plan.member_index < plan.members.size

    def with_prefix(state: State) -> State:
        out, lse = state
        if query_start_loc is None:
            return merge_states(out, lse, *_attend_prefixes(plain, operands, plan))
        at = jnp.clip(query_start_loc[:-1], 0, num_queries - 1)
        prefix = _attend_prefixes(plain, operands._replace(q=q[at]), plan)
        new_out, new_lse = merge_states(out[at], lse[at], *prefix)
        at = jnp.where(is_member, at, num_queries)
        out = out.at[at].set(new_out, mode="drop")
        return out, lse.at[at].set(new_lse, mode="drop")

    if options.branches:
        out, lse = when(jnp.any(is_member), with_prefix, own)
    else:
        out, lse = with_prefix(own)
    return out.astype(q.dtype), lse


def make_cascade_plan(operands: AttentionOperands, *, num_members: int) -> CascadePlan:
    """Return the plan of a step with R = `num_members`, at least 2.

    A group of n rows, two or more, has ceil(n / R) virtual rows: at most n / 2 if R is
    3 or more, and at most 2 n / 3 if R is 2. So V is enough for any groups.
    """
    (num_rows,), size = operands.context_lens.shape, num_members
    num_virtual = num_rows // 2 if size > 2 else 2 * num_rows // 3
    peers, num_blocks = _peers(operands)
    joins = jnp.any(peers, axis=1)
    num_blocks = jnp.where(joins, num_blocks, 0)

    row = jnp.arange(num_rows, dtype=jnp.int32)
    before = peers & (row[None, :] < row[:, None])
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)
    slot = rank % size
    # Virtual rows are numbered in the order of their first members.
    is_first = joins & (slot == 0)
    number = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    is_first_of_mine = peers & (rank[None, :] == (rank - slot)[:, None])
    virtual = jnp.max(jnp.where(is_first_of_mine, number[None, :], 0), axis=1)
    member_index = jnp.where(joins, virtual * size + slot, num_virtual * size)

    # A comparison in place of a scatter: on a GPU this saves a launch in each layer.
    indices = jnp.arange(num_virtual * size, dtype=jnp.int32)
    is_at = member_index[None, :] == indices[:, None]
    members = jnp.max(jnp.where(is_at, row[None, :], 0), axis=1)
    members = members.reshape(num_virtual, size)
    first = members[:, 0]
    is_used = jnp.arange(num_virtual, dtype=jnp.int32) <= number[-1]
    block_size = operands.block_size
    return CascadePlan(
        own_tables=behind(operands.block_tables, num_blocks),
        own_lens=operands.context_lens - num_blocks * block_size,
        members=members,
        tables=operands.block_tables[first],
        lens=jnp.where(is_used, num_blocks[first] * block_size, 0),
        member_index=member_index,
    )


def _peers(operands: AttentionOperands) -> tuple[jax.Array, jax.Array]:
    """Return bool[S, S], which rows are read together, and their shared blocks i32[S].

    A row of a group of two or more is its own peer; a row that reads alone has none.
    Only rows with one query are read together.
    """
    shared, query_start_loc = operands.shared_prefix, operands.query_start_loc
    assert shared is not None
    num_blocks = joined(shared, operands.context_lens, operands.sliding_window)
    if query_start_loc is not None:
        is_one = query_start_loc[1:] - query_start_loc[:-1] == 1
        num_blocks = jnp.where(is_one, num_blocks, 0)
    joins = num_blocks > 0
    peers = shared.leaders[:, None] == shared.leaders[None, :]
    peers &= joins[:, None] & joins[None, :]
    return peers & (jnp.sum(peers, axis=1) > 1)[:, None], num_blocks


def _attend_prefixes(
    plain: Attend, operands: AttentionOperands, plan: CascadePlan
) -> State:
    """Return attention of each row over its prefix; operands.q is [S, H, D].

    Returns:
      Output f32[S, H, D] and log-sum-exp f32[S, H]; zeros and -inf for rows alone.
    """
    num_kv_heads = operands.pools.k.shape[-3]
    prefixes = operands._replace(
        q=_join_heads(operands.q[plan.members], num_kv_heads),
        block_tables=plan.tables,
        context_lens=plan.lens,
        query_start_loc=None,
        sliding_window=None,
        sinks=None,
    )
    out, lse = plain(prefixes, return_lse=True, dtype=jnp.float32)
    num_slots = plan.members.size
    is_member = (plan.member_index < num_slots)[:, None]
    at = jnp.minimum(plan.member_index, num_slots - 1)
    shape = plan.members.shape[1], num_kv_heads
    out, lse = _split_heads(out, *shape)[at], _split_heads(lse, *shape)[at]
    # Unused members hold the result of some other query, possibly NaN.
    return (
        jnp.where(is_member[..., None], out, 0.0),
        jnp.where(is_member, lse, -jnp.inf),
    )


def _join_heads(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return [V, K * R * G, D] of [V, R, H, D]: members side by side per KV head."""
    num_virtual, size, num_heads, head_dim = q.shape
    q = q.reshape(num_virtual, size, num_kv_heads, -1, head_dim).swapaxes(1, 2)
    return q.reshape(num_virtual, size * num_heads, head_dim)


def _split_heads(heads: jax.Array, size: int, num_kv_heads: int) -> jax.Array:
    """Return [V * R, H, ...] of [V, K * R * G, ...]: the inverse of `_join_heads`."""
    num_virtual, _, *rest = heads.shape
    heads = heads.reshape(num_virtual, num_kv_heads, size, -1, *rest).swapaxes(1, 2)
    return heads.reshape(num_virtual * size, -1, *rest)
