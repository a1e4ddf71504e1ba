"""Eviction policies of the prefix cache: uses of nodes, and scores along paths.

Pipeline: eviction policy -> [prefix_eviction] -> prefix_cache.evict.

Shape symbols: N blocks, P parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import floor_div
from jpaged.indexing import get_or
from jpaged.kv.block_state import NO_BLOCK
from jpaged.kv.prefix_table import BlockUses, PrefixCache, is_cached, nodes
from jpaged.policies import CachedBlocks


class Eviction(NamedTuple):
    """An eviction policy with its arguments."""

    policy: Callable[[CachedBlocks], jax.Array]
    parameters: jax.Array  # f32[P]
    now: jax.Array  # i32[], the clock


def count_uses(cache: PrefixCache, before: jax.Array, after: jax.Array) -> PrefixCache:
    """Count the sequences that begin to use nodes, where the cache counts uses.

    Args:
      cache: the nodes.
      before: i32[N], reference counts before rows mapped cached blocks.
      after: i32[N], reference counts after that.
    """
    uses = cache.uses
    if uses is None:
        return cache
    gained = jnp.where(is_cached(cache), jnp.maximum(after - before, 0), 0)
    uses = dataclasses.replace(
        uses,
        num_uses=uses.num_uses + gained,
        floors=jnp.where(gained > 0, uses.floor, uses.floors),
    )
    return dataclasses.replace(cache, uses=uses)


def note_new_nodes(
    before: PrefixCache, cache: PrefixCache, clock: jax.Array | int
) -> PrefixCache:
    """Set the uses of blocks that became nodes since `before`; `clock` is i32[]."""
    uses = cache.uses
    if uses is None:
        return cache
    is_new = is_cached(cache) & ~is_cached(before)
    uses = dataclasses.replace(
        uses,
        inserted=jnp.where(is_new, jnp.asarray(clock, jnp.int32), uses.inserted),
        num_uses=jnp.where(is_new, 1, uses.num_uses),
        floors=jnp.where(is_new, uses.floor, uses.floors),
    )
    return dataclasses.replace(cache, uses=uses)


def node_scores(cache: PrefixCache, eviction: Eviction) -> jax.Array:
    """Return the score of each node, f32[N]: the largest in the subtree below it.

    So no node is evicted before the nodes behind it. Repeated doubling of the distance
    to an ancestor needs as many steps as the longest path's length has binary digits.
    """
    uses = cache.uses
    assert uses is not None
    view = CachedBlocks(
        last_used=cache.last_used,
        inserted=uses.inserted,
        num_uses=uses.num_uses,
        depths=cache.depths,
        floors=uses.floors,
        now=eviction.now,
        block_size=cache.tokens.shape[1],
        parameters=eviction.parameters,
    )
    found = eviction.policy(view).astype(jnp.float32)
    # A score that is not a number is evicted first. Zeros have one sign.
    found = jnp.where(jnp.isnan(found), -jnp.inf, found) + 0.0
    return largest_below(cache, jnp.where(is_cached(cache), found, -jnp.inf))


def largest_below(cache: PrefixCache, values: jax.Array) -> jax.Array:
    """Return the largest value in the subtree of each node, [N] as `values`.

    Companions of a node are below it.
    """
    (num_blocks,) = cache.parents.shape
    ancestors = jnp.where(nodes(cache), cache.parents, num_blocks)
    if cache.companions is not None:
        owners, number = cache.companions.owners, cache.companions.blocks.shape[1]
        owner = floor_div(jnp.maximum(owners, 0), number)
        ancestors = jnp.where(owners == NO_BLOCK, ancestors, owner)

    def has_ancestors(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(carry[1] < num_blocks)

    def double(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, ancestors = carry
        found = found.at[ancestors].max(found, mode="drop")
        ancestors = get_or(ancestors, ancestors, num_blocks)
        return found, ancestors

    return lax.while_loop(has_ancestors, double, (values, ancestors))[0]


def as_integers(scores: jax.Array) -> jax.Array:
    """Return integers in the order of the scores, i32[N]; `scores` f32[N], no NaN."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def with_floor(
    cache: PrefixCache, is_evicted: jax.Array, scores: jax.Array
) -> BlockUses:
    """Return the uses after an eviction: the largest finite score is the floor.

    Args:
      cache: the nodes before the eviction.
      is_evicted: bool[N].
      scores: f32[N], of the nodes.
    """
    uses = cache.uses
    assert uses is not None
    counts = is_evicted & jnp.isfinite(scores)
    highest = jnp.max(jnp.where(counts, scores, uses.floor))
    return dataclasses.replace(uses, floor=jnp.maximum(uses.floor, highest))
