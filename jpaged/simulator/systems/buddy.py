"""Buddy allocator: chunks of memory whose sizes are powers of two, as arrays.

Place on the road: requests -> [buddy] -> which slots a request has.

A chunk that is too large is halved until it fits; when both halves are free again they
are one chunk again. That is how the paper's Orca has its memory, of chunks of at most
2,048 tokens. Everything is a pure function of `BuddyState`: it can be jitted, vmapped
and carried through `lax.while_loop`.

Letters: U units, the smallest chunks; K orders: a chunk of order k has 2**k units.
Source: Knowlton, A fast storage allocator, CACM 1965; Kwon et al. 2023, Section 6.1.
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
    """Which chunks are free."""

    orders: jax.Array  # i32[U], of the free chunk that begins at this unit; NO_CHUNK
    num_free: jax.Array  # i32[K], free chunks of each order


def init_state(num_units: int, num_orders: int) -> BuddyState:
    """Everything free: the largest chunks first, smaller ones behind them.

    Raises:
      ValueError: not a unit, or no order, or one whose chunk is no int32.

    >>> init_state(num_units=11, num_orders=3).num_free.tolist()
    [1, 1, 2]
    """
    if num_units < 1 or not 1 <= num_orders <= 31:
        raise ValueError(
            f"num_units, num_orders: wanted at least 1, and from 1 to 31, got "
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


def num_free_units(state: BuddyState) -> jax.Array:
    """Units in free chunks, i32[]."""
    return jnp.sum(state.num_free << jnp.arange(state.num_free.size, dtype=jnp.int32))


def num_available(state: BuddyState, order: jax.Array) -> jax.Array:
    """How many chunks of `order` could be allocated now, i32[]."""
    above = jnp.arange(state.num_free.size, dtype=jnp.int32) - order
    parts = jnp.where(above >= 0, state.num_free << jnp.maximum(above, 0), 0)
    return jnp.sum(parts)


def allocate(state: BuddyState, order: jax.Array) -> tuple[BuddyState, jax.Array]:
    """The state without one chunk of `order`, and the unit at which it begins.

    It comes from the smallest free chunk that is large enough, the first of these; what
    it leaves of that is free. Where there is none, NO_CHUNK, and nothing changes.
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


def free(state: BuddyState, begin: jax.Array, order: jax.Array) -> BuddyState:
    """The state with a chunk that was allocated free again, and its buddies with it.

    A `begin` of NO_CHUNK changes nothing.
    """
    num_units, num_orders = state.orders.size, state.num_free.size
    every = jnp.arange(num_orders, dtype=jnp.int32)
    # The chunk of each order that holds this one, and that one's buddy.
    own = begin & -(1 << every)
    buddies = own ^ (1 << every)
    is_there = state.orders.at[buddies].get(mode="fill", fill_value=NO_CHUNK) == every
    # The largest chunk has no buddy; below, all up to the first that is not free merge.
    is_there &= every < num_orders - 1
    ok = begin != NO_CHUNK
    merges = ok & (every >= order)
    merges &= jnp.cumsum((every >= order) & ~is_there) == 0
    final = order + jnp.sum(merges, dtype=jnp.int32)
    gone = jnp.where(merges, buddies, num_units)
    orders = state.orders.at[gone].set(NO_CHUNK, mode="drop")
    at = jnp.where(ok, own[final], num_units)
    orders = orders.at[at].set(final, mode="drop")
    added = ok & (every == final)
    num_free = state.num_free - merges.astype(jnp.int32) + added.astype(jnp.int32)
    return BuddyState(orders, num_free)
