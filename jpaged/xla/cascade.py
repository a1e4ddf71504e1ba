"""Shared prefixes in plain XLA: their blocks are read once for many rows.

Pipeline: xla.attention -> [xla.cascade] -> xla.chunks.

Attention over a row's keys is attention over the prefix that its group shares, merged
with attention over the row's own blocks (Juravsky et al. 2024,
https://arxiv.org/abs/2402.05099). For the prefix, the queries of a group's rows form
one chunk, in which every query sees the whole prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.kv.shared_prefix import behind, joined
from jpaged.pages.operands import AttentionOperands
from jpaged.xla.chunks import XlaTiles, attend_chunks
from jpaged.xla.online_softmax import Result


class PrefixSplit(NamedTuple):
    """What each group reads together, and what each row reads alone."""

    order: jax.Array  # i32[S], rows, with those of a group side by side
    starts: jax.Array  # i32[S], position in `order` of the first row that s leads
    sizes: jax.Array  # i32[S], number of rows that s leads; 0 if it leads no group
    shared_lens: jax.Array  # i32[S], tokens of the prefix of the group that s leads
    own_tables: jax.Array  # i32[S, M], blocks after the row's shared ones
    own_lens: jax.Array  # i32[S], tokens in them


def split_prefixes(operands: AttentionOperands) -> PrefixSplit:
    """Split the context of each row into its shared prefix and its own blocks."""
    shared, context_lens = operands.shared_prefix, operands.context_lens
    assert shared is not None
    num_rows = context_lens.shape[0]
    num_blocks = joined(shared, context_lens, operands.sliding_window)
    num_tokens = num_blocks * operands.pools.k.shape[2]
    # A row that reads alone is sent past the end, where mode="drop" discards it.
    leader = jnp.where(num_blocks > 0, shared.leaders, num_rows)
    zeros = jnp.zeros((num_rows,), jnp.int32)
    sizes = zeros.at[leader].add(1, mode="drop")
    return PrefixSplit(
        order=jnp.argsort(leader, stable=True),
        starts=jnp.cumsum(sizes) - sizes,
        sizes=sizes,
        shared_lens=zeros.at[leader].max(num_tokens, mode="drop"),
        own_tables=behind(operands.block_tables, num_blocks),
        own_lens=context_lens - num_tokens,
    )


def attend_prefixes(
    operands: AttentionOperands, parts: PrefixSplit, tiles: XlaTiles
) -> Result:
    """Return attention of each row over its shared prefix, without sinks.

    Returns:
      Output f32`[S, H, D]` and log-sum-exp f32`[S, H]`; zeros and -inf for rows that
      read alone.
    """
    prefixes = operands._replace(
        q=operands.q[parts.order],
        context_lens=parts.shared_lens,
        sliding_window=None,
        sinks=None,
    )
    out, lse = attend_chunks(
        prefixes,
        parts.starts,
        parts.sizes,
        tiles=tiles,
        is_causal=False,
        dtype=jnp.dtype("float32"),
    )
    back = jnp.argsort(parts.order)
    return out[back], lse[back]
