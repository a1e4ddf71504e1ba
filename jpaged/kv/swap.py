"""Swapping: rows that move between the pool and the host's memory, blocks and all.

Place on the road: scheduler (who goes, who returns) -> [swap] -> kv_cache (the pages).

The host's blocks have a block manager's state of their own, whose rows are the places
of the request table: who is away needs no row of the engine. What moves is a table and
a length, and a copy of each block that a table names. A block that several rows share
moves once, and they share it there.

Shape letters: S rows of the engine, R places, M blocks per row, N blocks of a pool, Q
pairs of rows, C copies.

Source: Kwon et al. 2023, section 4.5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.compat import when
from jpaged.kv import block_manager
from jpaged.kv.block_manager import NO_BLOCK, BlockState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """Pages to copy from one pool to the other: pairs first, then NO_BLOCK."""

    src: jax.Array  # i32[C], blocks of the pool that is left
    dst: jax.Array  # i32[C], blocks of the other

    @classmethod
    def none(cls, device: BlockState, host: BlockState) -> Copies:
        """Nothing to copy, between these two."""
        nowhere = jnp.full((_max_copies(device, host),), NO_BLOCK, jnp.int32)
        return cls(nowhere, nowhere)

    @property
    def num_blocks(self) -> jax.Array:
        """Blocks that are copied, i32[]."""
        return jnp.sum(self.dst != NO_BLOCK, dtype=jnp.int32)


def swap_out(
    device: BlockState, host: BlockState, seq_indices: jax.Array
) -> tuple[BlockState, BlockState, Copies, jax.Array]:
    """Both states after rows have left the device, what to copy, and whether they have.

    All or nothing: `ok`, bool[], is False, and nothing changes, where the host has too
    few free blocks, or holds something at a place already.

    Args:
      device: the engine's blocks, S rows; donate it under jit.
      host: the host's, R rows.
      places: i32[S], the host's row for each row, all different; below 0: it stays.

    Raises:
      ValueError: the two are not alike in block size and width of their tables.

    >>> swap_out, swap_in = jax.jit(swap_out), jax.jit(swap_in)
    >>> sizes = dict(num_blocks=4, block_size=2, max_blocks_per_seq=2)
    >>> device = block_manager.init_state(max_seqs=2, **sizes)
    >>> host = block_manager.init_state(max_seqs=3, **sizes)
    >>> device, _ = block_manager.append(device, jnp.array([3, 0]))
    >>> device = block_manager.fork(device, jnp.array([0, 0]))  # both hold blocks 0, 1
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


def swap_in(
    device: BlockState,
    host: BlockState,
    seq_indices: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[BlockState, BlockState, Copies, jax.Array]:
    """Both states after rows have come back to the device; otherwise as `swap_out`.

    Args:
      device: the engine's blocks, S rows; donate it under jit.
      host: the host's, R rows.
      places: i32[S], the host's row that each row gets, all different; below 0: none.
      kept: bool[N], blocks of the device that are not given out though no row uses
        them; None keeps none.
    """
    rows = jnp.arange(device.context_lens.size, dtype=jnp.int32)
    host, device, copies, ok = _move(host, device, seq_indices, rows, kept)
    return device, host, copies, ok


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Swapped:
    """What a step moved between the two pools."""

    out: Copies  # from the device's to the host's
    into: Copies  # the other way
    ok: jax.Array  # bool[], False: a pool had no room, which the scheduler had promised


def swap_blocks(
    device: BlockState,
    host: BlockState,
    out: jax.Array,
    into: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[BlockState, BlockState, Swapped]:
    """Both states after rows left and came back, and the pages to copy.

    `out` and `into` are the `seq_indices` of `swap_out` and `swap_in`. Costs little
    in a step in which nobody moves.
    """

    def leave(carry):
        device, host, swapped = carry
        device, host, copies, ok = swap_out(device, host, out)
        return device, host, dataclasses.replace(swapped, out=copies, ok=ok)

    def enter(carry):
        device, host, swapped = carry
        device, host, copies, ok = swap_in(device, host, into, kept)
        ok &= swapped.ok
        return device, host, dataclasses.replace(swapped, into=copies, ok=ok)

    none = Copies.none(device, host)
    carry = (device, host, Swapped(none, none, jnp.bool_(True)))
    carry = when(jnp.any(out >= 0), leave, carry)
    return when(jnp.any(into >= 0), enter, carry)


def leaving(
    device: BlockState,
    host: BlockState,
    dropped: jax.Array,
    ranks: jax.Array,
    is_same: jax.Array,
) -> jax.Array:
    """Which of the dropped rows the host has room for, bool[S].

    Whole requests, the last by rank first, up to the first that does not fit. A request
    that has computed nothing yet has nothing to swap.

    Args:
      device: the engine's blocks.
      host: the host's.
      dropped: bool[S], the rows that lose their blocks.
      ranks: i32[S], all different; the rows of a request follow each other.
      is_same: bool[S, S], whether two rows are of one request.
    """
    goes = dataclasses.replace(
        device,
        block_tables=jnp.where(dropped[:, None], device.block_tables, NO_BLOCK),
        context_lens=jnp.where(dropped, device.context_lens, 0),
    )
    # Each block counts for the first row to go that holds it.
    held = block_manager.exclusive_blocks(goes, -ranks)
    goes_first = ranks[None, :] >= ranks[:, None]
    wanted = jnp.sum(jnp.where(goes_first, held[None, :], 0), axis=1)
    fits = wanted <= block_manager.num_free_blocks(host)
    is_mate = is_same & dropped[None, :]
    has_any = jnp.any(is_mate & (goes.context_lens > 0)[None, :], axis=1)
    return dropped & has_any & jnp.all(fits[None, :] | ~is_mate, axis=1)


def demand(host: BlockState, seq_indices: jax.Array) -> jax.Array:
    """The blocks that rows take which come back together, i32[S].

    Each block counts for the first of `seq_indices` (i32[S], below 0: none) with it.
    A row whose last block an earlier one writes too needs a copy of it.
    """
    tables_SM, lens = _rows_of(host, seq_indices >= 0, seq_indices)
    state = dataclasses.replace(host, block_tables=tables_SM, context_lens=lens)
    rows = jnp.arange(lens.size, dtype=jnp.int32)
    held = block_manager.exclusive_blocks(state, rows)
    last_column = jnp.maximum(lens - 1, 0)[:, None] // host.block_size
    last = jnp.take_along_axis(tables_SM, last_column, axis=1)[:, 0]
    is_open = lens % host.block_size != 0
    is_other = (last[None, :] == last[:, None]) & is_open[None, :]
    copies = is_open & jnp.any(is_other & (rows[None, :] < rows[:, None]), axis=1)
    return held + copies.astype(jnp.int32)


def _move(
    source: BlockState,
    target: BlockState,
    from_rows: jax.Array,
    to_rows: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[BlockState, BlockState, Copies, jax.Array]:
    """Both states after the rows `from_rows` have become `to_rows`, i32[Q] each.

    Pairs with a number below 0 take no part.
    """
    moves = (from_rows >= 0) & (to_rows >= 0)
    tables_QM, lens = _rows_of(source, moves, from_rows)
    is_block_QM = tables_QM != NO_BLOCK
    (num_source,) = source.ref_counts.shape
    is_needed = jnp.zeros((num_source,), jnp.bool_)
    needed = jnp.where(is_block_QM, tables_QM, num_source)
    is_needed = is_needed.at[needed].set(True, mode="drop")
    is_free = target.ref_counts == 0
    if kept is not None:
        is_free &= ~kept
    _, lens_there = _rows_of(target, moves, to_rows)
    ok = jnp.sum(is_needed) <= jnp.sum(is_free)
    ok &= jnp.all(lens_there == 0)

    # All or nothing: a refused move needs no block and moves no row.
    moves, is_needed, is_block_QM = moves & ok, is_needed & ok, is_block_QM & ok
    size = _max_copies(source, target)
    src, dst = _first(is_needed, size), _first(is_free, size)
    dst = jnp.where(src == NO_BLOCK, NO_BLOCK, dst)
    turn = jnp.cumsum(is_needed, dtype=jnp.int32) - 1
    turn_QM = turn.at[tables_QM].get(mode="clip")
    new_QM = jnp.where(is_block_QM, dst.at[turn_QM].get(mode="clip"), NO_BLOCK)
    (num_target,) = target.ref_counts.shape
    entries = jnp.where(is_block_QM, new_QM, num_target)
    at = jnp.where(moves, to_rows, target.context_lens.size)
    target = dataclasses.replace(
        target,
        ref_counts=target.ref_counts.at[entries].add(1, mode="drop"),
        block_tables=target.block_tables.at[at].set(new_QM, mode="drop"),
        context_lens=target.context_lens.at[at].set(lens, mode="drop"),
    )
    gone = jnp.zeros(source.context_lens.shape, jnp.bool_)
    gone = gone.at[jnp.where(moves, from_rows, gone.size)].set(True, mode="drop")
    return block_manager.free(source, gone), target, Copies(src, dst), ok


def _rows_of(
    state: BlockState, is_asked: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tables i32[Q, M] and lengths i32[Q] of the rows; empty where none is asked."""
    at = jnp.where(is_asked, rows, state.context_lens.size)
    tables = state.block_tables.at[at].get(mode="fill", fill_value=NO_BLOCK)
    return tables, state.context_lens.at[at].get(mode="fill", fill_value=0)


def _first(is_chosen: jax.Array, size: int) -> jax.Array:
    """The first `size` chosen numbers in order, i32[size], then NO_BLOCK."""
    turn = jnp.cumsum(is_chosen, dtype=jnp.int32) - 1
    numbers = jnp.arange(is_chosen.size, dtype=jnp.int32)
    none = jnp.full((size,), NO_BLOCK, jnp.int32)
    return none.at[jnp.where(is_chosen, turn, size)].set(numbers, mode="drop")


def _max_copies(a: BlockState, b: BlockState) -> int:
    """Blocks that can move between the two at once, at most."""
    for name in ("block_size", "width"):
        sizes = [
            state.block_size if name == "block_size" else state.block_tables.shape[1]
            for state in (a, b)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"host: expected tables of the device's {name} ({sizes[0]}), "
                f"got {sizes[1]}; make both states with the same sizes"
            )
    entries = min(a.block_tables.size, b.block_tables.size)
    return min(a.ref_counts.size, b.ref_counts.size, entries)
