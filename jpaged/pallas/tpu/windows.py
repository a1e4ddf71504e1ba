"""Arrays updated in place on TPUs: windows are read, changed and written back.

Place on the road: pallas.tpu_pages -> [pallas.tpu_windows].

The hardware copies whole memory tiles, and what a token brings is less. So an update
reads the windows around its slots, changes what is new, and writes them back; the
tokens are sorted by slot before, so that each window is read and written once, and no
two copies meet.

Letters as in `jpaged.attention`; W slots of a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Windows under way at once.
_BUFFERS = 4
# New tokens are in the core's memory so many bytes at a time, of each array.
_CHUNK_BYTES = 2**20

# (function, start): the last result of `result = function(token, slot, result)` over
# the window's tokens, counted from the first of the chunk.
Walk = Callable[[Callable[..., Any], Any], Any]


class Window(Protocol):
    """What is read and written as one; the same for every array of an update."""

    @property
    def num_slots(self) -> int:
        """W; it divides a block's slots, and windows begin at its multiples."""
        ...

    @property
    def block_size(self) -> int:
        """P."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a window's numbers."""
        ...

    def scratch(self) -> list[Any]:
        """What `put` needs besides."""
        ...

    def place(self, array: Any, layer: Any, slot: Any) -> Any:
        """The ref of the window of `slot` in an array's ref."""
        ...

    def put(self, buffer: Any, new: Any, walk: Walk, scratch: Any) -> None:
        """Puts `new[token]` at `slot` into the window in `buffer`, of each token."""
        ...


def update(
    arrays: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    slots: jax.Array,
    layer: jax.Array,
    window: Window,
    *,
    name: str,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """`arrays` with `values` at `slots`, in place where they are donated.

    Args:
      arrays: [L, N, ...], alike.
      values: of each array [T, ...], 32 bits wide, as `window.put` wants them.
      slots: i32[T]; those below 0 or past the arrays are skipped.
      layer: i32[], which of L.
      window: how the arrays are cut.
      name: of the kernel.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    number = len(arrays)
    most = max(_CHUNK_BYTES // (4 * math.prod(values[0].shape[1:])), 8)
    chunk = min(1 << (most.bit_length() - 1), pl.cdiv(slots.size, 8) * 8)
    end = arrays[0].shape[1] * window.block_size
    order, slots, num_live = _sorted(slots, end, chunk)
    firsts, chunk_windows = _windows(slots, num_live, chunk, window.num_slots)
    any_spec = pl.BlockSpec(memory_space=pl.ANY)

    def chunk_spec(values):
        rest = values.shape[1:]
        return pl.BlockSpec((chunk, *rest), lambda i, *_: (i, *(0 for _ in rest)))

    updated = pl.pallas_call(
        functools.partial(_kernel, chunk=chunk, window=window, number=number),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(slots.size // chunk,),
            in_specs=[*map(chunk_spec, values), *[any_spec] * number],
            out_specs=[any_spec] * number,
            scratch_shapes=[
                pltpu.SemaphoreType.DMA((2, _BUFFERS)),
                *(pltpu.VMEM((_BUFFERS, *window.shape), x.dtype) for x in arrays),
                *window.scratch(),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        # Counted with the four scalar arguments and the values.
        input_output_aliases={4 + number + i: i for i in range(number)},
        interpret=interpret,
        name=name,
    )(
        layer.reshape(1),
        slots,
        firsts,
        chunk_windows,
        *(value[order] for value in values),
        *arrays,
    )
    return tuple(updated)


def _sorted(
    slots: jax.Array, end: int, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens' order, their slots in it, and how many are below `end` and live.

    i32[T] twice, T filled up to whole chunks; what is not live comes last.
    """
    is_live = (slots >= 0) & (slots < end)
    slots = jnp.where(is_live, slots, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(slots)
    order = jnp.pad(order, (0, -slots.size % chunk))
    return order, slots[order], jnp.sum(is_live, dtype=jnp.int32)


def _windows(
    slots: jax.Array, num_live: jax.Array, chunk: int, num_slots: int
) -> tuple[jax.Array, jax.Array]:
    """The first token of each window, and the number of windows before each chunk.

    Args:
      slots: i32[T], rising; the first `num_live` are to be written.
      num_live: i32[].
      chunk: tokens of a chunk; a window does not reach into the next one.
      num_slots: of a window.

    Returns:
      i32[T + 1], `num_live` behind the last window; i32[chunks + 1].
    """
    (num_tokens,) = slots.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    window = slots // num_slots
    is_first = (window != jnp.roll(window, 1)) | (token % chunk == 0)
    is_first &= token < num_live
    (firsts,) = jnp.nonzero(is_first, size=num_tokens + 1, fill_value=num_live)
    per_chunk = jnp.sum(is_first.reshape(-1, chunk), axis=1, dtype=jnp.int32)
    before = jnp.pad(jnp.cumsum(per_chunk, dtype=jnp.int32), (1, 0))
    return firsts.astype(jnp.int32), before


def _kernel(
    layer_ref,  # i32[1]
    slots_ref,  # i32[T], rising
    firsts_ref,  # i32[T + 1], first token of each window
    chunk_windows_ref,  # i32[chunks + 1]
    *refs,  # of each array values [chunk, ...]; the arrays; the same memory as results
    chunk: int,
    window: Window,
    number: int,
):
    new_refs, arrays, rest = (
        refs[:number],
        refs[2 * number : 3 * number],
        refs[3 * number :],
    )
    # DMA[2, _BUFFERS]: of reads, of writes; of each array [_BUFFERS, *window.shape]
    semaphores, buffers, scratch = rest[0], rest[1 : 1 + number], rest[1 + number :]
    first_token = pl.program_id(0) * chunk
    begin, end = (chunk_windows_ref[pl.program_id(0) + i] for i in (0, 1))

    def copies(at, is_read):
        slot, index = slots_ref[firsts_ref[at]], at % _BUFFERS
        for array, buffer in zip(arrays, buffers, strict=True):
            place = window.place(array, layer_ref[0], slot)
            ends = (place, buffer.at[index]) if is_read else (buffer.at[index], place)
            yield pltpu.make_async_copy(*ends, semaphores.at[1 - is_read, index])

    def read(at):
        @pl.when(at < end)
        def _():
            for copy in copies(at, is_read=True):
                copy.start()

    def step(at, _):
        def walk(function, start):
            def one(token, result):
                return function(token - first_token, slots_ref[token], result)

            return lax.fori_loop(firsts_ref[at], firsts_ref[at + 1], one, start)

        for copy in copies(at, is_read=True):
            copy.wait()
        for buffer, new_ref in zip(buffers, new_refs, strict=True):
            window.put(buffer.at[at % _BUFFERS], new_ref, walk, scratch)
        for copy in copies(at, is_read=False):
            copy.start()

        # The buffer of the window before is the next to be read into.
        @pl.when(at > begin)
        def _():
            for copy in copies(at - 1, is_read=False):
                copy.wait()

        read(at + _BUFFERS - 1)

    for ahead in range(_BUFFERS - 1):
        read(begin + ahead)
    lax.fori_loop(begin, end, step, None)

    @pl.when(end > begin)
    def _():
        for copy in copies(end - 1, is_read=False):
            copy.wait()
