"""Updates of arrays in place on TPUs: windows are read, changed and written back.

Pipeline: pallas.tpu.pages -> [pallas.tpu.windows].

The hardware copies whole memory tiles, and a token is smaller than a tile. An update
therefore reads the windows around its slots, changes the new tokens, and writes the
windows back. The tokens are sorted by slot first, so that each window is read and
written once, and no two copies overlap.

Shape symbols as in `jpaged.attention`; W slots of a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Windows in flight at once.
_BUFFERS = 4
# Bytes of new tokens per array that the core's memory holds at a time.
_CHUNK_BYTES = 2**20

# (function, start) -> result: repeats `result = function(token, slot, result)` for the
# window's tokens, which count from the first one of the chunk.
TokenLoop = Callable[[Callable[..., Any], Any], Any]


class Window(Protocol):
    """The part of an array that is read and written as a whole.

    All arrays of an update have windows of one shape.
    """

    @property
    def num_slots(self) -> int:
        """W; it divides a block's slots, and windows start at its multiples."""
        ...

    @property
    def block_size(self) -> int:
        """P."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a window."""
        ...

    def scratch(self) -> list[Any]:
        """Return the memory that `put` needs."""
        ...

    def window_of(self, array: Any, layer: Any, slot: Any) -> Any:
        """Return the ref of the window of `slot` in an array's ref."""
        ...

    def put(self, buffer: Any, new: Any, loop: TokenLoop, scratch: Any) -> None:
        """Write `new[token]` to `slot` of the window in `buffer`, for each token."""
        ...


def update_windows(
    arrays: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    slots: jax.Array,
    layer: jax.Array,
    window: Window,
    *,
    name: str,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Return the arrays with new values, in place if the arrays are donated.

    Args:
      arrays: [L, N, ...], all of one shape.
      values: For each array [T, ...], of 32 bits, as `window.put` expects them.
      slots: i32[T]; slots below 0 or past the arrays are skipped.
      layer: i32[], index into L.
      window: How the arrays are divided.
      name: The kernel's name.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU.
    """
    number = len(arrays)
    most = max(_CHUNK_BYTES // (4 * math.prod(values[0].shape[1:])), 8)
    chunk = min(1 << (most.bit_length() - 1), pl.cdiv(slots.size, 8) * 8)
    end = arrays[0].shape[1] * window.block_size
    order, slots, num_live = _sort_slots(slots, end, chunk)
    firsts, chunk_windows = _list_windows(slots, num_live, chunk, window.num_slots)
    any_spec = pl.BlockSpec(memory_space=pl.ANY)

    def chunk_spec(values: jax.Array) -> pl.BlockSpec:
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
        # Indices that count the four scalar arguments and the values.
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


def _sort_slots(
    slots: jax.Array, end: int, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort tokens by slot; tokens whose slot is not from 0 to `end - 1` come last.

    Returns:
      The tokens in order i32[T], their slots i32[T], with T rounded up to whole chunks,
      and the number of tokens with a slot in the range, i32[].
    """
    is_live = (slots >= 0) & (slots < end)
    slots = jnp.where(is_live, slots, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(slots)
    order = jnp.pad(order, (0, -slots.size % chunk))
    return order, slots[order], jnp.sum(is_live, dtype=jnp.int32)


def _list_windows(
    slots: jax.Array, num_live: jax.Array, chunk: int, num_slots: int
) -> tuple[jax.Array, jax.Array]:
    """List the windows of sorted tokens.

    Args:
      slots: i32[T], sorted; the first `num_live` are written.
      num_live: i32[].
      chunk: Tokens per chunk; a window does not reach into the next chunk.
      num_slots: Slots per window.

    Returns:
      The first token of each window, i32[T + 1], with `num_live` after the last window;
      the number of windows before each chunk, and of all, i32[chunks + 1].
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
    layer_ref: Any,  # i32[1]
    slots_ref: Any,  # i32[T], sorted
    firsts_ref: Any,  # i32[T + 1], first token of each window
    chunk_windows_ref: Any,  # i32[chunks + 1]
    *refs: Any,  # values [chunk, ...], arrays, the same memory as outputs; scratch
    chunk: int,
    window: Window,
    number: int,
) -> None:
    new_refs, arrays = refs[:number], refs[2 * number : 3 * number]
    semaphores, *rest = refs[3 * number :]  # DMA[2, _BUFFERS]: of reads, of writes
    buffers, scratch = rest[:number], rest[number:]  # [_BUFFERS, *window.shape]
    first_token = pl.program_id(0) * chunk
    begin, end = (chunk_windows_ref[pl.program_id(0) + i] for i in (0, 1))

    def copies(at: Any, is_read: bool) -> Iterator[Any]:
        slot, index = slots_ref[firsts_ref[at]], at % _BUFFERS
        for array, buffer in zip(arrays, buffers, strict=True):
            own = window.window_of(array, layer_ref[0], slot)
            source, target = own, buffer.at[index]
            if not is_read:
                source, target = target, source
            semaphore = semaphores.at[1 - is_read, index]
            yield pltpu.make_async_copy(source, target, semaphore)

    def read(at: Any) -> None:
        @pl.when(at < end)
        def _() -> None:
            for copy in copies(at, is_read=True):
                copy.start()

    def change(at: Any) -> None:
        def loop(function: Callable[..., Any], start: Any) -> Any:
            def one(token: Any, result: Any) -> Any:
                return function(token - first_token, slots_ref[token], result)

            return lax.fori_loop(firsts_ref[at], firsts_ref[at + 1], one, start)

        for buffer, new_ref in zip(buffers, new_refs, strict=True):
            window.put(buffer.at[at % _BUFFERS], new_ref, loop, scratch)

    def step(at: Any, _: None) -> None:
        for copy in copies(at, is_read=True):
            copy.wait()
        change(at)
        for copy in copies(at, is_read=False):
            copy.start()

        # The next read overwrites the buffer of the window before.
        @pl.when(at > begin)
        def _() -> None:
            for copy in copies(at - 1, is_read=False):
                copy.wait()

        read(at + _BUFFERS - 1)

    for ahead in range(_BUFFERS - 1):
        read(begin + ahead)
    lax.fori_loop(begin, end, step, None)

    @pl.when(end > begin)
    def _() -> None:
        for copy in copies(end - 1, is_read=False):
            copy.wait()
