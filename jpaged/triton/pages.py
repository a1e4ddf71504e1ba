"""Page updates on NVIDIA GPUs, in place where the caller donates the pages.

Place on the road: attention -> [triton.pages] -> triton.launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.pages import operands
from jpaged.pages.quantised import float8_bits
from jpaged.triton.launch import launch

_COPY_SIZE = 4096  # elements that one program copies of the keys, and of the values

Layer = jax.Array | int | None
# Keys and values; of quantised pages their numbers and their scales.
Pools = Sequence[jax.Array]


def write(
    pools: Pools, values: Sequence[jax.Array], slots: jax.Array, layer: Layer
) -> tuple[jax.Array, ...]:
    """The pools with a vector or scale of each token and head at `slots` i32[T].

    Slots below 0 or past the pool are skipped.

    Args:
      pools: keys and values ([L,] N, K, P, D), and of quantised pages their scales
        ([L,] N, K, P or more).
      values: as many, [T, K, D] and [T, K].
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
    pools: Pools, src: jax.Array, dst: jax.Array, layer: Layer
) -> tuple[jax.Array, ...]:
    """The pools with block `dst[i]` as `src[i]` was, of one layer or of all.

    Pairs with a block outside the pool are skipped; no block is in both. `pools` as in
    `write`.
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


def _update(name, grid, arrays, pools: Pools, **static) -> tuple[jax.Array, ...]:
    """The pools, in their own memory, after the kernel for so many of them."""
    arrays, own = (*map(float8_bits, arrays),), (*map(float8_bits, pools),)
    found = launch(
        name if len(pools) == 2 else f"{name}_quantised",
        grid,
        (*arrays, *own),
        [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in own],
        aliases={len(arrays) + i: i for i in range(len(own))},
        **static,
    )
    return tuple(
        lax.bitcast_convert_type(new, pool.dtype)
        for new, pool in zip(found, pools, strict=True)
    )


def _settings(pools: Pools, layer: Layer) -> jax.Array:
    return jnp.stack([operands.layer_index(layer), jnp.int32(pools[0].shape[-4])])
