"""Hash table of the prefix cache: finds the node of a parent block and its tokens.

Pipeline: block_state -> [prefix_table] -> prefix_cache.

A node's key is its parent block and its own tokens. The hash only selects a bucket; the
whole key is always compared, so a hash collision never returns a wrong block.

Shape symbols: S rows, N blocks, M blocks per row, P tokens per block, L tokens, B rows
of a lookup, U buckets, W ways of a bucket.

Source: block hashes as in vLLM's automatic prefix caching; the tree as in Zheng et al.
2024 (SGLang, section 3). https://arxiv.org/abs/2312.07104
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.indexing import add, put, take
from jpaged.kv.block_state import NO_BLOCK, BlockState
from jpaged.kv.companions import Companions, init_companions, insert_companions

NOT_CACHED = -1
NUM_WAYS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockUses:
    """What an eviction policy reads about nodes; see `policies.CachedBlocks`."""

    inserted: jax.Array  # i32[N], clock
    num_uses: jax.Array  # i32[N]
    floors: jax.Array  # f32[N], `floor` at the last use
    floor: jax.Array  # f32[], largest score evicted so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Which blocks are nodes, with their keys and table entries; a pytree.

    The root is not a block: the parent of a sequence's first block is N.
    """

    parents: (
        jax.Array
    )  # i32[N], the block of the preceding tokens, N for a first block;
    # NOT_CACHED where the block is not a node; the next four are then meaningless
    tokens: jax.Array  # i32[N, P]
    depths: jax.Array  # i32[N], 0 for a first block
    last_used: jax.Array  # i32[N], clock of the last use
    ways: jax.Array  # i32[N], the node's entry in `buckets`, as a flat index
    buckets: jax.Array  # i32[U, W], blocks; a way is empty if `ways` of its block does
    # not point back to it, so that eviction does not write here
    uses: BlockUses | None = None  # None: the least recently used node is evicted
    companions: Companions | None = None  # None if there is one cache group
    # Of the cache groups (`kv.cache_groups`). Nodes are blocks of the first group.
    windows: tuple[int | None, ...] = dataclasses.field(
        default=(None,), metadata={"static": True}
    )


def init_prefix_cache(
    num_blocks: int,
    block_size: int,
    counts_uses: bool = False,
    windows: tuple[int | None, ...] = (None,),
) -> PrefixCache:
    """Return an empty cache for a pool of `num_blocks` blocks.

    Args:
      num_blocks: blocks of the pool.
      block_size: tokens per block.
      counts_uses: keep what eviction policies other than "lru" read.
      windows: of the cache groups.

    Raises:
      ValueError: a size is below 1, or the table does not fit into int32 indices.
    """
    for name, size in dict(num_blocks=num_blocks, block_size=block_size).items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    # At most one node per bucket on average: with 8 ways, one in a million is refused.
    num_buckets = 1 << (num_blocks - 1).bit_length()
    if num_buckets * NUM_WAYS >= 2**31:
        raise ValueError(f"num_blocks: expected at most {2**27}, got {num_blocks}")
    return PrefixCache(
        parents=jnp.full((num_blocks,), NOT_CACHED, jnp.int32),
        tokens=jnp.zeros((num_blocks, block_size), jnp.int32),
        depths=jnp.zeros((num_blocks,), jnp.int32),
        last_used=jnp.zeros((num_blocks,), jnp.int32),
        ways=jnp.zeros((num_blocks,), jnp.int32),
        buckets=jnp.full((num_buckets, NUM_WAYS), NO_BLOCK, jnp.int32),
        uses=_init_uses(num_blocks) if counts_uses else None,
        companions=init_companions(num_blocks, len(windows)),
        windows=windows,
    )


def _init_uses(num_blocks: int) -> BlockUses:
    return BlockUses(
        inserted=jnp.zeros((num_blocks,), jnp.int32),
        num_uses=jnp.zeros((num_blocks,), jnp.int32),
        floors=jnp.zeros((num_blocks,), jnp.float32),
        floor=jnp.float32(0),
    )


def nodes(cache: PrefixCache) -> jax.Array:
    """Return which blocks are nodes, bool[N]."""
    return cache.parents != NOT_CACHED


def is_cached(cache: PrefixCache) -> jax.Array:
    """Return which blocks are nodes, or store a node's tokens in another group."""
    if cache.companions is None:
        return nodes(cache)
    return nodes(cache) | (cache.companions.owners != NO_BLOCK)


def is_node(cache: PrefixCache, blocks: jax.Array) -> jax.Array:
    """Return which of `blocks` are nodes, bool of the shape of `blocks`."""
    return _lookup(cache.parents, blocks, NOT_CACHED) != NOT_CACHED


class TableHits(NamedTuple):
    """Result of `find_nodes` for each row."""

    blocks: jax.Array  # i32[S], the node with the key, NO_BLOCK if there is none
    buckets: jax.Array  # i32[S], the bucket of the key
    entries: jax.Array  # i32[S, W], the contents of that bucket


def find_nodes(cache: PrefixCache, parents: jax.Array, chunks: jax.Array) -> TableHits:
    """Find the nodes with the parents i32[S] and the tokens `chunks`, i32[S, P]."""
    buckets = buckets_of(cache, parents, chunks)
    entries_SW = take(cache.buckets, buckets)
    # The block in an empty way never gives a wrong hit: it is not a node (no parent is
    # NOT_CACHED), or a node with another key, or occurs twice in this bucket.
    is_hit_SW = _lookup(cache.parents, entries_SW, NOT_CACHED) == parents[:, None]
    keys_SWP = take(cache.tokens, entries_SW)
    is_hit_SW &= jnp.all(keys_SWP == chunks[:, None, :], axis=2)
    blocks = jnp.max(jnp.where(is_hit_SW, entries_SW, NO_BLOCK), axis=1)
    return TableHits(blocks, buckets, entries_SW)


def insert_next_blocks(
    cache: PrefixCache,
    blocks: BlockState,
    columns: jax.Array,
    ends: jax.Array,
    tokens: jax.Array,
    seq_indices: jax.Array | None,
) -> tuple[PrefixCache, BlockState, jax.Array, jax.Array]:
    """Insert the block at each row's column, or replace it by an existing node.

    Args:
      cache: the nodes.
      blocks: the block tables.
      columns: i32[S], the column of each row's next block.
      ends: i32[S], the column after the last block to insert; a row with
        `columns == ends` is finished.
      tokens: i32[S, L], or i32[R, L] with `seq_indices`.
      seq_indices: i32[S] or None; row s has the tokens `tokens[seq_indices[s]]`.

    Returns:
      The cache, the blocks, the advanced columns, and the ends. A full bucket ends its
      row at the current column.
    """
    num_blocks, block_size = cache.tokens.shape
    num_buckets, num_ways = cache.buckets.shape
    is_live = columns < ends
    chunks = block_tokens(tokens, seq_indices, columns, block_size)
    # The nodes are in the first group, whose table comes first.
    previous = entry_at(blocks.block_tables, columns - 1)
    parents = jnp.where(columns == 0, num_blocks, previous)
    own = entry_at(blocks.block_tables, columns)
    found = find_nodes(cache, parents, chunks)

    is_known = is_live & (found.blocks != NO_BLOCK)
    blocks = _replace_by_nodes(blocks, is_known, columns, own, found.blocks)

    # Only the lowest row with keys in a bucket inserts its block in this pass. In the
    # next pass the others find that node, or insert a different key.
    is_new = is_live & (found.blocks == NO_BLOCK)
    rows = jnp.arange(columns.size, dtype=jnp.int32)
    is_rival_SS = is_new[None, :] & (found.buckets[None, :] == found.buckets[:, None])
    is_rival_SS &= rows[None, :] < rows[:, None]
    way, has_empty_way = _first_empty_way(cache, found)
    inserts = is_new & has_empty_way & ~jnp.any(is_rival_SS, axis=1)
    block = jnp.where(inserts, own, num_blocks)
    bucket = jnp.where(inserts, found.buckets, num_buckets)
    cache = dataclasses.replace(
        cache,
        parents=put(cache.parents, block, parents),
        tokens=put(cache.tokens, block, chunks),
        depths=put(cache.depths, block, columns),
        ways=put(cache.ways, block, found.buckets * num_ways + way),
        buckets=put(cache.buckets, (bucket, way), own),
    )
    if cache.companions is not None:
        found_nodes = jnp.where(is_known, found.blocks, own)
        found_nodes = jnp.where(is_known | inserts, found_nodes, NO_BLOCK)
        companions, blocks, taken = insert_companions(
            cache.companions, blocks, columns, found_nodes
        )
        cache = dataclasses.replace(
            cache,
            companions=companions,
            depths=put(cache.depths, taken, columns[:, None]),
        )
    return (
        cache,
        blocks,
        columns + (is_known | inserts).astype(jnp.int32),
        jnp.where(is_new & ~has_empty_way, columns, ends),
    )


def _first_empty_way(
    cache: PrefixCache, found: TableHits
) -> tuple[jax.Array, jax.Array]:
    """Return the first empty way of each row's bucket, and whether it exists, [S]."""
    _, num_ways = cache.buckets.shape
    ways = jnp.arange(num_ways, dtype=jnp.int32)
    way_SW = found.buckets[:, None] * num_ways + ways[None, :]
    is_empty_SW = _lookup(cache.parents, found.entries, NOT_CACHED) == NOT_CACHED
    is_empty_SW |= _lookup(cache.ways, found.entries, NO_BLOCK) != way_SW
    way = jnp.argmax(is_empty_SW, axis=1).astype(jnp.int32)
    return way, jnp.any(is_empty_SW, axis=1)


def _replace_by_nodes(
    blocks: BlockState,
    is_known: jax.Array,
    columns: jax.Array,
    own: jax.Array,
    nodes: jax.Array,
) -> BlockState:
    """Let known rows use `nodes` in place of their `own` blocks at their columns."""
    column = jnp.arange(blocks.block_tables.shape[1], dtype=jnp.int32)
    is_replaced = is_known[:, None] & (column[None, :] == columns[:, None])
    own, nodes = (jnp.where(is_known, block, NO_BLOCK) for block in (own, nodes))
    return dataclasses.replace(
        blocks,
        ref_counts=add(add(blocks.ref_counts, own, -1), nodes, 1),
        block_tables=jnp.where(is_replaced, nodes[:, None], blocks.block_tables),
    )


def block_tokens(
    tokens: jax.Array,
    seq_indices: jax.Array | None,
    columns: jax.Array,
    block_size: int,
) -> jax.Array:
    """Return the tokens of each row's block at its column, i32[S, P].

    Those after the end of `tokens` are arbitrary.
    """
    if seq_indices is None:
        seq_indices = jnp.arange(columns.size, dtype=jnp.int32)
    offsets = jnp.arange(block_size, dtype=jnp.int32)
    positions_SP = columns[:, None] * block_size + offsets[None, :]
    return take(tokens, seq_indices[:, None], positions_SP).astype(jnp.int32)


def entry_at(table_SM: jax.Array, columns: jax.Array) -> jax.Array:
    """Return each row's entry at its column, i32[S]; arbitrary without the column."""
    return take(table_SM, jnp.arange(columns.size, dtype=jnp.int32), columns)


def buckets_of(cache: PrefixCache, parents: jax.Array, chunks: jax.Array) -> jax.Array:
    """Return the bucket of each key, i32[S]."""
    mask = jnp.uint32(cache.buckets.shape[0] - 1)
    return (hash_keys(parents, chunks) & mask).astype(jnp.int32)


def hash_keys(parents: jax.Array, chunks: jax.Array) -> jax.Array:
    """Return a 32-bit hash of each key, u32[S].

    Each token is mixed with its offset in the block, and the results are added.
    """
    offsets = np.arange(1, chunks.shape[1] + 1, dtype=np.uint32)
    mixed_SP = _mix(chunks.astype(jnp.uint32) ^ _mix(offsets)[None, :])
    total = jnp.sum(mixed_SP, axis=1, dtype=jnp.uint32)
    return _mix(total ^ _mix(parents.astype(jnp.uint32)))


def _mix(x: Any) -> Any:
    """Apply a bijection of 32-bit words; each bit of `x` flips about half of all bits.

    Source: the constants of `lowbias32`, found by search by Chris Wellons.
    https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _lookup(values: jax.Array, blocks: jax.Array, fill: int) -> jax.Array:
    """Return `values[blocks]`, and `fill` for NO_BLOCK."""
    return jnp.where(blocks == NO_BLOCK, fill, take(values, blocks))
