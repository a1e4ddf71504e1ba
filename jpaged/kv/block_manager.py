"""Block manager: which physical block of KV memory stores which tokens.

Pipeline: scheduler -> [block_manager] -> step inputs -> decoder. After decoding, the
engine calls `fork` once.

A row stores its tokens in its blocks in order, `block_size` tokens per block. Rows with
a shared prefix share its blocks. A shared block is copied before it is written.
Every operation is a pure function of `BlockState` and handles all rows at once. It can
be jitted, vmapped and carried through `lax.while_loop`. Values that can be derived are
not stored: neither the free blocks nor the number of blocks per row.

With several cache groups, a row has a table for each group (`cache_groups`).

Shape symbols: S rows, N blocks, M blocks per row, P tokens per block, T tokens, G cache
groups.

Source: Kwon et al. 2023, Sections 4.2 to 4.4. https://arxiv.org/abs/2309.06180
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv, floor_div, remainder
from jpaged.indexing import add, get_or, least, put, take, where_rows
from jpaged.kv import cache_groups
from jpaged.kv.block_state import NO_BLOCK as NO_BLOCK
from jpaged.kv.block_state import BlockState as BlockState
from jpaged.kv.block_state import init_state as init_state
from jpaged.kv.block_state import num_blocks_per_row, row_array
from jpaged.kv.block_state import num_free_blocks as num_free_blocks
from jpaged.kv.block_state import violations as violations
from jpaged.kv.drops import fork_drops
from jpaged.kv.free_blocks import FreeBits, lowest_free_blocks, pack_free_blocks

# `append` searches for one free block per row and for this many more, for prompt
# chunks. An append that needs more blocks searches for the largest possible number.
_PROMPT_BLOCKS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Append:
    """Result of `append`: whether it succeeded, and which blocks to copy first."""

    ok: jax.Array  # bool[]; False: the append was refused, and nothing changed
    copy_src: jax.Array  # i32[S * G], block to copy from, NO_BLOCK where none
    copy_dst: jax.Array  # i32[S * G], block to copy to, NO_BLOCK where none


class Demand(NamedTuple):
    """What an append needs, i32[S * G] each: one entry per row and cache group."""

    last: jax.Array  # the last block, an arbitrary number for empty rows
    copies: jax.Array  # 0 or 1, copies of the last block
    added: jax.Array  # new blocks

    @property
    def total(self) -> jax.Array:
        """Blocks of all rows together, i32[]."""
        return jnp.sum(self.copies + self.added)


def append(
    state: BlockState,
    num_tokens: jax.Array,
    kept: jax.Array | None = None,
    needed: Demand | None = None,
) -> tuple[BlockState, Append]:
    """Reserve slots for `num_tokens` more tokens in each row.

    A row that would write into a block that other rows still use gets a copy of it
    (copy-on-write). Rows that write into the same block in one call are served in row
    order, so the last one writes in place. The copies of one call are independent of
    each other: no destination is a source. The lowest free blocks are used first.

    All or nothing: `ok` is False and nothing changes if there are too few free blocks,
    if a row's block table is too short, or if an entry of `num_tokens` is negative.

    Args:
      state: donate it under jit; it is not needed afterwards.
      num_tokens: i32[S], tokens to add; 0 leaves the row unchanged.
      kept: bool[N], blocks that must not be reused although no row uses them, because
        the prefix cache keeps their contents; None means none.
      needed: `demand(state, num_tokens)`, if it is known.

    Returns:
      The new state, and the blocks to copy before tokens are written.

    >>> append, fork = jax.jit(append), jax.jit(fork)
    >>> state = init_state(num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
    >>> state, _ = append(state, jnp.array([6, 0]))
    >>> state = fork(state, jnp.array([0, 0]))  # row 1 continues from row 0
    >>> state, appended = append(state, jnp.array([1, 1]))
    >>> state.block_tables.tolist()  # block 0 is full and stays shared
    [[0, 2, -1], [0, 1, -1]]
    >>> appended.copy_src.tolist(), appended.copy_dst.tolist()
    ([1, -1], [2, -1])
    >>> state.ref_counts.tolist()
    [2, 1, 1, 0, 0, 0, 0, 0]

    Source: paper Sections 4.3 and 4.4.
    """
    num_tokens = row_array("num_tokens", num_tokens, state)
    if len(state.windows) > 1:
        split, num_tokens = _split(state, num_tokens)
        split, appended = append(split, num_tokens, kept, needed)
        return cache_groups.join_groups(split, state), appended
    needed = demand(state, num_tokens) if needed is None else needed
    last, copies, added = needed
    capacity = state.block_tables.shape[1] * state.block_size
    fits = (num_tokens >= 0) & (num_tokens <= capacity - state.context_lens)
    is_free = state.ref_counts == 0
    if kept is not None:
        is_free &= ~kept
    free_bits = pack_free_blocks(is_free)
    ok = jnp.all(fits) & (needed.total <= free_bits.num_free[-1])
    # All or nothing: a refused append requests nothing, so nothing changes below.
    num_tokens, copies, added = (
        jnp.where(ok, count, 0) for count in (num_tokens, copies, added)
    )

    # Row s gets the blocks taken[starts[s] : ends[s]].
    ends = jnp.cumsum(copies + added)
    starts = ends - copies - added
    taken = _take_free_blocks(state, free_bits, ends[-1])
    is_copy = copies > 0
    copied = jnp.where(is_copy, last, NO_BLOCK)
    state = dataclasses.replace(
        state,
        ref_counts=_refs_after_append(state, is_free, taken, ends[-1], copied),
        block_tables=_tables_after_append(state, taken, starts, copies, added),
        context_lens=state.context_lens + num_tokens,
    )
    copy_dst = jnp.where(is_copy, take(taken, starts), NO_BLOCK)
    return state, Append(ok=ok, copy_src=copied, copy_dst=copy_dst)


def append_one(
    state: BlockState, rows: jax.Array, kept: jax.Array | None = None
) -> tuple[BlockState, jax.Array]:
    """Reserve a slot for one more token in some rows, if no block must be copied.

    A small part of `append`, for decode steps: the state after it is the same.

    Args:
      state: the block tables.
      rows: bool[S], rows that get a token.
      kept: bool[N], as for `append`.

    Returns:
      The new state, and bool[]: whether it is valid. False if there are too few free
      blocks, a table is full, or a row would write into a block that another row or
      the prefix cache uses.
    """
    if len(state.windows) > 1:
        split, rows = _split(state, rows)
        split, ok = append_one(split, rows, kept)
        return cache_groups.join_groups(split, state), ok
    (num_rows, width), size = state.block_tables.shape, state.block_size
    column = floor_div(state.context_lens, size)
    starts_block = rows & (column * size == state.context_lens)
    number = jnp.arange(num_rows, dtype=jnp.int32)
    written = take(state.block_tables, number, jnp.minimum(column, width - 1))
    is_free = state.ref_counts == 0
    is_shared = state.ref_counts > 1
    if kept is not None:
        is_free &= ~kept
        is_shared |= kept
    is_shared = take(is_shared, written)
    free_bits = pack_free_blocks(is_free)
    order = jnp.cumsum(starts_block, dtype=jnp.int32) - 1
    ok = ~jnp.any(rows & ~starts_block & is_shared)
    ok &= jnp.all(~rows | (column < width)) & (order[-1] < free_bits.num_free[-1])
    taken = lowest_free_blocks(free_bits, num_rows)
    taken = take(taken, order)
    at = jnp.where(starts_block, column, width)
    return dataclasses.replace(
        state,
        block_tables=put(state.block_tables, (number, at), taken),
        ref_counts=put(
            state.ref_counts, jnp.where(starts_block, taken, state.ref_counts.size), 1
        ),
        context_lens=state.context_lens + rows.astype(jnp.int32),
    ), ok


def no_copies(state: BlockState) -> Append:
    """Return the result of an append that copies no block."""
    number = len(state.windows) * state.context_lens.size
    none = jnp.full((number,), NO_BLOCK, jnp.int32)
    return Append(jnp.bool_(True), none, none)


def blocks_needed(state: BlockState, num_tokens: jax.Array) -> jax.Array:
    """Return the blocks that `append(state, num_tokens)` needs for each row, i32[S].

    Copies are included. The number of free blocks and the width of the tables are not
    checked, and a negative number of tokens needs no block. If some entries of
    `num_tokens` are set to 0, the sum never grows, but the count of a single row may:
    the row may no longer be the last owner of a block.
    """
    num_tokens = row_array("num_tokens", num_tokens, state)
    if len(state.windows) > 1:
        needed = blocks_needed(*_split(state, num_tokens))
        return cache_groups.sum_groups(needed, state)
    _, copies, added = demand(state, num_tokens)
    return copies + added


def fork(state: BlockState, parents: jax.Array) -> BlockState:
    """Let row s continue from what row `parents[s]` stored before the call.

    All rows change at once. `parents[s] == s` keeps the row. NO_BLOCK, and any other
    number that is not a row, empties it. One call is fork, beam reorder and free. No
    block is copied; only references are counted.

    Args:
      state: donate it under jit.
      parents: i32[S].

    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=3, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([3, 1, 0]))
    >>> state = fork(state, jnp.array([0, NO_BLOCK, 0]))
    >>> state.block_tables.tolist(), state.ref_counts.tolist()
    ([[0, 1], [-1, -1], [0, 1]], [2, 2, 0, 0])

    Source: paper Sections 4.4 (sharing) and 5.2 (fork, append, free suffice).
    """
    parents = row_array("parents", parents, state)
    (max_seqs,) = state.context_lens.shape
    own = jnp.arange(max_seqs, dtype=jnp.int32)
    is_child = parents[None, :] == own[:, None]
    num_children = jnp.sum(is_child, axis=1, dtype=jnp.int32)
    has_parent = (parents >= 0) & (parents < max_seqs)
    tables = take(state.block_tables, parents)
    return dataclasses.replace(
        state,
        ref_counts=_add_refs(state, (num_children - 1)[:, None]),
        block_tables=jnp.where(has_parent[:, None], tables, NO_BLOCK),
        context_lens=jnp.where(has_parent, take(state.context_lens, parents), 0),
        drops=fork_drops(state.drops, parents, has_parent),
    )


def adopt(state: BlockState, block_tables: jax.Array, lens: jax.Array) -> BlockState:
    """Let empty rows use blocks that are already in the pool.

    Args:
      state: donate it under jit.
      block_tables: i32[S, M], the blocks; entries after a row's length are ignored.
        In front of a window they may be NO_BLOCK.
      lens: i32[S], tokens in these blocks; 0 leaves a row unchanged, and a row that is
        not empty is always left unchanged.

    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([3, 0]))
    >>> state = adopt(state, state.block_tables[jnp.array([0, 0])], jnp.array([0, 2]))
    >>> state.block_tables.tolist(), state.ref_counts.tolist()
    ([[0, 1], [0, -1]], [2, 1, 0, 0])
    """
    lens = row_array("lens", lens, state)
    if len(state.windows) > 1:
        tables = dataclasses.replace(state, block_tables=block_tables)
        tables = cache_groups.split_groups(tables).block_tables
        split, lens = _split(state, lens)
        return cache_groups.join_groups(adopt(split, tables, lens), state)
    _, max_blocks_per_seq = state.block_tables.shape
    adopts = (lens > 0) & (state.context_lens == 0)
    column = jnp.arange(max_blocks_per_seq, dtype=jnp.int32)[None, :]
    is_adopted = adopts[:, None] & (column < cdiv(lens, state.block_size)[:, None])
    state = dataclasses.replace(
        state,
        block_tables=jnp.where(is_adopted, block_tables, state.block_tables),
        context_lens=jnp.where(adopts, lens, state.context_lens),
    )
    counts = _add_refs(state, is_adopted.astype(jnp.int32))
    return dataclasses.replace(state, ref_counts=counts)


def adopt_from(
    state: BlockState, source_rows: jax.Array, lens: jax.Array
) -> BlockState:
    """Let empty rows use the first blocks of other rows, and what these have dropped.

    Args:
      state: donate it under jit.
      source_rows: i32[S], the row whose blocks a row uses.
      lens: i32[S], as for `adopt`.
    """
    adopts = (lens > 0) & (state.context_lens == 0)
    sources_drops = jax.tree.map(lambda column: take(column, source_rows), state.drops)
    drops = where_rows(adopts, sources_drops, state.drops)
    state = adopt(state, take(state.block_tables, source_rows), lens)
    return dataclasses.replace(state, drops=drops)


def free(state: BlockState, rows: jax.Array) -> BlockState:
    """Empty the rows that are True in `rows`, bool[S].

    A block becomes free when no row uses it any more.
    """
    rows = row_array("rows", rows, state, dtype=jnp.bool_)
    return dataclasses.replace(
        state,
        ref_counts=_add_refs(state, -rows.astype(jnp.int32)[:, None]),
        block_tables=jnp.where(rows[:, None], NO_BLOCK, state.block_tables),
        context_lens=jnp.where(rows, 0, state.context_lens),
        drops=where_rows(rows, jax.tree.map(jnp.zeros_like, state.drops), state.drops),
    )


def truncate(state: BlockState, context_lens: jax.Array) -> BlockState:
    """Shorten each row to its first `context_lens` tokens, i32[S].

    Rows only shrink: a number that is negative or not below the row's length leaves the
    row unchanged. Blocks after the new end are released. A row may end inside a block
    that other rows share; its next append copies that block.
    """
    context_lens = row_array("context_lens", context_lens, state)
    if len(state.windows) > 1:
        split = truncate(*_split(state, context_lens))
        return cache_groups.join_groups(split, state)
    _, max_blocks_per_seq = state.block_tables.shape
    is_shorter = (context_lens >= 0) & (context_lens < state.context_lens)
    context_lens = jnp.where(is_shorter, context_lens, state.context_lens)

    shorter = dataclasses.replace(state, context_lens=context_lens)
    column = jnp.arange(max_blocks_per_seq, dtype=jnp.int32)[None, :]
    is_released = column >= num_blocks_per_row(shorter)[:, None]
    return dataclasses.replace(
        shorter,
        ref_counts=_add_refs(state, -is_released.astype(jnp.int32)),
        block_tables=jnp.where(is_released, NO_BLOCK, state.block_tables),
    )


def exclusive_blocks(state: BlockState, order: jax.Array) -> jax.Array:
    """Return the blocks that each row frees if rows are freed from last to first.

    Every used block is counted once, for the first of its rows by `order` (ties: by row
    number). So the sum over the last rows by `order` is the number of blocks that
    become free when exactly these rows are freed.

    Args:
      state: the block tables.
      order: i32[S], sort keys.

    Returns:
      i32[S].

    >>> append = jax.jit(append)
    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([2, 0]))
    >>> state, _ = append(fork(state, jnp.array([0, 0])), jnp.array([0, 1]))
    >>> exclusive_blocks(state, jnp.array([0, 1])).tolist()  # row 1 is freed first
    [1, 1]
    >>> exclusive_blocks(state, jnp.array([1, 0])).tolist()
    [0, 2]
    """
    order = row_array("order", order, state)
    (num_blocks,) = state.ref_counts.shape
    own = jnp.arange(order.size, dtype=jnp.int32)
    is_before = order[None, :] < order[:, None]
    is_before |= (order[None, :] == order[:, None]) & (own[None, :] < own[:, None])
    rank = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    tables = state.block_tables
    rank_SM = jnp.broadcast_to(rank[:, None], tables.shape)
    first = jnp.full((num_blocks,), order.size, jnp.int32)
    is_first = (take(least(first, tables, rank_SM), tables) == rank_SM) & (
        tables != NO_BLOCK
    )
    return jnp.sum(is_first, axis=1, dtype=jnp.int32)


def slots(state: BlockState, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the slot of each token, block * block_size + offset.

    The slot is -1 if the row has no block for the position, if the position is
    negative, or if `rows` is not a row. Padding tokens have `rows == -1`.

    Args:
      state: the block tables.
      rows: i32[T].
      positions: i32[T], the token's position in its sequence.

    Returns:
      i32[T]; i32[G, T] if there are several cache groups.

    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([1, 3]))
    >>> slots(state, jnp.array([0, 1, 1, 1, -1]), jnp.array([0, 0, 1, 2, 0])).tolist()
    [0, 2, 3, 4, -1]
    """
    if (number := len(state.windows)) > 1:
        size = state.context_lens.size
        group = jnp.arange(number, dtype=jnp.int32)[:, None]
        is_row = (rows >= 0) & (rows < size)
        rows = jnp.where(is_row[None, :], rows[None, :] * number + group, -1)
        positions = jnp.broadcast_to(positions[None, :], (number, positions.size))
        return slots(cache_groups.split_groups(state), rows, positions)
    size = state.block_size
    column, offset = floor_div(positions, size), remainder(positions, size)
    block = get_or(state.block_tables, (rows, column), NO_BLOCK)
    has_block = (block != NO_BLOCK) & (positions >= 0)
    return jnp.where(has_block, block * size + offset, -1)


def _split(state: BlockState, values: jax.Array) -> tuple[BlockState, jax.Array]:
    """Return a row for each group of each row, with values [S] for each of them."""
    return cache_groups.split_groups(state), jnp.repeat(values, len(state.windows))


def demand(state: BlockState, num_tokens: jax.Array) -> Demand:
    """Return what `append(state, num_tokens)` needs."""
    if len(state.windows) > 1:
        state, num_tokens = _split(state, num_tokens)
    num_used = num_blocks_per_row(state)
    last_column = jnp.maximum(num_used - 1, 0)
    rows = jnp.arange(num_used.size, dtype=jnp.int32)
    last = take(state.block_tables, rows, last_column)

    # Rows are served in order, so the n-th writer of a block finds n - 1 references
    # removed. It writes in place if only its own reference is left, and copies if not.
    is_writer = (num_tokens > 0) & (
        remainder(state.context_lens, state.block_size) != 0
    )
    is_before_SS = is_writer[None, :] & (rows[None, :] <= rows[:, None])
    is_before_SS &= last[None, :] == last[:, None]
    nth = jnp.sum(is_before_SS, axis=1, dtype=jnp.int32)
    refs = take(state.ref_counts, last)
    copies = (is_writer & (nth < refs)).astype(jnp.int32)

    unused = num_used * state.block_size - state.context_lens
    overflow = jnp.maximum(num_tokens, 0) - unused
    return Demand(last, copies, jnp.maximum(cdiv(overflow, state.block_size), 0))


def _take_free_blocks(
    state: BlockState, free_bits: FreeBits, count: jax.Array
) -> jax.Array:
    """Return the `count` lowest free blocks, then arbitrary numbers.

    The length is the largest number of blocks that one append can take.
    """
    max_seqs, _ = state.block_tables.shape
    most = min(state.ref_counts.size, state.block_tables.size)
    few = min(most, max_seqs + _PROMPT_BLOCKS)
    if few == most:
        return lowest_free_blocks(free_bits, most)
    return lax.cond(
        count <= few,
        lambda: jnp.pad(lowest_free_blocks(free_bits, few), (0, most - few)),
        lambda: lowest_free_blocks(free_bits, most),
    )


def _refs_after_append(
    state: BlockState,
    is_free: jax.Array,
    taken: jax.Array,
    num_taken: jax.Array,
    copied: jax.Array,
) -> jax.Array:
    """Return the reference counts after the blocks were taken, i32[N].

    The lowest free blocks are taken, so the highest taken block tells which ones.
    `copied`, i32[S], are blocks that lose a reference, NO_BLOCK where none.
    """
    (num_blocks,) = state.ref_counts.shape
    highest = jnp.where(num_taken > 0, take(taken, num_taken - 1), -1)
    is_taken = is_free & (jnp.arange(num_blocks, dtype=jnp.int32) <= highest)
    return add(state.ref_counts + is_taken.astype(jnp.int32), copied, -1)


def _tables_after_append(
    state: BlockState,
    taken: jax.Array,
    starts: jax.Array,
    copies: jax.Array,
    added: jax.Array,
) -> jax.Array:
    """Return the block tables with each row's taken blocks, i32[S, M].

    A copy replaces the row's last block, and new blocks follow it, so the blocks that a
    row takes fill one contiguous range of its table.
    """
    _, max_blocks_per_seq = state.block_tables.shape
    first_column = num_blocks_per_row(state) - copies
    column = jnp.arange(max_blocks_per_seq, dtype=jnp.int32)
    offset_SM = column[None, :] - first_column[:, None]
    return jnp.where(
        (offset_SM >= 0) & (offset_SM < (copies + added)[:, None]),
        take(taken, starts[:, None] + offset_SM),
        state.block_tables,
    )


def _add_refs(state: BlockState, amount_SM: jax.Array) -> jax.Array:
    """Return the reference counts with each entry's amount added to its block, i32[N].

    `amount_SM` broadcasts to the block tables.
    """
    amount_SM = jnp.broadcast_to(amount_SM, state.block_tables.shape)
    return add(state.ref_counts, state.block_tables, amount_SM)
