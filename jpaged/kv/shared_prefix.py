"""Shared prefixes: which rows begin with the same blocks, found in the block tables.

Place on the road: block tables -> [shared_prefix] -> attention, which then reads those
blocks once for all rows of a group (cascade attention).

Parallel samples, beams and prompts with a cached beginning point at the same blocks.
The tables alone say so: nobody has to hand down who forked from whom.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Least(NamedTuple):
    """Where reading once begins to pay on a device."""

    device: str  # how jax's name of its kind begins; "" is any other
    tokens: int  # of a prefix
    saved: int  # tokens that a group need not read again, (rows - 1) times the prefix
    measured: str = ""  # when and with what; empty: arithmetic, not measured


# Those without a measurement are of Llama-3-8B's keys and values, 4 KiB a token and
# layer: `docs/decisions/cascade.md`.
LEAST = (
    Least("cpu", 128, 1024, measured="2026-11-28, docs/decisions/cascade.md"),
    Least("TPU", 512, 8192),
    Least("", 512, 49152),
)


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
    least_tokens: int | None = None,
    least_saved: int | None = None,
) -> SharedPrefix:
    """The groups that save most reads, in one level; jittable.

    Each row takes, of all beginnings that it shares, the one for which blocks times
    other rows is largest; rows that take the same one are a group. The block of a row's
    last token is never in it. Compares all pairs of rows: S * S * M numbers.

    Args:
      block_tables: i32[S, M], entries past a row's length may hold anything.
      context_lens: i32[S], tokens.
      block_size: tokens of a block.
      least_tokens: shorter prefixes are left alone; None: by `LEAST`, for the device.
      least_saved: so are groups that would save fewer tokens than this in all.
    """
    least = least_of(jax.devices()[0].device_kind)
    least_tokens = least.tokens if least_tokens is None else least_tokens
    least_saved = least.saved if least_saved is None else least_saved
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


def least_of(device_kind: str) -> Least:
    """The first entry of `LEAST` that fits."""
    return next(least for least in LEAST if device_kind.startswith(least.device))


def joined(
    shared: SharedPrefix,
    context_lens: jax.Array,
    sliding_window: int | jax.Array | None,
) -> jax.Array:
    """i32[S]: leading blocks that each row reads with its group; 0 where it is alone.

    A row whose window begins after the prefix does would see it in part: it reads
    alone. An idle row does too.
    """
    joins = context_lens > 0
    if sliding_window is not None:
        joins &= context_lens <= sliding_window
    return jnp.where(joins, shared.num_blocks, 0)


def behind(block_tables: jax.Array, num_blocks: jax.Array) -> jax.Array:
    """i32[S, M]: the tables without each row's first `num_blocks`, i32[S]."""
    width = block_tables.shape[1]
    column = jnp.arange(width, dtype=jnp.int32)[None, :] + num_blocks[:, None]
    column = jnp.minimum(column, width - 1)
    return jnp.take_along_axis(block_tables, column, axis=1)


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
