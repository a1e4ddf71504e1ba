"""Cascade: the blocks that rows share are read once, by any kernel's plain attention.

Place on the road: attention -> [cascade] -> pallas | triton.

Attention over a row's keys is attention over the prefix that its group shares, merged
with attention over its own blocks (Juravsky et al. 2024, https://arxiv.org/abs/2402.05099).
The prefix is read by a virtual row: one query whose heads of a key are those of all its
members, of whom none sees more of it than another. No kernel knows of it.

Letters as in `jpaged.attention`; V virtual rows, R members of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.compat import when
from jpaged.kv.shared_prefix import SharedPrefix, drop_leading_blocks, num_shared_blocks
from jpaged.xla.online_softmax import merge

# Rows of a kernel's tile that a virtual row fills, members times heads of a key: those
# of a Hopper GPU's product, and of the other kernels' tiles of prompts, or half of one.
ROWS = 64

# (q, block_tables, context_lens, query_start_loc, and by name sliding_window, sinks and
# the output's dtype): output [T, H, D] and log-sum-exp f32[T, H].
Attend = Callable[..., tuple[jax.Array, jax.Array]]
State = tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
    """Who reads what: together, and alone."""

    own_tables: jax.Array  # i32[S, M], blocks behind those that are read together
    own_lens: jax.Array  # i32[S], tokens in them
    members: jax.Array  # i32[V, R], rows; where there is none, any
    tables: jax.Array  # i32[V, M]
    lens: jax.Array  # i32[V], tokens of the prefix; 0 of a virtual row of nobody
    place: jax.Array  # i32[S], of the row among V * R members; V * R where it is alone


def num_members(
    num_heads: int, num_kv_heads: int, num_rows: int, rows: int | None = None
) -> int:
    """R. Below 2, where one row's heads of a key fill a tile, nobody shares."""
    rows = ROWS if rows is None else rows
    return min(rows // (num_heads // num_kv_heads), num_rows)


def attend(
    plain: Attend,
    q: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    shared: SharedPrefix,
    block_size: int,
    num_kv_heads: int,
    sliding_window: jax.Array | int | None,
    skips: bool,
    rows: int | None = None,
) -> State:
    """Output [T, H, D] in the dtype of q, and log-sum-exp f32[T, H].

    Args:
      plain: attention of one pool, which adds sinks unless told otherwise.
      q, block_tables, context_lens, query_start_loc: as `paged_attention`.
      shared: the groups.
      block_size, num_kv_heads: of the pool.
      sliding_window: as `paged_attention`; `plain` has it too.
      skips: a step in which nothing is shared passes over the prefixes' part, by a
        branch that the device takes. Without, it reads no key, and costs its launches.
      rows: of a kernel's tile that a virtual row fills; None: `ROWS`.
    """
    num_rows, num_queries = context_lens.shape[0], q.shape[0]
    size = num_members(q.shape[1], num_kv_heads, num_rows, rows)
    if size < 2:
        return plain(q, block_tables, context_lens, query_start_loc)
    plan = make_plan(
        shared,
        block_tables,
        context_lens,
        query_start_loc,
        block_size=block_size,
        sliding_window=sliding_window,
        num_members=size,
    )
    # Every row has tokens of its own, so that its sink counts once, there.
    own = plain(q, plan.own_tables, plan.own_lens, query_start_loc, dtype=jnp.float32)
    is_member = plan.place < plan.members.size

    def with_prefix(state: State) -> State:
        out, lse = state
        if query_start_loc is None:
            return merge(out, lse, *_prefix(plain, q, plan, num_kv_heads))
        at = jnp.clip(query_start_loc[:-1], 0, num_queries - 1)
        prefix = _prefix(plain, q[at], plan, num_kv_heads)
        new_out, new_lse = merge(out[at], lse[at], *prefix)
        at = jnp.where(is_member, at, num_queries)
        out = out.at[at].set(new_out, mode="drop")
        return out, lse.at[at].set(new_lse, mode="drop")

    if skips:
        out, lse = when(jnp.any(is_member), with_prefix, own)
    else:
        out, lse = with_prefix(own)
    return out.astype(q.dtype), lse


def make_plan(
    shared: SharedPrefix,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    block_size: int,
    sliding_window: jax.Array | int | None,
    num_members: int,
) -> Plan:
    """The plan of a step; R is `num_members`, at least 2.

    A group of n rows, two or more, has ceil(n / R) virtual rows: at most n / 2 of them
    for R of 3 and more, and 2 n / 3 for R of 2. So V holds those of any groups.
    """
    (num_rows,), size = context_lens.shape, num_members
    num_virtual = num_rows // 2 if size > 2 else 2 * num_rows // 3
    num_blocks = num_shared_blocks(shared, context_lens, sliding_window)
    if query_start_loc is not None:
        is_one = query_start_loc[1:] - query_start_loc[:-1] == 1
        num_blocks = jnp.where(is_one, num_blocks, 0)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    joins = num_blocks > 0
    # Of row s, who is in its group: s itself too, unless it is alone.
    peers = shared.leaders[:, None] == shared.leaders[None, :]
    peers &= joins[:, None] & joins[None, :]
    peers &= (jnp.sum(peers, axis=1) > 1)[:, None]
    joins = jnp.any(peers, axis=1)
    num_blocks = jnp.where(joins, num_blocks, 0)

    before = peers & (row[None, :] < row[:, None])
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)
    slot = rank % size
    # The first member of each virtual row opens it, and they are counted in that order.
    opens = joins & (slot == 0)
    opened = jnp.cumsum(opens, dtype=jnp.int32) - 1
    is_opener = peers & (rank[None, :] == (rank - slot)[:, None])
    virtual = jnp.max(jnp.where(is_opener, opened[None, :], 0), axis=1)
    place = jnp.where(joins, virtual * size + slot, num_virtual * size)

    # No scatter: on a GPU this is a launch less in each layer.
    places = jnp.arange(num_virtual * size, dtype=jnp.int32)
    is_at = place[None, :] == places[:, None]
    members = jnp.max(jnp.where(is_at, row[None, :], 0), axis=1)
    members = members.reshape(num_virtual, size)
    first = members[:, 0]
    is_used = jnp.arange(num_virtual, dtype=jnp.int32) <= opened[-1]
    return Plan(
        own_tables=drop_leading_blocks(block_tables, num_blocks),
        own_lens=context_lens - num_blocks * block_size,
        members=members,
        tables=block_tables[first],
        lens=jnp.where(is_used, num_blocks[first] * block_size, 0),
        place=place,
    )


def _prefix(plain: Attend, q: jax.Array, plan: Plan, num_kv_heads: int) -> State:
    """Output f32[S, H, D] and log-sum-exp f32[S, H] of `q` [S, H, D] over the prefixes.

    Zeros and -inf for rows that are alone.
    """
    options: dict[str, Any] = dict(sliding_window=None, sinks=None, dtype=jnp.float32)
    heads = _together(q[plan.members], num_kv_heads)
    out, lse = plain(heads, plan.tables, plan.lens, None, **options)
    num_places = plan.members.size
    is_member = (plan.place < num_places)[:, None]
    at = jnp.minimum(plan.place, num_places - 1)
    shape = plan.members.shape[1], num_kv_heads
    out, lse = _apart(out, *shape)[at], _apart(lse, *shape)[at]
    # Places of nobody hold what any query gives there, NaN too.
    return (
        jnp.where(is_member[..., None], out, 0.0),
        jnp.where(is_member, lse, -jnp.inf),
    )


def _together(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """[V, K * R * G, D] of [V, R, H, D]: the members' heads of a key side by side."""
    num_virtual, size, num_heads, head_dim = q.shape
    q = q.reshape(num_virtual, size, num_kv_heads, -1, head_dim).swapaxes(1, 2)
    return q.reshape(num_virtual, size * num_heads, head_dim)


def _apart(heads: jax.Array, size: int, num_kv_heads: int) -> jax.Array:
    """[V * R, H, ...] of [V, K * R * G, ...]: what `_together` did, undone."""
    num_virtual, _, *rest = heads.shape
    heads = heads.reshape(num_virtual, num_kv_heads, size, -1, *rest).swapaxes(1, 2)
    return heads.reshape(num_virtual * size, -1, *rest)
