"""Page updates on TPUs, in place: tokens are written to slots, blocks are copied.

Pipeline: attention -> pallas.tpu.calls -> [pallas.tpu.pages].

A slot is one row of its head's memory tiles; in packed pages it is some lanes of a row.
The scale of a slot, if pages have scales, is one lane of its block's row of scales.

Shape symbols as in `jpaged.attention`; R rows of a page, W rows of a window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pages import packed as packed_pages
from jpaged.pages.quantised import float8_bits
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu import windows as tpu_windows
from jpaged.pallas.tpu.numbers import from_float8_bits
from jpaged.pallas.tpu.windows import TokenLoop

Arrays = tuple[jax.Array, ...]
# Rows of a memory tile of bfloat16 (float32: of two tiles), and of 8 bits.
_ROWS, _NARROW_ROWS = 16, 32


@dataclasses.dataclass(frozen=True)
class _TokenWindow:
    """A window of W rows of every head's page; new tokens are [T, K * D].

    If a row holds several tokens, the numbers of a new token are repeated in the lanes
    of each of them.
    """

    num_slots: int
    block_size: int
    shape: tuple[int, ...]  # [K, W, D]
    wide: Any  # a dtype of 32 bits, in which single rows can be changed
    tokens_of_row: int

    def scratch(self) -> list[Any]:
        """Return the memory that `put` needs."""
        return [pltpu.VMEM(self.shape, self.wide)]

    def window_of(self, array: Any, layer: Any, slot: Any) -> Any:
        """Return the ref of the rows around `slot`."""
        num_rows = self.shape[1]
        start = slot % self.block_size // self.num_slots * num_rows
        rows = pl.ds(pl.multiple_of(start, num_rows), num_rows)
        return array.at[layer, slot // self.block_size, :, rows]

    def put(self, buffer: Any, new: Any, loop: TokenLoop, scratch: Any) -> None:
        """Write the window's new tokens to the window in `buffer`."""
        (window,) = scratch
        num_heads, _, head_dim = self.shape
        window[...] = float8_bits(buffer[...]).astype(self.wide)
        tokens = self.tokens_of_row

        def one(token: Any, slot: Any, _: None) -> None:
            row = new[pl.ds(token, 1)]  # [1, K * D]
            at = slot % self.num_slots
            own = pl.ds(at if tokens == 1 else at // tokens, 1)
            for head in range(num_heads):
                one_head = row[:, head * head_dim : (head + 1) * head_dim]
                if tokens > 1:
                    token_of_lane = tpu_packed.token_of_lane(one_head.shape, tokens)
                    is_own = token_of_lane == slot % tokens
                    one_head = jnp.where(is_own, one_head, window[head, own])
                window[head, own] = one_head

        loop(one, None)
        buffer[...] = from_float8_bits(window[...], buffer.dtype)


@dataclasses.dataclass(frozen=True)
class _ScaleWindow:
    """A window of a block's scales, of all heads; new scales are f32[T, K, P']."""

    num_slots: int  # P
    block_size: int  # P
    shape: tuple[int, ...]  # [K, P']

    def scratch(self) -> list[Any]:
        """Return the memory that `put` needs."""
        return []

    def window_of(self, array: Any, layer: Any, slot: Any) -> Any:
        """Return the ref of the scales of the block of `slot`."""
        return array.at[layer, slot // self.block_size]

    def put(self, buffer: Any, new: Any, loop: TokenLoop, scratch: Any) -> None:
        """Write the window's new scales to the window in `buffer`."""
        del scratch
        lane = lax.broadcasted_iota(jnp.int32, self.shape, 1)

        def one(token: Any, slot: Any, scales: jax.Array) -> jax.Array:
            return jnp.where(lane == slot % self.block_size, new[token], scales)

        buffer[...] = loop(one, buffer[...])


def write_pages(
    pages: Arrays,
    values: Arrays,
    slots: jax.Array,
    layer: jax.Array,
    interpret: Any = False,
) -> Arrays:
    """Return the pages with new tokens, in place if the pages are donated.

    Args:
      pages: Keys and values, [L, N, K, P, D'] with P a multiple of 16 and D' of 128; or
        packed pages of R rows, R = 2, 4 or a multiple of 8.
      values: New keys and values, [T, K, D] in the pages' dtype, with D = D' unless
        pages are packed.
      slots: i32[T]; slots below 0 or past the pool are skipped.
      layer: i32[], index into L.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    _, _, num_kv_heads, block_rows, width = pages[0].shape
    tokens_of_row = packed_pages.tokens_of_row(pages[0], values[0].shape[-1])
    is_narrow = pages[0].dtype.itemsize == 1
    most = _NARROW_ROWS if is_narrow else _ROWS
    rows = next(n for n in (most, 16, 8, 4, 2) if block_rows % n == 0)
    window = _TokenWindow(
        num_slots=rows * tokens_of_row,
        block_size=block_rows * tokens_of_row,
        shape=(num_kv_heads, rows, width),
        wide=jnp.int32 if is_narrow else jnp.float32,
        tokens_of_row=tokens_of_row,
    )

    def token_rows(values: jax.Array) -> jax.Array:
        """Return one row of numbers per token, so that any row can be read."""
        wide = float8_bits(values).astype(window.wide)
        if tokens_of_row > 1:
            wide = jnp.tile(wide, (1, 1, tokens_of_row))
        return wide.reshape(-1, num_kv_heads * width)

    return tpu_windows.update_windows(
        pages,
        tuple(map(token_rows, values)),
        slots,
        layer,
        window,
        name="write_kv",
        interpret=interpret,
    )


def write_scales(
    scales: Arrays,
    values: Arrays,
    slots: jax.Array,
    layer: jax.Array,
    block_size: int,
    interpret: Any = False,
) -> Arrays:
    """Return the scales with new ones, in place if they are donated.

    Args:
      scales: Of keys and of values, f32[L, N, K, P'], with P' a multiple of 128 and at
        least the block size, and K = 1, 2, 4 or a multiple of 8.
      values: New scales of keys and of values, f32[T, K].
      slots: i32[T], as in `write_pages`.
      layer: i32[], index into L.
      block_size: P.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    shape = scales[0].shape[2:]
    return tpu_windows.update_windows(
        scales,
        tuple(jnp.broadcast_to(x[..., None], (*x.shape, shape[1])) for x in values),
        slots,
        layer,
        _ScaleWindow(block_size, block_size, shape),
        name="write_scales",
        interpret=interpret,
    )


def copy_pages(
    arrays: Arrays,
    src: jax.Array,
    dst: jax.Array,
    layer: jax.Array,
    *,
    is_one_layer: bool,
    interpret: Any = False,
) -> Arrays:
    """Return pages and scales with block `src[i]` copied to block `dst[i]`.

    The copies are in place if the arrays are donated.

    Args:
      arrays: [L, N, ...], with a last axis that is a multiple of 128.
      src: i32[C]. Pairs with a block outside the pool are skipped; no block is in both
        `src` and `dst`.
      dst: i32[C].
      layer: i32[], index into L.
      is_one_layer: Copy in this layer only, and not in all layers.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    number, num_blocks = len(arrays), arrays[0].shape[1]
    is_live = (src >= 0) & (dst >= 0) & (src < num_blocks) & (dst < num_blocks)
    order = jnp.argsort(~is_live, stable=True)
    settings = jnp.stack([jnp.sum(is_live, dtype=jnp.int32), layer])
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    copied = pl.pallas_call(
        functools.partial(_copy_kernel, is_one_layer=is_one_layer),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[any_spec] * number,
            out_specs=[any_spec] * number,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        # Indices that count the three scalar arguments.
        input_output_aliases={3 + i: i for i in range(number)},
        interpret=interpret,
        name="copy_blocks",
    )(settings, src[order], dst[order], *arrays)
    return tuple(copied)


def _copy_kernel(
    settings_ref: Any,  # i32[2]: number of live pairs, layer
    src_ref: Any,  # i32[C], live pairs first
    dst_ref: Any,
    *refs: Any,  # the arrays [L, N, ...]; the same memory again, as outputs; DMA
    is_one_layer: bool,
) -> None:
    arrays, semaphore = refs[len(refs) // 2 : -1], refs[-1]
    layer = settings_ref[1] if is_one_layer else slice(None)

    def copies(pair: Any) -> Iterator[Any]:
        for array in arrays:
            source = array.at[layer, src_ref[pair]]
            target = array.at[layer, dst_ref[pair]]
            yield pltpu.make_async_copy(source, target, semaphore)

    def start(pair: Any, _: None) -> None:
        for one in copies(pair):
            one.start()

    def wait(pair: Any, _: None) -> None:
        for one in copies(pair):
            one.wait()

    # No block is read after it was written, so all copies can run at once.
    lax.fori_loop(0, settings_ref[0], start, None)
    lax.fori_loop(0, settings_ref[0], wait, None)
