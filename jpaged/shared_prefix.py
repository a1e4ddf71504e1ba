"""Shared prefixes: which rows begin with the same blocks, found in the block tables.

Place on the road: block tables -> [shared_prefix] -> attention, which then reads those
blocks once for all rows of a group (cascade attention).

Parallel samples, beams and prompts with a cached beginning point at the same blocks.
The tables alone say so: nobody has to hand down who forked from whom.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Where reading once begins to pay on a CPU, `docs/decisions/cascade.md`.
LEAST_TOKENS = 128
LEAST_SAVED = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Groups of rows whose tables begin with the same blocks.

    Rows with the same leader have the same first `num_blocks` blocks, and every one of
    them has more tokens than these blocks hold.
    """

    leaders: jax.Array  # i32[S], a row of the group; the row itself where it is alone
    num_blocks: jax.Array  # i32[S], leading blocks that the group shares; 0 alone


def find(
    block_tables: jax.Array,
    context_lens: jax.Array,
    block_size: int,
    *,
    least_tokens: int = LEAST_TOKENS,
    least_saved: int = LEAST_SAVED,
) -> SharedPrefix:
    """The groups that save most reads, in one level; jittable.

    Each row takes, of all beginnings that it shares, the one for which blocks times
    other rows is largest; rows that take the same one are a group. The block of a row's
    last token is never in it. Compares all pairs of rows: S * S * M numbers.

    Args:
      block_tables: i32[S, M], entries past a row's length may hold anything.
      context_lens: i32[S], tokens.
      block_size: tokens of a block.
      least_tokens: shorter prefixes are left alone.
      least_saved: so are groups that would save fewer tokens than this in all.
    """
    num_rows, width = block_tables.shape
    column = jnp.arange(width, dtype=jnp.int32)
    differ = block_tables[:, None, :] != block_tables[None, :, :]
    common = jnp.min(jnp.where(differ, column[None, None, :], width), axis=-1)
    most = jnp.maximum(context_lens - 1, 0) // block_size
    common = jnp.minimum(common, jnp.minimum(most[:, None], most[None, :]))  # i32[S, S]

    # From the longest down, the row itself first: r others share at least depths[r].
    row = jnp.arange(num_rows, dtype=jnp.int32)
    depths = -jnp.sort(-common, axis=1)
    best = jnp.argmax(depths * row[None, :], axis=1)
    depth = jnp.take_along_axis(depths, best[:, None], axis=1)  # i32[S, 1]
    is_member = (common >= depth) & (depth.T == depth) & (depth > 0)
    size = jnp.sum(is_member, axis=1)
    depth = depth[:, 0]
    saved = (size - 1) * depth * block_size
    pays = (depth * block_size >= least_tokens) & (saved >= least_saved)
    leaders = jnp.argmax(is_member, axis=1).astype(jnp.int32)
    return SharedPrefix(
        jnp.where(pays, leaders, row), jnp.where(pays, depth, 0).astype(jnp.int32)
    )


def num_tokens_read(
    shared: SharedPrefix, context_lens: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """i32[], i32[]: tokens whose keys and values a step reads, without and with groups.

    A group's prefix counts once; bytes are these times those of a token.
    """
    row = jnp.arange(context_lens.shape[0], dtype=jnp.int32)
    is_first = jnp.min(
        jnp.where(
            shared.leaders[:, None] == shared.leaders[None, :], row[None, :], row.size
        ),
        axis=1,
    )
    again = jnp.where(is_first == row, 0, shared.num_blocks * block_size)
    total = jnp.sum(context_lens)
    return total, total - jnp.sum(again)
