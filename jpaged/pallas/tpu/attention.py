"""Paged attention on TPUs: the kernel reads pages in place and gathers nothing.

Pipeline: attention -> pallas.tpu.calls -> [pallas.tpu.attention] -> pallas.tpu.kernel.

This module prepares the arguments of the kernel and calls it: it arranges queries in
tiles, lists the segments of the step, and applies sinks to the result.

Shape symbols as in `jpaged.attention`; R rows of a tile of queries, I segments.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages import packed as packed_pages
from jpaged.pages import tuned
from jpaged.pages.packed import LANES
from jpaged.pallas.sinks import apply_sinks
from jpaged.pallas.tpu import kernel as tpu_kernel
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu import segments as tpu_segments
from jpaged.pallas.tpu.numbers import product_dtype
from jpaged.pallas.tpu.plan import (
    TpuCallPlan,
    TpuTiles,
    from_query_tiles,
    plan_call,
    to_query_tiles,
)
from jpaged.pallas.tpu.segments import Segments


def attend_segments(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    scales: tuple[jax.Array, ...],
    layer: jax.Array,
    scale: float,
    window: jax.Array,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    return_lse: bool,
    dtype: Any = None,
    tiles: TpuTiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the output [T, H, D], and the log-sum-exp f32[T, H] or None.

    Args:
      q: [T, H, D].
      k_pages: [L, N, K, P, D'], with D' a multiple of 128, at least D, and zeros past
        D; or packed, [L, N, K, P * D // 128, 128].
      v_pages: Like k_pages.
      block_tables: i32[S, M].
      context_lens: i32[S].
      query_start_loc: i32[S + 1], or None if each row has one query.
      scales: Scales of keys and of values of quantised pages, f32[L, N, K, P'] with P'
        the next multiple of 128; () for other pages.
      layer: i32[], index into L.
      scale: A Python number.
      window: i32[], at most `operands.EVERYTHING`.
      logits_soft_cap: A Python number or None.
      sinks: f32[H] or None.
      return_lse: Whether to return the log-sum-exp.
      dtype: The output's dtype; None: that of q.
      tiles: Tile sizes; None: those of `jpaged.pages.tuned`.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    num_queries, _, head_dim = q.shape
    tokens_of_row = packed_pages.tokens_of_row(k_pages, head_dim)
    tiles = _tuned_tiles(q, k_pages) if tiles is None else tiles
    dtype = q.dtype if dtype is None else dtype
    if tokens_of_row > 1:
        q = tpu_packed.repeat_queries(q, tokens_of_row)
    plan = plan_call(
        q,
        k_pages,
        block_tables,
        is_ragged=query_start_loc is not None,
        tiles=tiles,
        tokens_of_row=tokens_of_row,
        scale=scale,
        soft_cap=logits_soft_cap,
    )
    out, *lses = _call_kernel(
        to_query_tiles(q.astype(product_dtype(k_pages.dtype, q.dtype)), plan),
        (k_pages, v_pages, *scales),
        block_tables,
        _list_segments(query_start_loc, context_lens, window, num_queries, plan),
        jnp.stack([layer, window]),
        plan,
        # Sinks are applied to a float32 output, so that the result is rounded once.
        out_dtype=jnp.float32 if sinks is not None else dtype,
        has_lse=return_lse or sinks is not None,
        interpret=interpret,
    )
    # All copies of a query over packed pages have its result.
    out = from_query_tiles(out, plan, num_queries)[:, ::tokens_of_row, :head_dim]
    if not lses:
        return out, None
    lse = from_query_tiles(lses[0], plan, num_queries)[:, ::tokens_of_row, 0]
    return (out, lse) if sinks is None else apply_sinks(out, lse, sinks, dtype)


def _tuned_tiles(q: jax.Array, k_pages: jax.Array) -> TpuTiles:
    shape = packed_pages.plain_shape(k_pages, q.shape[-1])
    pages = jax.ShapeDtypeStruct(shape, k_pages.dtype)
    return tuned.tiles("mosaic_tpu", TpuTiles(), q.shape[1], pages)


def _list_segments(
    query_start_loc: jax.Array | None,
    context_lens: jax.Array,
    window: jax.Array,
    num_queries: int,
    plan: TpuCallPlan,
) -> Segments:
    max_tokens = plan.width * plan.block_size
    if query_start_loc is None:
        return tpu_segments.decode_segments(context_lens, window, max_tokens)
    return tpu_segments.chunk_segments(
        query_start_loc,
        context_lens,
        window,
        max_tokens,
        tile_queries=plan.tile_queries,
        num_tiles=plan.num_tiles(num_queries),
    )


def _call_kernel(
    q_tiles: jax.Array,
    arrays: tuple[jax.Array, ...],
    block_tables: jax.Array,
    segments: Segments,
    settings: jax.Array,
    plan: TpuCallPlan,
    *,
    out_dtype: Any,
    has_lse: bool,
    interpret: Any,
) -> Sequence[jax.Array]:
    """Return the kernel's output in tiles, and its log-sum-exp if `has_lse`."""
    heads, rows, head_dim = plan.pass_heads, plan.rows, plan.head_dim

    def at_tile(
        pass_index: Any, segment: Any, _settings: Any, _tables: Any, tile: Any, *_
    ):
        return tile[segment], pass_index, 0, 0

    def spec(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, rows, size), at_tile)

    shape = (q_tiles.shape[0], plan.num_kv_heads, rows)
    out_shape = [jax.ShapeDtypeStruct((*shape, head_dim), out_dtype)]
    out_specs = [spec(head_dim)]
    if has_lse:
        out_shape.append(jax.ShapeDtypeStruct((*shape, LANES), jnp.float32))
        out_specs.append(spec(LANES))
    in_place = [pl.BlockSpec(memory_space=pl.ANY) for _ in arrays]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2 + len(segments),
        grid=(plan.num_kv_heads // heads, segments.tile.shape[0]),
        in_specs=[spec(head_dim), *in_place],
        out_specs=out_specs,
        scratch_shapes=tpu_kernel.scratch(plan, arrays),
    )
    call = pl.pallas_call(
        functools.partial(
            tpu_kernel.attention_kernel,
            plan=plan,
            num_arrays=len(arrays),
            has_lse=has_lse,
        ),
        grid_spec=grid_spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        name="paged_attention",
    )
    tables = block_tables.reshape(-1)
    return call(settings, tables, *segments, q_tiles, *_keep_in_place(arrays))


def _keep_in_place(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Constrain the arrays to the main memory.

    Without the constraint, XLA moves a small pool next to the core before a program's
    loop and back after it: two copies of the pool in every step.
    """
    return [
        pltpu.with_memory_space_constraint(array, pltpu.HBM)
        if isinstance(array, Tracer)
        else array  # called outside of any program
        for array in arrays
    ]
