"""Shared prefixes: which rows start with the same blocks, found in the block tables.

Pipeline: block tables -> [shared_prefix] -> attention, which then reads those blocks
once for all rows of a group (cascade attention).

Parallel samples, beams and prompts with a cached prefix point at the same blocks. This
is visible in the tables, so no record of forks is needed.

Shape symbols: S rows, M blocks per row.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.kv.block_state import NO_BLOCK


class SharingThreshold(NamedTuple):
    """From which sizes on one read of a shared prefix is faster on a device."""

    device: str  # start of jax's name of the device kind; "" is any other device
    tokens: int  # tokens of the prefix
    saved: int  # tokens that a group does not read again: (rows - 1) * prefix tokens
    measured: str = ""  # date and source of the measurement; empty: computed only


# Computed thresholds are for the keys and values of Llama-3-8B, 4 KiB per token and
# layer: `docs/decisions/cascade.md`.
SHARING_THRESHOLDS = (
    SharingThreshold(
        "cpu", 128, 1024, measured="2026-11-28, docs/decisions/cascade.md"
    ),
    SharingThreshold("TPU", 512, 8192),
    SharingThreshold("", 512, 49152),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Groups of rows whose block tables start with the same blocks.

    Rows with the same leader have the same first `num_blocks` blocks, and each of these
    rows has more tokens than these blocks store.
    """

    leaders: jax.Array  # i32[S], a row of the group; the row itself if it is alone
    num_blocks: jax.Array  # i32[S], leading blocks that the group shares; 0 if alone


def find_shared_prefix(
    block_tables: jax.Array,
    context_lens: jax.Array,
    block_size: int,
    *,
    min_prefix_tokens: int | None = None,
    min_saved_tokens: int | None = None,
) -> SharedPrefix:
    """Find the groups of rows that save the most reads; jittable.

    There is one level of groups. For each row, of all prefixes that it shares with
    other rows, the one with the largest product of blocks and other rows is chosen.
    Rows that choose the same prefix form a group. The block of a row's last token never
    belongs to it. All pairs of rows are compared: S * S * M numbers.

    Args:
      block_tables: i32[S, M]; entries after a row's length are ignored. Or i32[G, S, M]
        of G cache groups, the first without a window: a prefix is shared if those of
        its blocks that two rows still have are shared in all groups.
      context_lens: i32[S], tokens.
      block_size: tokens per block.
      min_prefix_tokens: shorter prefixes are not grouped; None: the device's entry in
        `SHARING_THRESHOLDS`.
      min_saved_tokens: groups that save fewer tokens are not formed; None: as above.
    """
    threshold = sharing_threshold(jax.devices()[0].device_kind)
    if min_prefix_tokens is None:
        min_prefix_tokens = threshold.tokens
    if min_saved_tokens is None:
        min_saved_tokens = threshold.saved
    *_, num_rows, width = block_tables.shape
    column = jnp.arange(width, dtype=jnp.int32)
    differ = block_tables[..., :, None, :] != block_tables[..., None, :, :]
    if block_tables.ndim == 3:
        has_block = block_tables != NO_BLOCK
        differ &= has_block[:, :, None, :] & has_block[:, None, :, :]
        differ = jnp.any(differ, axis=0)
    common = jnp.min(jnp.where(differ, column[None, None, :], width), axis=-1)
    most = jnp.maximum(context_lens - 1, 0) // block_size
    common = jnp.minimum(common, jnp.minimum(most[:, None], most[None, :]))  # i32[S, S]

    # Sorted from the longest, the row itself first: r others share at least depths[r].
    row = jnp.arange(num_rows, dtype=jnp.int32)
    depths = -jnp.sort(-common, axis=1)
    best = jnp.argmax(depths * row[None, :], axis=1)
    depth = jnp.take_along_axis(depths, best[:, None], axis=1)  # i32[S, 1]
    is_member = (common >= depth) & (depth.T == depth) & (depth > 0)
    size = jnp.sum(is_member, axis=1)
    depth = depth[:, 0]
    saved = (size - 1) * depth * block_size
    pays = (depth * block_size >= min_prefix_tokens) & (saved >= min_saved_tokens)
    leaders = jnp.argmax(is_member, axis=1).astype(jnp.int32)
    return SharedPrefix(
        jnp.where(pays, leaders, row), jnp.where(pays, depth, 0).astype(jnp.int32)
    )


def sharing_threshold(device_kind: str) -> SharingThreshold:
    """Return the first entry of `SHARING_THRESHOLDS` that matches the device."""
    return next(
        threshold
        for threshold in SHARING_THRESHOLDS
        if device_kind.startswith(threshold.device)
    )


def num_shared_blocks(
    shared: SharedPrefix,
    context_lens: jax.Array,
    sliding_window: int | jax.Array | None,
) -> jax.Array:
    """Return the leading blocks that each row reads with its group, i32[S]; 0 if none.

    A row whose sliding window starts after the first token sees only a part of the
    prefix, so it reads alone. So does an idle row.
    """
    joins = context_lens > 0
    if sliding_window is not None:
        joins &= context_lens <= sliding_window
    return jnp.where(joins, shared.num_blocks, 0)


def drop_leading_blocks(block_tables: jax.Array, num_blocks: jax.Array) -> jax.Array:
    """Return the tables without each row's first `num_blocks`, i32[S] -> i32[S, M]."""
    width = block_tables.shape[1]
    column = jnp.arange(width, dtype=jnp.int32)[None, :] + num_blocks[:, None]
    column = jnp.minimum(column, width - 1)
    return jnp.take_along_axis(block_tables, column, axis=1)


def num_tokens_read(
    shared: SharedPrefix, context_lens: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Return the tokens whose keys and values a step reads, without and with groups.

    Both are i32[]. A group's prefix counts once. Bytes are these numbers times the
    bytes of one token.
    """
    row = jnp.arange(context_lens.shape[0], dtype=jnp.int32)
    is_same = shared.leaders[:, None] == shared.leaders[None, :]
    first = jnp.min(jnp.where(is_same, row[None, :], row.size), axis=1)
    saved = jnp.where(first == row, 0, shared.num_blocks * block_size)
    total = jnp.sum(context_lens)
    return total, total - jnp.sum(saved)
