"""Page updates in plain XLA: in place where the caller donates the pages.

Place on the road: attention -> [xla.pages].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
    """`pages` with block `dst[i]` holding what `src[i]` held; -1 skips the pair."""
    stacked = pages.ndim == 5
    num_blocks = pages.shape[1 if stacked else 0]
    target = jnp.where((src < 0) | (dst < 0), num_blocks, dst)
    source = jnp.clip(src, 0, num_blocks - 1)
    if not stacked:
        return pages.at[target].set(pages[source], mode="drop")
    if layer is None:
        return pages.at[:, target].set(pages[:, source], mode="drop")
    return pages.at[layer, target].set(pages[layer, source], mode="drop")
