"""Queries over packed pages: one copy per token of a page row, and the merged results.

Pipeline: pallas.tpu.attention, pallas.tpu.kernel -> [pallas.tpu.packed].

A row of a packed page holds `tokens` keys side by side, and a product sums over all of
its lanes. So the kernel has `tokens` copies of each query in neighbouring rows. The
j-th copy has its numbers in the lanes of a page row's j-th token, and zeros elsewhere.
It sees only those tokens, and the online softmaxes of the copies are merged at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages.packed import LANES

SoftmaxState = tuple[jax.Array, jax.Array, jax.Array]


def repeat_queries(q: jax.Array, tokens: int) -> jax.Array:
    """Return the copies of each query, [T, H * tokens, 128], given q [T, H, D]."""
    num_queries, num_heads, head_dim = q.shape
    copies = [
        jnp.pad(q, ((0, 0), (0, 0), (start, LANES - head_dim - start)))
        for start in range(0, LANES, head_dim)
    ]
    return jnp.stack(copies, axis=2).reshape(num_queries, num_heads * tokens, LANES)


def token_of_query_row(row: jax.Array, tokens: int) -> jax.Array:
    """Return which token of a page row a row of queries sees."""
    return row & (tokens - 1)


def token_of_lane(shape: tuple[int, ...], tokens: int) -> jax.Array:
    """Return which token of a page row each lane belongs to, i32[..., 128]."""
    lane = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return lane >> ((LANES // tokens).bit_length() - 1)


def merge_copies(
    highest: jax.Array, total: jax.Array, acc: jax.Array, tokens: int
) -> SoftmaxState:
    """Merge the online softmaxes of each query's `tokens` copies.

    Args:
      highest: Maxima, f32[R, 128].
      total: Sums of weights, f32[R, 128].
      acc: Weighted values, f32[R, 128].
      tokens: Copies per query.

    Returns:
      The same three arrays. All copies of a query have its results, and its values are
      in the lanes of every token.
    """
    row = lax.broadcasted_iota(jnp.int32, acc.shape, 0)
    over_all = _over_copies(highest, row, tokens, jnp.maximum)
    share = jnp.exp(highest - over_all)
    is_own = token_of_lane(acc.shape, tokens) == token_of_query_row(row, tokens)
    acc = _over_copies(jnp.where(is_own, acc * share, 0.0), row, tokens, jnp.add)
    shift = LANES // tokens
    while shift < LANES:
        acc += pltpu.roll(acc, shift, 1)
        shift *= 2
    return over_all, _over_copies(total * share, row, tokens, jnp.add), acc


def _over_copies(
    x: jax.Array,
    row: jax.Array,
    tokens: int,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Combine x [R, 128] over every `tokens` rows; all of them get the result."""
    shift = 1
    while shift < tokens:
        above, below = (pltpu.roll(x, by, 0) for by in (shift, x.shape[0] - shift))
        x = combine(x, jnp.where((row & shift) != 0, above, below))
        shift *= 2
    return x
