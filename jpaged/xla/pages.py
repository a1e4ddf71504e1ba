"""Page updates in plain XLA: in place where the caller donates the pages.

Place on the road: attention -> [xla.pages].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jpaged.compat import switch_in_place

_FEW_PAIRS = 4


def write(
    pages: jax.Array, values: jax.Array, slots: jax.Array, layer: jax.Array | int | None
) -> jax.Array:
    """`pages` ([L,] N, K, P, D) with `values` [T, K, D] at `slots` i32[T].

    Slots below 0 or past the pool are skipped.
    """
    *_, num_blocks, _, block_size, _ = pages.shape
    # -1 would wrap around to the last block; past the end, mode="drop" discards it.
    blocks = jnp.where(slots < 0, num_blocks, slots // block_size)
    offsets = slots % block_size
    if layer is None:
        return pages.at[blocks, :, offsets].set(values, mode="drop")
    return pages.at[layer, blocks, :, offsets].set(values, mode="drop")


def copy(
    pages: jax.Array, src: jax.Array, dst: jax.Array, layer: jax.Array | int | None
) -> jax.Array:
    """`pages` with block `dst[i]` holding what `src[i]` held; -1 skips the pair.

    All pairs are read before any is written. A step copies few blocks and has a pair
    for every row, so few pairs have a program of their own.
    """
    (num_pairs,) = src.shape
    is_live = (src >= 0) & (dst >= 0)
    order = jnp.argsort(~is_live, stable=True)
    src, dst = src[order], dst[order]
    sizes = [size for size in (_FEW_PAIRS, num_pairs) if size <= num_pairs]
    branches = [
        functools.partial(_copy_pairs, src=src[:size], dst=dst[:size], layer=layer)
        for size in sorted(set(sizes))
    ]
    number = jnp.sum(is_live, dtype=jnp.int32)
    index = jnp.where(number <= _FEW_PAIRS, 0, len(branches) - 1)
    return switch_in_place(jnp.where(number == 0, -1, index), branches, pages)


def _copy_pairs(pages, src, dst, layer) -> jax.Array:
    stacked = pages.ndim == 5
    num_blocks = pages.shape[1 if stacked else 0]
    target = jnp.where((src < 0) | (dst < 0), num_blocks, dst)
    source = jnp.clip(src, 0, num_blocks - 1)
    if not stacked:
        return pages.at[target].set(pages[source], mode="drop")
    if layer is None:
        return pages.at[:, target].set(pages[:, source], mode="drop")
    return pages.at[layer, target].set(pages[layer, source], mode="drop")
