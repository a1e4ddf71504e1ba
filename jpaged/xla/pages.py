"""Pages in plain XLA: read by tables, and updated in place where the caller donates.

Place on the road: attention -> [xla.pages].

Scales of quantised pages, [L, N, K, P'], go wherever the pages [L, N, K, P, D] go. P'
is P, or more, as TPUs want it; nobody reads what is behind P.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.compat import switch_in_place
from jpaged.pages.quantised import decode

_FEW_PAIRS = 4


class Pools(NamedTuple):
    """Keys and values of one layer, or of all as one pool."""

    k: jax.Array  # [N, K, P, D]
    v: jax.Array  # [N, K, P, D]
    k_scale: jax.Array | None = None  # f32[N, K, P'], of quantised pages
    v_scale: jax.Array | None = None


class Tokens(NamedTuple):
    """What a table's columns hold, by row and KV head: B = R * K."""

    k: jax.Array  # [B, C * P, D]
    v: jax.Array  # [B, C * P, D]
    k_scale: jax.Array | None  # f32[B, C * P]
    v_scale: jax.Array | None


def gather(pools: Pools, columns: jax.Array) -> Tokens:
    """The blocks `columns` i32[R, C]; numbers of 8 bits come in float32."""
    block_size = pools.k.shape[2]
    scales = [
        None
        if scale is None
        else _gather(scale[..., None], columns, block_size)[..., 0]
        for scale in (pools.k_scale, pools.v_scale)
    ]
    k, v = (decode(_gather(pages, columns, block_size)) for pages in (pools.k, pools.v))
    return Tokens(k, v, *scales)


def _gather(pages: jax.Array, columns: jax.Array, block_size: int) -> jax.Array:
    """[R * K, C * P, D]: the blocks `columns` i32[R, C] of `pages` [N, K, P', D].

    Gathers (block, head) slabs, so that the result needs no transpose, as flat rows
    behind a barrier: fused into the product, the CPU of jax 0.12 gathers it slower.
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
    """`pages` ([L,] N, K, P, D) with `values` [T, K, D] at `slots` i32[T].

    Or scales ([L,] N, K, P') and [T, K]. Slots below 0 or past the pool are skipped.
    """
    num_blocks = pages.shape[0 if layer is None else 1]
    # -1 would wrap around to the last block; past the end, mode="drop" discards it.
    blocks = jnp.where(slots < 0, num_blocks, slots // block_size)
    offsets = slots % block_size
    if layer is None:
        return pages.at[blocks, :, offsets].set(values, mode="drop")
    return pages.at[layer, blocks, :, offsets].set(values, mode="drop")


def copy(
    pools: tuple[jax.Array, ...],
    src: jax.Array,
    dst: jax.Array,
    layer: jax.Array | int | None,
    *,
    is_stacked: bool,
) -> tuple[jax.Array, ...]:
    """Each pool with block `dst[i]` holding what `src[i]` held; -1 skips the pair.

    Blocks are the first axis, or where `is_stacked` the second, behind the layers. All
    pairs are read before any is written. A step copies few blocks and has a pair for
    every row, so few pairs have a program of their own.
    """
    (num_pairs,) = src.shape
    is_live = (src >= 0) & (dst >= 0)
    order = jnp.argsort(~is_live, stable=True)
    src, dst = src[order], dst[order]
    sizes = [size for size in (_FEW_PAIRS, num_pairs) if size <= num_pairs]

    def pairs(size, pools):
        put = functools.partial(
            _copy_pairs,
            src=src[:size],
            dst=dst[:size],
            layer=layer,
            is_stacked=is_stacked,
        )
        return tuple(map(put, pools))

    branches = [functools.partial(pairs, size) for size in sorted(set(sizes))]
    number = jnp.sum(is_live, dtype=jnp.int32)
    index = jnp.where(number <= _FEW_PAIRS, 0, len(branches) - 1)
    return switch_in_place(jnp.where(number == 0, -1, index), branches, pools)


def _copy_pairs(pages, *, src, dst, layer, is_stacked) -> jax.Array:
    num_blocks = pages.shape[1 if is_stacked else 0]
    target = jnp.where((src < 0) | (dst < 0), num_blocks, dst)
    source = jnp.clip(src, 0, num_blocks - 1)
    if not is_stacked:
        return pages.at[target].set(pages[source], mode="drop")
    if layer is None:
        return pages.at[:, target].set(pages[:, source], mode="drop")
    return pages.at[layer, target].set(pages[layer, source], mode="drop")
