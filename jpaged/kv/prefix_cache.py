"""Prefix cache: which blocks hold which prefixes, a radix tree as arrays.

Place on the road: beside the block manager. Before a request is scheduled, `match`
finds the blocks of its beginning; after a step, `insert` enters the blocks that became
full; `evict` gives unused ones back when blocks are needed.

A full block can be a *node* of the tree. Its key is its parent, the block of the tokens
before, and its own tokens, and both are compared whenever it is looked up: the hash
only says in which bucket to look. A node keeps its block when its last row goes: its
`ref_counts` is 0 then, so it counts as free, but `append` is told to keep it until
`evict` gives it up. Who overwrites a node's tokens has to `forget` it.

Rows and tree agree: of the blocks of a row, those that are nodes come first and are a
path from the root. So whoever uses a node uses its ancestors, and none of them has been
used less recently than it: eviction never leaves a node without its parent.

Shape letters: S rows, N blocks, M blocks per row, P tokens per block, L tokens, B rows
of a lookup, U buckets, W ways of a bucket.

Source: block hashes as in vLLM's automatic prefix caching, the tree as in Zheng et al.
2024 (SGLang, section 3). https://arxiv.org/abs/2312.07104
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.kv.block_manager import NO_BLOCK, BlockState

NOT_CACHED = -1
_NUM_WAYS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Which blocks are nodes, with their keys, and where they are found; a pytree.

    The root is no block: the parent of a first block is N.
    """

    parents: jax.Array  # i32[N], the block of the tokens before, N for a first block;
    # NOT_CACHED where the block is no node, and then the next four mean nothing
    tokens: jax.Array  # i32[N, P]
    depths: jax.Array  # i32[N], 0 for a first block
    last_used: jax.Array  # i32[N], clock of the last use
    ways: jax.Array  # i32[N], the place in `buckets`, flat, at which the node stands
    buckets: jax.Array  # i32[U, W], blocks; where `ways` does not point back, the way
    # is empty: so eviction does not have to write here


def init_cache(num_blocks: int, block_size: int) -> PrefixCache:
    """A cache for a pool of `num_blocks`, in which nothing is known.

    Raises:
      ValueError: a size is below 1, or a table of this size needs more than int32.
    """
    for name, size in dict(num_blocks=num_blocks, block_size=block_size).items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    # At most one node per bucket in the mean: with 8 ways one in a million is refused.
    num_buckets = 1 << (num_blocks - 1).bit_length()
    if num_buckets * _NUM_WAYS >= 2**31:
        raise ValueError(f"num_blocks: expected at most {2**27}, got {num_blocks}")
    return PrefixCache(
        parents=jnp.full((num_blocks,), NOT_CACHED, jnp.int32),
        tokens=jnp.zeros((num_blocks, block_size), jnp.int32),
        depths=jnp.zeros((num_blocks,), jnp.int32),
        last_used=jnp.zeros((num_blocks,), jnp.int32),
        ways=jnp.zeros((num_blocks,), jnp.int32),
        buckets=jnp.full((num_buckets, _NUM_WAYS), NO_BLOCK, jnp.int32),
    )


def is_cached(cache: PrefixCache) -> jax.Array:
    """Which blocks are nodes, bool[N]."""
    return cache.parents != NOT_CACHED


def match(
    cache: PrefixCache,
    tokens: jax.Array,
    max_lens: jax.Array,
    seq_indices: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The longest known beginning of each row of tokens, in whole blocks.

    Nothing is counted or touched: whoever uses a path must let a row hold it before
    anything is evicted. The loop is as long as the longest path found.

    Args:
      cache: what is known.
      tokens: i32[B, L].
      max_lens: i32[B], tokens of each row that may be found; 0 asks for none.
      places: i32[B] or None; where given, row b's tokens are `tokens[seq_indices[b]]`.

    Returns:
      paths: i32[B, M] with M = ceil(L / P), the blocks, NO_BLOCK after the last.
      lens: i32[B], the tokens in them, a multiple of P.

    >>> from jpaged import block_manager
    >>> blocks = block_manager.init_state(
    ...     num_blocks=8, block_size=2, max_seqs=1, max_blocks_per_seq=4)
    >>> blocks, _ = block_manager.append(blocks, jnp.array([5]))
    >>> cache, blocks = insert(
    ...     init_cache(8, 2), blocks, jnp.array([[5, 6, 7, 8, 9]]), clock=0)
    >>> prompts = jnp.array([[5, 6, 7, 8, 1], [5, 6, 7, 0, 0], [6, 5, 7, 8, 9]])
    >>> paths, lens = match(cache, prompts, jnp.array([4, 4, 4]))
    >>> paths.tolist(), lens.tolist()
    ([[0, 1, -1], [0, -1, -1], [-1, -1, -1]], [4, 2, 0])
    """
    num_blocks, block_size = cache.tokens.shape
    num_rows, length = max_lens.shape[0], tokens.shape[1]
    num_full = jnp.clip(max_lens.astype(jnp.int32), 0, length) // block_size
    paths = jnp.full((num_rows, cdiv(length, block_size)), NO_BLOCK, jnp.int32)
    parents = jnp.full((num_rows,), num_blocks, jnp.int32)

    def goes_on(carry) -> jax.Array:
        _, _, depths, ends = carry
        return jnp.any(depths < ends)

    def descend(carry):
        paths, parents, depths, ends = carry
        rows = jnp.arange(num_rows)
        chunks = _chunks(tokens, seq_indices, depths, block_size)
        found = _look_up(cache, parents, chunks).blocks
        is_found = (found != NO_BLOCK) & (depths < ends)
        columns = jnp.where(is_found, depths, paths.shape[1])
        paths = paths.at[rows, columns].set(found, mode="drop")
        depths = depths + is_found.astype(jnp.int32)
        return paths, found, depths, jnp.where(is_found, ends, depths)

    carry = (paths, parents, jnp.zeros_like(parents), num_full)
    paths, _, depths, _ = lax.while_loop(goes_on, descend, carry)
    return paths, depths * block_size


def insert(
    cache: PrefixCache,
    blocks: BlockState,
    tokens: jax.Array,
    clock: jax.Array | int,
    seq_indices: jax.Array | None = None,
) -> tuple[PrefixCache, BlockState]:
    """Cache and blocks after the full blocks of all rows have become nodes.

    Where the tree has the same tokens under the same parent in another block, the
    row's table gets the tree's block in place of its own, which loses the reference.
    If rows bring the same key at once, the block of the lowest stays. A block whose
    bucket is full is not entered, and those behind it in its row neither; they are
    tried again in the next call.

    With nothing to enter it looks at one block of each row. Otherwise the loop is as
    long as the most blocks that one row enters, and by one where rows share a bucket.

    Args:
      cache: as it was; donate it under jit.
      blocks: as after the step; donate it. Every token that `context_lens` counts must
        be computed and final.
      tokens: i32[S, L], of each row, in order.
      clock: i32[]; what is in use is used now. May not run backwards.
      places: i32[S] or None; where given, row s's tokens are `tokens[seq_indices[s]]`.
    """
    _, block_size = cache.tokens.shape
    num_full = jnp.minimum(blocks.context_lens, tokens.shape[1]) // block_size
    last = _at_column(blocks.block_tables, num_full - 1)
    # The nodes of a row come first, so that its last full block speaks for all.
    has_new = (num_full > 0) & ~_is_node(cache, last)

    def enter_all(carry):
        cache, blocks = carry
        columns = _num_nodes(cache, blocks.block_tables, num_full)

        def goes_on(carry) -> jax.Array:
            _, _, columns, ends = carry
            return jnp.any(columns < ends)

        def enter(carry):
            cache, blocks, columns, ends = carry
            return _enter(cache, blocks, columns, ends, tokens, seq_indices)

        carry = lax.while_loop(goes_on, enter, (cache, blocks, columns, num_full))
        cache, blocks, _, _ = carry
        # At once, or a node could be younger than its parent.
        return touch(cache, blocks.ref_counts, clock), blocks

    return when(jnp.any(has_new), enter_all, (cache, blocks))


def touch(
    cache: PrefixCache, ref_counts: jax.Array, clock: jax.Array | int
) -> PrefixCache:
    """The cache in which what some row uses was used at `clock`, i32[]."""
    now = jnp.asarray(clock, jnp.int32)
    last_used = jnp.where(ref_counts > 0, now, cache.last_used)
    return dataclasses.replace(cache, last_used=last_used)


def evict(
    cache: PrefixCache, ref_counts: jax.Array, num_needed: jax.Array | int
) -> PrefixCache:
    """The cache after the fewest nodes went that leave `num_needed` blocks free.

    Free is what no row uses and what is no node. Only nodes that no row uses go: the
    least recently used first; of those the deepest, so tails go before heads; of those
    the highest block. All of them go where they do not suffice.

    With enough free blocks it costs one count.
    """
    candidates = is_cached(cache) & (ref_counts == 0)
    num_free = jnp.sum((ref_counts == 0) & ~candidates, dtype=jnp.int32)
    count = jnp.minimum(
        jnp.asarray(num_needed, jnp.int32) - num_free,
        jnp.sum(candidates, dtype=jnp.int32),
    )
    numbers = jnp.arange(candidates.size, dtype=jnp.int32)
    order = (cache.last_used, -cache.depths, -numbers)

    def release_finished(parents: jax.Array) -> jax.Array:
        return jnp.where(_first(candidates, order, count), NOT_CACHED, parents)

    parents = when(count > 0, release_finished, cache.parents)
    return dataclasses.replace(cache, parents=parents)


def forget(cache: PrefixCache, blocks: jax.Array) -> PrefixCache:
    """The cache without the nodes `blocks`, i32[S], and without all behind them.

    For blocks that will hold something else. NO_BLOCK, and what is no node, is ignored.
    The loop is as long as the longest path behind one of them.
    """
    (num_blocks,) = cache.parents.shape
    at = jnp.where(blocks == NO_BLOCK, num_blocks, blocks)
    gone = jnp.zeros((num_blocks,), jnp.bool_).at[at].set(True, mode="drop")

    def follow(carry):
        gone, _ = carry
        is_behind = gone.at[cache.parents].get(mode="fill", fill_value=False)
        more = gone | (is_behind & is_cached(cache))
        return more, jnp.any(more != gone)

    gone, _ = lax.while_loop(lambda carry: carry[1], follow, (gone, jnp.bool_(True)))
    return dataclasses.replace(
        cache, parents=jnp.where(gone, NOT_CACHED, cache.parents)
    )


def violations(
    cache: PrefixCache, blocks: BlockState, tokens: jax.Array | None = None
) -> list[str]:
    """What is wrong with the cache, one sentence each; an empty list if it is sound.

    Host side, for tests and debugging: one node and one row after the other, with
    nothing of the functions above but the choice of buckets. With `tokens`, i32[S, L],
    the nodes of each row are compared with its tokens.
    """
    num_blocks, block_size = cache.tokens.shape
    parents, ways = np.asarray(cache.parents), np.asarray(cache.ways)
    depths, last_used = np.asarray(cache.depths), np.asarray(cache.last_used)
    keys = [tuple(key) for key in np.asarray(cache.tokens).tolist()]
    entries = np.asarray(cache.buckets).ravel()
    homes = np.asarray(_buckets_of(cache, cache.parents, cache.tokens))
    nodes = np.flatnonzero(parents != NOT_CACHED).tolist()
    found: list[str] = []
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for block in nodes:
        parent = int(parents[block])
        if parent != num_blocks:
            if not 0 <= parent < num_blocks or parents[parent] == NOT_CACHED:
                found.append(f"block {block}: its parent {parent} is no node")
                continue
            if last_used[parent] < last_used[block]:
                found.append(f"block {block}: used after its parent {parent}")
        wanted = 0 if parent == num_blocks else int(depths[parent]) + 1
        if depths[block] != wanted:
            found.append(f"block {block}: depth {depths[block]}, expected {wanted}")
        twin = seen.setdefault((parent, keys[block]), block)
        if twin != block:
            found.append(f"block {block}: has the key of block {twin}")
        way = int(ways[block])
        if not 0 <= way < entries.size or entries[way] != block:
            found.append(f"block {block}: does not stand at its place {way}")
        elif way // _NUM_WAYS != homes[block]:
            found.append(f"block {block}: not in its bucket {homes[block]}")
    for row, table in enumerate(np.asarray(blocks.block_tables).tolist()):
        before, is_path = num_blocks, True
        for column, block in enumerate(one for one in table if one != NO_BLOCK):
            is_node = parents[block] != NOT_CACHED
            if is_node and not (is_path and parents[block] == before):
                found.append(f"row {row}: its node {block} is not on a path")
            is_path, before = is_path and is_node, block
            start = column * block_size
            if is_node and tokens is not None:
                length = int(blocks.context_lens[row])
                held = np.asarray(tokens[row])[start : min(length, start + block_size)]
                if tuple(held.tolist()) != keys[block][: len(held)]:
                    found.append(f"row {row}: block {block} is for other tokens")
    return found


class _Found(NamedTuple):
    """What a look-up found for each row."""

    blocks: jax.Array  # i32[S], the node with this key, NO_BLOCK: none
    buckets: jax.Array  # i32[S], where it stands or would
    entries: jax.Array  # i32[S, W], what its bucket holds


def _look_up(cache: PrefixCache, parents: jax.Array, chunks: jax.Array) -> _Found:
    """The nodes under `parents`, i32[S], with the tokens `chunks`, i32[S, P]."""
    buckets = _buckets_of(cache, parents, chunks)
    entries_SW = cache.buckets[buckets]
    # An empty way's block is no node (no parent is NOT_CACHED), or is one with another
    # key, or stands in this bucket twice.
    is_hit_SW = _values(cache.parents, entries_SW, NOT_CACHED) == parents[:, None]
    keys_SWP = cache.tokens.at[entries_SW].get(mode="clip")
    is_hit_SW &= jnp.all(keys_SWP == chunks[:, None, :], axis=2)
    blocks = jnp.max(jnp.where(is_hit_SW, entries_SW, NO_BLOCK), axis=1)
    return _Found(blocks, buckets, entries_SW)


def _enter(cache, blocks, columns, ends, tokens, seq_indices):
    """One node or one hit more for each row that is not at its end, `columns == ends`.

    Returns the cache, the blocks, the columns and the ends, which a full bucket lowers.
    """
    num_blocks, block_size = cache.tokens.shape
    num_buckets, num_ways = cache.buckets.shape
    rows = jnp.arange(columns.size)
    is_live = columns < ends
    chunks = _chunks(tokens, seq_indices, columns, block_size)
    before = _at_column(blocks.block_tables, columns - 1)
    parents = jnp.where(columns == 0, num_blocks, before)
    own = _at_column(blocks.block_tables, columns)
    found = _look_up(cache, parents, chunks)

    is_known = is_live & (found.blocks != NO_BLOCK)
    column = jnp.where(is_known, columns, blocks.block_tables.shape[1])
    table = blocks.block_tables.at[rows, column].set(found.blocks, mode="drop")
    ref_counts = blocks.ref_counts
    for block, amount in ((own, -1), (found.blocks, 1)):
        block = jnp.where(is_known, block, num_blocks)
        ref_counts = ref_counts.at[block].add(amount, mode="drop")

    # One row per bucket enters, the lowest. The others find its block the next time,
    # or that theirs is another key.
    is_new = is_live & (found.blocks == NO_BLOCK)
    place_SW = found.buckets[:, None] * num_ways + jnp.arange(num_ways)[None, :]
    is_empty_SW = _values(cache.parents, found.entries, NOT_CACHED) == NOT_CACHED
    is_empty_SW |= _values(cache.ways, found.entries, NO_BLOCK) != place_SW
    has_room = jnp.any(is_empty_SW, axis=1)
    is_rival_SS = is_new[None, :] & (found.buckets[None, :] == found.buckets[:, None])
    is_rival_SS &= rows[None, :] < rows[:, None]
    enters = is_new & has_room & ~jnp.any(is_rival_SS, axis=1)
    way = jnp.argmax(is_empty_SW, axis=1).astype(jnp.int32)
    block = jnp.where(enters, own, num_blocks)
    bucket = jnp.where(enters, found.buckets, num_buckets)
    cache = dataclasses.replace(
        cache,
        parents=cache.parents.at[block].set(parents, mode="drop"),
        tokens=cache.tokens.at[block].set(chunks, mode="drop"),
        depths=cache.depths.at[block].set(columns, mode="drop"),
        ways=cache.ways.at[block].set(found.buckets * num_ways + way, mode="drop"),
        buckets=cache.buckets.at[bucket, way].set(own, mode="drop"),
    )
    blocks = dataclasses.replace(blocks, ref_counts=ref_counts, block_tables=table)
    return (
        cache,
        blocks,
        columns + (is_known | enters).astype(jnp.int32),
        jnp.where(is_new & ~has_room, columns, ends),
    )


def _num_nodes(
    cache: PrefixCache, table_SM: jax.Array, num_full: jax.Array
) -> jax.Array:
    """How many of the first `num_full` blocks of each row are nodes, i32[S].

    They come first, so halving finds their end.
    """

    def goes_on(carry) -> jax.Array:
        low, high = carry
        return jnp.any(low < high)

    def halve(carry):
        low, high = carry
        middle = (low + high) // 2
        is_more = _is_node(cache, _at_column(table_SM, middle)) & (low < high)
        return jnp.where(is_more, middle + 1, low), jnp.where(is_more, high, middle)

    carry = (jnp.zeros_like(num_full), num_full)
    return lax.while_loop(goes_on, halve, carry)[0]


def _first(
    candidates: jax.Array, order: tuple[jax.Array, ...], count: jax.Array
) -> jax.Array:
    """The first `count` candidates, ordered by the first key, then the next, bool[N].

    Nothing is sorted: of each key halving finds the least bound up to which there are
    enough candidates. The last key must tell all of them apart.
    """
    chosen = jnp.zeros_like(candidates)
    for keys in order:

        def goes_on(carry) -> jax.Array:
            low, high = carry
            return low < high

        def halve(carry, keys=keys, candidates=candidates, count=count):
            low, high = carry
            middle = low + (high - low) // 2
            is_enough = jnp.sum(candidates & (keys <= middle), dtype=jnp.int32) >= count
            return (
                jnp.where(is_enough, low, middle + 1),
                jnp.where(is_enough, middle, high),
            )

        least = jnp.min(jnp.where(candidates, keys, jnp.iinfo(jnp.int32).max))
        most = jnp.max(jnp.where(candidates, keys, jnp.iinfo(jnp.int32).min))
        bound, _ = lax.while_loop(goes_on, halve, (least, most))
        is_before = candidates & (keys < bound)
        chosen |= is_before
        count = count - jnp.sum(is_before, dtype=jnp.int32)
        candidates = candidates & (keys == bound)
    return chosen | candidates


def _buckets_of(cache: PrefixCache, parents: jax.Array, chunks: jax.Array) -> jax.Array:
    """The bucket of each key, i32[S]."""
    mask = jnp.uint32(cache.buckets.shape[0] - 1)
    return (_hash(parents, chunks) & mask).astype(jnp.int32)


def _hash(parents: jax.Array, chunks: jax.Array) -> jax.Array:
    """32 mixed bits of each key, u32[S]: every token with its place, then their sum."""
    offsets = jnp.arange(chunks.shape[1], dtype=jnp.uint32) + jnp.uint32(1)
    mixed_SP = _mix(chunks.astype(jnp.uint32) ^ _mix(offsets)[None, :])
    total = jnp.sum(mixed_SP, axis=1, dtype=jnp.uint32)
    return _mix(total ^ _mix(parents.astype(jnp.uint32)))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit of `x` moves about half of all.

    Source: the constants of `lowbias32`, found by search by Chris Wellons.
    https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _chunks(
    tokens: jax.Array,
    seq_indices: jax.Array | None,
    columns: jax.Array,
    block_size: int,
) -> jax.Array:
    """The tokens of each row's block at its column, i32[S, P]; some past the end."""
    rows = (
        jnp.arange(columns.size, dtype=jnp.int32)
        if seq_indices is None
        else seq_indices
    )
    offsets = jnp.arange(block_size, dtype=jnp.int32)
    positions_SP = columns[:, None] * block_size + offsets[None, :]
    chunks = tokens.at[rows[:, None], positions_SP].get(mode="clip")
    return chunks.astype(jnp.int32)


def _values(values: jax.Array, blocks: jax.Array, fill: int) -> jax.Array:
    """`values[blocks]`, and `fill` for NO_BLOCK."""
    index = jnp.where(blocks == NO_BLOCK, values.size, blocks)
    return values.at[index].get(mode="fill", fill_value=fill)


def _is_node(cache: PrefixCache, blocks: jax.Array) -> jax.Array:
    """Which of `blocks` are nodes, bool like `blocks`."""
    return _values(cache.parents, blocks, NOT_CACHED) != NOT_CACHED


def _at_column(table_SM: jax.Array, columns: jax.Array) -> jax.Array:
    """The entry of each row at its column, i32[S]; some entry where there is none."""
    columns = jnp.clip(columns, 0, table_SM.shape[1] - 1)
    return jnp.take_along_axis(table_SM, columns[:, None], axis=1)[:, 0]
