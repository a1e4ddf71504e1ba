"""The Hopper GPU's kernels as attention calls them: one list of work for any step.

Place on the road: attention -> [pallas.gpu] -> pallas.gpu_attention, pallas.gpu_merge.

Decode rows and prompt chunks are the same kernel: tiles of queries of one row of the
tables, a query or as many as fill the tensor core's 64 rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jpaged.pages import operands, tuned
from jpaged.pallas.gpu import (
    attention as gpu_attention,
)
from jpaged.pallas.gpu import (
    merge as gpu_merge,
)
from jpaged.pallas.gpu import (
    work as gpu_work,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """None is measured, for there was no GPU: the arithmetic is in
    `docs/decisions/mosaic_gpu_kernel.md`."""

    tokens: int = 64  # of a tile of keys; more cost registers, and spill
    shared_bytes: int = 2**17  # of all tiles of keys and values under way
    blocks: int = 264  # of threads, all heads' together: two turns of an H200's cores
    part_tokens: int = 512  # of an item that is not the last of its tile, at least


SIZES = Sizes()


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
    """Output [T, H, D], and log-sum-exp f32[T, H].

    Args: as `jpaged.attention.paged_attention`; `scale` and `logits_soft_cap` are
    Python numbers. `dtype` is the output's; None takes that of q.
    """
    _check_one_device()
    is_ragged = query_start_loc is not None
    sizes = tuned.tiles("mosaic_gpu", SIZES, q.shape[1], k_pages)
    plan = _plan(q, k_pages, block_tables, scale, logits_soft_cap, is_ragged, sizes)
    num_rows, num_queries = block_tables.shape[0], q.shape[0]
    starts = operands.query_starts(query_start_loc, num_rows)
    tiles = gpu_work.tiles_of(
        starts,
        context_lens,
        operands.window_size(sliding_window),
        num_tiles=gpu_work.max_tiles(num_queries, num_rows, plan.tile_queries),
        tile_queries=plan.tile_queries,
        group=plan.group,
        rows=gpu_attention.ROWS,
        max_tokens=plan.width * plan.block_size,
    )
    num_full = max(sizes.blocks // plan.num_kv_heads, 1)
    items, first_items, num_items = gpu_work.items_of(
        tiles,
        num_items=tiles.row.shape[0] + num_full,
        unit=plan.unit,
        units=plan.units,
        min_steps=max(sizes.part_tokens // plan.tokens, 1),
    )
    outs, lses = gpu_attention.attend(
        _to_tiles(q.astype(k_pages.dtype), tiles, plan),
        _units(k_pages, plan),
        _units(v_pages, plan),
        block_tables.reshape(-1),
        items,
        tiles.seen,
        tiles.lowest,
        operands.layer_index(layer).reshape(1),
        plan,
    )
    tile = gpu_work.tile_of_queries(starts, num_queries, plan.tile_queries)
    tile = jnp.minimum(tile, tiles.row.shape[0] - 1)
    query = jnp.arange(num_queries, dtype=jnp.int32)
    is_live = query < starts[-1]
    parts = gpu_work.Parts(
        item=first_items[tile],
        count=jnp.where(is_live, num_items[tile], 0),
        row=jnp.where(is_live, (query - tiles.first[tile]) * plan.group, 0),
    )
    # Sinks are applied to the output, which is rounded once, behind them.
    dtype = q.dtype if dtype is None else dtype
    merged = jnp.float32 if sinks is not None else dtype
    out, lse = gpu_merge.merge(outs, lses, parts, plan.group, merged)
    out = out[..., : q.shape[-1]]
    lse = jnp.where(lse < -1e28, -jnp.inf, lse / gpu_attention.LOG2E)
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks, dtype)


def _check_one_device() -> None:
    """Raises ValueError where XLA would have to split the kernels over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and AxisType.Manual not in mesh.axis_types:
        raise ValueError(
            "implementation: 'mosaic_gpu' cannot serve this ('xla' can): expected one "
            f"device, or a call within jax.shard_map, got a mesh {dict(mesh.shape)}"
        )


def _plan(q, k_pages, block_tables, scale, soft_cap, is_ragged, sizes):
    num_heads = q.shape[1]
    num_blocks, num_kv_heads, block_size, head_dim = k_pages.shape[-4:]
    group = num_heads // num_kv_heads
    bytes_of_token = head_dim * k_pages.dtype.itemsize
    return gpu_attention.Plan(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        width=block_tables.shape[1],
        tile_queries=gpu_attention.ROWS // group if is_ragged else 1,
        tokens=sizes.tokens,
        stages=max(sizes.shared_bytes // (2 * sizes.tokens * bytes_of_token), 2),
        scale=scale,
        soft_cap=soft_cap,
    )


def _units(pages: jax.Array, plan: gpu_attention.Plan) -> jax.Array:
    """[L * N * K * P / unit, unit, D]: what one copy moves has one index."""
    return pages.reshape(-1, plan.unit, plan.head_dim)


def _to_tiles(q: jax.Array, tiles: gpu_work.Tiles, plan) -> jax.Array:
    """[Q, K, R, D] of q [T, H, D]; rows without a query hold any other's."""
    query = jnp.arange(plan.tile_queries, dtype=jnp.int32)
    query = jnp.clip(tiles.first[:, None] + query[None, :], 0, q.shape[0] - 1)
    found = q.reshape(-1, plan.num_kv_heads, plan.group, plan.head_dim)[query]
    found = found.transpose(0, 2, 1, 3, 4)
    found = found.reshape(*found.shape[:2], plan.rows, plan.head_dim)
    pad = gpu_attention.ROWS - plan.rows
    return jnp.pad(found, ((0, 0), (0, 0), (0, pad), (0, 0)))


def _with_sinks(out, lse, sinks, dtype):
    """The same with a score per head that has no value."""
    is_empty = jnp.isneginf(lse)
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, :])
    share = jnp.where(is_empty, 0.0, jnp.exp(lse - total))
    out = (out * share[..., None]).astype(dtype)
    return out, jnp.where(is_empty, -jnp.inf, total)
