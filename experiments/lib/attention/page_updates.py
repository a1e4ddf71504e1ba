"""Page updates for the attention benchmark: tokens written, blocks copied.

Each update is compared with numpy, bit for bit, before it is timed. Each repetition
updates another part of the pool, so that caches do not hold the written pages.

Shape symbols: N blocks, P tokens per block, K KV heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.attention.cases import median_seconds, repeat
from experiments.lib.attention.contenders import needs_backend, needs_cpu_kernels
from jpaged import attention
from jpaged.arithmetic import cdiv
from jpaged.attention import backends
from jpaged.pages import packed as packed_pages


@dataclasses.dataclass(frozen=True)
class PageUpdate:
    """Sizes of one update of keys and values."""

    name: str  # "write_kv" or "copy_blocks"
    number: int  # tokens or blocks
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def bytes_of_one(self) -> int:
        """Bytes of one token's or block's keys, of all heads."""
        tokens = 1 if self.name == "write_kv" else self.block_size
        heads = tokens * self.num_kv_heads * self.head_dim
        return heads * jnp.dtype(self.dtype).itemsize

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        return 2 * 2 * self.number * self.bytes_of_one


# "mosaic_gpu" updates pages by XLA.
_NEEDS: dict[str, Callable[[], str | None]] = {
    "xla": lambda: None,
    "cpu": needs_cpu_kernels,
    "mosaic_tpu": lambda: needs_backend("tpu"),
    "triton": lambda: needs_backend("gpu", "jax_triton"),
}
UPDATES = {
    f"{name}/{implementation}": (name, implementation, needed)
    for name in ("write_kv", "copy_blocks")
    for implementation, needed in _NEEDS.items()
}

# (repetition, k_pages, v_pages, order, k, v) -> (k_pages, v_pages)
UpdateCall = Callable[..., tuple[jax.Array, ...]]


def _call(update: PageUpdate, implementation: str, num_blocks: int) -> UpdateCall:
    """The update as a function; the repetition decides where in the pool it starts."""
    options: dict[str, Any] = {"implementation": implementation}
    if update.name == "write_kv":

        def write(
            repetition: jax.Array,
            k_pages: jax.Array,
            v_pages: jax.Array,
            order: jax.Array,
            k: jax.Array,
            v: jax.Array,
        ) -> tuple[jax.Array, ...]:
            slots = (order + repetition * update.number) % (
                num_blocks * update.block_size
            )
            return attention.write_kv(k_pages, v_pages, k, v, slots, **options)

        return write
    half = num_blocks // 2

    def copy(
        repetition: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        order: jax.Array,
        *_: jax.Array,
    ) -> tuple[jax.Array, ...]:
        src = (order + repetition * update.number) % half
        dst = half + (half - 1 - src)
        return attention.copy_blocks(k_pages, v_pages, src, dst, **options)

    return copy


def _arrays(
    update: PageUpdate, implementation: str, num_blocks: int
) -> list[jax.Array]:
    """Pools, slots or blocks of the first repetition, and keys and values to write."""
    sizes = (update.block_size, update.head_dim, update.dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    page = backends.layout(implementation).page_shape(*sizes)
    pool = (num_blocks, update.num_kv_heads, *page)
    new = (update.number, update.num_kv_heads, update.head_dim)
    shapes = (pool, pool, new, new)
    k_pages, v_pages, k, v = (
        jax.random.normal(key, shape, update.dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    num_places = num_blocks * update.block_size
    if update.name == "copy_blocks":
        num_places = num_blocks // 2
    order = np.random.default_rng(0).permutation(num_places)[: update.number]
    return [k_pages, v_pages, jnp.asarray(order, jnp.int32), k, v]


def _blocks_needed(update: PageUpdate) -> int:
    if update.name == "copy_blocks":
        return 2 * update.number
    return cdiv(update.number, update.block_size)


def _check(update: PageUpdate, implementation: str) -> None:
    """Raises ValueError unless one update of a small pool equals numpy's."""
    num_blocks = _blocks_needed(update) + 2
    arrays = _arrays(update, implementation, num_blocks)
    call = jax.jit(_call(update, implementation, num_blocks))
    found = call(jnp.int32(0), *arrays)
    *pools, order, k, v = map(np.array, arrays)
    for pages, new, result in zip(pools, (k, v), found, strict=True):
        if update.name == "copy_blocks":
            pages[len(pages) - 1 - order] = pages[order]
        else:
            size, dim = update.block_size, update.head_dim
            slots = pages.reshape(packed_pages.plain_shape(pages, dim))
            slots[order // size, :, order % size, :dim] = new
            slots[order // size, :, order % size, dim:] = 0
        if np.asarray(result).tobytes() != pages.tobytes():
            raise ValueError(
                f"pages: expected those of numpy, got others; not timing {update.name}"
            )


def measure_update(
    name: str, update: PageUpdate, pool_bytes: int, repeats: int, least_s: float
) -> dict[str, Any]:
    """Checks an update and times one call.

    Args:
      name: Of `UPDATES`.
      update: Sizes.
      pool_bytes: Bytes of both pools together, at least.
      repeats: Rounds; the median counts.
      least_s: Shortest duration of a round, in seconds.

    Returns:
      As `contenders.measure_case`.

    Raises:
      ValueError: The implementation cannot serve the update, or its pages are wrong.
    """
    implementation = UPDATES[name][1]
    _check(update, implementation)
    bytes_of_block = update.bytes_of_one
    if update.name == "write_kv":
        bytes_of_block *= update.block_size
    num_blocks = max(pool_bytes // (2 * bytes_of_block), _blocks_needed(update)) + 2
    num_blocks += num_blocks % 2
    *pools, order, k, v = _arrays(update, implementation, num_blocks)
    call = _call(update, implementation, num_blocks)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(
        loops: jax.Array | int, pools: tuple[jax.Array, ...], *rest: jax.Array
    ) -> tuple[jax.Array, ...]:
        return repeat(loops, lambda index, pools: call(index, *pools, *rest), pools)

    state = [tuple(pools)]

    def run(loops: int) -> None:
        state[0] = jax.block_until_ready(loop(loops, state[0], order, k, v))

    return {"error": 0.0} | median_seconds(run, repeats, least_s)
