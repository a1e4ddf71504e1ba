"""Paged attention on Hopper GPUs: TMA copies of pages, and the tensor core's products.

Place on the road: attention -> pallas.gpu -> [pallas.gpu_attention].

One block of threads serves an item (see `gpu_work`) of one key/value head. One of its
warpgroups keeps the tensor memory accelerator busy: `stages` tiles of keys and of
values are on their way at once, a copy for each block, into swizzled shared memory. The
others multiply, 64 rows at a time as `wgmma` wants them, and keep the online softmax:
one for up to 128 columns of the output, for more do not fit in its registers. Each
computes all scores. What the items of a query found is merged by `gpu_merge`.

Letters as in `jpaged.attention`; R = 64 rows of a tile of queries, C tokens of a tile
of keys, Q tiles, I items, W warpgroups that multiply.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.compat import load_from_gpu_memory
from jpaged.pallas.gpu.work import Items

ROWS = 64  # of one wgmma
LOG2E = math.log2(math.e)
# Columns of the output that a warpgroup's registers hold.
_COLUMNS = 128
# Of a thread of a warpgroup that computes, and of the one that fetches.
_COMPUTE_REGISTERS, _FETCH_REGISTERS = 232, 40
# Numbers that a warpgroup reads at once, at least, and what an output is filled up to.
_WIDTH = 128
# Scores of unseen tokens, and where the running maximum begins: far above the former,
# so that their weights are 0, and below every score of a model.
_UNSEEN, _LOWEST = -1e30, -1e29
_SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call, all static."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    num_blocks: int
    width: int  # of the block tables
    tile_queries: int
    tokens: int  # of a tile of keys, C
    stages: int  # tiles of keys, and of values, in shared memory
    scale: float
    soft_cap: float | None

    @property
    def unit(self) -> int:
        """Tokens of one copy: a block, or a part of a large one."""
        return min(self.block_size, self.tokens)

    @property
    def units(self) -> int:
        """Copies of a tile of keys."""
        return self.tokens // self.unit

    @property
    def warpgroups(self) -> int:
        """That compute, W; one more fetches."""
        return max(self.head_dim // _COLUMNS, 1)

    @property
    def columns(self) -> int:
        """Of the output, of one of them."""
        return self.head_dim // self.warpgroups

    @property
    def rows(self) -> int:
        """Of a tile that hold queries."""
        return self.tile_queries * self.group


def attend(
    q_tiles: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    items: Items,
    seen: jax.Array,
    lowest: jax.Array,
    layer: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """Each item's attention, f32[I, K, rows, D'], and log2 of its sum, f32[I, K, R].

    Rows behind a tile's queries, what is behind D of D' (D, at least 128), and items
    without steps are not written.

    Args:
      q_tiles: [Q, K, R, D].
      k_pages, v_pages: [L * N * K * P / unit, unit, D].
      tables: i32[S * M].
      items, seen, lowest: as in `gpu_work`.
      layer: i32[1].
    """
    num_items = items.tile.shape[0]
    shape = (num_items, plan.num_kv_heads)
    dtype, number = k_pages.dtype, plan.warpgroups
    k_shape = (plan.stages, plan.tokens, plan.head_dim)
    v_shape = (plan.stages, number, plan.tokens, plan.columns)
    weights_shape = (number, ROWS, plan.tokens)
    barriers = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    out_width = max(plan.head_dim, _WIDTH)
    call = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=[
            jax.ShapeDtypeStruct((*shape, plan.rows, out_width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, ROWS), jnp.float32),
        ],
        scratch_types=dict(
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
        ),
        grid=(num_items, plan.num_kv_heads),
        grid_names=("item", "kv_head"),
        num_threads=number + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="paged_attention",
    )
    fields = jnp.stack(items, axis=1)
    return call(q_tiles, k_pages, v_pages, tables, fields, seen, lowest, layer)


def _kernel(
    q_gmem,  # [Q, K, R, D]
    k_gmem,  # [L * N * K * P / unit, unit, D]
    v_gmem,
    tables,  # i32[S * M]
    fields,  # i32[I, fields of Items]
    seen,  # i32[Q, R]
    lowest,
    layer,  # i32[1]
    out_gmem,  # f32[I, K, rows, D']
    lse_gmem,  # f32[I, K, R]
    *,
    plan: Plan,
    **scratch,
):
    number, kv_head = lax.axis_index("item"), lax.axis_index("kv_head")
    item = Items(*(fields[number, i] for i in range(len(Items._fields))))
    role = lax.axis_index("warpgroup")

    @pl.when((role == plan.warpgroups) & (item.steps > 0))
    def _():
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
        pages = functools.partial(_pages, tables, layer[0], item, kv_head, plan)
        _fetch(k_gmem, v_gmem, pages, item.steps, plan, **scratch)

    @pl.when((role < plan.warpgroups) & (item.steps > 0))
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        out = out_gmem.at[number, kv_head]
        q = q_gmem.at[item.tile, kv_head]
        sight = [load_from_gpu_memory(x.at[item.tile]) for x in (seen, lowest)]
        acc, total, highest = _attend(q, role, item, sight, plan, **scratch)

        @pl.when(role == 0)
        def _():
            lse_gmem[number, kv_head] = highest + jnp.log2(jnp.maximum(total, 1e-30))

        _put(acc, total, out, role, item, plan, **scratch)


# ---- the warpgroup that fetches


def _pages(tables, layer, item: Items, kv_head, plan: Plan, step):
    """The places of a step's copies in the pool, i32 scalars.

    Behind a tile's last block they are that block again: the barriers count copies, and
    entries past the length are not read.
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


def _fetch(k_gmem, v_gmem, pages, steps, plan: Plan, **scratch):
    """Copies the item's blocks, each step's as soon as its buffers are free."""
    k_smem, v_smem = scratch["k_smem"], scratch["v_smem"]

    def copy_keys(place, slot, lines, full):
        plgpu.copy_gmem_to_smem(k_gmem.at[place], k_smem.at[slot, lines], full)

    def copy_values(place, slot, lines, full):
        for i in range(plan.warpgroups):
            values = v_gmem.at[place, :, pl.ds(i * plan.columns, plan.columns)]
            plgpu.copy_gmem_to_smem(values, v_smem.at[slot, i, lines], full)

    pools = [
        (copy_keys, scratch["k_full"], scratch["k_free"]),
        (copy_values, scratch["v_full"], scratch["v_free"]),
    ]

    def fetch(step, found):
        slot = lax.rem(step, jnp.int32(plan.stages))
        # The next step's block numbers are on their way while this one waits.
        following = pages(step + 1)
        for copy, full, free in pools:

            @pl.when(step >= plan.stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            for i, place in enumerate(found):
                copy(place, slot, pl.ds(i * plan.unit, plan.unit), full.at[slot])
        return following

    lax.fori_loop(0, steps, fetch, pages(0))

    @pl.loop(jnp.maximum(steps - plan.stages, 0), steps)
    def _(step):
        slot = lax.rem(step, jnp.int32(plan.stages))
        for *_, free in pools:
            plgpu.barrier_wait(free.at[slot])


# ---- the warpgroup that computes


def _attend(
    q,
    role,
    item: Items,
    sight,
    plan: Plan,
    *,
    q_smem,
    k_smem,
    v_smem,
    weights_smem,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
    **_,
):
    """Sums of weighted values, f32[R, columns], of weights, f32[R], and maxima, f32[R].

    Of a warpgroup's columns, which are those of its `role`.
    """

    @pl.when(role == 0)
    def _():
        plgpu.copy_gmem_to_smem(q, q_smem, q_full)

    weights_smem = weights_smem.at[role]
    seen, lowest = (_over_columns(x, plan.tokens) for x in sight)
    plgpu.barrier_wait(q_full)

    def step(number, carry):
        acc, total, before = carry
        slot = lax.rem(number, jnp.int32(plan.stages))
        start = (item.unit + number * plan.units) * plan.unit
        position = start + lax.broadcasted_iota(jnp.int32, (ROWS, plan.tokens), 1)
        is_seen = (position < seen) & (position >= lowest)

        plgpu.barrier_wait(k_full.at[slot])
        keys = k_smem.at[slot].transpose((1, 0))
        scores = _product(q_smem, keys, plan.tokens)
        plgpu.barrier_arrive(k_free.at[slot])
        scores = jnp.where(is_seen, _log2_scores(scores, plan), _UNSEEN)
        highest = jnp.maximum(before, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - _over_columns(highest, plan.tokens))
        keep = jnp.exp2(before - highest)
        total = total * keep + jnp.sum(weights, axis=1)
        weights_smem[...] = weights.astype(weights_smem.dtype)

        plgpu.barrier_wait(v_full.at[slot])
        values = v_smem.at[slot, role]

        @pl.when((start < item.first_token) | (start + plan.tokens > item.end_token))
        def _():
            _clear_unseen(values, start, item)

        plgpu.commit_smem()
        update = _product(weights_smem, values, plan.columns)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc * _over_columns(keep, plan.columns) + update, total, highest

    start = (
        jnp.zeros((ROWS, plan.columns), jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
        jnp.full((ROWS,), _LOWEST, jnp.float32),
    )
    return lax.fori_loop(0, item.steps, step, start)


def _product(left, right, columns: int):
    """f32[R, columns] of two operands in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))


def _log2_scores(scores, plan: Plan):
    """Scaled, capped, and in powers of two, which is what the hardware has."""
    if plan.soft_cap is None:
        return scores * (plan.scale * LOG2E)
    # tanh(x) by exp2: the hardware's own is off by 5e-4, and the cap multiplies that.
    double = jnp.exp2(scores * (2 * LOG2E * plan.scale / plan.soft_cap))
    return (plan.soft_cap * LOG2E) * (1.0 - 2.0 / (double + 1.0))


def _clear_unseen(values, start, item: Items):
    """Zeros for values that no query sees: their weight is 0, and 0 * NaN is NaN."""
    position = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
    is_seen = (position >= item.first_token) & (position < item.end_token)
    loaded = values[...]
    values[...] = jnp.where(is_seen, loaded, jnp.zeros_like(loaded))


def _over_columns(rows, columns: int):
    return lax.broadcast_in_dim(rows, (ROWS, columns), (0,))


def _put(acc, total, out, role, item: Items, plan: Plan, *, out_smem, out_free, **_):
    """A warpgroup's columns of the item's output, divided by its weights."""
    share = jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)
    if plan.warpgroups > 1:  # shared memory holds the columns of one: they take turns
        pl.when(role > 0)(lambda: plgpu.barrier_wait(out_free))
    out_smem[...] = acc * _over_columns(share, plan.columns)
    plgpu.commit_smem()

    def put(rows):
        lines = pl.ds(0, rows)
        place = out.at[lines, pl.ds(role * plan.columns, plan.columns)]
        plgpu.copy_smem_to_gmem(out_smem.at[lines], place)

    if plan.tile_queries == 1:
        put(plan.rows)
    else:  # of a single query, no more rows than it has heads
        pl.when(item.queries == 1)(lambda: put(plan.group))
        pl.when(item.queries > 1)(lambda: put(plan.rows))
    plgpu.wait_smem_to_gmem(0)
    if plan.warpgroups > 1:
        pl.when(role < plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(out_free))
