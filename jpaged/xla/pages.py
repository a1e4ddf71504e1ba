"""Pages in plain XLA: gathered by tables, and updated in place if the caller donates.

Pipeline: xla.backend, xla.online_softmax -> [xla.pages].

Scales of quantised pages, [L, N, K, P'], are read, written and copied with the pages
[L, N, K, P, D]. P' is P, or larger, as TPUs store scales; entries after P are not read.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.compat import switch_in_place
from jpaged.pages.operands import Pools
from jpaged.pages.quantised import widen

_FEW_PAIRS = 4

Arrays = TypeVar("Arrays")  # a pytree of pools


class GatheredTokens(NamedTuple):
    """Keys and values of the blocks in a table's columns, with B = R * K."""

    k: jax.Array  # [B, C * P, D]
    v: jax.Array  # [B, C * P, D]
    k_scale: jax.Array | None  # f32[B, C * P], of quantised pages
    v_scale: jax.Array | None


def gather(pools: Pools, columns: jax.Array) -> GatheredTokens:
    """Return the blocks `columns` i32[R, C] of one layer; 8-bit numbers as float32.

    Keys that are the values too are gathered once.
    """
    block_size = pools.k.shape[2]

    def tokens(pages: jax.Array, scale: jax.Array | None) -> Any:
        if scale is not None:
            scale = _gather_blocks(scale[..., None], columns, block_size)[..., 0]
        return widen(_gather_blocks(pages, columns, block_size)), scale

    k, k_scale = tokens(pools.k, pools.k_scale)
    v, v_scale = (k, k_scale) if pools.v is None else tokens(pools.v, pools.v_scale)
    return GatheredTokens(k, v, k_scale, v_scale)


def _gather_blocks(pages: jax.Array, columns: jax.Array, block_size: int) -> jax.Array:
    """Return [R * K, C * P, D]: the blocks `columns` i32[R, C] of pages [N, K, P', D].

    Gathers (block, head) slabs, so that the result needs no transpose, as flat rows
    before an optimisation barrier: if XLA fuses the gather into the product, the CPU of
    jax 0.12 gathers more slowly.
    """
    num_blocks, num_kv_heads, width, head_dim = pages.shape
    num_rows, blocks = columns.shape
    head = jnp.arange(num_kv_heads, dtype=columns.dtype)
    slab = columns[:, None, :] * num_kv_heads + head[None, :, None]
    flat = pages.reshape(num_blocks * num_kv_heads, width * head_dim)
    tile = flat.at[slab.reshape(-1)].get(mode="promise_in_bounds")
    tile = lax.optimization_barrier(tile)
    tile = tile[:, : block_size * head_dim]
    return tile.reshape(num_rows * num_kv_heads, blocks * block_size, head_dim)


def write(
    pages: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    layer: jax.Array | int | None,
    block_size: int,
) -> jax.Array:
    """Return `pages` ([L,] N, K, P, D) with `values` [T, K, D] at `slots` i32[T].

    The same for scales ([L,] N, K, P') and [T, K]. Slots below 0 or past the pool are
    skipped.
    """
    num_blocks = pages.shape[0 if layer is None else 1]
    # -1 would wrap around to the last block; past the end, mode="drop" discards it.
    blocks = jnp.where(slots < 0, num_blocks, slots // block_size)
    offsets = slots % block_size
    if layer is None:
        return pages.at[blocks, :, offsets].set(values, mode="drop")
    return pages.at[layer, blocks, :, offsets].set(values, mode="drop")


def copy(
    pools: Arrays,
    src: jax.Array,
    dst: jax.Array,
    layer: jax.Array | int | None,
    *,
    is_stacked: bool,
) -> Arrays:
    """Return each pool with block `src[i]` copied to block `dst[i]`; -1 skips the pair.

    Blocks are the first axis, or with `is_stacked` the second, after the layers. All
    pairs are read before any is written. A step has a pair for every row and copies few
    blocks, so a small number of pairs has a program of its own.
    """
    (num_pairs,) = src.shape
    is_live = (src >= 0) & (dst >= 0)
    order = jnp.argsort(~is_live, stable=True)
    src, dst = src[order], dst[order]
    sizes = [size for size in (_FEW_PAIRS, num_pairs) if size <= num_pairs]

    def copy_first(size: int, pools: Arrays) -> Arrays:
        put = functools.partial(
            _copy_pairs,
            src=src[:size],
            dst=dst[:size],
            layer=layer,
            is_stacked=is_stacked,
        )
        return jax.tree.map(put, pools)

    branches = [functools.partial(copy_first, size) for size in sorted(set(sizes))]
    number = jnp.sum(is_live, dtype=jnp.int32)
    index = jnp.where(number <= _FEW_PAIRS, 0, len(branches) - 1)
    return switch_in_place(jnp.where(number == 0, -1, index), branches, pools)


def _copy_pairs(
    pages: jax.Array,
    *,
    src: jax.Array,
    dst: jax.Array,
    layer: jax.Array | int | None,
    is_stacked: bool,
) -> jax.Array:
    num_blocks = pages.shape[1 if is_stacked else 0]
    target = jnp.where((src < 0) | (dst < 0), num_blocks, dst)
    source = jnp.clip(src, 0, num_blocks - 1)
    if not is_stacked:
        return pages.at[target].set(pages[source], mode="drop")
    if layer is None:
        return pages.at[:, target].set(pages[:, source], mode="drop")
    return pages.at[layer, target].set(pages[layer, source], mode="drop")
