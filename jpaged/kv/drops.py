"""Drops: rows that have dropped blocks, and how they drop them.

Pipeline: retention -> [drops] -> block tables without the dropped blocks.

A row that has dropped blocks stores the tokens that are left one after another, as any
row. Token t of its sequence is stored at index t - dropped, for tokens after the
drop: those that the next appends add.

Shape symbols: S rows, M blocks per row, N blocks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.indexing import add, put, take, where_rows
from jpaged.kv.block_state import NO_BLOCK, BlockState, num_blocks_per_row
from jpaged.kv.block_state import Drops as Drops


def init_drops(max_seqs: int, width: int, has_statistic: bool) -> Drops:
    """Return what empty rows have dropped: nothing."""

    def zeros() -> jax.Array:
        return jnp.zeros((max_seqs,), jnp.int32)

    if not has_statistic:
        return Drops(zeros(), zeros())
    statistic = jnp.zeros((max_seqs, width), jnp.float32)
    return Drops(zeros(), zeros(), statistic, zeros())


def drop_blocks(state: BlockState, keeps: jax.Array) -> BlockState:
    """Drop blocks from rows, and close the gaps in their tables.

    Args:
      state: with `drops`; donate it under jit.
      keeps: bool[S, M], the blocks that stay. The last block of a row must stay; only
        full blocks are dropped.

    >>> from jpaged.kv import block_manager
    >>> state = block_manager.init_state(
    ...     num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=3)
    >>> state = dataclasses.replace(state, drops=init_drops(2, 3, False))
    >>> state, _ = block_manager.append(state, jnp.array([5, 0]))
    >>> state = block_manager.fork(state, jnp.array([0, 0]))
    >>> keeps = jnp.array([[True, False, True], [True] * 3])
    >>> state = drop_blocks(state, keeps)
    >>> state.block_tables.tolist(), state.ref_counts.tolist()
    ([[0, 2, -1], [0, 1, 2]], [2, 1, 2, 0])
    >>> state.context_lens.tolist(), state.drops.dropped.tolist()
    ([3, 5], [2, 0])
    """
    drops, tables = state.drops, state.block_tables
    assert drops is not None
    column = jnp.arange(tables.shape[1], dtype=jnp.int32)[None, :]
    is_block = column < num_blocks_per_row(state)[:, None]
    is_dropped = is_block & ~keeps
    keeps = is_block & keeps
    gone = jnp.where(is_dropped, tables, state.ref_counts.size)
    lost = jnp.sum(is_dropped, axis=1, dtype=jnp.int32) * state.block_size
    statistic = drops.statistic
    if statistic is not None:
        statistic = pack_columns(statistic, keeps, 0)
    return dataclasses.replace(
        state,
        ref_counts=add(state.ref_counts, gone, -1),
        block_tables=pack_columns(tables, keeps, NO_BLOCK),
        context_lens=state.context_lens - lost,
        drops=dataclasses.replace(
            drops, dropped=drops.dropped + lost, statistic=statistic
        ),
    )


def pack_columns(values: jax.Array, keeps: jax.Array, fill: int) -> jax.Array:
    """Return the kept columns of each row [S, M] in front, in order, then `fill`."""
    num_rows, width = values.shape
    target = jnp.where(keeps, jnp.cumsum(keeps, axis=1) - 1, width)
    rows = jnp.arange(num_rows)[:, None]
    return put(jnp.full_like(values, fill), (rows, target), values)


def computed_lens(state: BlockState) -> jax.Array:
    """Return each row's tokens that were computed, stored or dropped, i32[S]."""
    if state.drops is None:
        return state.context_lens
    return state.context_lens + state.drops.dropped


def intact_rows(state: BlockState) -> jax.Array | None:
    """Return the rows that store all their tokens, bool[S]; None: all rows do."""
    return None if state.drops is None else state.drops.dropped == 0


def references_of(state: BlockState, rows: jax.Array) -> jax.Array:
    """Return how many table entries of the rows bool[S] point at each block, i32[N]."""
    entries = jnp.where(
        rows[:, None] & (state.block_tables != NO_BLOCK),
        state.block_tables,
        state.ref_counts.size,
    )
    return add(jnp.zeros_like(state.ref_counts), entries, 1)


def fork_drops(
    drops: Drops | None, parents: jax.Array, has_parent: jax.Array
) -> Drops | None:
    """Return the drops of rows that continue `parents`; see `block_manager.fork`."""
    parents_drops = jax.tree.map(lambda column: take(column, parents), drops)
    return where_rows(has_parent, parents_drops, jax.tree.map(jnp.zeros_like, drops))
