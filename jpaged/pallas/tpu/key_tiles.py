"""Tiles of keys and values in a TPU core's memory: one is computed, one is fetched.

Pipeline: pallas.tpu.kernel -> [pallas.tpu.key_tiles].

A tile is copied block by block from the pages. With pages of 8 bits the scales are
copied too, and laid side by side, because each score is multiplied by its key's scale.

Shape symbols as in `jpaged.attention`; R rows of a page, each of one token, or of
several in packed pages; C rows of a tile, B = C // R its blocks; Kw heads of a pass, Ks
heads whose scales the pass fetches.
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
from jpaged.pages.quantised import float8_bits
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu.numbers import from_float8_bits, to_product_dtype
from jpaged.pallas.tpu.plan import TpuCallPlan
from jpaged.pallas.tpu.segments import Segments


def scratch(plan: TpuCallPlan, dtype: Any, scale_width: int | None) -> list[Any]:
    """Return the memory that a kernel allocates for the last fields of `KeyTiles`.

    Args:
      plan: The call's sizes.
      dtype: The pages' dtype.
      scale_width: P', or None if pages have no scales.
    """
    block = (plan.block_rows, plan.head_dim)
    pages = pltpu.VMEM((2, plan.pass_heads, plan.blocks, *block), dtype)
    semaphores = pltpu.SemaphoreType.DMA((2,))
    if scale_width is None:
        return [semaphores, pages, pages]
    heads = plan.scale_heads
    scales = pltpu.VMEM((2, plan.blocks, heads, scale_width), jnp.float32)
    rows = pltpu.VMEM((heads, plan.tokens), jnp.float32)
    return [semaphores, pages, pages, scales, scales, rows, rows]


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Two tiles, in slots 0 and 1 of refs; tile number 0 has token 0."""

    plan: TpuCallPlan
    pass_index: Any  # i32[]
    layer: Any  # i32[]
    tables: Any  # i32[S * M]
    segments: Segments  # of refs
    arrays: tuple[Any, ...]  # pages [L, N, K, R, D], scales f32[L, N, K, P']
    semaphores: Any  # DMA[2]
    keys: Any  # [2, Kw, B, R, D]
    values: Any
    k_scales: Any = None  # f32[2, B, Ks, P'], with pages of 8 bits
    v_scales: Any = None
    k_rows: Any = None  # f32[Ks, C]: scales of the tile that is computed
    v_rows: Any = None

    @property
    def has_scales(self) -> bool:
        """Whether pages have 8 bits per number."""
        return self.k_scales is not None

    def clear(self) -> None:
        """Make values finite that are never fetched: weight 0 times NaN is NaN."""
        self.values[...] = jnp.zeros_like(self.values)

    def fetch(self, segment: Any, number: Any, slot: Any) -> None:
        """Start the copies of the blocks that a segment needs of a tile."""

        def start(column: Any, _: None) -> None:
            block = self.tables[self.segments.row[segment] * self.plan.width + column]
            block = jnp.clip(block, 0, self.arrays[0].shape[1] - 1)
            for copy in self._copies(block, column - number * self.plan.blocks, slot):
                copy.start()

        lax.fori_loop(*self._columns(segment, number), start, None)

    def wait(self, segment: Any, number: Any, slot: Any) -> None:
        """Wait for all copies that `fetch` started."""

        def done(column: Any, _: None) -> None:
            for copy in self._copies(0, column - number * self.plan.blocks, slot):
                copy.wait()

        lax.fori_loop(*self._columns(segment, number), done, None)

    def clear_unseen(self, segment: Any, number: Any, slot: Any) -> None:
        """Set fetched values to 0 that no query of the segment sees.

        In packed pages keys too, because they share a row with keys that are seen.
        """
        if self.values.dtype == jnp.int8:
            return  # no number is NaN
        is_packed = self.plan.tokens_of_row > 1
        buffers = (self.keys, self.values) if is_packed else (self.values,)
        block_size = self.plan.block_size
        first_token = self.segments.first_token[segment]
        end_token = self.segments.end_token[segment]
        begin, end = self._columns(segment, number)
        for column, token in ((begin, first_token), (end - 1, end_token)):
            first = column * block_size

            @pl.when((token > first) & (token < first + block_size))
            def _(column: Any = column) -> None:
                position = column * block_size + self._tokens()
                is_seen = (position >= first_token) & (position < end_token)
                for buffer in buffers:
                    block = slot, slice(None), column - number * self.plan.blocks
                    self._keep(buffer, block, is_seen)

    def _keep(self, buffer: Any, block: tuple[Any, ...], is_seen: jax.Array) -> None:
        """Set the numbers of a block in a buffer to 0 where `is_seen` is false."""
        wide = jnp.float32 if buffer.dtype.itemsize > 1 else jnp.int32
        numbers = float8_bits(buffer[block]).astype(wide)
        numbers = jnp.where(is_seen, numbers, wide(0))
        buffer[block] = from_float8_bits(numbers, buffer.dtype)

    def spread_scales(self, slot: Any) -> None:
        """Fill `k_rows` and `v_rows`; scales that were not fetched may be NaN."""
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

    def numbers_of(
        self, head: int, slot: Any, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Return keys and values [C, D] of a head of the pass, without scales."""
        keys, values = (
            to_product_dtype(pages[slot, head], dtype).reshape(self.plan.columns, -1)
            for pages in (self.keys, self.values)
        )
        return keys, values

    def scales_of(self, head: int) -> tuple[Any, Any]:
        """Return the scales of keys and values, f32[1, C] each, or None and None."""
        if not self.has_scales:
            return None, None
        is_own = self.plan.scale_heads == self.plan.pass_heads
        first = 0 if is_own else self.pass_index * self.plan.pass_heads
        index = pl.ds(first + head, 1)
        return self.k_rows[index], self.v_rows[index]

    def _tokens(self) -> jax.Array:
        """Return the token of a block to which each number belongs, i32[Kw, R, D]."""
        plan = self.plan
        shape = (plan.pass_heads, plan.block_rows, plan.head_dim)
        row = lax.broadcasted_iota(jnp.int32, shape, 1)
        if plan.tokens_of_row == 1:
            return row
        token = tpu_packed.token_of_lane(shape, plan.tokens_of_row)
        return row * plan.tokens_of_row + token

    def _copies(self, block: Any, column: Any, slot: Any) -> list[Any]:
        """Return the copies of one block to a column of a tile."""
        plan = self.plan
        heads = pl.ds(self.pass_index * plan.pass_heads, plan.pass_heads)
        scale_heads = heads if plan.scale_heads == plan.pass_heads else slice(None)
        targets = [
            (heads, buffer.at[slot, :, column]) for buffer in (self.keys, self.values)
        ]
        if self.has_scales:
            targets += [
                (scale_heads, buffer.at[slot, column])
                for buffer in (self.k_scales, self.v_scales)
            ]
        return [
            pltpu.make_async_copy(
                array.at[self.layer, block, own], target, self.semaphores.at[slot]
            )
            for array, (own, target) in zip(self.arrays, targets, strict=True)
        ]

    def _columns(self, segment: Any, number: Any) -> tuple[Any, Any]:
        """Return the range of table columns that a segment needs of a tile."""
        block_size, blocks = self.plan.block_size, self.plan.blocks
        begin = self.segments.first_token[segment] // block_size
        end = pl.cdiv(self.segments.end_token[segment], block_size)
        begin = jnp.maximum(begin, number * blocks)
        return begin, jnp.minimum(end, (number + 1) * blocks)


def _side_by_side(scales: list[jax.Array], block_size: int) -> jax.Array:
    """Join blocks' scales f32[Ks, P'] to f32[Ks, P * blocks], of at most P' tokens."""
    row = scales[0]
    lane = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    for number, own in enumerate(scales[1:], 1):
        start = number * block_size
        row = jnp.where(lane >= start, pltpu.roll(own, start, 1), row)
    return row[:, : len(scales) * block_size]
