"""Prefix cache: which blocks store which prefixes, a radix tree as arrays.

Pipeline: request table -> [prefix_cache] -> scheduler.

Before a request is scheduled, `match` finds the blocks of its longest cached prefix.
After a step, `insert` adds the blocks that became full. `evict` removes unused blocks
when blocks are needed.

A full block can be a *node* of the tree. A node stays in the cache when no row uses its
block any more: its `ref_counts` is 0, so it counts as free, but `append` is told to
keep it until `evict` removes it. A caller that overwrites a node's tokens must `forget`
the node.

Invariant: the nodes among a row's blocks come first and form a path from the root. So a
row that uses a node also uses its ancestors, and every ancestor was used at least as
recently as the node. Eviction therefore never leaves a node without its parent.

Shape symbols: S rows, N blocks, M blocks per row, P tokens per block, L tokens, B rows
of a lookup, R sequences.

Source: block hashes as in vLLM's automatic prefix caching; the tree as in Zheng et al.
2024 (SGLang, section 3). https://arxiv.org/abs/2312.07104
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv, floor_div, midpoint
from jpaged.compat import when
from jpaged.indexing import get_or, put
from jpaged.kv.block_state import NO_BLOCK, BlockState
from jpaged.kv.cache_groups import has_windows
from jpaged.kv.companions import drop_companions, limit_to_windows
from jpaged.kv.prefix_checks import violations as violations
from jpaged.kv.prefix_eviction import Eviction as Eviction
from jpaged.kv.prefix_eviction import (
    as_integers,
    largest_below,
    node_scores,
    note_new_nodes,
    with_floor,
)
from jpaged.kv.prefix_eviction import count_uses as count_uses
from jpaged.kv.prefix_table import (
    NOT_CACHED,
    block_tokens,
    entry_at,
    find_nodes,
    insert_next_blocks,
    is_node,
    nodes,
)
from jpaged.kv.prefix_table import PrefixCache as PrefixCache
from jpaged.kv.prefix_table import init_prefix_cache as init_prefix_cache
from jpaged.kv.prefix_table import is_cached as is_cached


def match(
    cache: PrefixCache,
    tokens: jax.Array,
    max_lens: jax.Array,
    seq_indices: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Find the longest cached prefix of each row, in whole blocks.

    The call changes no reference count and no clock. A caller that uses a path must
    assign it to a row before anything is evicted. The loop has one iteration per block
    of the longest path found.

    Args:
      cache: the nodes.
      tokens: i32[B, L], or i32[R, L] with `seq_indices`.
      max_lens: i32[B], largest prefix of each row, in tokens; 0 looks up nothing.
      seq_indices: i32[B] or None; row b has the tokens `tokens[seq_indices[b]]`.

    Returns:
      paths: i32[B, M] with M = ceil(L / P), the blocks, NO_BLOCK after the last. With G
        cache groups i32[B, G * M], and NO_BLOCK in front of a window: a prefix is one
        whose last window is there in each group.
      lens: i32[B], the tokens in them, a multiple of P.

    >>> from jpaged import block_manager
    >>> blocks = block_manager.init_state(
    ...     num_blocks=8, block_size=2, max_seqs=1, max_blocks_per_seq=4)
    >>> blocks, _ = block_manager.append(blocks, jnp.array([5]))
    >>> cache, blocks = insert(
    ...     init_prefix_cache(8, 2), blocks, jnp.array([[5, 6, 7, 8, 9]]), clock=0)
    >>> prompts = jnp.array([[5, 6, 7, 8, 1], [5, 6, 7, 0, 0], [6, 5, 7, 8, 9]])
    >>> paths, lens = match(cache, prompts, jnp.array([4, 4, 4]))
    >>> paths.tolist(), lens.tolist()
    ([[0, 1, -1], [0, -1, -1], [-1, -1, -1]], [4, 2, 0])
    """
    num_blocks, block_size = cache.tokens.shape
    num_rows, length = max_lens.shape[0], tokens.shape[1]
    num_full = floor_div(jnp.minimum(max_lens.astype(jnp.int32), length), block_size)
    paths = jnp.full((num_rows, cdiv(length, block_size)), NO_BLOCK, jnp.int32)
    parents = jnp.full((num_rows,), num_blocks, jnp.int32)

    def is_unfinished(carry: tuple) -> jax.Array:
        column, _, parents, _ = carry
        return jnp.any((parents != NO_BLOCK) & (column < num_full))

    def descend(carry: tuple) -> tuple:
        # All rows are at the same column; those that have ended have no parent.
        column, paths, parents, depths = carry
        columns = jnp.broadcast_to(column, parents.shape)
        chunks = block_tokens(tokens, seq_indices, columns, block_size)
        found = find_nodes(cache, parents, chunks).blocks
        is_live = (parents != NO_BLOCK) & (column < num_full)
        found = jnp.where(is_live, found, NO_BLOCK)
        paths = lax.dynamic_update_slice(paths, found[:, None], (0, column))
        depths = depths + (found != NO_BLOCK).astype(jnp.int32)
        return column + 1, paths, found, depths

    carry = (jnp.int32(0), paths, parents, jnp.zeros_like(parents))
    _, paths, _, depths = lax.while_loop(is_unfinished, descend, carry)
    if has_windows(cache.windows):
        paths, depths = limit_to_windows(
            cache.companions, cache.windows, block_size, paths, depths
        )
    return paths, depths * block_size


def insert(
    cache: PrefixCache,
    blocks: BlockState,
    tokens: jax.Array,
    clock: jax.Array | int,
    seq_indices: jax.Array | None = None,
) -> tuple[PrefixCache, BlockState]:
    """Make the full blocks of all rows nodes of the tree.

    If the tree already has the same tokens under the same parent in another block, the
    row's table gets the tree's block, and the row's own block loses the reference. If
    several rows insert the same key in one call, the lowest row's block is kept. A
    block whose bucket is full is not inserted, nor are the later blocks of its row; the
    next call tries them again.

    If there is nothing to insert, only one block of each row is read. Otherwise the
    loop has one iteration per block of the row with the most new blocks, and one more
    where rows share a bucket.

    Args:
      cache: donate it under jit.
      blocks: the state after the step; donate it. All tokens that `context_lens` counts
        must be computed and final.
      tokens: i32[S, L], or i32[R, L] with `seq_indices`; each row's tokens in order.
      clock: i32[], the time of use of everything in use. It must not decrease.
      seq_indices: i32[S] or None; row s has the tokens `tokens[seq_indices[s]]`.

    Returns:
      The new cache and blocks.
    """
    _, block_size = cache.tokens.shape
    num_full = floor_div(jnp.minimum(blocks.context_lens, tokens.shape[1]), block_size)
    last = entry_at(blocks.block_tables, num_full - 1)
    # A row's nodes come first, so its last full block tells whether all are nodes.
    has_new = (num_full > 0) & ~is_node(cache, last)

    def insert_all(carry: tuple) -> tuple:
        cache, blocks = carry
        columns = _num_nodes(cache, blocks.block_tables, num_full)
        ends = num_full
        if cache.windows[0] is not None:
            # The parent was released before it was a node: the path has a gap.
            before = entry_at(blocks.block_tables, columns - 1)
            has_gap = (columns > 0) & (before == NO_BLOCK)
            ends = jnp.where(has_gap, columns, ends)

        def is_unfinished(carry: tuple) -> jax.Array:
            _, _, columns, ends = carry
            return jnp.any(columns < ends)

        def insert_one(carry: tuple) -> tuple:
            cache, blocks, columns, ends = carry
            return insert_next_blocks(cache, blocks, columns, ends, tokens, seq_indices)

        carry = (cache, blocks, columns, ends)
        before = cache
        cache, blocks, _, _ = lax.while_loop(is_unfinished, insert_one, carry)
        cache = note_new_nodes(before, cache, clock)
        # Touched in the same call; otherwise a node could be newer than its parent.
        return touch(cache, blocks.ref_counts, clock), blocks

    return when(jnp.any(has_new), insert_all, (cache, blocks))


def touch(
    cache: PrefixCache, ref_counts: jax.Array, clock: jax.Array | int
) -> PrefixCache:
    """Set `last_used` to `clock`, i32[], for every block that a row uses."""
    now = jnp.asarray(clock, jnp.int32)
    last_used = jnp.where(ref_counts > 0, now, cache.last_used)
    return dataclasses.replace(cache, last_used=last_used)


def evict(
    cache: PrefixCache,
    ref_counts: jax.Array,
    num_needed: jax.Array | int,
    eviction: Eviction | None = None,
) -> PrefixCache:
    """Remove the fewest nodes so that `num_needed` blocks are free.

    A block is free if no row uses it and it is not a node. Only nodes that no row uses
    are evicted: the least recently used first; of those the deepest, so children before
    their parents; of those the highest block number. If all of them are not enough, all
    of them are evicted.

    If enough blocks are free already, the cost is one count.

    Args:
      cache: the nodes.
      ref_counts: i32[N], rows that use each block.
      num_needed: i32[], blocks that must be free.
      eviction: a policy whose scores replace the time of the last use; needs a cache
        with `uses`. None: the least recently used.
    """
    candidates = is_cached(cache) & (ref_counts == 0)
    num_free = jnp.sum((ref_counts == 0) & ~candidates, dtype=jnp.int32)
    count = jnp.minimum(
        jnp.asarray(num_needed, jnp.int32) - num_free,
        jnp.sum(candidates, dtype=jnp.int32),
    )
    numbers = jnp.arange(candidates.size, dtype=jnp.int32)
    keys, *order = (cache.last_used, -cache.depths, -numbers)

    def remove(carry: tuple) -> tuple:
        parents, uses, companions = carry
        scores = None if eviction is None else node_scores(cache, eviction)
        first = keys if scores is None else as_integers(scores)
        if scores is None and cache.windows[0] is not None:
            # A row releases blocks in front of its window that its other blocks follow.
            first = largest_below(cache, keys)
        is_evicted = _smallest(candidates, (first, *order), count)
        if scores is not None:
            uses = with_floor(cache, is_evicted, scores)
        if cache.windows[0] is not None:
            is_evicted = _with_descendants(cache, is_evicted)
        if companions is not None:
            companions = drop_companions(companions, is_evicted)
        return jnp.where(is_evicted, NOT_CACHED, parents), uses, companions

    carry = (cache.parents, cache.uses, cache.companions)
    parents, uses, companions = when(count > 0, remove, carry)
    return dataclasses.replace(cache, parents=parents, uses=uses, companions=companions)


def forget_orphans(cache: PrefixCache) -> PrefixCache:
    """Remove the nodes without a parent, and all their descendants.

    Rows that have dropped blocks may use a node without its ancestors, which `evict`
    then takes first. Their blocks must not be reused before this call.
    """
    root = cache.parents.size

    def orphans(parents: jax.Array) -> jax.Array:
        is_known = jnp.where(parents == root, True, is_node(cache_of(parents), parents))
        return (parents != NOT_CACHED) & ~is_known

    def cache_of(parents: jax.Array) -> PrefixCache:
        return dataclasses.replace(cache, parents=parents)

    parents = lax.while_loop(
        lambda parents: jnp.any(orphans(parents)),
        lambda parents: jnp.where(orphans(parents), NOT_CACHED, parents),
        cache.parents,
    )
    return cache_of(parents)


def forget(cache: PrefixCache, blocks: jax.Array) -> PrefixCache:
    """Remove the nodes `blocks`, i32[S], and all their descendants.

    For blocks that will be overwritten. NO_BLOCK and blocks that are not nodes are
    ignored. The loop has one iteration per level below these nodes. Companions of nodes
    are removed alone.
    """
    removed = put(jnp.zeros(cache.parents.shape, jnp.bool_), blocks, True)
    removed = _with_descendants(cache, removed)
    companions = cache.companions
    if companions is not None:
        companions = drop_companions(companions, removed)
    return dataclasses.replace(
        cache,
        parents=jnp.where(removed, NOT_CACHED, cache.parents),
        companions=companions,
    )


def _with_descendants(cache: PrefixCache, removed: jax.Array) -> jax.Array:
    """Return the blocks `removed`, bool[N], and all nodes below them."""

    def add_children(carry: tuple) -> tuple:
        removed, _ = carry
        is_child = get_or(removed, cache.parents, False)
        more = removed | (is_child & nodes(cache))
        return more, jnp.any(more != removed)

    return lax.while_loop(
        lambda carry: carry[1], add_children, (removed, jnp.bool_(True))
    )[0]


def _num_nodes(
    cache: PrefixCache, table_SM: jax.Array, num_full: jax.Array
) -> jax.Array:
    """Return how many of each row's first `num_full` blocks are nodes, i32[S].

    A row's nodes come first, so a binary search finds their end.
    """

    def is_unfinished(carry: tuple) -> jax.Array:
        low, high = carry
        return jnp.any(low < high)

    def halve(carry: tuple) -> tuple:
        low, high = carry
        middle = (low + high) >> 1
        entry = entry_at(table_SM, middle)
        is_more = is_node(cache, entry)
        if cache.windows[0] is not None:  # released in front of the window
            is_more |= entry == NO_BLOCK
        is_more &= low < high
        return jnp.where(is_more, middle + 1, low), jnp.where(is_more, high, middle)

    carry = (jnp.zeros_like(num_full), num_full)
    return lax.while_loop(is_unfinished, halve, carry)[0]


def _smallest(
    candidates: jax.Array, order: tuple[jax.Array, ...], count: jax.Array
) -> jax.Array:
    """Select the `count` smallest candidates by the keys of `order`, bool[N].

    Nothing is sorted: for each key, a binary search finds the smallest bound that
    includes enough candidates. The last key must be different for all candidates.
    """
    all_keys = jnp.stack(order)

    def narrow(number: jax.Array, carry: tuple) -> tuple:
        chosen, candidates, count = carry
        keys = lax.dynamic_index_in_dim(all_keys, number, keepdims=False)

        def halve(carry: tuple) -> tuple:
            low, high = carry
            middle = midpoint(low, high)
            is_enough = jnp.sum(candidates & (keys <= middle), dtype=jnp.int32) >= count
            return (
                jnp.where(is_enough, low, middle + 1),
                jnp.where(is_enough, middle, high),
            )

        low = jnp.min(jnp.where(candidates, keys, jnp.iinfo(jnp.int32).max))
        high = jnp.max(jnp.where(candidates, keys, jnp.iinfo(jnp.int32).min))
        bound, _ = lax.while_loop(lambda carry: carry[0] < carry[1], halve, (low, high))
        is_below = candidates & (keys < bound)
        count = count - jnp.sum(is_below, dtype=jnp.int32)
        return chosen | is_below, candidates & (keys == bound), count

    carry = (jnp.zeros_like(candidates), candidates, count)
    chosen, candidates, _ = lax.fori_loop(0, len(order), narrow, carry)
    return chosen | candidates
