"""Paged attention on Hopper GPUs: TMA copies pages, tensor cores multiply them.

Pipeline: attention -> pallas.gpu.calls -> [pallas.gpu.attention].

One block of threads computes one item (see `work`) for one key/value head. One of its
warpgroups keeps the tensor memory accelerator (TMA) busy: `stages` tiles of keys and of
values are in flight at once, one copy per block, into swizzled shared memory. The other
warpgroups multiply, 64 rows at a time as `wgmma` requires, and keep the online softmax.
Each computes up to 128 columns of the output, because more do not fit in its registers,
and each computes all scores. `merge` merges the items of each query.

Shape symbols as in `jpaged.attention`; R = 64 rows of a tile of queries, C tokens of a
tile of keys, Q tiles, I items, W warpgroups that multiply.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.compat import load_from_gpu_memory
from jpaged.pallas.gpu.plan import ROWS, GpuCallPlan
from jpaged.pallas.gpu.work import Items

LOG2E = math.log2(math.e)
# Registers per thread: of a warpgroup that computes, and of the one that fetches.
_COMPUTE_REGISTERS, _FETCH_REGISTERS = 232, 40
# The fewest numbers that a warpgroup reads at once; outputs are padded to as many.
_WIDTH = 128
# Scores of unseen tokens, and the first running maximum. The maximum is far above the
# scores, so that weights of unseen tokens are 0, and below every score of a model.
_UNSEEN, _LOWEST = -1e30, -1e29
_SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def attend_items(
    q_tiles: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    items: Items,
    seen: jax.Array,
    lowest: jax.Array,
    layer: jax.Array,
    plan: GpuCallPlan,
) -> tuple[jax.Array, jax.Array]:
    """Compute the attention of each item.

    Args:
      q_tiles: [Q, K, R, D].
      k_pages: [L * N * K * P / unit, unit, D].
      v_pages: Like k_pages.
      tables: i32[S * M].
      items: As in `work`.
      seen: i32[Q, R], as in `work.QueryTiles`.
      lowest: i32[Q, R], as in `work.QueryTiles`.
      layer: i32[1].
      plan: The call's sizes.

    Returns:
      Outputs f32[I, K, rows, D'], where D' is D but at least 128, and log-sum-exps to
      base 2, f32[I, K, R]. Rows without queries, columns past D, and items without
      steps are not written.
    """
    num_items = items.tile.shape[0]
    shape = (num_items, plan.num_kv_heads)
    out_width = max(plan.head_dim, _WIDTH)
    call = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=[
            jax.ShapeDtypeStruct((*shape, plan.rows, out_width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, ROWS), jnp.float32),
        ],
        scratch_types=_scratch_types(k_pages.dtype, plan),
        grid=shape,
        grid_names=("item", "kv_head"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="paged_attention",
    )
    fields = jnp.stack(items, axis=1)
    return call(q_tiles, k_pages, v_pages, tables, fields, seen, lowest, layer)


def _scratch_types(dtype: Any, plan: GpuCallPlan) -> dict[str, Any]:
    """Return the shared memory and barriers of a block of threads."""
    number = plan.warpgroups
    k_shape = (plan.stages, plan.tokens, plan.head_dim)
    v_shape = (plan.stages, number, plan.tokens, plan.columns)
    weights_shape = (number, ROWS, plan.tokens)
    barriers = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    return dict(
        q_smem=plgpu.SMEM((ROWS, plan.head_dim), dtype, transforms=_SWIZZLE),
        k_smem=plgpu.SMEM(k_shape, dtype, transforms=_SWIZZLE),
        v_smem=plgpu.SMEM(v_shape, dtype, transforms=_SWIZZLE),
        weights_smem=plgpu.SMEM(weights_shape, dtype, transforms=_SWIZZLE),
        out_smem=plgpu.SMEM((ROWS, plan.columns), jnp.float32),
        q_full=plgpu.Barrier(),
        k_full=barriers(num_arrivals=plan.units),
        v_full=barriers(num_arrivals=plan.units * number),
        k_free=barriers(num_arrivals=number),
        v_free=barriers(num_arrivals=number),
        out_free=plgpu.Barrier(),
    )


def _kernel(
    q_gmem: Any,  # [Q, K, R, D]
    k_gmem: Any,  # [L * N * K * P / unit, unit, D]
    v_gmem: Any,
    tables: Any,  # i32[S * M]
    fields: Any,  # i32[I, fields of Items]
    seen: Any,  # i32[Q, R]
    lowest: Any,
    layer: Any,  # i32[1]
    out_gmem: Any,  # f32[I, K, rows, D']
    lse_gmem: Any,  # f32[I, K, R]
    *,
    plan: GpuCallPlan,
    **scratch: Any,
) -> None:
    number, kv_head = lax.axis_index("item"), lax.axis_index("kv_head")
    item = Items(*(fields[number, i] for i in range(len(Items._fields))))
    role = lax.axis_index("warpgroup")

    @pl.when((role == plan.warpgroups) & (item.steps > 0))
    def _() -> None:
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
        pages = functools.partial(_unit_indices, tables, layer[0], item, kv_head, plan)
        _fetch(k_gmem, v_gmem, pages, item.steps, plan, **scratch)

    @pl.when((role < plan.warpgroups) & (item.steps > 0))
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        out = out_gmem.at[number, kv_head]
        q = q_gmem.at[item.tile, kv_head]
        limits = [load_from_gpu_memory(x.at[item.tile]) for x in (seen, lowest)]
        acc, total, highest = _compute(q, role, item, limits, plan, **scratch)

        @pl.when(role == 0)
        def _() -> None:
            lse_gmem[number, kv_head] = highest + jnp.log2(jnp.maximum(total, 1e-30))

        _put(acc, total, out, role, item, plan, **scratch)


# ---- the warpgroup that fetches


def _unit_indices(
    tables: Any, layer: Any, item: Items, kv_head: Any, plan: GpuCallPlan, step: Any
) -> tuple[Any, ...]:
    """Return the indices in the pool of the units that a step copies, i32 scalars.

    Past a tile's last unit, the last unit is repeated: the barriers count copies, and
    table entries past the length must not be read.
    """
    parts = plan.block_size // plan.unit
    found = []
    for i in range(plan.units):
        unit = jnp.minimum(item.unit + step * plan.units + i, item.last_unit)
        column = lax.div(unit, jnp.int32(parts))
        block = tables[item.row * plan.width + column]
        block = jnp.clip(block, 0, plan.num_blocks - 1)
        page = (layer * plan.num_blocks + block) * plan.num_kv_heads + kv_head
        found.append(page * parts + unit - column * parts)
    return tuple(found)


def _fetch(
    k_gmem: Any,
    v_gmem: Any,
    pages: Callable[[Any], tuple[Any, ...]],
    steps: Any,
    plan: GpuCallPlan,
    **scratch: Any,
) -> None:
    """Copy the item's units; each step starts as soon as its buffers are free."""
    k_smem, v_smem = scratch["k_smem"], scratch["v_smem"]

    def copy_keys(index: Any, slot: Any, lines: Any, full: Any) -> None:
        plgpu.copy_gmem_to_smem(k_gmem.at[index], k_smem.at[slot, lines], full)

    def copy_values(index: Any, slot: Any, lines: Any, full: Any) -> None:
        for i in range(plan.warpgroups):
            values = v_gmem.at[index, :, pl.ds(i * plan.columns, plan.columns)]
            plgpu.copy_gmem_to_smem(values, v_smem.at[slot, i, lines], full)

    pools = [
        (copy_keys, scratch["k_full"], scratch["k_free"]),
        (copy_values, scratch["v_full"], scratch["v_free"]),
    ]

    def fetch(step: Any, found: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = lax.rem(step, jnp.int32(plan.stages))
        # The next step's block numbers are loaded while this step waits.
        following = pages(step + 1)
        for copy, full, free in pools:

            @pl.when(step >= plan.stages)
            def _(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            for i, index in enumerate(found):
                copy(index, slot, pl.ds(i * plan.unit, plan.unit), full.at[slot])
        return following

    lax.fori_loop(0, steps, fetch, pages(0))

    @pl.loop(jnp.maximum(steps - plan.stages, 0), steps)
    def _(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(plan.stages))
        for *_, free in pools:
            plgpu.barrier_wait(free.at[slot])


# ---- a warpgroup that computes


def _compute(
    q: Any, role: Any, item: Items, limits: Any, plan: GpuCallPlan, **scratch: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the online softmax of the item for one warpgroup's columns.

    Args:
      q: [R, D] in global memory.
      role: The warpgroup's number, i32[].
      item: The item.
      limits: i32[R] twice: the number of tokens up to each row's query, and the first
        token that it sees.
      plan: The call's sizes.
      **scratch: Shared memory and barriers.

    Returns:
      Sums of weighted values f32[R, columns], sums of weights f32[R], and maxima
      f32[R].
    """

    @pl.when(role == 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(q, scratch["q_smem"], scratch["q_full"])

    limits = [_over_columns(x, plan.tokens) for x in limits]
    plgpu.barrier_wait(scratch["q_full"])
    step = functools.partial(
        _add_tile, role=role, item=item, limits=limits, plan=plan, scratch=scratch
    )
    start = (
        jnp.zeros((ROWS, plan.columns), jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
        jnp.full((ROWS,), _LOWEST, jnp.float32),
    )
    return lax.fori_loop(0, item.steps, step, start)


def _add_tile(
    step: Any,
    carry: tuple[jax.Array, jax.Array, jax.Array],
    *,
    role: Any,
    item: Items,
    limits: list[jax.Array],
    plan: GpuCallPlan,
    scratch: dict[str, Any],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the online softmax after one more tile of keys."""
    acc, total, before = carry
    seen, lowest = limits
    slot = lax.rem(step, jnp.int32(plan.stages))
    start = (item.unit + step * plan.units) * plan.unit
    position = start + lax.broadcasted_iota(jnp.int32, (ROWS, plan.tokens), 1)
    is_seen = (position < seen) & (position >= lowest)

    plgpu.barrier_wait(scratch["k_full"].at[slot])
    keys = scratch["k_smem"].at[slot].transpose((1, 0))
    scores = _product(scratch["q_smem"], keys, plan.tokens)
    plgpu.barrier_arrive(scratch["k_free"].at[slot])
    scores = jnp.where(is_seen, _log2_scores(scores, plan), _UNSEEN)
    highest = jnp.maximum(before, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - _over_columns(highest, plan.tokens))
    keep = jnp.exp2(before - highest)
    total = total * keep + jnp.sum(weights, axis=1)
    weights_smem = scratch["weights_smem"].at[role]
    weights_smem[...] = weights.astype(weights_smem.dtype)

    plgpu.barrier_wait(scratch["v_full"].at[slot])
    values = scratch["v_smem"].at[slot, role]

    @pl.when((start < item.first_token) | (start + plan.tokens > item.end_token))
    def _() -> None:
        _clear_unseen(values, start, item)

    plgpu.commit_smem()
    update = _product(weights_smem, values, plan.columns)
    plgpu.barrier_arrive(scratch["v_free"].at[slot])
    return acc * _over_columns(keep, plan.columns) + update, total, highest


def _product(left: Any, right: Any, columns: int) -> jax.Array:
    """Return the product f32[R, columns] of two operands in shared memory."""

    def multiply(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, left, right)
        return acc[...]

    # Public, but not re-exported in the way that pyright expects.
    acc_type = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(multiply, acc_type((ROWS, columns), jnp.float32))


def _log2_scores(scores: jax.Array, plan: GpuCallPlan) -> jax.Array:
    """Scale and cap scores, and convert them to base 2, which the hardware computes."""
    if plan.soft_cap is None:
        return scores * (plan.scale * LOG2E)
    # tanh(x) from exp2: the hardware's tanh has errors of 5e-4, times the cap.
    double = jnp.exp2(scores * (2 * LOG2E * plan.scale / plan.soft_cap))
    return (plan.soft_cap * LOG2E) * (1.0 - 2.0 / (double + 1.0))


def _clear_unseen(values: Any, start: Any, item: Items) -> None:
    """Set values that no query sees to 0: their weight is 0, and 0 * NaN is NaN."""
    position = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
    is_seen = (position >= item.first_token) & (position < item.end_token)
    loaded = values[...]
    values[...] = jnp.where(is_seen, loaded, jnp.zeros_like(loaded))


def _over_columns(rows: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(rows, (ROWS, columns), (0,))


def _put(
    acc: jax.Array,
    total: jax.Array,
    out: Any,
    role: Any,
    item: Items,
    plan: GpuCallPlan,
    *,
    out_smem: Any,
    out_free: Any,
    **_: Any,
) -> None:
    """Write a warpgroup's columns of the item's output, divided by the weights' sum."""
    share = jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)
    # Shared memory holds the columns of one warpgroup, so they write one after another.
    if plan.warpgroups > 1:
        pl.when(role > 0)(lambda: plgpu.barrier_wait(out_free))
    out_smem[...] = acc * _over_columns(share, plan.columns)
    plgpu.commit_smem()

    def put(rows: int) -> None:
        lines = pl.ds(0, rows)
        target = out.at[lines, pl.ds(role * plan.columns, plan.columns)]
        plgpu.copy_smem_to_gmem(out_smem.at[lines], target)

    if plan.tile_queries == 1:
        put(plan.rows)
    else:  # a single query has only as many rows as heads
        pl.when(item.queries == 1)(lambda: put(plan.group))
        pl.when(item.queries > 1)(lambda: put(plan.rows))
    plgpu.wait_smem_to_gmem(0)
    if plan.warpgroups > 1:
        pl.when(role < plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(out_free))
