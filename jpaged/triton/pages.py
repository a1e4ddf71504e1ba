"""Page updates on NVIDIA GPUs, in place if the caller donates the pages.

Pipeline: attention -> [triton.pages] -> triton.launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.pages import operands
from jpaged.pages.quantised import float8_bits
from jpaged.triton.launch import launch

_COPY_SIZE = 4096  # elements of the keys, and of the values, that a program copies

Layer = jax.Array | int | None
# Pages of keys and of values; of quantised pages also the scales of both.
Pages = Sequence[jax.Array]


def write(
    pools: Pages, values: Sequence[jax.Array], slots: jax.Array, layer: Layer
) -> tuple[jax.Array, ...]:
    """Return the pools with each token's vectors and scales written at its slot.

    Args:
      pools: Keys and values ([L,] N, K, P, D), and for quantised pages their scales
        ([L,] N, K, at least P).
      values: One array per pool, [T, K, D] or [T, K].
      slots: i32[T]; slots below 0 or past the pool are skipped.
      layer: Index into stacked pools.
    """
    num_tokens, num_kv_heads, head_dim = values[0].shape
    arrays = (*values, slots.astype(jnp.int32), _settings(pools, layer))
    return _update(
        "write",
        (num_tokens,),
        arrays,
        pools,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=pools[0].shape[-2],
        STRIDE=pools[-1].shape[-1] if len(pools) > 2 else pools[0].shape[-2],
        SIZE=1 << (num_kv_heads * head_dim - 1).bit_length(),
    )


def copy(
    pools: Pages, src: jax.Array, dst: jax.Array, layer: Layer
) -> tuple[jax.Array, ...]:
    """Return the pools with block `src[i]` copied to block `dst[i]`.

    Args:
      pools: As in `write`.
      src: i32[C]. Pairs with a block outside the pool are skipped; no block is in both
        `src` and `dst`.
      dst: i32[C].
      layer: Index into stacked pools; None copies the blocks of all layers.
    """
    pages = pools[0]
    is_all = layer is None and pages.ndim == 5
    sizes = dict(BLOCK_SIZE=math.prod(pages.shape[-3:]), SIZE=_COPY_SIZE)
    if len(pools) > 2:
        sizes["SCALES"] = math.prod(pools[-1].shape[-2:])
    pieces = cdiv(max(sizes.values()), _COPY_SIZE)
    arrays = (src.astype(jnp.int32), dst.astype(jnp.int32), _settings(pools, layer))
    grid = (src.shape[0], pages.shape[0] if is_all else 1, pieces)
    return _update("copy", grid, arrays, pools, **sizes)


def _update(
    name: str,
    grid: tuple[int, ...],
    arrays: Sequence[jax.Array],
    pools: Pages,
    **static: Any,
) -> tuple[jax.Array, ...]:
    """Return the pools, in their own memory, after an update by a kernel."""
    arrays, own = (*map(float8_bits, arrays),), (*map(float8_bits, pools),)
    updated = launch(
        f"{name}_kernel" if len(pools) == 2 else f"{name}_quantised_kernel",
        grid,
        (*arrays, *own),
        [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in own],
        aliases={len(arrays) + i: i for i in range(len(own))},
        **static,
    )
    return tuple(
        lax.bitcast_convert_type(new, pool.dtype)
        for new, pool in zip(updated, pools, strict=True)
    )


def _settings(pools: Pages, layer: Layer) -> jax.Array:
    """Return the layer and the number of blocks, i32[2]."""
    return jnp.stack([operands.layer_index(layer), jnp.int32(pools[0].shape[-4])])
