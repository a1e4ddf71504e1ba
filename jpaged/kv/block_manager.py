"""Block manager: which physical block of KV memory holds which tokens.

Place on the road: scheduler -> [block_manager] -> step inputs -> decoder. After
decoding the engine comes back here once, with `fork`.

A row's tokens lie in its blocks in order, `block_size` to a block; rows that share a
beginning share its blocks, and a block that is shared is copied before it is written.
Everything is a pure function of `BlockState`: it can be jitted, vmapped and carried
through `lax.while_loop`, and works on all rows at once. What can be derived (the free
blocks, the number of blocks of a row) is not stored.

Shape letters: S rows, N blocks, M blocks per row, P tokens per block, T tokens.

Source: Kwon et al. 2023, Sections 4.2 to 4.4. https://arxiv.org/abs/2309.06180
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.arithmetic import cdiv

NO_BLOCK = -1
_WORD_BITS = 32
# An append looks for a free block per row and this many for prompt chunks. One that
# takes more pays for the largest that could be asked.
_PROMPT_BLOCKS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockState:
    """The whole memory of the block manager, as a pytree."""

    ref_counts: jax.Array  # i32[N], block-table entries that point at it; 0 = free
    block_tables: jax.Array  # i32[S, M], NO_BLOCK after the last used entry
    context_lens: jax.Array  # i32[S], tokens stored; 0 = the row is empty
    block_size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Append:
    """What an append decided, and what must be copied before tokens are written."""

    ok: jax.Array  # bool[], False: refused, and nothing changed
    copy_src: jax.Array  # i32[S], block to copy from, NO_BLOCK where none
    copy_dst: jax.Array  # i32[S], block to copy to, NO_BLOCK where none


def init_state(
    *, num_blocks: int, block_size: int, max_seqs: int, max_blocks_per_seq: int
) -> BlockState:
    """A state in which every block is free and every row is empty.

    Raises:
      ValueError: a size is below 1, or slot numbers would not fit into int32.
    """
    sizes = dict(
        num_blocks=num_blocks,
        block_size=block_size,
        max_seqs=max_seqs,
        max_blocks_per_seq=max_blocks_per_seq,
    )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name in ("num_blocks", "max_blocks_per_seq"):
        if sizes[name] * block_size >= 2**31:
            raise ValueError(
                f"{name} * block_size: expected less than 2**31 (slots are int32), "
                f"got {sizes[name]} * {block_size}; use fewer blocks"
            )
    return BlockState(
        ref_counts=jnp.zeros((num_blocks,), jnp.int32),
        block_tables=jnp.full((max_seqs, max_blocks_per_seq), NO_BLOCK, jnp.int32),
        context_lens=jnp.zeros((max_seqs,), jnp.int32),
        block_size=block_size,
    )


def num_free_blocks(state: BlockState) -> jax.Array:
    """The number of blocks that no row uses, i32[]."""
    return jnp.sum(state.ref_counts == 0, dtype=jnp.int32)


def append(
    state: BlockState, num_tokens: jax.Array, kept: jax.Array | None = None
) -> tuple[BlockState, Append]:
    """The state with room for `num_tokens` more tokens per row, and the copies to do.

    A row that would write into a block that other rows still use gets a copy of it
    first (copy-on-write). Where several owners append in one call they are served in
    row order, so the last owner left writes in place. The copies of one call are
    independent of each other: no destination is a source. Free blocks are given out
    lowest first.

    All or nothing: `ok` is False, and nothing changes, where too few blocks are free,
    where a row's table has no room, and where a `num_tokens` is negative.

    Args:
      state: donate it under jit; nothing of it is needed afterwards.
      num_tokens: i32[S], tokens to add; 0 = the row takes no part.
      kept: bool[N], blocks that are not given out though no row uses them, for what
        they hold may be wanted again (see `prefix_cache`); None keeps none.

    >>> append, fork = jax.jit(append), jax.jit(fork)
    >>> state = init_state(num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
    >>> state, _ = append(state, jnp.array([6, 0]))
    >>> state = fork(state, jnp.array([0, 0]))  # row 1 continues what row 0 holds
    >>> state, appended = append(state, jnp.array([1, 1]))
    >>> state.block_tables.tolist()  # block 0 is full and stays shared
    [[0, 2, -1], [0, 1, -1]]
    >>> appended.copy_src.tolist(), appended.copy_dst.tolist()
    ([1, -1], [2, -1])
    >>> state.ref_counts.tolist()
    [2, 1, 1, 0, 0, 0, 0, 0]

    Source: paper Sections 4.3 and 4.4.
    """
    num_tokens = _per_row("num_tokens", num_tokens, state)
    max_seqs, max_blocks_per_seq = state.block_tables.shape
    (num_blocks,) = state.ref_counts.shape

    last, copies, added = _demand(state, num_tokens)
    room = max_blocks_per_seq * state.block_size - state.context_lens
    fits = (num_tokens >= 0) & (num_tokens <= room)
    is_free = state.ref_counts == 0
    if kept is not None:
        is_free &= ~kept
    words, num_free = _free_words(is_free)
    ok = jnp.all(fits) & (jnp.sum(copies + added) <= num_free[-1])
    # All or nothing: a refused append asks for nothing, so that nothing changes below.
    num_tokens, copies, added = (
        jnp.where(ok, asked, 0) for asked in (num_tokens, copies, added)
    )

    # A row takes the blocks taken[start : start + copies + added]. The first replaces
    # its last block if that is copied, so they fill one range of its table.
    ends = jnp.cumsum(copies + added)
    start = ends - copies - added
    most = min(num_blocks, max_seqs * max_blocks_per_seq)
    few = min(most, max_seqs + _PROMPT_BLOCKS)
    taken = lax.cond(
        ends[-1] <= few,
        lambda: jnp.pad(_first_free(words, num_free, few), (0, most - few)),
        lambda: _first_free(words, num_free, most),
    )
    first_column = _blocks_held(state) - copies
    offset_SM = jnp.arange(max_blocks_per_seq)[None, :] - first_column[:, None]
    block_tables = jnp.where(
        (offset_SM >= 0) & (offset_SM < (copies + added)[:, None]),
        taken.at[start[:, None] + offset_SM].get(mode="clip"),
        state.block_tables,
    )

    # The lowest free blocks were taken, so the highest of them tells which they are.
    highest = jnp.where(ends[-1] > 0, taken.at[ends[-1] - 1].get(mode="clip"), -1)
    is_taken = is_free & (jnp.arange(num_blocks) <= highest)
    is_copy = copies > 0
    # In JAX the index -1 is not out of bounds: it wraps around to the last element.
    # Send what is not meant past the end, where mode="drop" discards it.
    ref_counts = state.ref_counts + is_taken.astype(jnp.int32)
    copied = jnp.where(is_copy, last, num_blocks)
    ref_counts = ref_counts.at[copied].add(-1, mode="drop")

    state = dataclasses.replace(
        state,
        ref_counts=ref_counts,
        block_tables=block_tables,
        context_lens=state.context_lens + num_tokens,
    )
    return state, Append(
        ok=ok,
        copy_src=jnp.where(is_copy, last, NO_BLOCK),
        copy_dst=jnp.where(is_copy, taken.at[start].get(mode="clip"), NO_BLOCK),
    )


def blocks_needed(state: BlockState, num_tokens: jax.Array) -> jax.Array:
    """The blocks that `append(state, num_tokens)` would take for each row, i32[S].

    Copies are counted; what is free and what the tables can hold is not asked, and a
    negative number of tokens takes none. With some rows' `num_tokens` set to 0 the sum
    never grows, but a row's own count may: it may no longer be the last owner.
    """
    _, copies, added = _demand(state, _per_row("num_tokens", num_tokens, state))
    return copies + added


def fork(state: BlockState, parents: jax.Array) -> BlockState:
    """The state in which row s holds what row `parents[s]` held.

    All rows move at once. `parents[s] == s` keeps the row, and NO_BLOCK empties it, as
    does any other number that is no row. One call is fork, beam reorder and free; no
    block is copied, only counted. The identity costs next to nothing.

    Args:
      state: as it was; donate it under jit.
      parents: i32[S].

    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=3, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([3, 1, 0]))
    >>> state = fork(state, jnp.array([0, NO_BLOCK, 0]))
    >>> state.block_tables.tolist(), state.ref_counts.tolist()
    ([[0, 1], [-1, -1], [0, 1]], [2, 2, 0, 0])

    Source: paper Sections 4.4 (sharing) and 5.2 (fork, append, free suffice).
    """
    parents = _per_row("parents", parents, state)
    (max_seqs,) = state.context_lens.shape
    rows = jnp.arange(max_seqs)
    parents = jnp.where((parents >= 0) & (parents < max_seqs), parents, max_seqs)

    def move() -> BlockState:
        num_children = jnp.zeros_like(rows).at[parents].add(1, mode="drop")
        return dataclasses.replace(
            state,
            ref_counts=_add_refs(state, (num_children - 1)[:, None]),
            block_tables=state.block_tables.at[parents].get(
                mode="fill", fill_value=NO_BLOCK
            ),
            context_lens=state.context_lens.at[parents].get(mode="fill", fill_value=0),
        )

    return lax.cond(jnp.any(parents != rows), move, lambda: state)


def adopt(state: BlockState, block_tables: jax.Array, lens: jax.Array) -> BlockState:
    """The state in which empty rows hold full blocks that are in the pool already.

    Args:
      state: as it was; donate it under jit.
      block_tables: i32[S, M], the blocks; entries past a row's length are not read.
      lens: i32[S], tokens in them, whole blocks; 0 leaves a row as it is, and so does
        any number where the row is not empty.

    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([3, 0]))
    >>> state = adopt(state, state.block_tables[jnp.array([0, 0])], jnp.array([0, 2]))
    >>> state.block_tables.tolist(), state.ref_counts.tolist()
    ([[0, 1], [0, -1]], [2, 1, 0, 0])
    """
    lens = _per_row("lens", lens, state)
    _, max_blocks_per_seq = state.block_tables.shape
    takes = (lens > 0) & (state.context_lens == 0)
    column = jnp.arange(max_blocks_per_seq)[None, :]
    is_held = takes[:, None] & (column < (lens // state.block_size)[:, None])
    state = dataclasses.replace(
        state,
        block_tables=jnp.where(is_held, block_tables, state.block_tables),
        context_lens=jnp.where(takes, lens, state.context_lens),
    )
    counts = _add_refs(state, jnp.where(is_held, 1, 0))
    return dataclasses.replace(state, ref_counts=counts)


def free(state: BlockState, rows: jax.Array) -> BlockState:
    """The state with the marked rows emptied; `rows` is bool[S].

    A block becomes free when its last row is.
    """
    rows = _per_row("rows", rows, state, dtype=jnp.bool_)
    (max_seqs,) = rows.shape
    return fork(state, jnp.where(rows, NO_BLOCK, jnp.arange(max_seqs)))


def truncate(state: BlockState, context_lens: jax.Array) -> BlockState:
    """The state with each row cut back to its first `context_lens` tokens, i32[S].

    It may only shrink: a row whose number is negative, or not below its length, stays
    as it is. Blocks past the new end are let go. A row may end inside a block that
    others hold; its next append copies that block.
    """
    context_lens = _per_row("context_lens", context_lens, state)
    _, max_blocks_per_seq = state.block_tables.shape
    is_cut = (context_lens >= 0) & (context_lens < state.context_lens)
    context_lens = jnp.where(is_cut, context_lens, state.context_lens)

    def cut() -> BlockState:
        shorter = dataclasses.replace(state, context_lens=context_lens)
        column = jnp.arange(max_blocks_per_seq)[None, :]
        is_dropped = column >= _blocks_held(shorter)[:, None]
        return dataclasses.replace(
            shorter,
            ref_counts=_add_refs(state, jnp.where(is_dropped, -1, 0)),
            block_tables=jnp.where(is_dropped, NO_BLOCK, state.block_tables),
        )

    return lax.cond(jnp.any(is_cut), cut, lambda: state)


def exclusive_blocks(state: BlockState, order: jax.Array) -> jax.Array:
    """The blocks that become free with each row when rows go from the back, i32[S].

    Every used block is counted once, for the first of its rows by `order` (then by row
    number). So the sum over the last rows by `order` is what freeing exactly these
    rows gives back.

    >>> append = jax.jit(append)
    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([2, 0]))
    >>> state, _ = append(fork(state, jnp.array([0, 0])), jnp.array([0, 1]))
    >>> exclusive_blocks(state, jnp.array([0, 1])).tolist()  # row 1 goes first
    [1, 1]
    >>> exclusive_blocks(state, jnp.array([1, 0])).tolist()
    [0, 2]
    """
    order = _per_row("order", order, state)
    (num_blocks,) = state.ref_counts.shape
    (max_seqs,) = order.shape

    def count_first_owners() -> jax.Array:
        sorted_rows = jnp.argsort(order, stable=True)
        place = jnp.zeros_like(order).at[sorted_rows].set(jnp.arange(max_seqs))
        place_SM = jnp.broadcast_to(place[:, None], state.block_tables.shape)
        first = jnp.full((num_blocks,), max_seqs, jnp.int32)
        first = first.at[_past_the_end(state)].min(place_SM, mode="drop")
        # NO_BLOCK reads max_seqs, which is nobody's place.
        first_SM = first.at[_past_the_end(state)].get(mode="fill", fill_value=max_seqs)
        return jnp.sum(first_SM == place_SM, axis=1, dtype=jnp.int32)

    is_any_shared = jnp.any(state.ref_counts > 1)
    return lax.cond(is_any_shared, count_first_owners, lambda: _blocks_held(state))


def slots(state: BlockState, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Where each token's keys and values lie, i32[T]: block * block_size + offset.

    -1 where the row has no block for the position, where it is negative, and where
    `rows` is no row: padding tokens are `rows == -1`.

    >>> state = init_state(num_blocks=4, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    >>> state, _ = append(state, jnp.array([1, 3]))
    >>> slots(state, jnp.array([0, 1, 1, 1, -1]), jnp.array([0, 0, 1, 2, 0])).tolist()
    [0, 2, 3, 4, -1]
    """
    max_seqs, max_blocks_per_seq = state.block_tables.shape
    column, offset = positions // state.block_size, positions % state.block_size
    block = state.block_tables.at[
        jnp.where(rows < 0, max_seqs, rows),
        jnp.where(positions < 0, max_blocks_per_seq, column),
    ].get(mode="fill", fill_value=NO_BLOCK)
    return jnp.where(block == NO_BLOCK, -1, block * state.block_size + offset)


def violations(state: BlockState) -> list[str]:
    """What is wrong with the state, one sentence each; an empty list if it is sound.

    Host side, for tests and debugging: everything is counted anew from the tables, one
    row after the other, with nothing of the functions above.
    """
    ref_counts = np.asarray(state.ref_counts)
    block_tables = np.asarray(state.block_tables)
    (num_blocks,) = ref_counts.shape
    _, max_blocks_per_seq = block_tables.shape
    found: list[str] = []
    entries = np.zeros((num_blocks,), np.int64)
    for row, length in enumerate(np.asarray(state.context_lens).tolist()):
        if not 0 <= length <= max_blocks_per_seq * state.block_size:
            found.append(f"row {row}: its length {length} does not fit its table")
        num_held = max(0, cdiv(length, state.block_size))
        held, rest = block_tables[row, :num_held], block_tables[row, num_held:]
        is_block = (held >= 0) & (held < num_blocks)
        if not is_block.all():
            found.append(f"row {row}: of {held.tolist()} not all are blocks")
        if (rest != NO_BLOCK).any():
            found.append(f"row {row}: {rest.tolist()} lie past its {length} tokens")
        blocks, times = np.unique(held[is_block], return_counts=True)
        if (times > 1).any():
            found.append(f"row {row}: holds {blocks[times > 1].tolist()} twice")
        entries[blocks] += times
    for block in np.flatnonzero(entries != ref_counts).tolist():
        found.append(
            f"block {block}: {entries[block]} table entries point at it, "
            f"its reference count is {ref_counts[block]}"
        )
    return found


def _per_row(
    name: str, value: jax.Array, state: BlockState, dtype: type = jnp.int32
) -> jax.Array:
    """`value` as [S] of `dtype`; a ValueError if it is not one such number per row."""
    value = jnp.asarray(value)
    kind = jnp.bool_ if dtype == jnp.bool_ else jnp.integer
    if value.shape != state.context_lens.shape or not jnp.issubdtype(value.dtype, kind):
        raise ValueError(
            f"{name}: expected {kind.__name__} of shape {state.context_lens.shape}, "
            f"one per row, got {value.dtype} of shape {value.shape}"
        )
    return value.astype(dtype)


def _blocks_held(state: BlockState) -> jax.Array:
    """The number of blocks of each row, i32[S]."""
    return cdiv(state.context_lens, state.block_size)


def _past_the_end(state: BlockState) -> jax.Array:
    """The block tables with N, which mode="drop" discards, for NO_BLOCK; i32[S, M]."""
    (num_blocks,) = state.ref_counts.shape
    return jnp.where(state.block_tables == NO_BLOCK, num_blocks, state.block_tables)


def _add_refs(state: BlockState, amount_SM: jax.Array) -> jax.Array:
    """Reference counts after each table entry's block gained its amount, i32[N]."""
    amount_SM = jnp.broadcast_to(amount_SM, state.block_tables.shape)
    return state.ref_counts.at[_past_the_end(state)].add(amount_SM, mode="drop")


def _demand(
    state: BlockState, num_tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What an append asks for: last block, copies (0 or 1), blocks added; i32[S] each.

    An empty row has no last block and gets some number, which nobody reads.
    """
    held = _blocks_held(state)
    last_column = jnp.maximum(held - 1, 0)[:, None]
    last = jnp.take_along_axis(state.block_tables, last_column, axis=1)[:, 0]

    # Served in row order, the n-th writer of a block finds n - 1 references gone: it
    # writes in place if its own is the last one left, and copies otherwise.
    is_writer = (num_tokens > 0) & (state.context_lens % state.block_size != 0)
    rows = jnp.arange(last.size)
    is_before_SS = is_writer[None, :] & (rows[None, :] <= rows[:, None])
    is_before_SS &= last[None, :] == last[:, None]
    nth = jnp.sum(is_before_SS, axis=1, dtype=jnp.int32)
    refs = state.ref_counts.at[last].get(mode="clip")
    copies = (is_writer & (nth < refs)).astype(jnp.int32)

    unused = held * state.block_size - state.context_lens
    overflow = jnp.maximum(num_tokens, 0) - unused
    return last, copies, jnp.maximum(cdiv(overflow, state.block_size), 0)


def _free_words(is_free: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One bit per block, set where it is free, and the free blocks up to each word.

    Returns u32[W] and i32[W], with 32 blocks to a word.
    """
    (num_blocks,) = is_free.shape
    is_free = jnp.pad(is_free, (0, -num_blocks % _WORD_BITS))
    bit = jnp.uint32(1) << jnp.arange(_WORD_BITS, dtype=jnp.uint32)
    bits = jnp.where(is_free.reshape(-1, _WORD_BITS), bit[None, :], jnp.uint32(0))
    words = jnp.sum(bits, axis=1, dtype=jnp.uint32)
    return words, jnp.cumsum(lax.population_count(words).astype(jnp.int32))


def _first_free(words: jax.Array, num_free: jax.Array, count: int) -> jax.Array:
    """The lowest free blocks in order, i32[count]; past the last one, some number.

    The n-th free block is a binary search for its word and five halvings of the word,
    for all n at once: after the packing, nothing is of size N.
    """
    (num_words,) = words.shape
    nth = jnp.arange(count, dtype=jnp.int32)
    index = jnp.searchsorted(num_free, nth, side="right", method="scan_unrolled")
    index = jnp.minimum(index, num_words - 1).astype(jnp.int32)
    word = words[index]
    # From here on `nth` is the number of free blocks to pass inside the word.
    nth = nth - num_free[index] + lax.population_count(word).astype(jnp.int32)
    block = index * _WORD_BITS
    for half in (16, 8, 4, 2, 1):
        in_low = lax.population_count(word & jnp.uint32(2**half - 1)).astype(jnp.int32)
        is_high = nth >= in_low
        nth = jnp.where(is_high, nth - in_low, nth)
        word = jnp.where(is_high, word >> half, word)
        block = jnp.where(is_high, block + half, block)
    return block
