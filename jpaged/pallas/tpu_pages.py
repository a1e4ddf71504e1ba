"""Page updates on TPUs, in place: tokens into slots, blocks onto blocks.

Place on the road: attention -> pallas.tpu -> [pallas.tpu_pages].

A slot is one row of a memory tile, and the hardware copies whole tiles only. So a write
reads the `WINDOW` rows around its slots, changes what is new, and writes them back; the
tokens are sorted by slot before, so that each window is read and written once, and no
two copies meet.

Letters as in `jpaged.attention`; W rows of a window, I windows of a step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of a window: a tile of bfloat16, and two of float32.
WINDOW = 16
# Windows under way at once.
_BUFFERS = 4
# New tokens are in the core's memory so many bytes at a time, keys and values each.
_CHUNK_BYTES = 2**20


def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`k_pages`, `v_pages` [L, N, K, P, D] with `k`, `v` [T, K, D] at `slots` i32[T].

    Slots below 0 or past the pool are skipped. In place where the pages are donated.
    P is a multiple of `WINDOW`, and D of 128.
    """
    _, num_blocks, num_kv_heads, block_size, head_dim = k_pages.shape
    (num_tokens,) = slots.shape
    width = num_kv_heads * head_dim
    most = max(_CHUNK_BYTES // (4 * width), 8)
    chunk = min(1 << (most.bit_length() - 1), pl.cdiv(num_tokens, 8) * 8)
    num_chunks = pl.cdiv(num_tokens, chunk)

    is_live = (slots >= 0) & (slots < num_blocks * block_size)
    slots = jnp.where(is_live, slots, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(slots)
    order = jnp.pad(order, (0, num_chunks * chunk - num_tokens))
    slots, num_live = slots[order], jnp.sum(is_live, dtype=jnp.int32)
    firsts, chunk_windows = _windows(slots, num_live, chunk)

    def rows(values):  # one row of numbers to a token, so that any row can be read
        return values.astype(jnp.float32)[order].reshape(-1, width)

    rows_spec = pl.BlockSpec((chunk, width), lambda number, *_: (number, 0))
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    window = (num_kv_heads, WINDOW, head_dim)
    buffer = pltpu.VMEM((_BUFFERS, *window), k_pages.dtype)
    k_pages, v_pages = pl.pallas_call(
        functools.partial(_write_kernel, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_chunks,),
            in_specs=[rows_spec, rows_spec, any_spec, any_spec],
            out_specs=[any_spec, any_spec],
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.VMEM(window, jnp.float32),
                pltpu.SemaphoreType.DMA((2, _BUFFERS)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(pages.shape, pages.dtype)
            for pages in (k_pages, v_pages)
        ],
        input_output_aliases={6: 0, 7: 1},  # counted with the four scalar arguments
        interpret=interpret,
        name="write_kv",
    )(
        layer.reshape(1),
        slots,
        firsts,
        chunk_windows,
        rows(k),
        rows(v),
        k_pages,
        v_pages,
    )
    return k_pages, v_pages


def _windows(
    slots: jax.Array, num_live: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The first token of each window, and the number of windows before each chunk.

    Args:
      slots: i32[T], rising; the first `num_live` are to be written.
      num_live: i32[].
      chunk: tokens of a chunk; a window does not reach into the next one.

    Returns:
      i32[T + 1], `num_live` behind the last window; i32[chunks + 1].
    """
    (num_tokens,) = slots.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    window = slots // WINDOW
    is_first = (window != jnp.roll(window, 1)) | (token % chunk == 0)
    is_first &= token < num_live
    (firsts,) = jnp.nonzero(is_first, size=num_tokens + 1, fill_value=num_live)
    per_chunk = jnp.sum(is_first.reshape(-1, chunk), axis=1, dtype=jnp.int32)
    before = jnp.pad(jnp.cumsum(per_chunk, dtype=jnp.int32), (1, 0))
    return firsts.astype(jnp.int32), before


def _write_kernel(
    layer_ref,  # i32[1]
    slots_ref,  # i32[T], rising
    firsts_ref,  # i32[T + 1], first token of each window
    chunk_windows_ref,  # i32[chunks + 1]
    k_ref,  # f32[chunk, K * D]
    v_ref,  # f32[chunk, K * D]
    k_in,  # the same memory as k_out
    v_in,
    k_out,  # [L, N, K, P, D]
    v_out,
    k_buffer,  # [_BUFFERS, K, W, D]
    v_buffer,
    window_ref,  # f32[K, W, D]
    semaphores,  # DMA[2, _BUFFERS]: of reads, of writes
    *,
    chunk: int,
):
    del k_in, v_in
    number = pl.program_id(0)
    layer = layer_ref[0]
    _, _, num_kv_heads, block_size, head_dim = k_out.shape
    begin, end = chunk_windows_ref[number], chunk_windows_ref[number + 1]

    def copies(window, is_read):
        slot = slots_ref[firsts_ref[window]]
        start = pl.multiple_of(slot % block_size // WINDOW * WINDOW, WINDOW)
        index = window % _BUFFERS
        for pages, buffer in ((k_out, k_buffer), (v_out, v_buffer)):
            place = pages.at[layer, slot // block_size, :, pl.ds(start, WINDOW)]
            ends = (place, buffer.at[index]) if is_read else (buffer.at[index], place)
            yield pltpu.make_async_copy(*ends, semaphores.at[1 - is_read, index])

    def read(window):
        @pl.when(window < end)
        def _():
            for copy in copies(window, is_read=True):
                copy.start()

    def put(window, new_ref, buffer):
        window_ref[...] = buffer[window % _BUFFERS].astype(jnp.float32)

        def one(token, _):
            new = new_ref[pl.ds(token - number * chunk, 1)]  # [1, K * D]
            offset = slots_ref[token] % WINDOW
            for head in range(num_kv_heads):
                start = head * head_dim
                one_head = new[:, start : start + head_dim]
                window_ref[head, pl.ds(offset, 1)] = one_head

        lax.fori_loop(firsts_ref[window], firsts_ref[window + 1], one, None)
        buffer[window % _BUFFERS] = window_ref[...].astype(buffer.dtype)

    def step(window, _):
        for copy in copies(window, is_read=True):
            copy.wait()
        put(window, k_ref, k_buffer)
        put(window, v_ref, v_buffer)
        for copy in copies(window, is_read=False):
            copy.start()

        # The buffer of the window before is the next to be read into.
        @pl.when(window > begin)
        def _():
            for copy in copies(window - 1, is_read=False):
                copy.wait()

        read(window + _BUFFERS - 1)

    for ahead in range(_BUFFERS - 1):
        read(begin + ahead)
    lax.fori_loop(begin, end, step, None)

    @pl.when(end > begin)
    def _():
        for copy in copies(end - 1, is_read=False):
            copy.wait()


def copy(
    k_pages: jax.Array,
    v_pages: jax.Array,
    src: jax.Array,
    dst: jax.Array,
    layer: jax.Array,
    *,
    is_one_layer: bool,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`k_pages`, `v_pages` [L, N, K, P, D] with block `dst[i]` as `src[i]` was.

    Pairs with a block outside the pool are skipped; no block is in both `src` and
    `dst`. All layers unless `is_one_layer`. In place where the pages are donated; D is
    a multiple of 128.
    """
    num_blocks = k_pages.shape[1]
    is_live = (src >= 0) & (dst >= 0) & (src < num_blocks) & (dst < num_blocks)
    order = jnp.argsort(~is_live, stable=True)
    number = jnp.sum(is_live, dtype=jnp.int32)
    settings = jnp.stack([number, layer])
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    k_pages, v_pages = pl.pallas_call(
        functools.partial(_copy_kernel, is_one_layer=is_one_layer),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[any_spec, any_spec],
            out_specs=[any_spec, any_spec],
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(pages.shape, pages.dtype)
            for pages in (k_pages, v_pages)
        ],
        input_output_aliases={3: 0, 4: 1},  # counted with the three scalar arguments
        interpret=interpret,
        name="copy_blocks",
    )(settings, src[order], dst[order], k_pages, v_pages)
    return k_pages, v_pages


def _copy_kernel(
    settings_ref,  # i32[2]: pairs, layer
    src_ref,  # i32[C], live pairs first
    dst_ref,
    k_in,  # the same memory as k_out
    v_in,
    k_out,  # [L, N, K, P, D]
    v_out,
    semaphore,  # DMA
    *,
    is_one_layer: bool,
):
    del k_in, v_in
    layer = settings_ref[1] if is_one_layer else slice(None)

    def copies(pair):
        for pages in (k_out, v_out):
            ends = (pages.at[layer, block[pair]] for block in (src_ref, dst_ref))
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
