"""The TPU's attention kernel.

Pipeline: pallas.tpu.attention -> [pallas.tpu.kernel] -> pallas.tpu.key_tiles.

One kernel computes prompt chunks and decode rows. It loops over segments of queries
(see `segments`). For each segment it reads the blocks that the queries see, one tile of
tokens at a time, into one of two buffers (`key_tiles`), while it computes the tile in
the other buffer. It fetches the next segment's first tile before it computes this
segment's last tile, so the memory never waits. The online softmax is that of Milakov
and Gimelshein 2018.

Shape symbols as in `jpaged.attention`; R rows of a tile of queries (query by query, and
for each query the G heads that share a key), C rows of a tile of keys, I segments, Kw
heads of a pass over the segments. A row of keys is a token, or several tokens of packed
pages (see `packed`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages.packed import LANES
from jpaged.pallas.tpu import key_tiles as tpu_key_tiles
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu.key_tiles import KeyTiles
from jpaged.pallas.tpu.plan import ROWS, TpuCallPlan
from jpaged.pallas.tpu.segments import Segments

# Below every score of a float32 model, and finite, because -inf - -inf is NaN.
_LOWEST = -1e30


def scratch(plan: TpuCallPlan, arrays: Sequence[jax.Array]) -> list[Any]:
    """Return the memory that the kernel allocates: its last arguments, in order."""
    heads, rows = plan.pass_heads, plan.rows
    scale_width = arrays[-1].shape[-1] if len(arrays) > 2 else None
    return [
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, plan.head_dim), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        *tpu_key_tiles.scratch(plan, arrays[0].dtype, scale_width),
    ]


def attention_kernel(
    settings_ref: Any,  # i32[2]: layer, window
    tables_ref: Any,  # i32[S * M]
    *refs: Any,  # `Segments`, i32[I] each; q, arrays, outputs, and `scratch`
    plan: TpuCallPlan,
    num_arrays: int,
    has_lse: bool,
) -> None:
    """Compute one segment for the heads of one pass."""
    num_fields = len(Segments._fields)
    segments, refs = Segments(*refs[:num_fields]), refs[num_fields:]
    # [1, Kw, R, D]; pages [L, N, K, ., D] twice, and scales
    q_ref, arrays, refs = refs[0], refs[1 : 1 + num_arrays], refs[1 + num_arrays :]
    # [1, Kw, R, D], and f32[1, Kw, R, LANES] with a log-sum-exp
    out_ref, lse_ref, refs = refs[0], refs[1] if has_lse else None, refs[1 + has_lse :]
    (max_ref, sum_ref, acc_ref, slot_ref), buffers = refs[:4], refs[4:]
    pass_index, segment = pl.program_id(0), pl.program_id(1)
    num_segments = pl.num_programs(1)
    layer, window = settings_ref[0], settings_ref[1]
    tiles = KeyTiles(plan, pass_index, layer, tables_ref, segments, arrays, *buffers)
    softmax = _OnlineSoftmax(
        plan, window, segments, segment, tiles, q_ref, max_ref, sum_ref, acc_ref
    )
    tile = segments.tile[segment]

    @pl.when(segment == 0)
    def _() -> None:
        slot_ref[0] = 0
        tiles.clear()

    @pl.when((segment == 0) | (segments.tile[jnp.maximum(segment - 1, 0)] != tile))
    def _() -> None:
        softmax.clear()

    _add_segment(softmax, tiles, slot_ref, num_segments)
    next_tile = segments.tile[jnp.minimum(segment + 1, num_segments - 1)]

    @pl.when((segment == num_segments - 1) | (next_tile != tile))
    def _() -> None:
        softmax.store(out_ref, lse_ref)


@dataclasses.dataclass(frozen=True)
class _OnlineSoftmax:
    """The online softmax of a tile of queries, while its segments are computed."""

    plan: TpuCallPlan
    window: Any  # i32[]
    segments: Segments  # of refs
    segment: Any  # i32[], the segment that is computed
    tiles: KeyTiles
    queries: Any  # [1, Kw, R, D]
    maxima: Any  # f32[Kw, R, LANES]
    sums: Any  # f32[Kw, R, LANES]
    acc: Any  # f32[Kw, R, D]

    def clear(self) -> None:
        """Start a tile of queries."""
        self.maxima[...] = jnp.full_like(self.maxima, _LOWEST)
        self.sums[...] = jnp.zeros_like(self.sums)
        self.acc[...] = jnp.zeros_like(self.acc)

    def add_tile(self, number: Any, slot: Any, start: Any, num_rows: int) -> None:
        """Add a tile of keys.

        Args:
          number: The tile's number, i32[].
          slot: The buffer that holds it, i32[].
          start: The first row of queries to compute, i32[].
          num_rows: The number of rows to compute.
        """
        rows = pl.ds(start, num_rows)
        mask = self._mask(number, start, num_rows)
        for head in range(self.plan.pass_heads):
            queries = self.queries[0, head, rows]
            keys, values = self.tiles.numbers_of(head, slot, queries.dtype)
            key_scales, value_scales = self.tiles.scales_of(head)
            scores = self._scores(queries, keys, key_scales)
            scores = jnp.where(mask, scores, _LOWEST)
            before = self.maxima[head, rows]
            highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(mask, jnp.exp(scores - highest[:, :1]), 0.0)
            keep = jnp.exp(before - highest)
            self.maxima[head, rows] = highest
            self.sums[head, rows] = self.sums[head, rows] * keep + jnp.sum(
                weights, axis=1, keepdims=True
            )
            if value_scales is not None:
                # Scales of unseen tokens may be NaN.
                weights = jnp.where(mask, weights * value_scales, 0.0)
            update = _product(weights.astype(values.dtype), values, (1, 0))
            self.acc[head, rows] = self.acc[head, rows] * keep[:, :1] + update

    def store(self, out_ref: Any, lse_ref: Any) -> None:
        """Write the tile's output, and its log-sum-exp if `lse_ref` is not None."""
        for head in range(self.plan.pass_heads):
            highest, total, acc = self.maxima[head], self.sums[head], self.acc[head]
            if self.plan.tokens_of_row > 1:
                highest, total, acc = tpu_packed.merge_copies(
                    highest, total, acc, self.plan.tokens_of_row
                )
            is_empty = total == 0
            total = jnp.where(is_empty, 1.0, total)
            out_ref[0, head] = (acc / total[:, :1]).astype(out_ref.dtype)
            if lse_ref is not None:
                lse = highest + jnp.log(total)
                lse_ref[0, head] = jnp.where(is_empty, -jnp.inf, lse)

    def _mask(self, number: Any, start: Any, num_rows: int) -> jax.Array:
        """Return which keys of a tile each row of queries sees, bool[num_rows, C]."""
        plan, segments, segment = self.plan, self.segments, self.segment
        shape = (num_rows, plan.columns)
        row = start + lax.broadcasted_iota(jnp.int32, shape, 0)
        # Division of integer vectors, by float32; adding a half makes it exact.
        query = (row.astype(jnp.float32) + 0.5) * (1.0 / plan.group)
        query = segments.tile[segment] * plan.tile_queries + query.astype(jnp.int32)
        seen = query + segments.shift[segment]
        position = lax.broadcasted_iota(jnp.int32, shape, 1)
        if plan.tokens_of_row > 1:
            position *= plan.tokens_of_row
            position += tpu_packed.token_of_query_row(row, plan.tokens_of_row)
        position += number * plan.tokens
        mask = (position < seen) & (position >= seen - self.window)
        return (
            mask & (query >= segments.first[segment]) & (query < segments.end[segment])
        )

    def _scores(self, queries: Any, keys: Any, key_scales: Any) -> jax.Array:
        scores = _product(queries, keys, (1, 1))
        scale, soft_cap = self.plan.scale, self.plan.soft_cap
        scores *= scale if key_scales is None else scale * key_scales
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        return scores


def _add_segment(
    softmax: _OnlineSoftmax, tiles: KeyTiles, slot_ref: Any, num_segments: Any
) -> None:
    """Loop over the segment's tiles of keys; the next tile is fetched meanwhile."""
    plan, segments, segment = softmax.plan, softmax.segments, softmax.segment
    begin = segments.first_token[segment] // plan.tokens
    end = pl.cdiv(segments.end_token[segment], plan.tokens)

    @pl.when(segments.next_live[0] == segment)
    def _() -> None:
        tiles.fetch(segment, begin, slot_ref[0])

    following = segments.next_live[segment + 1]
    few_start, is_few = _few_rows(softmax)

    def step(number: Any, _: None) -> None:
        slot = slot_ref[0]

        @pl.when(number + 1 < end)
        def _() -> None:
            tiles.fetch(segment, number + 1, 1 - slot)

        @pl.when((number + 1 == end) & (following < num_segments))
        def _() -> None:
            first = segments.first_token[following] // plan.tokens
            tiles.fetch(following, first, 1 - slot)

        tiles.wait(segment, number, slot)
        tiles.clear_unseen(segment, number, slot)
        tiles.spread_scales(slot)
        if plan.few_rows < plan.rows:

            @pl.when(is_few)
            def _() -> None:
                start = pl.multiple_of(few_start, ROWS)
                softmax.add_tile(number, slot, start, plan.few_rows)

            @pl.when(~is_few)
            def _() -> None:
                softmax.add_tile(number, slot, 0, plan.rows)

        else:
            softmax.add_tile(number, slot, 0, plan.rows)
        slot_ref[0] = 1 - slot

    lax.fori_loop(begin, end, step, None)


def _few_rows(softmax: _OnlineSoftmax) -> tuple[Any, Any]:
    """Return the first of `few_rows` rows, i32[], and whether they hold the segment."""
    plan, segments, segment = softmax.plan, softmax.segments, softmax.segment
    first_of_tile = segments.tile[segment] * plan.tile_queries
    rows_start = (segments.first[segment] - first_of_tile) * plan.group
    rows_end = (segments.end[segment] - first_of_tile) * plan.group
    few_start = rows_start // ROWS * ROWS
    is_few = rows_end <= few_start + plan.few_rows
    # In the last rows of a tile the range must not reach past the tile's end.
    return jnp.minimum(few_start, plan.rows - plan.few_rows), is_few


def _product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Return the f32 product over one axis of each; float32 inputs are not rounded."""
    is_float32 = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
