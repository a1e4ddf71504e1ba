"""Queries over packed pages: one for each place in a row, and their results as one.

Place on the road: pallas.tpu_attention -> [pallas.tpu_packed].

A row of a packed page holds `tokens` keys side by side, and a product sums over all of
its lanes. So each query stands in the kernel `tokens` times, neighbours, the j-th with
its numbers in the lanes of a row's j-th token and zeros elsewhere. Each sees those
tokens alone, and their online softmaxes are merged in the end.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages.packed import LANES

Numbers = tuple[jax.Array, jax.Array, jax.Array]


def spread(q: jax.Array, tokens: int) -> jax.Array:
    """[T, H * tokens, 128] of q [T, H, D]."""
    num_queries, num_heads, head_dim = q.shape
    places = [
        jnp.pad(q, ((0, 0), (0, 0), (start, LANES - head_dim - start)))
        for start in range(0, LANES, head_dim)
    ]
    return jnp.stack(places, axis=2).reshape(num_queries, num_heads * tokens, LANES)


def place_of_row(row: jax.Array, tokens: int) -> jax.Array:
    """Which token of a page's row a row of queries sees."""
    return row & (tokens - 1)


def place_of_lane(shape: tuple[int, ...], tokens: int) -> jax.Array:
    """Which token of a page's row a lane belongs to, i32 of `shape` [..., 128]."""
    lane = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return lane >> ((LANES // tokens).bit_length() - 1)


def merged(
    highest: jax.Array, total: jax.Array, acc: jax.Array, tokens: int
) -> Numbers:
    """A query's maximum, sum and weighted values, from those of its `tokens` rows.

    f32[R, 128] each. All rows of a query get them, and its values stand in the lanes
    of every token.
    """
    row = lax.broadcasted_iota(jnp.int32, acc.shape, 0)
    over_all = _over_rows(highest, row, tokens, jnp.maximum)
    share = jnp.exp(highest - over_all)
    is_own = place_of_lane(acc.shape, tokens) == place_of_row(row, tokens)
    acc = _over_rows(jnp.where(is_own, acc * share, 0.0), row, tokens, jnp.add)
    shift = LANES // tokens
    while shift < LANES:
        acc += pltpu.roll(acc, shift, 1)
        shift *= 2
    return over_all, _over_rows(total * share, row, tokens, jnp.add), acc


def _over_rows(
    x: jax.Array,
    row: jax.Array,
    tokens: int,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`x` [R, 128] combined over every `tokens` rows, in each of them."""
    shift = 1
    while shift < tokens:
        above, below = (pltpu.roll(x, by, 0) for by in (shift, x.shape[0] - shift))
        x = combine(x, jnp.where((row & shift) != 0, above, below))
        shift *= 2
    return x
