"""Paged attention on NVIDIA GPUs: pages are read where they lie, and never gathered.

Place on the road: attention -> [triton.attention] -> triton.launch.

The work is cut into items, each a tile of queries of one row. Rows of one query, which
is decode, are cut along their tokens too, by their actual lengths: all of the step's
tokens over the number of programs that fill the GPU. Their partial results are merged
by a second, small kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.pages import operands, tuned
from jpaged.pages.quantised import float8_bits
from jpaged.triton import tiles as tiles_module
from jpaged.triton.launch import launch
from jpaged.triton.tiles import Tiles


class Plan(NamedTuple):
    """Who computes what; a function of the lengths alone."""

    starts: jax.Array  # i32[S + 1], first query of each row
    items: jax.Array  # i32[S + 1], first item of each row
    parts: jax.Array  # i32[S + 1], first partial result of each row that has several
    chunk: jax.Array  # i32[], tokens of a split


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    layer: jax.Array | int | None,
    scale: float,
    sliding_window: jax.Array | int | None,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    dtype: Any = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [T, H, D], and log-sum-exp f32[T, H].

    Arguments as of `jpaged.attention.paged_attention`, with scales ([L,] N, K, P or
    more); `dtype` is the output's, None takes that of q; `tiles` None takes those of
    `tuned`, or `triton.tiles`.
    """
    num_queries, num_heads, head_dim = q.shape
    *_, num_blocks, num_kv_heads, block_size, _ = k_pages.shape
    num_rows, width = block_tables.shape
    group = num_heads // num_kv_heads
    if tiles is None:
        itemsizes = k_pages.dtype.itemsize, q.dtype.itemsize
        tiles = tiles_module.choose(head_dim, *itemsizes)
        tiles = tuned.tiles("triton", tiles, num_heads, k_pages)
    is_ragged = query_start_loc is not None
    queries = max(tiles.query_rows // group, 1) if is_ragged else 1
    window = operands.window_size(sliding_window)
    starts = operands.query_starts(query_start_loc, num_rows)
    # Rows split into at most so many items more than there are rows.
    more = max(tiles.programs // num_kv_heads, 1)
    has_parts = width * block_size > tiles.least_chunk
    plan = make_plan(context_lens, starts, window, queries, more, tiles)
    num_items = num_rows + (num_queries // queries if is_ragged else 0) + more
    num_parts = num_rows + more if has_parts else 1
    sizes = jnp.array([num_rows, width, num_blocks], jnp.int32)
    settings = jnp.stack([operands.layer_index(layer), window, plan.chunk])
    settings = jnp.concatenate([settings, sizes])
    has_sinks = sinks is not None
    sinks = jnp.zeros(num_heads) if sinks is None else sinks
    sinks = sinks.astype(jnp.float32)
    kind, scales = k_pages.dtype, 0  # of the products; of a block and head
    if k_scale is None or v_scale is None:
        k_scale = v_scale = sinks  # any array: it is not read
    else:
        kind, scales = q.dtype, k_scale.shape[-1]
    lens = context_lens.astype(jnp.int32)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    dtype = q.dtype if dtype is None else dtype
    results = (array(*q.shape, dtype=dtype), array(num_queries, num_heads))
    partial = (array(num_parts, num_heads, head_dim), array(num_parts, num_heads))
    # Compilers for Ampere refuse float8_e4m3fn.
    pools = (float8_bits(k_pages), float8_bits(v_pages), k_scale, v_scale)
    out, lse, *parts = launch(
        "attend",
        (num_items, num_kv_heads),
        (q, *pools, block_tables, lens, *plan[:3], settings, sinks),
        (*results, *partial),
        # A prompt's tile has four times the rows of most decode rows'.
        num_warps=tiles.num_warps * (2 if is_ragged or group > 32 else 1),
        num_stages=tiles.num_stages,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=block_size,
        QUERIES=queries,
        ROWS=max(1 << (queries * group - 1).bit_length(), 16),
        TOKENS=tiles.tokens,
        SCALE=float(scale),
        SOFT_CAP=float(logits_soft_cap or 0.0),
        HAS_SINKS=has_sinks,
        SCALES=scales,
        # TF32 would round float32 keys to 10 bits.
        PRECISION="ieee" if kind == jnp.float32 else "tf32",
    )
    if has_parts:
        out, lse = launch(
            "merge",
            (num_rows, num_heads),
            (*parts, plan.starts, plan.parts, sinks, out, lse),
            results,
            aliases={5: 0, 6: 1},
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            HAS_SINKS=has_sinks,
        )
    # Memory of queries that no row owns was never written.
    is_owned = jnp.arange(num_queries, dtype=jnp.int32) < plan.starts[-1]
    out = jnp.where(is_owned[:, None, None], out, 0)
    return out, jnp.where(is_owned[:, None], lse, -jnp.inf)


def make_plan(
    context_lens: jax.Array,
    starts: jax.Array,
    window: jax.Array,
    queries: int,
    more: int,
    tiles: Tiles,
) -> Plan:
    """Splits rows of one query so that all together have at most `more` splits more
    than rows, and rows of several into tiles of `queries`."""
    num_queries = starts[1:] - starts[:-1]
    is_one = num_queries == 1
    spans = jnp.where(is_one, jnp.minimum(context_lens, window), 0).astype(jnp.int32)
    chunk = _ceil_div(jnp.sum(spans, dtype=jnp.int32), more)
    chunk = _ceil_div(chunk, tiles.tokens) * tiles.tokens
    chunk = jnp.maximum(chunk, tiles.least_chunk)
    splits = jnp.maximum(_ceil_div(spans, chunk), 1)
    items = jnp.where(is_one, splits, _ceil_div(num_queries, queries))
    parts = jnp.where(is_one & (splits > 1), splits, 0)
    return Plan(starts, _firsts(items), _firsts(parts), chunk)


def _firsts(numbers: jax.Array) -> jax.Array:
    """i32[S + 1]: where each row begins if row s has `numbers[s]`."""
    return jnp.pad(jnp.cumsum(numbers, dtype=jnp.int32), (1, 0))


def _ceil_div(a: jax.Array, b: jax.Array | int) -> jax.Array:
    return (a + b - 1) // b
