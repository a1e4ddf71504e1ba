"""Batch-invariant attention: a query's bits depend on its own sequence alone.

Pipeline: forward, decoder -> [invariant] -> attention.

Neither the batch, the chunking of prompts, the block size nor the block table's width
changes a result. The "cpu" kernels have this property: they read keys in chunks that
start at fixed positions, and sum in a fixed order. For other backends this module does
the same with XLA: all shapes are those of one tile of queries and one chunk of keys.

Shape symbols: S sequences, T queries, H query heads, K kv heads, D head_dim, G query
heads per kv head, C keys of a chunk, B batch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv, floor_div, remainder
from jpaged.attention import api, backends
from jpaged.pages.packed import plain

QUERIES = 8  # of a tile
KEYS = 64  # of a chunk


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    query_start_loc: jax.Array | None,
    layer: jax.Array | int | None,
    implementation: str | None,
    **options: Any,
) -> jax.Array:
    """Return attention [T, H, D] as `api.paged_attention`, batch-invariant.

    Args:
      q: [T, H, D].
      k_pages: pages of floats; see `api.paged_attention`, like the other arguments.
      v_pages: see there.
      block_tables: see there.
      context_lens: see there.
      query_start_loc: see there.
      layer: see there.
      implementation: name of the backend whose pages these are.
      **options: scale, sliding_window, logits_soft_cap and sinks.
    """
    if backends.serving_name(implementation) == "cpu":
        attended: Any = api.paged_attention(
            q,
            k_pages,
            v_pages,
            block_tables,
            context_lens,
            query_start_loc=query_start_loc,
            layer=layer,
            implementation="cpu",
            **options,
        )
        return attended
    k_pages, v_pages = (plain(pages, q.shape[-1]) for pages in (k_pages, v_pages))
    if layer is not None:
        k_pages, v_pages = (
            lax.dynamic_index_in_dim(pages, layer, keepdims=False)
            for pages in (k_pages, v_pages)
        )
    rows, ends = _query_rows(q.shape[0], context_lens, query_start_loc)
    num_tiles = cdiv(q.shape[0], QUERIES)

    def tiled(x: jax.Array) -> jax.Array:
        padding = ((0, num_tiles * QUERIES - x.shape[0]), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(num_tiles, QUERIES, *x.shape[1:])

    attend = functools.partial(
        _attend_tile, k_pages=k_pages, v_pages=v_pages, **options
    )
    out = lax.map(
        lambda tile: attend(*tile), (tiled(q), tiled(block_tables[rows]), tiled(ends))
    )
    return out.reshape(-1, *q.shape[1:])[: q.shape[0]].astype(q.dtype)


def _query_rows(
    num_queries: int, context_lens: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the sequence of each query, and the number of keys that it sees."""
    index = jnp.arange(num_queries, dtype=jnp.int32)
    if starts is None:
        return index, context_lens
    starts = lax.cummax(starts)
    row = jnp.sum(index[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, context_lens.shape[0] - 1)
    ends = context_lens[row] - (starts[row + 1] - 1 - index)
    return row, jnp.where(index < starts[-1], ends, 0)


def _attend_tile(
    q: jax.Array,
    tables: jax.Array,
    ends: jax.Array,
    *,
    k_pages: jax.Array,
    v_pages: jax.Array,
    scale: float | None = None,
    sliding_window: int | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention [Q, H, D] of a tile: q [Q, H, D], tables i32[Q, M], ends i32[Q]."""
    num_queries, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_pages.shape
    grouped = (num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q = q.reshape(grouped).astype(jnp.float32)
    factor = head_dim**-0.5 if scale is None else scale
    window = jnp.iinfo(jnp.int32).max if sliding_window is None else sliding_window

    def add_chunk(chunk: jax.Array, carry: Any) -> Any:
        out, total, maximum = carry
        position = chunk * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
        column = jnp.minimum(floor_div(position, block_size), tables.shape[1] - 1)
        block = jnp.maximum(tables[:, column], 0)
        offset = remainder(position, block_size)[None]
        k, v = (
            pages[block, :, offset].astype(jnp.float32) for pages in (k_pages, v_pages)
        )
        is_seen = position[None] < ends[:, None]
        is_seen &= ends[:, None] - position[None] <= window
        v = jnp.where(is_seen[:, :, None, None], v, 0.0)  # unused slots may be NaN
        scores = _dot("qkgd,qckd->qkgc", q, k) * factor
        if logits_soft_cap is not None:
            scores = jnp.tanh(scores / logits_soft_cap) * logits_soft_cap
        scores = jnp.where(is_seen[:, None, None], scores, -jnp.inf)
        highest = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        safe = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(maximum - safe)
        gained = _dot("qkgc,qckd->qkgd", weights, v)
        total = total * shrink + jnp.sum(weights, axis=-1)
        return out * shrink[..., None] + gained, total, highest

    minus_infinity = jnp.full(grouped[:3], -jnp.inf)
    carry = (jnp.zeros(grouped), jnp.zeros(grouped[:3]), minus_infinity)
    num_chunks = cdiv(jnp.max(ends), KEYS)
    out, total, maximum = lax.fori_loop(0, num_chunks, add_chunk, carry)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, *grouped[1:3])
        highest = jnp.maximum(maximum, sink)
        shrink = jnp.exp(maximum - highest)
        out, total = out * shrink[..., None], total * shrink + jnp.exp(sink - highest)
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    return out.reshape(num_queries, num_heads, head_dim)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: str | None,
    gradient: Any,
    sinks: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Return causal attention with the bits of `paged_attention`; differentiable.

    Args:
      q: [B, T, H, D].
      k: [B, T, K, D].
      v: [B, T, K, D].
      implementation: as in `paged_attention`.
      gradient: causal attention with the same arguments; the gradient is its.
      sinks: [H], or None.
      **options: as in `paged_attention`.
    """

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
        batch, length = q.shape[:2]
        # One block for each sequence: results do not depend on the block size.
        pages = [jnp.swapaxes(x, 1, 2) for x in (k, v)]
        out = paged_attention(
            q.reshape(-1, *q.shape[2:]),
            pages[0],
            pages[1],
            jnp.arange(batch, dtype=jnp.int32)[:, None],
            jnp.full((batch,), length, jnp.int32),
            query_start_loc=jnp.arange(batch + 1, dtype=jnp.int32) * length,
            layer=None,
            implementation=implementation,
            sinks=sinks,
            **options,
        )
        return out.reshape(q.shape)

    attend = jax.custom_vjp(forward)

    def backward(operands: Any, cotangent: jax.Array) -> Any:
        q, k, v, sinks = operands

        def plain_attention(*operands: Any) -> jax.Array:
            *qkv, sinks = operands
            return gradient(*qkv, sinks=sinks, **options)

        return jax.vjp(plain_attention, q, k, v, sinks)[1](cotangent)

    attend.defvjp(lambda *operands: (forward(*operands), operands), backward)
    return attend(q, k, v, sinks)
