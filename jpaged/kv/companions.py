"""Companions: the blocks of a cached prefix in the cache groups but the first.

Pipeline: cache_groups, block_state -> [companions] -> prefix_table, prefix_cache.

A node of the prefix cache is a block of the first group, which keeps all tokens. Its
companions store the same tokens for the layers of the other groups. A companion may be
evicted alone: a hit needs only those that the first token behind it sees.

Shape symbols: S rows, N blocks, M blocks per row and group, G cache groups, B rows of a
lookup.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import floor_div, remainder
from jpaged.kv.block_state import NO_BLOCK, BlockState
from jpaged.kv.cache_groups import Windows, num_columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Companions:
    """The blocks that store a node's tokens in the other cache groups.

    An entry of `blocks` is valid if the block's owner points back to it, so that
    eviction does not write there. docs/decisions/cache_groups.md explains the rule.
    """

    blocks: jax.Array  # i32[N, G - 1], of each node and group but the first
    owners: jax.Array  # i32[N], node * (G - 1) + group - 1; NO_BLOCK: no companion


def init_companions(num_blocks: int, num_groups: int) -> Companions | None:
    """Return no companions; None if there is one group."""
    if num_groups == 1:
        return None
    if num_blocks * (num_groups - 1) >= 2**31:
        raise ValueError(
            f"num_blocks: expected less than 2**31 / {num_groups - 1}, because keys "
            f"are int32, got {num_blocks}"
        )
    return Companions(
        blocks=jnp.full((num_blocks, num_groups - 1), NO_BLOCK, jnp.int32),
        owners=jnp.full((num_blocks,), NO_BLOCK, jnp.int32),
    )


def companions_of(companions: Companions, nodes: jax.Array) -> jax.Array:
    """Return the companions of `nodes`, i32[..., G - 1]; NO_BLOCK where none is left.

    Args:
      companions: of all nodes.
      nodes: i32[...], NO_BLOCK has no companions.
    """
    num_blocks, number = companions.blocks.shape
    at = jnp.where(nodes == NO_BLOCK, num_blocks, nodes)
    found = companions.blocks.at[at].get(mode="fill", fill_value=NO_BLOCK)
    keys = nodes[..., None] * number + _groups(number, nodes.ndim)
    at = jnp.where(found == NO_BLOCK, num_blocks, found)
    owners = companions.owners.at[at].get(mode="fill", fill_value=NO_BLOCK)
    is_valid = (found != NO_BLOCK) & (owners == keys) & (nodes != NO_BLOCK)[..., None]
    return jnp.where(is_valid, found, NO_BLOCK)


def _groups(number: int, ndim: int) -> jax.Array:
    """Return the numbers of groups, as the last of `ndim + 1` axes."""
    return jnp.arange(number, dtype=jnp.int32).reshape((1,) * ndim + (number,))


def insert_companions(
    companions: Companions, blocks: BlockState, columns: jax.Array, nodes: jax.Array
) -> tuple[Companions, BlockState, jax.Array]:
    """Make rows' blocks companions of nodes, or replace them by those that exist.

    If several rows have a block for a companion that is missing, the lowest row's block
    is kept, and the others get it.

    Args:
      companions: of all nodes.
      blocks: the block tables, with the nodes in the first group.
      columns: i32[S], the column of each row.
      nodes: i32[S], the row's node there; NO_BLOCK: none.

    Returns:
      The companions; the blocks; and i32[S, G - 1], the rows' blocks that have become
      companions, N where none.
    """
    (num_blocks,) = blocks.ref_counts.shape
    number, width = companions.blocks.shape[1], num_columns(blocks)
    group, (num_rows,) = _groups(number, 1), nodes.shape
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    column = (group + 1) * width + jnp.minimum(columns, width - 1)[:, None]
    own = blocks.block_tables[row, column]
    own = jnp.where((nodes != NO_BLOCK)[:, None], own, NO_BLOCK)

    is_missing = (companions_of(companions, nodes) == NO_BLOCK) & (own != NO_BLOCK)
    is_same = (nodes[None, :] == nodes[:, None]) & (row.T < row)
    is_rival = jnp.any(is_same[:, :, None] & is_missing[None, :, :], axis=1)
    inserts = is_missing & ~is_rival
    at_node = jnp.where(inserts, nodes[:, None], num_blocks)
    taken = jnp.where(inserts, own, num_blocks)
    keys = nodes[:, None] * number + group
    companions = Companions(
        blocks=companions.blocks.at[at_node, group].set(own, mode="drop"),
        owners=companions.owners.at[taken].set(keys, mode="drop"),
    )

    found = companions_of(companions, nodes)
    is_replaced = (own != NO_BLOCK) & (found != NO_BLOCK) & (found != own)
    ref_counts = blocks.ref_counts
    for block, amount in ((own, -1), (found, 1)):
        at = jnp.where(is_replaced, block, num_blocks)
        ref_counts = ref_counts.at[at].add(amount, mode="drop")
    tables = blocks.block_tables.at[row, column].set(jnp.where(is_replaced, found, own))
    is_row = (nodes != NO_BLOCK)[:, None]
    tables = jnp.where(is_row, tables, blocks.block_tables)
    blocks = dataclasses.replace(blocks, ref_counts=ref_counts, block_tables=tables)
    return companions, blocks, taken


def drop_companions(companions: Companions, is_dropped: jax.Array) -> Companions:
    """Remove companions, bool[N], and those of removed nodes among these blocks."""
    owners, number = companions.owners, companions.blocks.shape[1]
    is_any = owners != NO_BLOCK
    owner = floor_div(jnp.maximum(owners, 0), number)
    is_gone = is_any & (is_dropped | is_dropped[owner])
    return dataclasses.replace(companions, owners=jnp.where(is_gone, NO_BLOCK, owners))


def groups_of(companions: Companions) -> jax.Array:
    """Return the group of each companion, i32[N]; meaningless for other blocks."""
    return remainder(companions.owners, companions.blocks.shape[1]) + 1


def limit_to_windows(
    companions: Companions | None,
    windows: Windows,
    block_size: int,
    paths: jax.Array,
    depths: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Shorten paths to what all groups can serve, and add the other groups' blocks.

    Args:
      companions: of all nodes; None with one group.
      windows: of the groups.
      block_size: tokens per block.
      paths: i32[B, M], nodes from the root, NO_BLOCK after the last.
      depths: i32[B], nodes of each path.

    Returns:
      Block tables of all groups i32[B, G * M] and i32[B], blocks of the prefix. In
      front of a window the entries are NO_BLOCK.
    """
    width = paths.shape[1]
    column = jnp.arange(width, dtype=jnp.int32)
    tables = [paths]
    if companions is not None:
        found = companions_of(companions, paths)
        tables += [found[..., group] for group in range(found.shape[-1])]
    # The first token behind c blocks sees from column starts[c] on.
    count = jnp.arange(width + 1, dtype=jnp.int32)
    fits = count[None, :] <= depths[:, None]
    starts = []
    for table, window in zip(tables, windows, strict=True):
        start = jnp.zeros_like(count)
        if window is not None:
            seen = jnp.maximum(count * block_size - window + 1, 0)
            start = floor_div(seen, block_size)
            missing = jnp.where(table == NO_BLOCK, column[None, :], -1)
            last = lax.cummax(missing, axis=1)
            last = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)
            fits &= last < start[None, :]
        starts.append(start)
    best = jnp.max(jnp.where(fits, count[None, :], 0), axis=1)
    kept = [
        (column[None, :] >= start[best][:, None]) & (column[None, :] < best[:, None])
        for start in starts
    ]
    tables = [
        jnp.where(is_kept, table, NO_BLOCK)
        for table, is_kept in zip(tables, kept, strict=True)
    ]
    return jnp.concatenate(tables, axis=1), best
