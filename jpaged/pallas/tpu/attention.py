"""Paged attention on TPUs: pages are read where they lie, and never gathered.

Place on the road: attention -> pallas.tpu -> [pallas.tpu_attention].

One kernel serves prompt chunks and decode rows. It walks segments of queries (see
`tpu_segments`); of each it reads the blocks that the segment's queries see, a tile of
tokens at a time, into one of two buffers (`tpu_key_tiles`), while the tile in the other
is computed. The next segment's first tile is under way before this one's last is done,
so the memory never waits. The online softmax is that of Milakov and Gimelshein 2018.

Letters as in `jpaged.attention`; R rows of a tile of queries (query by query, and of
each the G heads that share a key), C rows of a tile of keys, I segments. A row of keys
is a token, or of packed pages several: see `tpu_packed`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages import packed as packed_pages
from jpaged.pages import tuned
from jpaged.pages.packed import LANES
from jpaged.pallas.tpu import (
    key_tiles as tpu_key_tiles,
)
from jpaged.pallas.tpu import (
    packed as tpu_packed,
)
from jpaged.pallas.tpu import (
    segments as tpu_segments,
)
from jpaged.pallas.tpu.key_tiles import KeyTiles
from jpaged.pallas.tpu.numbers import product_dtype
from jpaged.pallas.tpu.plan import ROWS, Plan, Tiles, from_tiles, plan_of, to_tiles
from jpaged.pallas.tpu.segments import Segments

# Below every score that a float32 model gives, and finite: -inf - -inf is NaN.
_LOWEST = -1e30


def attend(
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
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Output [T, H, D], and log-sum-exp f32[T, H] if asked for.

    Args:
      q: [T, H, D].
      k_pages, v_pages: [L, N, K, P, D'] with D' a multiple of 128, at least D; what is
        behind D of a head must be zeros. Or packed, [L, N, K, P * D // 128, 128].
      scales: of pages of 8 bits those of keys and of values, f32[L, N, K, P'] with P'
        the next multiple of 128; else ().
      block_tables: i32[S, M].
      context_lens: i32[S].
      query_start_loc: i32[S + 1], or None where each row has one query.
      layer: i32[], which of L.
      scale: Python number.
      window: i32[], at most `operands.EVERYTHING`.
      logits_soft_cap: Python number or None.
      sinks: f32[H] or None.
      return_lse: whether to give the log-sum-exp.
      dtype: of the output; None takes that of q.
      tiles: sizes; None takes those of `jpaged.tuned`.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    num_queries, num_heads, head_dim = q.shape
    tokens_of_row = packed_pages.tokens_of_row(k_pages, head_dim)
    if tiles is None:
        shape = packed_pages.plain_shape(k_pages, head_dim)
        pages = jax.ShapeDtypeStruct(shape, k_pages.dtype)
        tiles = tuned.tiles("mosaic_tpu", Tiles(), num_heads, pages)
    if tokens_of_row > 1:
        q = tpu_packed.spread(q, tokens_of_row)
    plan = plan_of(
        q,
        k_pages,
        block_tables,
        is_ragged=query_start_loc is not None,
        tiles=tiles,
        tokens_of_row=tokens_of_row,
    )
    num_tiles = pl.cdiv(num_queries, plan.tile_queries)
    max_tokens = plan.width * plan.block_size
    if query_start_loc is None:
        segments = tpu_segments.of_single_queries(context_lens, window, max_tokens)
    else:
        segments = tpu_segments.of_chunks(
            query_start_loc,
            context_lens,
            window,
            max_tokens,
            tile_queries=plan.tile_queries,
            num_tiles=num_tiles,
        )
    has_lse = return_lse or sinks is not None
    dtype = q.dtype if dtype is None else dtype
    out, *lses = _call(
        to_tiles(q.astype(product_dtype(k_pages.dtype, q.dtype)), plan, num_tiles),
        (k_pages, v_pages, *scales),
        block_tables,
        segments,
        window,
        layer,
        plan=plan,
        scale=scale,
        soft_cap=logits_soft_cap,
        # Sinks are applied to the output, which is rounded once, behind them.
        out_dtype=jnp.float32 if sinks is not None else dtype,
        has_lse=has_lse,
        interpret=interpret,
    )
    # The rows of a query over packed pages all have its result.
    out = from_tiles(out, plan, num_queries)[:, ::tokens_of_row, :head_dim]
    if not has_lse:
        return out, None
    lse = from_tiles(lses[0], plan, num_queries)[:, ::tokens_of_row, 0]
    if sinks is not None:
        is_empty = jnp.isneginf(lse)
        with_sink = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, :])
        share = jnp.where(is_empty, 0.0, jnp.exp(lse - with_sink))
        out = (out * share[..., None]).astype(dtype)
        lse = jnp.where(is_empty, -jnp.inf, with_sink)
    return out, lse


def _call(
    q_tiles,
    arrays,
    block_tables,
    segments: Segments,
    window,
    layer,
    *,
    plan: Plan,
    scale: float,
    soft_cap: float | None,
    out_dtype,
    has_lse: bool,
    interpret,
):
    num_tiles = q_tiles.shape[0]
    num_segments = segments.tile.shape[0]
    heads, rows, head_dim = plan.walk_heads, plan.rows, plan.head_dim
    width = arrays[-1].shape[-1] if len(arrays) > 2 else None

    def at_tile(walk, segment, _settings, _tables, tile, *_):
        return tile[segment], walk, 0, 0

    def spec(size):
        return pl.BlockSpec((1, heads, rows, size), at_tile)

    shape = (num_tiles, plan.num_kv_heads, rows)
    out_shape = [jax.ShapeDtypeStruct((*shape, head_dim), out_dtype)]
    out_specs = [spec(head_dim)]
    if has_lse:
        out_shape.append(jax.ShapeDtypeStruct((*shape, LANES), jnp.float32))
        out_specs.append(spec(LANES))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2 + len(segments),
        grid=(plan.num_kv_heads // heads, num_segments),
        in_specs=[spec(head_dim), *(pl.BlockSpec(memory_space=pl.ANY) for _ in arrays)],
        out_specs=out_specs,
        scratch_shapes=[
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, head_dim), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            *tpu_key_tiles.scratch(plan, arrays[0].dtype, width),
        ],
    )
    settings = jnp.stack([layer, window])
    return pl.pallas_call(
        functools.partial(
            _kernel,
            plan=plan,
            scale=scale,
            soft_cap=soft_cap,
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
    )(settings, block_tables.reshape(-1), *segments, q_tiles, *_left_in_place(arrays))


def _kernel(
    settings_ref,  # i32[2]: layer, window
    tables_ref,  # i32[S * M]
    *refs,  # `Segments`, i32[I] each, and the rest in the order of `_call`
    plan: Plan,
    scale: float,
    soft_cap: float | None,
    num_arrays: int,
    has_lse: bool,
):
    segments, refs = (
        Segments(*refs[: len(Segments._fields)]),
        refs[len(Segments._fields) :],
    )
    # [1, Kw, R, D], Kw heads of a walk; pages [L, N, K, ., D] twice, and scales
    q_ref, arrays, refs = refs[0], refs[1 : 1 + num_arrays], refs[1 + num_arrays :]
    # [1, Kw, R, D], and f32[1, Kw, R, LANES] if asked for
    out_ref, lse_ref, refs = refs[0], refs[1] if has_lse else None, refs[1 + has_lse :]
    # f32[Kw, R, LANES] twice, f32[Kw, R, D], i32[1]
    (max_ref, sum_ref, acc_ref, slot_ref), buffers = refs[:4], refs[4:]
    walk, segment = pl.program_id(0), pl.program_id(1)
    num_segments = pl.num_programs(1)
    layer, window = settings_ref[0], settings_ref[1]
    tiles = KeyTiles(plan, walk, layer, tables_ref, segments, arrays, *buffers)
    tokens, tokens_of_row = plan.tokens, plan.tokens_of_row
    tile = segments.tile[segment]

    @pl.when(segment == 0)
    def _():
        slot_ref[0] = 0
        tiles.clear()

    @pl.when((segment == 0) | (segments.tile[jnp.maximum(segment - 1, 0)] != tile))
    def _():
        max_ref[...] = jnp.full_like(max_ref, _LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def compute(number, slot, start, num_rows):
        """The online softmax of the rows from `start` on over a tile of tokens."""
        place = pl.ds(start, num_rows)
        shape = (num_rows, plan.columns)
        row = start + lax.broadcasted_iota(jnp.int32, shape, 0)
        # Integer division of vectors by any number; the half makes it exact.
        query = (row.astype(jnp.float32) + 0.5) * (1.0 / plan.group)
        query = tile * plan.tile_queries + query.astype(jnp.int32)
        seen = query + segments.shift[segment]
        position = lax.broadcasted_iota(jnp.int32, shape, 1)
        if tokens_of_row > 1:
            position *= tokens_of_row
            position += tpu_packed.place_of_row(row, tokens_of_row)
        position += number * tokens
        mask = (position < seen) & (position >= seen - window)
        mask &= (query >= segments.first[segment]) & (query < segments.end[segment])
        for head in range(plan.walk_heads):
            queries = q_ref[0, head, place]
            keys, values = tiles.numbers_of(head, slot, queries.dtype)
            scores = _product(queries, keys, (1, 1))
            k_row, v_row = tiles.scales_of(head)
            scores *= scale if k_row is None else scale * k_row
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            scores = jnp.where(mask, scores, _LOWEST)
            before = max_ref[head, place]
            highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(mask, jnp.exp(scores - highest[:, :1]), 0.0)
            keep = jnp.exp(before - highest)
            max_ref[head, place] = highest
            sum_ref[head, place] = sum_ref[head, place] * keep + jnp.sum(
                weights, axis=1, keepdims=True
            )
            if v_row is not None:
                # Scales of unseen tokens may be NaN.
                weights = jnp.where(mask, weights * v_row, 0.0)
            update = _product(weights.astype(values.dtype), values, (1, 0))
            acc_ref[head, place] = acc_ref[head, place] * keep[:, :1] + update

    begin = segments.first_token[segment] // tokens
    end = pl.cdiv(segments.end_token[segment], tokens)

    @pl.when(segments.next_live[0] == segment)
    def _():
        tiles.fetch(segment, begin, slot_ref[0])

    following = segments.next_live[segment + 1]
    in_tile = (segments.first[segment] - tile * plan.tile_queries) * plan.group
    few_start = in_tile // ROWS * ROWS
    rows_end = (segments.end[segment] - tile * plan.tile_queries) * plan.group
    is_few = rows_end <= few_start + plan.few_rows
    # The last tile's few rows may not begin so late that they reach behind its end.
    few_start = jnp.minimum(few_start, plan.rows - plan.few_rows)

    def step(number, _):
        slot = slot_ref[0]

        @pl.when(number + 1 < end)
        def _():
            tiles.fetch(segment, number + 1, 1 - slot)

        @pl.when((number + 1 == end) & (following < num_segments))
        def _():
            first = segments.first_token[following] // tokens
            tiles.fetch(following, first, 1 - slot)

        tiles.wait(segment, number, slot)
        tiles.clear_unseen(segment, number, slot)
        tiles.spread_scales(slot)
        if plan.few_rows < plan.rows:

            @pl.when(is_few)
            def _():
                start = pl.multiple_of(few_start, ROWS)
                compute(number, slot, start, plan.few_rows)

            @pl.when(~is_few)
            def _():
                compute(number, slot, 0, plan.rows)

        else:
            compute(number, slot, 0, plan.rows)
        slot_ref[0] = 1 - slot

    lax.fori_loop(begin, end, step, None)

    following_tile = segments.tile[jnp.minimum(segment + 1, num_segments - 1)]

    @pl.when((segment == num_segments - 1) | (following_tile != tile))
    def _():
        for head in range(plan.walk_heads):
            highest, total, acc = max_ref[head], sum_ref[head], acc_ref[head]
            if tokens_of_row > 1:
                highest, total, acc = tpu_packed.merged(
                    highest, total, acc, tokens_of_row
                )
            is_empty = total == 0
            total = jnp.where(is_empty, 1.0, total)
            out_ref[0, head] = (acc / total[:, :1]).astype(out_ref.dtype)
            if lse_ref is not None:
                lse = highest + jnp.log(total)
                lse_ref[0, head] = jnp.where(is_empty, -jnp.inf, lse)


def _left_in_place(arrays):
    """The arrays, which XLA is to leave where they are.

    In a program's loop it would else move a pool that is small enough beside the core
    first, and back in the end: two copies of it in every step.
    """
    return [
        pltpu.with_memory_space_constraint(array, pltpu.HBM)
        if isinstance(array, Tracer)
        else array  # called outside of any program
        for array in arrays
    ]


def _product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """f32 product over one axis of each; float32 is not rounded on the way in."""
    is_float32 = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
