"""Consistency checks of the prefix cache, on the host."""

import jax
import numpy as np

from jpaged.kv.block_state import NO_BLOCK, BlockState
from jpaged.kv.prefix_table import NOT_CACHED, NUM_WAYS, PrefixCache, buckets_of


def violations(
    cache: PrefixCache, blocks: BlockState, tokens: jax.Array | None = None
) -> list[str]:
    """Return one sentence for each inconsistency; an empty list if there is none.

    For tests and debugging. It checks node by node and row by row, and of the traced
    operations it uses only the choice of buckets.

    Args:
      cache: the nodes.
      blocks: the block tables.
      tokens: i32[S, L], each row's tokens, to compare with the row's nodes; None: the
        tokens are not compared.
    """
    found = _node_violations(cache) + _row_violations(cache, blocks, tokens)
    return found + _companion_violations(cache, blocks)


def _node_violations(cache: PrefixCache) -> list[str]:
    num_blocks, _ = cache.tokens.shape
    parents, ways = np.asarray(cache.parents), np.asarray(cache.ways)
    depths, last_used = np.asarray(cache.depths), np.asarray(cache.last_used)
    keys = [tuple(key) for key in np.asarray(cache.tokens).tolist()]
    entries = np.asarray(cache.buckets).ravel()
    buckets = np.asarray(buckets_of(cache, cache.parents, cache.tokens))
    found: list[str] = []
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for block in np.flatnonzero(parents != NOT_CACHED).tolist():
        parent = int(parents[block])
        if parent != num_blocks:
            if not 0 <= parent < num_blocks or parents[parent] == NOT_CACHED:
                found.append(f"block {block}: parent {parent} is not a node")
                continue
            is_older = last_used[parent] < last_used[block]
            if is_older and cache.windows[0] is None:
                found.append(f"block {block}: used after its parent {parent}")
        depth = 0 if parent == num_blocks else int(depths[parent]) + 1
        if depths[block] != depth:
            found.append(f"block {block}: expected depth {depth}, got {depths[block]}")
        twin = seen.setdefault((parent, keys[block]), block)
        if twin != block:
            found.append(f"block {block}: has the same key as block {twin}")
        way = int(ways[block])
        if not 0 <= way < entries.size or entries[way] != block:
            found.append(f"block {block}: is not in the table at way {way}")
        elif way // NUM_WAYS != buckets[block]:
            found.append(f"block {block}: is not in its bucket {buckets[block]}")
    return found


def _row_violations(
    cache: PrefixCache, blocks: BlockState, tokens: jax.Array | None
) -> list[str]:
    num_blocks, block_size = cache.tokens.shape
    parents = np.asarray(cache.parents)
    keys = [tuple(key) for key in np.asarray(cache.tokens).tolist()]
    found: list[str] = []
    drops = blocks.drops
    width = blocks.block_tables.shape[1] // len(cache.windows)
    for row, table in enumerate(np.asarray(blocks.block_tables)[:, :width].tolist()):
        if drops is not None and int(drops.dropped[row]):
            continue  # may have nodes in any places
        previous, is_path = num_blocks, True
        for column, block in enumerate(table):
            if block == NO_BLOCK:  # after the last block, or in front of the window
                continue
            is_node = parents[block] != NOT_CACHED
            if is_node and column and table[column - 1] == NO_BLOCK:
                previous = parents[block]
            if is_node and not (is_path and parents[block] == previous):
                found.append(f"row {row}: node {block} is not on a path from the root")
            is_path, previous = is_path and is_node, block
            start = column * block_size
            if is_node and tokens is not None:
                length = int(blocks.context_lens[row])
                mine = np.asarray(tokens[row])[start : min(length, start + block_size)]
                if tuple(mine.tolist()) != keys[block][: len(mine)]:
                    found.append(f"row {row}: node {block} has other tokens")
    return found


def _companion_violations(cache: PrefixCache, blocks: BlockState) -> list[str]:
    """Check the blocks of nodes in the cache groups but the first."""
    if cache.companions is None:
        return []
    parents, number = np.asarray(cache.parents), len(cache.windows) - 1
    owners = np.asarray(cache.companions.owners)
    companions = np.asarray(cache.companions.blocks)
    found: list[str] = []
    for block in np.flatnonzero(owners != NO_BLOCK).tolist():
        node, group = divmod(int(owners[block]), number)
        if parents[block] != NOT_CACHED:
            found.append(f"block {block}: is a node, and a companion of {node}")
        if parents[node] == NOT_CACHED:
            found.append(f"block {block}: is a companion of {node}, which is no node")
        elif companions[node, group] != block:
            found.append(
                f"block {block}: node {node} has companion {companions[node, group]}"
            )
    tables = np.asarray(blocks.block_tables)
    tables = tables.reshape(len(tables), len(cache.windows), -1)
    for row, group, column in np.argwhere(tables[:, 1:] != NO_BLOCK).tolist():
        block, node = tables[row, 1 + group, column], tables[row, 0, column]
        if owners[block] not in (NO_BLOCK, node * number + group):
            found.append(
                f"row {row}: block {block} of group {1 + group} is the companion of "
                f"another node than {node}"
            )
    return found
