"""The online softmax over a table's tiles: the inner loop of attention in plain XLA.

Pipeline: xla.attention, xla.chunks -> [xla.online_softmax] -> xla.pages.

A loop reads a sequence's blocks tile by tile (Milakov and Gimelshein 2018). Its trip
counts come from the context lengths. Tiles that every query of the loop sees completely
need no mask; only the other tiles pay for one.

Shape symbols as in `jpaged.attention`; R rows, C blocks of a tile, B = R * K, Q queries
of one product.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.pages.operands import AttentionOperands
from jpaged.xla import pages

# Below every score that a float32 model gives, and finite: -inf - -inf is NaN.
_LOWEST = -1e30

# Output [..., H, D] and log-sum-exp f32[..., H].
Result = tuple[jax.Array, jax.Array]


class Softmax(NamedTuple):
    """The running state of the online softmax."""

    maximum: jax.Array  # f32[B, Q]
    total: jax.Array  # f32[B, Q]
    out: jax.Array  # f32[B, Q, D]


class _TileRange(NamedTuple):
    """Which tiles of a table the loop reads, i32[] each.

    Tiles begin <= i < end are read. Of these, every query sees tiles first <= i < last
    completely; the others need a mask.
    """

    begin: jax.Array
    first: jax.Array
    last: jax.Array
    end: jax.Array


def walk(
    operands: AttentionOperands,
    queries: jax.Array,
    tables: jax.Array,
    visible: jax.Array,
    *,
    blocks: int,
) -> Softmax:
    """Return the online softmax of `queries` over the tiles that they see.

    Args:
      operands: their `pools`, `scale`, `sliding_window` and `logits_soft_cap`.
      queries: `[B, Q, D]` with B = R * K.
      tables: i32`[R, M]`.
      visible: i32`[R * K, 1]` or `[1, Q]`, tokens that each query sees; 0 for none.
      blocks: C, blocks of a tile.
    """
    num_blocks, _, block_size, _ = operands.pools.k.shape
    tokens, window = blocks * block_size, operands.sliding_window
    pad = -tables.shape[1] % blocks
    tables = jnp.clip(jnp.pad(tables, ((0, 0), (0, pad))), 0, num_blocks - 1)
    tiles = _tile_range(visible, window, tokens)
    step = functools.partial(_tile, operands, queries, tables, blocks)

    def unmasked(index: jax.Array, state: Softmax) -> Softmax:
        return step(index, state, None)

    def masked(index: jax.Array, state: Softmax) -> Softmax:
        index += tiles.begin
        index += jnp.where(index < tiles.first, 0, tiles.last - tiles.first)
        position = index * tokens + jnp.arange(tokens, dtype=jnp.int32)
        position = position[None, None, :]
        mask = position < visible[..., None]
        if window is not None:
            mask &= position >= visible[..., None] - window
        return step(index, state, mask)

    state = Softmax(
        jnp.full(queries.shape[:2], _LOWEST, jnp.float32),
        jnp.zeros(queries.shape[:2], jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    state = lax.fori_loop(tiles.first, tiles.last, unmasked, state)
    num_masked = (tiles.first - tiles.begin) + (tiles.end - tiles.last)
    state = lax.fori_loop(0, num_masked, masked, state)
    # Queries that see nothing took part in the loop without a mask: reset them.
    idle = jnp.broadcast_to(visible <= 0, state.total.shape)
    return Softmax(
        jnp.where(idle, _LOWEST, state.maximum),
        jnp.where(idle, 0.0, state.total),
        jnp.where(idle[..., None], 0.0, state.out),
    )


def _tile_range(
    visible: jax.Array, sliding_window: int | jax.Array | None, tokens: int
) -> _TileRange:
    """Return the tiles of `tokens` to read for queries that see `visible` tokens.

    An idle query (0 tokens) does not limit the tiles without a mask: its result is
    dropped.
    """
    least = jnp.min(jnp.where(visible > 0, visible, jnp.iinfo(jnp.int32).max))
    most = jnp.max(visible)
    end = cdiv(most, tokens)
    begin = first = jnp.int32(0)
    if sliding_window is not None:
        begin = jnp.minimum(jnp.maximum(least - sliding_window, 0) // tokens, end)
        first = cdiv(jnp.maximum(most - sliding_window, 0), tokens)
        first = jnp.minimum(first, end)
    return _TileRange(begin, first, jnp.clip(least // tokens, first, end), end)


def _tile(
    operands: AttentionOperands,
    queries: jax.Array,
    tables: jax.Array,
    blocks: int,
    index: jax.Array,
    state: Softmax,
    mask: jax.Array | None,
) -> Softmax:
    """Return the state after one tile; `mask` is bool[B or 1, Q or 1, tokens]."""
    columns = lax.dynamic_slice(tables, (0, index * blocks), (len(tables), blocks))
    keys, values, k_scale, v_scale = pages.gather(operands.pools, columns)
    product = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = product("bqd,btd->bqt", queries.astype(keys.dtype), keys) * operands.scale
    if k_scale is not None:
        scores *= k_scale[:, None, :]
    if (cap := operands.logits_soft_cap) is not None:
        scores = cap * jnp.tanh(scores / cap)
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


def finish(
    state: Softmax,
    sinks: jax.Array | None,
    num_kv_heads: int,
    dtype: jnp.dtype,
    queries_per_head: int = 1,
) -> Result:
    """Return the output `[B, Q, D]` in `dtype` and the log-sum-exp f32`[B, Q]`.

    Args:
      state: after the last tile, with Q = G * queries_per_head.
      sinks: f32`[H]` or None.
      num_kv_heads: K.
      dtype: of the output.
      queries_per_head: queries side by side in Q for each head.
    """
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


def merge_states(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> Result:
    """Merge attention over two disjoint sets of keys into attention over their union.

    Args:
      out_a, out_b: `[..., H, D]`, attention outputs.
      lse_a, lse_b: f32`[..., H]`, natural log-sum-exps; `-inf` marks an empty set.

    Returns:
      The merged output in the dtype of `out_a`, and its log-sum-exp f32`[..., H]`.
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    # If both sets are empty, lse is -inf and -inf - -inf is NaN; the weights must be 0.
    base = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weight_a = jnp.exp(lse_a - base)[..., None]
    weight_b = jnp.exp(lse_b - base)[..., None]
    out = weight_a * out_a.astype(jnp.float32) + weight_b * out_b.astype(jnp.float32)
    return out.astype(out_a.dtype), lse
