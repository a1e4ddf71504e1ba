"""Eviction policies: which unused block of the prefix cache is evicted first.

Pipeline: CachedBlocks -> [eviction policy] -> scores; the smallest is evicted first.
A block without its prefix is of no use, so a block is kept at least as long as the
blocks behind it: the cache raises its score to theirs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged.policies.views import CachedBlocks


def lru(blocks: CachedBlocks) -> jax.Array:
    """Least recently used."""
    return blocks.last_used


def fifo(blocks: CachedBlocks) -> jax.Array:
    """First in, first out."""
    return blocks.inserted


def lfu(blocks: CachedBlocks) -> jax.Array:
    """Least frequently used since it was cached; of these the least recently."""
    age = (blocks.now - blocks.last_used).astype(jnp.float32)
    return blocks.num_uses.astype(jnp.float32) - age / (age + 1.0)


def gdsf(blocks: CachedBlocks) -> jax.Array:
    """Cost-aware: uses times cost, plus the score at which blocks were evicted then.

    The cost of a block is what it takes to compute it again: its tokens' dense layers,
    and their attention to the prefix. Parameters: the share of attention at 1,000
    tokens of context; none is 0.1.

    Source: Cherkasova 1998, Greedy-Dual-Size-Frequency; all blocks have one size.
    """
    share = blocks.parameters[0] if blocks.parameters.shape[0] else jnp.float32(0.1)
    context = blocks.depths.astype(jnp.float32) * (blocks.block_size / 1000)
    uses = blocks.num_uses.astype(jnp.float32)
    return blocks.floors + uses * (1.0 + share * context)
