"""Paged attention on TPUs: pages are read where they lie, and never gathered.

Place on the road: attention -> pallas.tpu -> [pallas.tpu_attention].

One kernel serves prompt chunks and decode rows. It walks segments of queries (see
`tpu_segments`); of each it reads the blocks that the segment's queries see, a tile of
tokens at a time, into one of two buffers, while the tile in the other is computed. The
next segment's first tile is under way before this one's last is done, so the memory
never waits. The online softmax is that of Milakov and Gimelshein 2018.

Letters as in `jpaged.attention`; R rows of a tile of queries (query by query, and of
each the G heads that share a key), C tokens of a tile of keys, I segments.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged import tuned
from jpaged.implementations import LANES
from jpaged.pallas import tpu_segments
from jpaged.pallas.tpu_segments import Segments

# Below every score that a float32 model gives, and finite: -inf - -inf is NaN.
_LOWEST = -1e30
# Rows of queries are a multiple of this: a bfloat16 tile has 16 rows.
_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes; none is measured, for there was no TPU: the arithmetic is in
    `docs/decisions/tpu_kernel.md`."""

    query_rows: int = 128  # rows of a tile of queries: queries times heads of a key
    buffer_bytes: int = 2**20  # of one of the four buffers of keys and values
    tokens: int = 512  # of a tile of keys, at most
    kv_heads: int = 8  # served by one walk over the segments, at most


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one call, all static."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    width: int  # of the block tables
    tile_queries: int
    rows: int  # of a tile of queries, R
    few_rows: int  # of a tile that a single query needs; R where that is no less
    walk_heads: int  # kv heads of one walk
    tokens: int  # of a tile of keys, C

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    layer: jax.Array,
    scale: float,
    window: jax.Array,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    return_lse: bool,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp f32[T, H] if asked for.

    Args:
      q: [T, H, D].
      k_pages, v_pages: [L, N, K, P, D'] with D' a multiple of 128, at least D; what is
        behind D of a head must be zeros.
      block_tables: i32[S, M].
      context_lens: i32[S].
      query_start_loc: i32[S + 1], or None where each row has one query.
      layer: i32[], which of L.
      scale: Python number.
      window: i32[], at most EVERYTHING.
      logits_soft_cap: Python number or None.
      sinks: f32[H] or None.
      return_lse: whether to give the log-sum-exp.
      tiles: sizes; None takes those of `jpaged.tuned`.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    if tiles is None:
        tiles = tuned.tiles("mosaic_tpu", Tiles(), q.shape[1], k_pages)
    plan = _plan(q, k_pages, block_tables, query_start_loc is not None, tiles)
    num_queries = q.shape[0]
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
    out, *lses = _call(
        _to_tiles(q.astype(k_pages.dtype), plan, num_tiles),
        k_pages,
        v_pages,
        block_tables,
        segments,
        window,
        layer,
        plan=plan,
        scale=scale,
        soft_cap=logits_soft_cap,
        # Sinks are applied to the output, which is rounded once, behind them.
        out_dtype=jnp.float32 if sinks is not None else q.dtype,
        has_lse=has_lse,
        interpret=interpret,
    )
    out = _from_tiles(out, plan, num_queries)[..., : q.shape[-1]]
    if not has_lse:
        return out, None
    lse = _from_tiles(lses[0], plan, num_queries)[..., 0]
    if sinks is not None:
        is_empty = jnp.isneginf(lse)
        with_sink = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, :])
        share = jnp.where(is_empty, 0.0, jnp.exp(lse - with_sink))
        out = (out * share[..., None]).astype(q.dtype)
        lse = jnp.where(is_empty, -jnp.inf, with_sink)
    return out, lse


def _plan(q, k_pages, block_tables, is_ragged: bool, tiles: Tiles) -> _Plan:
    num_queries, num_heads, _ = q.shape
    _, _, num_kv_heads, block_size, head_dim = k_pages.shape
    width = block_tables.shape[1]
    group = num_heads // num_kv_heads
    tile_queries = 1
    if is_ragged:
        most = min(max(tiles.query_rows // group, 1), pl.next_power_of_2(num_queries))
        tile_queries = 1 << (most.bit_length() - 1)
    rows = pl.cdiv(tile_queries * group, _ROWS) * _ROWS
    # A query's rows lie within so many, counted from a multiple of _ROWS.
    few_rows = pl.cdiv(group, _ROWS) * _ROWS
    if _ROWS % group:
        few_rows += _ROWS
    heads = next(n for n in range(tiles.kv_heads, 0, -1) if num_kv_heads % n == 0)
    bytes_of_token = heads * head_dim * k_pages.dtype.itemsize
    tokens = min(tiles.buffer_bytes // bytes_of_token, tiles.tokens, width * block_size)
    return _Plan(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        width=width,
        tile_queries=tile_queries,
        rows=rows,
        few_rows=min(few_rows, rows),
        walk_heads=heads,
        tokens=max(tokens // block_size, 1) * block_size,
    )


def _to_tiles(q: jax.Array, plan: _Plan, num_tiles: int) -> jax.Array:
    """[tiles, K, R, D'] of q [T, H, D]."""
    num_queries, _, head_dim = q.shape
    pad = num_tiles * plan.tile_queries - num_queries
    q = jnp.pad(q, ((0, pad), (0, 0), (0, plan.head_dim - head_dim)))
    q = q.reshape(num_tiles, plan.tile_queries, plan.num_kv_heads, plan.group, -1)
    q = q.transpose(0, 2, 1, 3, 4)
    q = q.reshape(num_tiles, plan.num_kv_heads, -1, plan.head_dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows - q.shape[2]), (0, 0)))


def _from_tiles(tiles: jax.Array, plan: _Plan, num_queries: int) -> jax.Array:
    """[T, H, D] of [tiles, K, R, D]."""
    num_tiles, _, _, size = tiles.shape
    tiles = tiles[:, :, : plan.tile_queries * plan.group]
    shape = (num_tiles, plan.num_kv_heads, plan.tile_queries, plan.group, size)
    queries = tiles.reshape(shape).transpose(0, 2, 1, 3, 4)
    return queries.reshape(-1, plan.num_heads, size)[:num_queries]


def _call(
    q_tiles,
    k_pages,
    v_pages,
    block_tables,
    segments: Segments,
    window,
    layer,
    *,
    plan: _Plan,
    scale: float,
    soft_cap: float | None,
    out_dtype,
    has_lse: bool,
    interpret,
):
    num_tiles = q_tiles.shape[0]
    num_segments = segments.tile.shape[0]
    heads, rows, head_dim = plan.walk_heads, plan.rows, plan.head_dim

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
    buffer = pltpu.VMEM((2, heads, plan.tokens, head_dim), k_pages.dtype)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2 + len(segments),
        grid=(plan.num_kv_heads // heads, num_segments),
        in_specs=[
            spec(head_dim),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=out_specs,
        scratch_shapes=[
            buffer,
            buffer,
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, head_dim), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
        ],
    )
    settings = jnp.stack([layer, window])
    return pl.pallas_call(
        functools.partial(
            _kernel, plan=plan, scale=scale, soft_cap=soft_cap, has_lse=has_lse
        ),
        grid_spec=grid_spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        name="paged_attention",
    )(settings, block_tables.reshape(-1), *segments, q_tiles, k_pages, v_pages)


def _kernel(
    settings_ref,  # i32[2]: layer, window
    tables_ref,  # i32[S * M]
    tile_ref,  # i32[I], and so on: `Segments`
    row_ref,
    first_ref,
    end_ref,
    shift_ref,
    first_token_ref,
    end_token_ref,
    next_live_ref,
    q_ref,  # [1, Kw, R, D], Kw heads of a walk
    k_hbm,  # [L, N, K, P, D]
    v_hbm,  # [L, N, K, P, D]
    out_ref,  # [1, Kw, R, D]
    *refs,  # f32[1, Kw, R, LANES] log-sum-exp if asked for, and scratch
    plan: _Plan,
    scale: float,
    soft_cap: float | None,
    has_lse: bool,
):
    lse_ref = refs[0] if has_lse else None
    # [2, Kw, C, D] twice, DMA[2], f32[Kw, R, LANES] twice, f32[Kw, R, D], i32[1]
    k_buffer, v_buffer, semaphores, max_ref, sum_ref, acc_ref, slot_ref = refs[-7:]
    walk, segment = pl.program_id(0), pl.program_id(1)
    num_segments = pl.num_programs(1)
    layer, window = settings_ref[0], settings_ref[1]
    block_size, tokens = plan.block_size, plan.tokens
    blocks = tokens // block_size
    tile = tile_ref[segment]
    first_token, end_token = first_token_ref[segment], end_token_ref[segment]

    @pl.when(segment == 0)
    def _():
        slot_ref[0] = 0
        # What is never fetched must be finite, for its weight is 0 and 0 * NaN is NaN.
        v_buffer[...] = jnp.zeros_like(v_buffer)

    @pl.when((segment == 0) | (tile_ref[jnp.maximum(segment - 1, 0)] != tile))
    def _():
        max_ref[...] = jnp.full_like(max_ref, _LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def copies(block, column, slot):
        """The copies of one block to its place among a tile's columns."""
        place = pl.ds(pl.multiple_of(column * block_size, block_size), block_size)
        heads = pl.ds(walk * plan.walk_heads, plan.walk_heads)
        return [
            pltpu.make_async_copy(
                pages.at[layer, block, heads],
                buffer.at[slot, :, place],
                semaphores.at[slot],
            )
            for pages, buffer in ((k_hbm, k_buffer), (v_hbm, v_buffer))
        ]

    def columns(of, number):
        """First and last + 1 of the table's columns that `of` needs of a tile."""
        begin = jnp.maximum(first_token_ref[of] // block_size, number * blocks)
        end = pl.cdiv(end_token_ref[of], block_size)
        return begin, jnp.minimum(end, (number + 1) * blocks)

    def fetch(of, number, slot):
        def start(column, _):
            block = tables_ref[row_ref[of] * plan.width + column]
            block = jnp.clip(block, 0, k_hbm.shape[1] - 1)
            for copy in copies(block, column - number * blocks, slot):
                copy.start()

        lax.fori_loop(*columns(of, number), start, None)

    def wait(number, slot):
        def done(column, _):
            for copy in copies(0, column - number * blocks, slot):
                copy.wait()

        lax.fori_loop(*columns(segment, number), done, None)

    def clear_unseen(number, slot):
        """Zeros for values in the tile's fetched blocks that no query sees."""
        begin, end = columns(segment, number)
        for column, token in ((begin, first_token), (end - 1, end_token)):
            first = column * block_size

            @pl.when((token > first) & (token < first + block_size))
            def _(column=column):
                start = (column - number * blocks) * block_size
                place = pl.ds(pl.multiple_of(start, block_size), block_size)
                values = v_buffer[slot, :, place].astype(jnp.float32)
                position = lax.broadcasted_iota(jnp.int32, values.shape, 1)
                position += column * block_size
                is_seen = (position >= first_token) & (position < end_token)
                values = jnp.where(is_seen, values, 0.0)
                v_buffer[slot, :, place] = values.astype(v_buffer.dtype)

    def compute(number, slot, start, num_rows):
        """The online softmax of the rows from `start` on over a tile of tokens."""
        place = pl.ds(start, num_rows)
        shape = (num_rows, tokens)
        row = start + lax.broadcasted_iota(jnp.int32, shape, 0)
        # Integer division of vectors by any number; the half makes it exact.
        query = (row.astype(jnp.float32) + 0.5) * (1.0 / plan.group)
        query = tile * plan.tile_queries + query.astype(jnp.int32)
        seen = query + shift_ref[segment]
        position = number * tokens + lax.broadcasted_iota(jnp.int32, shape, 1)
        mask = (position < seen) & (position >= seen - window)
        mask &= (query >= first_ref[segment]) & (query < end_ref[segment])
        for head in range(plan.walk_heads):
            keys, values = k_buffer[slot, head], v_buffer[slot, head]
            scores = _product(q_ref[0, head, place], keys, (1, 1)) * scale
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
            update = _product(weights.astype(values.dtype), values, (1, 0))
            acc_ref[head, place] = acc_ref[head, place] * keep[:, :1] + update

    begin, end = first_token // tokens, pl.cdiv(end_token, tokens)

    @pl.when(next_live_ref[0] == segment)
    def _():
        fetch(segment, begin, slot_ref[0])

    following = next_live_ref[segment + 1]
    in_tile = (first_ref[segment] - tile * plan.tile_queries) * plan.group
    few_start = in_tile // _ROWS * _ROWS
    rows_end = (end_ref[segment] - tile * plan.tile_queries) * plan.group
    is_few = rows_end <= few_start + plan.few_rows
    # The last tile's few rows may not begin so late that they reach behind its end.
    few_start = jnp.minimum(few_start, plan.rows - plan.few_rows)

    def step(number, _):
        slot = slot_ref[0]

        @pl.when(number + 1 < end)
        def _():
            fetch(segment, number + 1, 1 - slot)

        @pl.when((number + 1 == end) & (following < num_segments))
        def _():
            fetch(following, first_token_ref[following] // tokens, 1 - slot)

        wait(number, slot)
        clear_unseen(number, slot)
        if plan.few_rows < plan.rows:

            @pl.when(is_few)
            def _():
                start = pl.multiple_of(few_start, _ROWS)
                compute(number, slot, start, plan.few_rows)

            @pl.when(~is_few)
            def _():
                compute(number, slot, 0, plan.rows)

        else:
            compute(number, slot, 0, plan.rows)
        slot_ref[0] = 1 - slot

    lax.fori_loop(begin, end, step, None)

    following_tile = tile_ref[jnp.minimum(segment + 1, num_segments - 1)]

    @pl.when((segment == num_segments - 1) | (following_tile != tile))
    def _():
        for head in range(plan.walk_heads):
            total = sum_ref[head]
            is_empty = total == 0
            total = jnp.where(is_empty, 1.0, total)
            out_ref[0, head] = (acc_ref[head] / total[:, :1]).astype(out_ref.dtype)
            if lse_ref is not None:
                lse = max_ref[head] + jnp.log(total)
                lse_ref[0, head] = jnp.where(is_empty, -jnp.inf, lse)


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
