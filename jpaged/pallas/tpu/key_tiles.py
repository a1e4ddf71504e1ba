"""Tiles of keys and values in a TPU core's memory: one is computed, one on its way.

Place on the road: pallas.tpu_attention -> [pallas.tpu_key_tiles].

A tile is copied block by block from where the pages lie. Of pages of 8 bits the scales
come along, and are put side by side, for a score is multiplied by its key's.

Letters as in `jpaged.attention`; R rows of a page, of a token each or of packed pages
of several; C rows of a tile, B = C // R its blocks, Kw heads of a walk, Ks heads whose
scales it fetches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages.packed import LANES
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu.numbers import bits, of_bits, widened
from jpaged.pallas.tpu.plan import Plan
from jpaged.pallas.tpu.segments import Segments


def scratch(plan: Plan, dtype: Any, scale_width: int | None) -> list[Any]:
    """What a kernel allocates for `KeyTiles`: its last fields, in their order."""
    block = (plan.block_rows, plan.head_dim)
    pages = pltpu.VMEM((2, plan.walk_heads, plan.blocks, *block), dtype)
    semaphores = pltpu.SemaphoreType.DMA((2,))
    if scale_width is None:
        return [semaphores, pages, pages]
    heads = plan.scale_heads
    scales = pltpu.VMEM((2, plan.blocks, heads, scale_width), jnp.float32)
    rows = pltpu.VMEM((heads, plan.tokens), jnp.float32)
    return [semaphores, pages, pages, scales, scales, rows, rows]


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Two tiles, slot 0 and slot 1, of refs; a tile's `number` counts from token 0."""

    plan: Plan
    walk: Any  # i32[]
    layer: Any  # i32[]
    tables: Any  # i32[S * M]
    segments: Segments  # of refs
    arrays: tuple[Any, ...]  # pages [L, N, K, R, D] twice, scales f32[L, N, K, P'] too
    semaphores: Any  # DMA[2]
    keys: Any  # [2, Kw, B, R, D]
    values: Any
    k_scales: Any = None  # f32[2, B, Ks, P'], of pages of 8 bits
    v_scales: Any = None
    k_rows: Any = None  # f32[Ks, C]: the scales of the tile that is computed
    v_rows: Any = None

    @property
    def has_scales(self) -> bool:
        """Whether pages are of 8 bits."""
        return self.k_scales is not None

    def clear(self) -> None:
        """Finite values for what is never fetched: its weight is 0, and 0 * NaN NaN."""
        self.values[...] = jnp.zeros_like(self.values)

    def fetch(self, of, number, slot) -> None:
        """Starts the copies of the blocks that segment `of` needs of a tile."""

        def start(column, _):
            block = self.tables[self.segments.row[of] * self.plan.width + column]
            block = jnp.clip(block, 0, self.arrays[0].shape[1] - 1)
            for copy in self._copies(block, column - number * self.plan.blocks, slot):
                copy.start()

        lax.fori_loop(*self._columns(of, number), start, None)

    def wait(self, of, number, slot) -> None:
        """Returns when all that `fetch` started is there."""

        def done(column, _):
            for copy in self._copies(0, column - number * self.plan.blocks, slot):
                copy.wait()

        lax.fori_loop(*self._columns(of, number), done, None)

    def clear_unseen(self, of, number, slot) -> None:
        """Zeros for values in a tile's fetched blocks that no query of `of` sees.

        In packed pages for keys too, which share their row with some that are seen.
        """
        if self.values.dtype == jnp.int8:
            return  # none is NaN
        is_packed = self.plan.tokens_of_row > 1
        buffers = (self.keys, self.values) if is_packed else (self.values,)
        block_size = self.plan.block_size
        first_token = self.segments.first_token[of]
        end_token = self.segments.end_token[of]
        begin, end = self._columns(of, number)
        wide = jnp.float32 if self.values.dtype.itemsize > 1 else jnp.int32
        for column, token in ((begin, first_token), (end - 1, end_token)):
            first = column * block_size

            @pl.when((token > first) & (token < first + block_size))
            def _(column=column):
                place = column - number * self.plan.blocks
                position = column * block_size + self._tokens()
                is_seen = (position >= first_token) & (position < end_token)
                for buffer in buffers:
                    numbers = bits(buffer[slot, :, place]).astype(wide)
                    numbers = jnp.where(is_seen, numbers, wide(0))
                    buffer[slot, :, place] = of_bits(numbers, buffer.dtype)

    def spread_scales(self, slot) -> None:
        """Makes `k_rows` and `v_rows`; what was not fetched may be NaN."""
        if not self.has_scales:
            return
        block_size, blocks = self.plan.block_size, self.plan.blocks
        group = max(LANES // block_size, 1)
        pairs = ((self.k_scales, self.k_rows), (self.v_scales, self.v_rows))
        for scales, rows in pairs:
            for first in range(0, blocks, group):
                columns = range(first, min(first + group, blocks))
                row = _side_by_side([scales[slot, c] for c in columns], block_size)
                rows[:, pl.ds(first * block_size, row.shape[1])] = row

    def numbers_of(self, head: int, slot, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """[C, D] twice, keys and values of a head of the walk, without their scales."""
        keys, values = (
            widened(pages[slot, head], dtype).reshape(self.plan.columns, -1)
            for pages in (self.keys, self.values)
        )
        return keys, values

    def scales_of(self, head: int) -> tuple[Any, Any]:
        """f32[1, C] twice, of a head of the walk; None twice where pages have none."""
        if not self.has_scales:
            return None, None
        is_own = self.plan.scale_heads == self.plan.walk_heads
        first = 0 if is_own else self.walk * self.plan.walk_heads
        return tuple(
            rows[pl.ds(first + head, 1)] for rows in (self.k_rows, self.v_rows)
        )

    def _tokens(self) -> jax.Array:
        """Which of a block's tokens each number is of, i32[Kw, R, D]."""
        plan = self.plan
        shape = (plan.walk_heads, plan.block_rows, plan.head_dim)
        row = lax.broadcasted_iota(jnp.int32, shape, 1)
        if plan.tokens_of_row == 1:
            return row
        place = tpu_packed.place_of_lane(shape, plan.tokens_of_row)
        return row * plan.tokens_of_row + place

    def _copies(self, block, column, slot):
        """The copies of one block to its place among a tile's columns."""
        plan = self.plan
        heads = pl.ds(self.walk * plan.walk_heads, plan.walk_heads)
        scale_heads = heads if plan.scale_heads == plan.walk_heads else slice(None)
        places = [
            (heads, buffer.at[slot, :, column]) for buffer in (self.keys, self.values)
        ]
        if self.has_scales:
            places += [
                (scale_heads, buffer.at[slot, column])
                for buffer in (self.k_scales, self.v_scales)
            ]
        return [
            pltpu.make_async_copy(
                array.at[self.layer, block, own], place, self.semaphores.at[slot]
            )
            for array, (own, place) in zip(self.arrays, places, strict=True)
        ]

    def _columns(self, of, number):
        """First and last + 1 of the table's columns that `of` needs of a tile."""
        block_size, blocks = self.plan.block_size, self.plan.blocks
        begin = self.segments.first_token[of] // block_size
        end = pl.cdiv(self.segments.end_token[of], block_size)
        begin = jnp.maximum(begin, number * blocks)
        return begin, jnp.minimum(end, (number + 1) * blocks)


def _side_by_side(scales: list[jax.Array], block_size: int) -> jax.Array:
    """f32[Ks, P * blocks] of blocks' scales f32[Ks, P'], for at most P' tokens."""
    row = scales[0]
    lane = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    for number, own in enumerate(scales[1:], 1):
        start = number * block_size
        row = jnp.where(lane >= start, pltpu.roll(own, start, 1), row)
    return row[:, : len(scales) * block_size]
