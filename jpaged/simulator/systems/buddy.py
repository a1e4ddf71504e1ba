"""Buddy allocator: chunks of memory whose sizes are powers of two, as arrays.

Pipeline: requests -> [buddy] -> the KV slots of each request.

A chunk that is too large is halved until it has the requested size. When both halves
are free again, they merge into one chunk. The paper's Orca allocates its memory this
way, in chunks of at most 2,048 tokens. Everything is a pure function of `BuddyState`:
it works under `jit`, `vmap` and `lax.while_loop`.

Shape symbols: U units, the smallest chunks; K orders. A chunk of order k has 2**k
units.
Source: Knowlton, A fast storage allocator, CACM 1965; Kwon et al. 2023, section 6.1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

NO_CHUNK = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BuddyState:
    """The free chunks."""

    orders: jax.Array  # i32[U], order of the free chunk that begins here, or NO_CHUNK
    num_free: jax.Array  # i32[K], free chunks of each order


def init_buddy(num_units: int, num_orders: int) -> BuddyState:
    """Return a state with all memory free: the largest chunks first, then smaller ones.

    Args:
      num_units: U, at least 1.
      num_orders: K, from 1 to 31, so that the size of a chunk is an int32.

    Raises:
      ValueError: an argument is out of its range.

    >>> init_buddy(num_units=11, num_orders=3).num_free.tolist()
    [1, 1, 2]
    """
    if num_units < 1 or not 1 <= num_orders <= 31:
        raise ValueError(
            f"num_units, num_orders: expected at least 1, and from 1 to 31, got "
            f"{num_units} and {num_orders}"
        )
    orders = np.full(num_units, NO_CHUNK, np.int32)
    num_free = np.zeros(num_orders, np.int32)
    begin = 0
    for order in reversed(range(num_orders)):
        size = 2**order
        num_free[order] = (num_units - begin) // size
        end = begin + int(num_free[order]) * size
        orders[begin:end:size] = order
        begin = end
    return BuddyState(jnp.asarray(orders), jnp.asarray(num_free))


def num_available(state: BuddyState, order: jax.Array) -> jax.Array:
    """Count how many chunks of `order` can be allocated now, i32[]."""
    above = jnp.arange(state.num_free.size, dtype=jnp.int32) - order
    parts = jnp.where(above >= 0, state.num_free << jnp.maximum(above, 0), 0)
    return jnp.sum(parts)


def allocate_chunk(state: BuddyState, order: jax.Array) -> tuple[BuddyState, jax.Array]:
    """Allocate a chunk of `order`.

    The chunk is taken from the smallest free chunk that is large enough, the first one
    of that size. The rest of that chunk stays free.

    Returns:
      The state, and the first unit of the chunk, i32[]. If no chunk is large enough,
      the unit is NO_CHUNK and the state is unchanged.
    """
    num_units, num_orders = state.orders.size, state.num_free.size
    every = jnp.arange(num_orders, dtype=jnp.int32)
    is_found = (every >= order) & (state.num_free > 0)
    ok = jnp.any(is_found)
    found = jnp.argmax(is_found).astype(jnp.int32)
    begin = jnp.argmax(state.orders == found).astype(jnp.int32)
    # Halves are split off from the end: one of every order from `order` up to `found`.
    is_half = ok & (every >= order) & (every < found)
    halves = jnp.where(is_half, begin + (1 << every), num_units)
    orders = state.orders.at[halves].set(every, mode="drop")
    orders = orders.at[jnp.where(ok, begin, num_units)].set(NO_CHUNK, mode="drop")
    taken = ok & (every == found)
    num_free = state.num_free + is_half.astype(jnp.int32) - taken.astype(jnp.int32)
    return BuddyState(orders, num_free), jnp.where(ok, begin, NO_CHUNK)


def free_chunk(state: BuddyState, begin: jax.Array, order: jax.Array) -> BuddyState:
    """Free an allocated chunk, and merge it with its free buddies.

    Args:
      state: the allocator.
      begin: i32[], the chunk's first unit; NO_CHUNK changes nothing.
      order: i32[], the chunk's order.
    """
    num_units, num_orders = state.orders.size, state.num_free.size
    every = jnp.arange(num_orders, dtype=jnp.int32)
    # The chunk of each order that contains this one, and that chunk's buddy.
    own = begin & -(1 << every)
    buddies = own ^ (1 << every)
    is_free = state.orders.at[buddies].get(mode="fill", fill_value=NO_CHUNK) == every
    # The largest chunk has no buddy. Smaller ones merge up to the first buddy that is
    # not free.
    is_free &= every < num_orders - 1
    ok = begin != NO_CHUNK
    merges = ok & (every >= order)
    merges &= jnp.cumsum((every >= order) & ~is_free) == 0
    final = order + jnp.sum(merges, dtype=jnp.int32)
    merged = jnp.where(merges, buddies, num_units)
    orders = state.orders.at[merged].set(NO_CHUNK, mode="drop")
    at = jnp.where(ok, own[final], num_units)
    orders = orders.at[at].set(final, mode="drop")
    added = ok & (every == final)
    num_free = state.num_free - merges.astype(jnp.int32) + added.astype(jnp.int32)
    return BuddyState(orders, num_free)
