"""Page updates on TPUs, in place: tokens into slots, blocks onto blocks.

Place on the road: attention -> pallas.tpu -> [pallas.tpu_pages].

A slot is one row of its head's memory tiles, of packed pages some lanes of a row. Its
scale, where the page has some, is one lane of the block's row of scales.

Letters as in `jpaged.attention`; R rows of a page, W of a window.
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

from jpaged.pages import packed as packed_pages
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu import windows as tpu_windows
from jpaged.pallas.tpu.numbers import bits, of_bits
from jpaged.pallas.tpu.windows import Walk

Arrays = tuple[jax.Array, ...]
# Rows of a memory tile: of bfloat16, and two tiles of float32; of 8 bits.
_ROWS, _NARROW_ROWS = 16, 32


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Windows of W rows of every head's page; new tokens are [T, K * D].

    Where a row has several tokens, a new one's numbers stand in the lanes of each.
    """

    num_slots: int
    block_size: int
    shape: tuple[int, ...]  # [K, W, D]
    wide: Any  # the dtype in which any row can be changed: of 32 bits
    tokens_of_row: int

    def scratch(self) -> list[Any]:
        return [pltpu.VMEM(self.shape, self.wide)]

    def place(self, array: Any, layer: Any, slot: Any) -> Any:
        num_rows = self.shape[1]
        start = slot % self.block_size // self.num_slots * num_rows
        rows = pl.ds(pl.multiple_of(start, num_rows), num_rows)
        return array.at[layer, slot // self.block_size, :, rows]

    def put(self, buffer: Any, new: Any, walk: Walk, scratch: Any) -> None:
        (window,) = scratch
        num_heads, _, head_dim = self.shape
        window[...] = bits(buffer[...]).astype(self.wide)
        tokens = self.tokens_of_row

        def one(token, slot, _):
            row = new[pl.ds(token, 1)]  # [1, K * D]
            at = slot % self.num_slots
            place = pl.ds(at if tokens == 1 else at // tokens, 1)
            for head in range(num_heads):
                one_head = row[:, head * head_dim : (head + 1) * head_dim]
                if tokens > 1:
                    lane_of = tpu_packed.place_of_lane(one_head.shape, tokens)
                    is_own = lane_of == slot % tokens
                    one_head = jnp.where(is_own, one_head, window[head, place])
                window[head, place] = one_head

        walk(one, None)
        buffer[...] = of_bits(window[...], buffer.dtype)


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """Windows of a block's scales, of all heads; new tokens are f32[T, K, P']."""

    num_slots: int  # P
    block_size: int  # P
    shape: tuple[int, ...]  # [K, P']

    def scratch(self) -> list[Any]:
        return []

    def place(self, array: Any, layer: Any, slot: Any) -> Any:
        return array.at[layer, slot // self.block_size]

    def put(self, buffer: Any, new: Any, walk: Walk, scratch: Any) -> None:
        del scratch
        lane = lax.broadcasted_iota(jnp.int32, self.shape, 1)

        def one(token, slot, scales):
            return jnp.where(lane == slot % self.block_size, new[token], scales)

        buffer[...] = walk(one, buffer[...])


def write(
    pages: Arrays,
    values: Arrays,
    slots: jax.Array,
    layer: jax.Array,
    interpret: Any = False,
) -> Arrays:
    """`pages`, of keys and of values, with `values` at `slots` i32[T].

    Slots below 0 or past the pool are skipped. In place where the pages are donated.

    Args:
      pages: two [L, N, K, P, D'], P a multiple of 16 and D' of 128; or packed ones of
        R rows, which are 2, 4 or a multiple of 8.
      values: two [T, K, D] in the pages' dtype, D = D' unless pages are packed.
      slots: i32[T].
      layer: i32[], which of L.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    _, _, num_kv_heads, block_rows, width = pages[0].shape
    tokens_of_row = packed_pages.tokens_of_row(pages[0], values[0].shape[-1])
    is_narrow = pages[0].dtype.itemsize == 1
    most = _NARROW_ROWS if is_narrow else _ROWS
    rows = next(n for n in (most, 16, 8, 4, 2) if block_rows % n == 0)
    window = _Rows(
        num_slots=rows * tokens_of_row,
        block_size=block_rows * tokens_of_row,
        shape=(num_kv_heads, rows, width),
        wide=jnp.int32 if is_narrow else jnp.float32,
        tokens_of_row=tokens_of_row,
    )

    def of_tokens(values):
        """One row of numbers to a token, so that any row can be read."""
        wide = bits(values).astype(window.wide)
        if tokens_of_row > 1:
            wide = jnp.tile(wide, (1, 1, tokens_of_row))
        return wide.reshape(-1, num_kv_heads * width)

    return tpu_windows.update(
        pages,
        tuple(map(of_tokens, values)),
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
    """`scales`, of keys and of values, with `values` f32[T, K] at `slots`.

    As `write`; `scales` are two f32[L, N, K, P'] with P' a multiple of 128, at least
    the `block_size`, of K 1, 2, 4 or a multiple of 8.
    """
    shape = scales[0].shape[2:]
    return tpu_windows.update(
        scales,
        tuple(jnp.broadcast_to(x[..., None], (*x.shape, shape[1])) for x in values),
        slots,
        layer,
        _Lanes(block_size, block_size, shape),
        name="write_scales",
        interpret=interpret,
    )


def copy(
    arrays: Arrays,
    src: jax.Array,
    dst: jax.Array,
    layer: jax.Array,
    *,
    is_one_layer: bool,
    interpret: Any = False,
) -> Arrays:
    """`arrays` [L, N, ...], pages and scales, with block `dst[i]` as `src[i]` was.

    Pairs with a block outside the pool are skipped; no block is in both `src` and
    `dst`. All layers unless `is_one_layer`. In place where the arrays are donated; the
    last axis is a multiple of 128.
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
        # Counted with the three scalar arguments.
        input_output_aliases={3 + i: i for i in range(number)},
        interpret=interpret,
        name="copy_blocks",
    )(settings, src[order], dst[order], *arrays)
    return tuple(copied)


def _copy_kernel(
    settings_ref,  # i32[2]: pairs, layer
    src_ref,  # i32[C], live pairs first
    dst_ref,
    *refs,  # of each array [L, N, ...]; the same memory again, as results; DMA
    is_one_layer: bool,
):
    arrays, semaphore = refs[len(refs) // 2 : -1], refs[-1]
    layer = settings_ref[1] if is_one_layer else slice(None)

    def copies(pair):
        for array in arrays:
            ends = (array.at[layer, block[pair]] for block in (src_ref, dst_ref))
            yield pltpu.make_async_copy(*ends, semaphore)

    def start(pair, _):
        for one in copies(pair):
            one.start()

    def wait(pair, _):
        for one in copies(pair):
            one.wait()

    # No block is read after it was written, so all copies may run at once.
    lax.fori_loop(0, settings_ref[0], start, None)
    lax.fori_loop(0, settings_ref[0], wait, None)
