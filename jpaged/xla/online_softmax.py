"""The online softmax over a table's tiles: the inner loop of attention in plain XLA.

Place on the road: xla.attention, xla.cascade -> [xla.online_softmax] -> xla.pages.

A sequence's blocks are walked a tile at a time (Milakov and Gimelshein 2018), in loops
whose trip counts come from the context lengths. Tiles that every query of the loop sees
whole need no mask; only the others pay for one.

Letters as in `jpaged.attention`; R rows, C blocks of a tile, B = R * K, Q queries of
one product.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.xla import pages
from jpaged.xla.pages import Pools

# Below every score that a float32 model gives, and finite: -inf - -inf is NaN.
_LOWEST = -1e30


class Softmax(NamedTuple):
    """The running state of the online softmax."""

    maximum: jax.Array  # f32[B, Q]
    total: jax.Array  # f32[B, Q]
    out: jax.Array  # f32[B, Q, D]


def walk(
    queries: jax.Array,
    pools: Pools,
    tables: jax.Array,
    visible: jax.Array,
    *,
    blocks,
    scale,
    sliding_window,
    logits_soft_cap,
) -> Softmax:
    """The online softmax of `queries` over the tables' tiles that they see.

    Args:
      queries: [B, Q, D] with B = R * K.
      tables: i32[R, M].
      visible: i32[R * K, 1] or [1, Q], tokens that each query sees; 0 for none.
    """
    num_batch, num_queries, head_dim = queries.shape
    num_blocks, _, block_size, _ = pools.k.shape
    tokens = blocks * block_size
    pad = -tables.shape[1] % blocks
    tables = jnp.clip(jnp.pad(tables, ((0, 0), (0, pad))), 0, num_blocks - 1)

    least = jnp.min(jnp.where(visible > 0, visible, jnp.iinfo(jnp.int32).max))
    most = jnp.max(visible)
    end = (most + tokens - 1) // tokens
    # Tiles from `first` up to `last` are seen whole by every query; those before and
    # behind need a mask. An idle row or query never blocks them: its result is dropped.
    begin = first = jnp.int32(0)
    if sliding_window is not None:
        begin = jnp.minimum(jnp.maximum(least - sliding_window, 0) // tokens, end)
        first = (jnp.maximum(most - sliding_window, 0) + tokens - 1) // tokens
        first = jnp.minimum(first, end)
    last = jnp.clip(least // tokens, first, end)

    step = functools.partial(
        _tile,
        queries,
        pools,
        tables,
        blocks=blocks,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )

    def masked(index, state):
        index += begin
        index += jnp.where(index < first, 0, last - first)
        position = index * tokens + jnp.arange(tokens, dtype=jnp.int32)
        position = position[None, None, :]
        mask = position < visible[..., None]
        if sliding_window is not None:
            mask &= position >= visible[..., None] - sliding_window
        return step(index, state, mask)

    state = Softmax(
        jnp.full((num_batch, num_queries), _LOWEST, jnp.float32),
        jnp.zeros((num_batch, num_queries), jnp.float32),
        jnp.zeros((num_batch, num_queries, head_dim), jnp.float32),
    )
    state = lax.fori_loop(first, last, lambda i, s: step(i, s, None), state)
    num_masked = (first - begin) + (end - last)
    state = lax.fori_loop(0, num_masked, masked, state)
    # Idle rows walked along without a mask: they saw nothing.
    idle = jnp.broadcast_to(visible <= 0, state.total.shape)
    return Softmax(
        jnp.where(idle, _LOWEST, state.maximum),
        jnp.where(idle, 0.0, state.total),
        jnp.where(idle[..., None], 0.0, state.out),
    )


def _tile(
    queries,
    pools,
    tables,
    index,
    state,
    mask,
    *,
    blocks,
    scale,
    logits_soft_cap,
):
    """One tile's step of the online softmax; `mask` bool[B or 1, Q or 1, tokens]."""
    num_rows = tables.shape[0]
    columns = lax.dynamic_slice(tables, (0, index * blocks), (num_rows, blocks))
    keys, values, k_scale, v_scale = pages.gather(pools, columns)
    product = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = product("bqd,btd->bqt", queries.astype(keys.dtype), keys) * scale
    if k_scale is not None:
        scores *= k_scale[:, None, :]
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
        # Unused slots may hold NaN, and 0 * NaN is NaN.
        seen = jnp.any(mask, axis=1)
        values = jnp.where(seen[..., None], values, jnp.zeros((), values.dtype))
        v_scale = None if v_scale is None else jnp.where(seen, v_scale, 0.0)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    keep = jnp.exp(state.maximum - maximum)
    total = state.total * keep + jnp.sum(weights, axis=-1)
    if v_scale is not None:
        weights *= v_scale[:, None, :]
    update = product("bqt,btd->bqd", weights.astype(values.dtype), values)
    return Softmax(maximum, total, state.out * keep[..., None] + update)


def finish(state, sinks, num_kv_heads, dtype, queries_per_head=1):
    """The output in `dtype` and the log-sum-exp from the running state."""
    empty = state.total == 0
    lse = jnp.where(
        empty, -jnp.inf, state.maximum + jnp.log(jnp.where(empty, 1.0, state.total))
    )
    scale = 1.0 / jnp.where(empty, 1.0, state.total)
    if sinks is not None:
        num_batch = lse.shape[0]
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)
        sink = jnp.repeat(sink, queries_per_head, axis=1)
        sink = jnp.tile(sink, (num_batch // num_kv_heads, 1))
        with_sink = jnp.where(empty, -jnp.inf, jnp.logaddexp(lse, sink))
        scale = jnp.where(empty, 0.0, scale * jnp.exp(lse - with_sink))
        lse = with_sink
    return (state.out * scale[..., None]).astype(dtype), lse


def merge(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `jpaged.attention.merge_states`."""
    lse = jnp.logaddexp(lse_a, lse_b)
    # Both sets empty: lse is -inf and -inf - -inf is NaN; the weights must be 0.
    base = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weight_a = jnp.exp(lse_a - base)[..., None]
    weight_b = jnp.exp(lse_b - base)[..., None]
    out = weight_a * out_a.astype(jnp.float32) + weight_b * out_b.astype(jnp.float32)
    return out.astype(out_a.dtype), lse
