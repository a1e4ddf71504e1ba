"""Attention on Hopper GPUs: one work list and one kernel for every kind of step.

Pipeline: attention -> [pallas.gpu.calls] -> pallas.gpu.attention, pallas.gpu.merge.

Decode rows and prompt chunks use the same kernel. A tile contains queries of one row of
the block tables: one query for decode, or as many as fill the tensor core's 64 rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jpaged.pages import operands, tuned
from jpaged.pallas.gpu import attention as gpu_attention
from jpaged.pallas.gpu import merge as gpu_merge
from jpaged.pallas.gpu import work as gpu_work
from jpaged.pallas.gpu.plan import (
    GPU_TILES,
    ROWS,
    GpuCallPlan,
    page_units,
    plan_call,
    to_query_tiles,
)
from jpaged.pallas.sinks import apply_sinks


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
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the output [T, H, D] and the log-sum-exp f32[T, H].

    The arguments are those of `jpaged.attention.paged_attention`, with `scale` and
    `logits_soft_cap` as Python numbers.

    Args:
      dtype: The output's dtype; None: that of q.

    Raises:
      ValueError: The call is on a mesh of several devices, outside of `jax.shard_map`.
    """
    _check_one_device()
    sizes = tuned.tiles("mosaic_gpu", GPU_TILES, q.shape[1], k_pages)
    is_ragged = query_start_loc is not None
    plan = plan_call(q, k_pages, block_tables, scale, logits_soft_cap, is_ragged, sizes)
    starts = operands.query_starts(query_start_loc, block_tables.shape[0])
    window = operands.window_size(sliding_window)
    tiles = _query_tiles(starts, context_lens, window, q.shape[0], plan)
    items, first_items, num_items = gpu_work.split_tiles(
        tiles,
        num_items=tiles.row.shape[0] + max(sizes.blocks // plan.num_kv_heads, 1),
        unit=plan.unit,
        units=plan.units,
        min_steps=max(sizes.part_tokens // plan.tokens, 1),
    )
    outs, lses = gpu_attention.attend_items(
        to_query_tiles(q.astype(k_pages.dtype), tiles, plan),
        page_units(k_pages, plan),
        page_units(v_pages, plan),
        block_tables.reshape(-1),
        items,
        tiles.seen,
        tiles.lowest,
        operands.layer_index(layer).reshape(1),
        plan,
    )
    parts = _query_parts(starts, tiles, first_items, num_items, q.shape[0], plan)
    dtype = q.dtype if dtype is None else dtype
    # Sinks are applied to a float32 output, so that the result is rounded once.
    merged = jnp.float32 if sinks is not None else dtype
    out, lse = gpu_merge.merge_items(outs, lses, parts, plan.group, merged)
    out = out[..., : q.shape[-1]]
    lse = jnp.where(lse < -1e28, -jnp.inf, lse / gpu_attention.LOG2E)
    return (out, lse) if sinks is None else apply_sinks(out, lse, sinks, dtype)


def _check_one_device() -> None:
    """Raise ValueError if XLA would have to split the kernels over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and AxisType.Manual not in mesh.axis_types:
        raise ValueError(
            "implementation: 'mosaic_gpu' cannot serve this ('xla' can): expected one "
            f"device, or a call within jax.shard_map, got a mesh {dict(mesh.shape)}"
        )


def _query_tiles(
    starts: jax.Array,
    context_lens: jax.Array,
    window: jax.Array,
    num_queries: int,
    plan: GpuCallPlan,
) -> gpu_work.QueryTiles:
    num_rows = context_lens.shape[0]
    return gpu_work.query_tiles(
        starts,
        context_lens,
        window,
        num_tiles=gpu_work.max_tiles(num_queries, num_rows, plan.tile_queries),
        tile_queries=plan.tile_queries,
        group=plan.group,
        rows=ROWS,
        max_tokens=plan.width * plan.block_size,
    )


def _query_parts(
    starts: jax.Array,
    tiles: gpu_work.QueryTiles,
    first_items: jax.Array,
    num_items: jax.Array,
    num_queries: int,
    plan: GpuCallPlan,
) -> gpu_work.QueryParts:
    tile = gpu_work.tile_of_queries(starts, num_queries, plan.tile_queries)
    tile = jnp.minimum(tile, tiles.row.shape[0] - 1)
    query = jnp.arange(num_queries, dtype=jnp.int32)
    is_live = query < starts[-1]
    return gpu_work.QueryParts(
        item=first_items[tile],
        num_items=jnp.where(is_live, num_items[tile], 0),
        row=jnp.where(is_live, (query - tiles.first[tile]) * plan.group, 0),
    )
