"""Swapping: rows move between the device's pool and the host's, with their blocks.

Pipeline: scheduler (which rows move) -> [swap] -> kv_cache (copies their pages).

The host pool has a `BlockState` of its own, whose rows are the sequence indices of the
request table: a swapped sequence uses no batch row. A move transfers a block table and
a length, and copies each block of the table. A block that several of the moved rows
share is copied once, and they share the copy.

Shape symbols: S batch rows, R sequences, M blocks per row, N blocks of a pool, Q pairs
of rows, C copies.

Source: Kwon et al. 2023, section 4.5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.compat import when
from jpaged.kv import block_manager, cache_groups
from jpaged.kv.block_manager import NO_BLOCK, BlockState
from jpaged.kv.drops import Drops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """Pages to copy from one pool to the other: pairs first, then NO_BLOCK."""

    src: jax.Array  # i32[C], blocks of the source pool
    dst: jax.Array  # i32[C], blocks of the target pool

    @classmethod
    def none(cls, device: BlockState, host: BlockState) -> Copies:
        """Return an empty list for these two pools."""
        empty = jnp.full((_max_copies(device, host),), NO_BLOCK, jnp.int32)
        return cls(empty, empty)

    @property
    def num_blocks(self) -> jax.Array:
        """Number of blocks to copy, i32[]."""
        return jnp.sum(self.dst != NO_BLOCK, dtype=jnp.int32)


def swap_out_rows(
    device: BlockState, host: BlockState, seq_indices: jax.Array
) -> tuple[BlockState, BlockState, Copies, jax.Array]:
    """Move rows from the device's block tables to the host's.

    All or nothing: if the host has too few free blocks, or already stores one of the
    sequences, `ok` is False and nothing changes.

    Args:
      device: the device's blocks, S rows; donate it under jit.
      host: the host's blocks, R rows.
      seq_indices: i32[S], the host row for each batch row, all different; a negative
        number keeps the row on the device.

    Returns:
      Both new states, the pages to copy, and `ok`, bool[].

    Raises:
      ValueError: the states differ in block size or in the width of their tables.

    >>> swap_out, swap_in = jax.jit(swap_out_rows), jax.jit(swap_in_rows)
    >>> sizes = dict(num_blocks=4, block_size=2, max_blocks_per_seq=2)
    >>> device = block_manager.init_state(max_seqs=2, **sizes)
    >>> host = block_manager.init_state(max_seqs=3, **sizes)
    >>> device, _ = block_manager.append(device, jnp.array([3, 0]))
    >>> device = block_manager.fork(device, jnp.array([0, 0]))  # both use blocks 0, 1
    >>> device, host, copies, ok = swap_out(device, host, jnp.array([2, 0]))
    >>> host.block_tables.tolist(), host.ref_counts.tolist()
    ([[0, 1], [-1, -1], [0, 1]], [2, 2, 0, 0])
    >>> copies.src.tolist(), copies.dst.tolist(), device.ref_counts.tolist()
    ([0, 1, -1, -1], [0, 1, -1, -1], [0, 0, 0, 0])
    >>> device, host, copies, ok = swap_in(device, host, jnp.array([-1, 2]))
    >>> device.block_tables.tolist(), host.ref_counts.tolist()
    ([[-1, -1], [0, 1]], [1, 1, 0, 0])
    """
    rows = jnp.arange(device.context_lens.size, dtype=jnp.int32)
    return _move(device, host, rows, seq_indices)


def swap_in_rows(
    device: BlockState,
    host: BlockState,
    seq_indices: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[BlockState, BlockState, Copies, jax.Array]:
    """Move rows from the host's block tables back to the device's.

    Args:
      device: the device's blocks, S rows; donate it under jit.
      host: the host's blocks, R rows.
      seq_indices: i32[S], the host row for each batch row, all different; a negative
        number leaves the batch row unchanged.
      kept: bool[N], blocks of the device that must not be reused although no row uses
        them; None means none.

    Returns:
      As `swap_out_rows`.
    """
    rows = jnp.arange(device.context_lens.size, dtype=jnp.int32)
    host, device, copies, ok = _move(host, device, seq_indices, rows, kept)
    return device, host, copies, ok


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Swapped:
    """What a step moves between the two pools."""

    out: Copies  # from the device to the host
    into: Copies  # from the host to the device
    ok: jax.Array  # bool[]; False: a pool was full, although the scheduler had checked

    def none(self) -> Swapped:
        """Return a result of the same shapes that moves nothing."""

        def nothing(copies: Copies) -> Copies:
            none = jnp.full_like(copies.src, NO_BLOCK)
            return Copies(none, none)

        return Swapped(nothing(self.out), nothing(self.into), jnp.ones_like(self.ok))


def swap_blocks(
    device: BlockState,
    host: BlockState,
    out: jax.Array,
    into: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[BlockState, BlockState, Swapped]:
    """Swap rows out and in, and return both states and the pages to copy.

    `out` and `into` are the `seq_indices` of `swap_out_rows` and `swap_in_rows`. A step
    without swaps costs little.
    """

    def move_out(carry: tuple) -> tuple:
        device, host, swapped = carry
        device, host, copies, ok = swap_out_rows(device, host, out)
        return device, host, dataclasses.replace(swapped, out=copies, ok=ok)

    def move_in(carry: tuple) -> tuple:
        device, host, swapped = carry
        device, host, copies, ok = swap_in_rows(device, host, into, kept)
        ok &= swapped.ok
        return device, host, dataclasses.replace(swapped, into=copies, ok=ok)

    none = Copies.none(device, host)
    carry = (device, host, Swapped(none, none, jnp.bool_(True)))
    carry = when(jnp.any(out >= 0), move_out, carry)
    return when(jnp.any(into >= 0), move_in, carry)


def fits_on_host(
    device: BlockState,
    host: BlockState,
    preempted: jax.Array,
    ranks: jax.Array,
    is_same: jax.Array,
) -> jax.Array:
    """Select the preempted rows that the host pool has space for, bool[S].

    Whole requests are selected, the last by rank first, until one does not fit. A
    request that has not computed any token is not selected: it has nothing to swap.

    Args:
      device: the device's blocks.
      host: the host's blocks.
      preempted: bool[S], the rows that lose their blocks.
      ranks: i32[S], all different; the rows of a request have consecutive ranks.
      is_same: bool[S, S], whether two rows belong to the same request.
    """
    moved = dataclasses.replace(
        device,
        block_tables=jnp.where(preempted[:, None], device.block_tables, NO_BLOCK),
        context_lens=jnp.where(preempted, device.context_lens, 0),
    )
    # Each block counts for the first row to move that uses it.
    new_blocks = block_manager.exclusive_blocks(moved, -ranks)
    is_before = ranks[None, :] >= ranks[:, None]
    needed = jnp.sum(jnp.where(is_before, new_blocks[None, :], 0), axis=1)
    fits = needed <= block_manager.num_free_blocks(host)
    is_mate = is_same & preempted[None, :]
    has_any = jnp.any(is_mate & (moved.context_lens > 0)[None, :], axis=1)
    return preempted & has_any & jnp.all(fits[None, :] | ~is_mate, axis=1)


def swap_in_demand(host: BlockState, seq_indices: jax.Array) -> jax.Array:
    """Return the blocks that sequences need when they are swapped in together, i32[S].

    Each block counts for the first sequence in `seq_indices` (i32[S], negative: none)
    that uses it. A sequence whose last block an earlier one also writes needs one block
    more, for a copy.
    """
    if (number := len(host.windows)) > 1:
        split = cache_groups.split_groups(host)
        group = jnp.arange(number, dtype=jnp.int32)[None, :]
        index = seq_indices[:, None]
        index = jnp.where(index < 0, -1, index * number + group)
        return cache_groups.sum_groups(swap_in_demand(split, index.reshape(-1)), host)
    tables_SM, lens = _select_rows(host, seq_indices >= 0, seq_indices)
    state = dataclasses.replace(host, block_tables=tables_SM, context_lens=lens)
    rows = jnp.arange(lens.size, dtype=jnp.int32)
    num_blocks = block_manager.exclusive_blocks(state, rows)
    last_column = jnp.maximum(lens - 1, 0)[:, None] // host.block_size
    last = jnp.take_along_axis(tables_SM, last_column, axis=1)[:, 0]
    is_partial = lens % host.block_size != 0
    is_other = (last[None, :] == last[:, None]) & is_partial[None, :]
    copies = is_partial & jnp.any(is_other & (rows[None, :] < rows[:, None]), axis=1)
    return num_blocks + copies.astype(jnp.int32)


def _move(
    source: BlockState,
    target: BlockState,
    from_rows: jax.Array,
    to_rows: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[BlockState, BlockState, Copies, jax.Array]:
    """Move the source's rows `from_rows` to the target's rows `to_rows`, i32[Q] each.

    Pairs with a negative number are ignored.
    """
    moves = (from_rows >= 0) & (to_rows >= 0)
    tables_QM, lens = _select_rows(source, moves, from_rows)
    is_block_QM = tables_QM != NO_BLOCK
    (num_source,) = source.ref_counts.shape
    is_needed = jnp.zeros((num_source,), jnp.bool_)
    needed = jnp.where(is_block_QM, tables_QM, num_source)
    is_needed = is_needed.at[needed].set(True, mode="drop")
    is_free = target.ref_counts == 0
    if kept is not None:
        is_free &= ~kept
    _, target_lens = _select_rows(target, moves, to_rows)
    ok = jnp.sum(is_needed) <= jnp.sum(is_free)
    ok &= jnp.all(target_lens == 0)

    # All or nothing: a refused move needs no block and moves no row.
    moves, is_needed, is_block_QM = moves & ok, is_needed & ok, is_block_QM & ok
    drops = _select_drops(source, moves, from_rows)
    size = _max_copies(source, target)
    src, dst = _first_true(is_needed, size), _first_true(is_free, size)
    dst = jnp.where(src == NO_BLOCK, NO_BLOCK, dst)
    copy_index = jnp.cumsum(is_needed, dtype=jnp.int32) - 1
    copy_index_QM = copy_index.at[tables_QM].get(mode="clip")
    new_QM = jnp.where(is_block_QM, dst.at[copy_index_QM].get(mode="clip"), NO_BLOCK)
    (num_target,) = target.ref_counts.shape
    entries = jnp.where(is_block_QM, new_QM, num_target)
    index = jnp.where(moves, to_rows, target.context_lens.size)
    target = dataclasses.replace(
        target,
        ref_counts=target.ref_counts.at[entries].add(1, mode="drop"),
        block_tables=target.block_tables.at[index].set(new_QM, mode="drop"),
        context_lens=target.context_lens.at[index].set(lens, mode="drop"),
        drops=jax.tree.map(
            lambda column, new: column.at[index].set(new, mode="drop"),
            target.drops,
            drops,
        ),
    )
    is_moved = jnp.zeros(source.context_lens.shape, jnp.bool_)
    is_moved = is_moved.at[jnp.where(moves, from_rows, is_moved.size)].set(
        True, mode="drop"
    )
    return block_manager.free(source, is_moved), target, Copies(src, dst), ok


def _select_rows(
    state: BlockState, is_selected: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return tables i32[Q, M] and lengths i32[Q] of `rows`; empty if not selected."""
    index = jnp.where(is_selected, rows, state.context_lens.size)
    tables = state.block_tables.at[index].get(mode="fill", fill_value=NO_BLOCK)
    return tables, state.context_lens.at[index].get(mode="fill", fill_value=0)


def _select_drops(
    state: BlockState, is_selected: jax.Array, rows: jax.Array
) -> Drops | None:
    """Return what `rows` have dropped; nothing if not selected."""
    index = jnp.where(is_selected, rows, state.context_lens.size)
    return jax.tree.map(
        lambda column: column.at[index].get(mode="fill", fill_value=0), state.drops
    )


def _first_true(is_chosen: jax.Array, size: int) -> jax.Array:
    """Return the first `size` indices that are True, in order, then NO_BLOCK."""
    position = jnp.cumsum(is_chosen, dtype=jnp.int32) - 1
    numbers = jnp.arange(is_chosen.size, dtype=jnp.int32)
    none = jnp.full((size,), NO_BLOCK, jnp.int32)
    return none.at[jnp.where(is_chosen, position, size)].set(numbers, mode="drop")


def _max_copies(a: BlockState, b: BlockState) -> int:
    """Return the largest number of blocks that can move between two pools at once."""
    for name, sizes in {
        "block_size": (a.block_size, b.block_size),
        "max_blocks_per_seq": (a.block_tables.shape[1], b.block_tables.shape[1]),
    }.items():
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"host: expected the device's {name} ({sizes[0]}), got {sizes[1]}; "
                "create both states with the same sizes"
            )
    entries = min(a.block_tables.size, b.block_tables.size)
    return min(a.ref_counts.size, b.ref_counts.size, entries)
