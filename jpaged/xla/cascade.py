"""Shared prefixes in plain XLA: their blocks are read once for many rows.

Place on the road: xla.attention -> [xla.cascade] -> xla.chunks.

Attention over a row's keys is attention over the prefix that its group shares, merged
with attention over its own blocks (Juravsky et al. 2024, https://arxiv.org/abs/2402.05099).
The prefix's part is a chunk of queries, one of each row, that all see the whole prefix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.kv.shared_prefix import SharedPrefix, drop_leading_blocks, num_shared_blocks
from jpaged.xla.chunks import chunks
from jpaged.xla.pages import Pools


class Parts(NamedTuple):
    """What each group reads together, and each row by itself."""

    order: jax.Array  # i32[S], rows, those of a group side by side
    starts: jax.Array  # i32[S], of the group that row s leads: its first in that order
    sizes: jax.Array  # i32[S], its rows; 0 where s leads none
    shared_lens: jax.Array  # i32[S], tokens of its prefix
    own_tables: jax.Array  # i32[S, M], blocks behind the row's shared ones
    own_lens: jax.Array  # i32[S], tokens in them


def split(
    shared: SharedPrefix,
    block_tables: jax.Array,
    context_lens: jax.Array,
    block_size: int,
    sliding_window: int | jax.Array | None,
) -> Parts:
    """The parts of all rows."""
    num_rows = context_lens.shape[0]
    num_blocks = num_shared_blocks(shared, context_lens, sliding_window)
    num_tokens = num_blocks * block_size
    group = jnp.where(num_blocks > 0, shared.leaders, num_rows)
    nobody = jnp.zeros((num_rows,), jnp.int32)
    sizes = nobody.at[group].add(1, mode="drop")
    return Parts(
        order=jnp.argsort(group, stable=True),
        starts=jnp.cumsum(sizes) - sizes,
        sizes=sizes,
        shared_lens=nobody.at[group].max(num_tokens, mode="drop"),
        own_tables=drop_leading_blocks(block_tables, num_blocks),
        own_lens=context_lens - num_tokens,
    )


def attend(
    q: jax.Array, pools: Pools, block_tables: jax.Array, parts: Parts, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Output f32[S, H, D] and log-sum-exp f32[S, H] of each row over its prefix.

    Zeros and -inf for rows that are alone.
    """
    options |= {"sliding_window": None, "sinks": None}
    out, lse = chunks(
        q[parts.order],
        pools,
        block_tables,
        parts.shared_lens,
        parts.starts,
        parts.sizes,
        is_causal=False,
        dtype=jnp.dtype("float32"),
        **options,
    )
    back = jnp.argsort(parts.order)
    return out[back], lse[back]
