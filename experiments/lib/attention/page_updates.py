"""Page updates for the attention benchmark: tokens written, blocks copied.

Beside the road: each is compared with numpy, bit for bit, before it is timed. Each
repetition moves on through the pool, so that caches do not hold what is written.

Letters: N blocks, P tokens per block, K kv heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.attention.cases import median_seconds, repeat
from experiments.lib.attention.contenders import needs_backend
from jpaged import attention
from jpaged.arithmetic import cdiv
from jpaged.attention import backends
from jpaged.pages import packed as packed_pages


@dataclasses.dataclass(frozen=True)
class Update:
    """One line of the benchmark: so many tokens or blocks, K and V."""

    name: str  # "write_kv" or "copy_blocks"
    number: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def bytes_of_one(self) -> int:
        """Of a key or value of all heads, or of all of a block."""
        tokens = 1 if self.name == "write_kv" else self.block_size
        heads = tokens * self.num_kv_heads * self.head_dim
        return heads * jnp.dtype(self.dtype).itemsize

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        return 2 * 2 * self.number * self.bytes_of_one


# Page updates of "mosaic_gpu" are XLA's.
_NEEDS: dict[str, Callable[[], str | None]] = {
    "xla": lambda: None,
    "mosaic_tpu": lambda: needs_backend("tpu"),
    "triton": lambda: needs_backend("gpu", "jax_triton"),
}
UPDATES = {
    f"{name}/{implementation}": (name, implementation, needed)
    for name in ("write_kv", "copy_blocks")
    for implementation, needed in _NEEDS.items()
}

# Of a round: pools and i32[number] numbers to pools.
Call = Callable[..., tuple[jax.Array, ...]]


def _call(update: Update, implementation: str, num_blocks: int) -> Call:
    """The pools after an update, of which `turn` says where it begins."""
    options: dict[str, Any] = {"implementation": implementation}
    if update.name == "write_kv":

        def write(turn, k_pages, v_pages, order, k, v):
            slots = (order + turn * update.number) % (num_blocks * update.block_size)
            return attention.write_kv(k_pages, v_pages, k, v, slots, **options)

        return write
    half = num_blocks // 2

    def copy(turn, k_pages, v_pages, order, k, v):
        del k, v
        src = (order + turn * update.number) % half
        dst = half + (half - 1 - src)
        return attention.copy_blocks(k_pages, v_pages, src, dst, **options)

    return copy


def _arrays(update: Update, implementation: str, num_blocks: int) -> list[jax.Array]:
    """Pools, the places of the first turn, and keys and values to write."""
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
    seq_indices = num_blocks * update.block_size
    if update.name == "copy_blocks":
        seq_indices = num_blocks // 2
    order = np.random.default_rng(0).permutation(seq_indices)[: update.number]
    return [k_pages, v_pages, jnp.asarray(order, jnp.int32), k, v]


def _blocks_needed(update: Update) -> int:
    if update.name == "copy_blocks":
        return 2 * update.number
    return cdiv(update.number, update.block_size)


def _check(update: Update, implementation: str) -> None:
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
            raise ValueError("wrong pages: not timed")


def measure(
    name: str, update: Update, pool_bytes: int, repeats: int, least_s: float
) -> dict[str, Any]:
    """Seconds of one call, as `lib_attention_contenders.measure`.

    Raises:
      ValueError: the implementation cannot serve it, or its pages are wrong.
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

    def loop(loops, pools, *rest):
        return repeat(loops, lambda turn, pools: call(turn, *pools, *rest), pools)

    loop = jax.jit(loop, donate_argnums=1)
    state = [tuple(pools)]

    def run(loops: int) -> None:
        state[0] = jax.block_until_ready(loop(loops, state[0], order, k, v))

    return {"error": 0.0} | median_seconds(run, repeats, least_s)
