"""KV cache: the pages of all layers.

Place on the road: block manager (which block) -> [kv_cache] (what is in it).

One array of all layers for the keys and one for the values, and the layer's index goes
into whatever reads or writes them: a slice of the pool would be a copy of it.

Source: Kwon et al. 2023, section 4.1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention import api as attention
from jpaged.compat import DEVICE_MEMORY, HOST_MEMORY, zeros
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.pages.backends import choose, page_shape, scale_width, stored_dtype
from jpaged.pages.quantised import is_quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every block, layer by layer.

    The blocks are the second axis of every leaf, so what moves blocks maps over leaves.
    """

    k_pages: jax.Array  # [L, N, K, P, D], the last two those of `page_shape`
    v_pages: jax.Array  # [L, N, K, P, D]
    k_scale: jax.Array | None = None  # f32[L, N, K, P'], of quantised pages
    v_scale: jax.Array | None = None  # f32[L, N, K, P'], P' of `scale_width`


def init_cache(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str,
    memory: Any = DEVICE_MEMORY,
    implementation: str | None = None,
) -> KVCache:
    """A cache of zeros; `memory` is `compat.DEVICE_MEMORY` or `compat.HOST_MEMORY`.

    Heads and scales are stored as the `implementation` of attention wants them. `dtype`
    is a float's name, "int8" or "fp8".

    Raises:
      ValueError: the implementation does not serve quantised pages of these sizes.
    """
    dtype = stored_dtype(dtype, implementation)
    page = page_shape(block_size, head_dim, dtype, implementation)
    shape = (num_layers, num_blocks, num_kv_heads, *page)
    if not is_quantised(dtype):
        return KVCache(zeros(shape, dtype, memory), zeros(shape, dtype, memory))
    # Of one head: how many a device has, a mesh decides.
    choose(implementation, jax.ShapeDtypeStruct((1, 1, 1, *shape[3:]), dtype))
    scales = (*shape[:3], scale_width(block_size, implementation))
    kinds = ((shape, dtype), (shape, dtype), (scales, "float32"), (scales, "float32"))
    arrays = [zeros(*kind, memory) for kind in kinds]
    return KVCache(*arrays)


def bytes_per_block(
    *,
    num_layers: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str,
    implementation: str | None = None,
) -> int:
    """Bytes that one block takes: keys and values, all layers (paper section 3).

    With the scales where `dtype` is "int8" or "fp8".
    """
    dtype = stored_dtype(dtype, implementation)
    page = page_shape(block_size, head_dim, dtype, implementation)
    head = math.prod(page) * jnp.dtype(dtype).itemsize
    if is_quantised(dtype):
        head += scale_width(block_size, implementation) * jnp.dtype("float32").itemsize
    return 2 * num_layers * num_kv_heads * head


def write(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    layer: jax.Array | int,
    implementation: str | None = None,
) -> KVCache:
    """The cache with `k`, `v` [T, K, D] of a layer at `slot_mapping` i32[T].

    In place where the cache is donated.
    """
    pages = attention.write_kv(
        cache.k_pages,
        cache.v_pages,
        k,
        v,
        slot_mapping,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        layer=layer,
        implementation=implementation,
    )
    return KVCache(*pages)


def copy_blocks(
    cache: KVCache,
    src: jax.Array,
    dst: jax.Array,
    implementation: str | None = None,
) -> KVCache:
    """The cache with block `dst[i]` holding what `src[i]` held, in every layer.

    `src`, `dst`: i32[C], NO_BLOCK skips the pair. In place where the cache is donated.
    """
    pages = attention.copy_blocks(
        cache.k_pages,
        cache.v_pages,
        src,
        dst,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        implementation=implementation,
    )
    return KVCache(*pages)


def swap_out(
    cache: KVCache, host_cache: KVCache, src: jax.Array, dst: jax.Array
) -> KVCache:
    """The host's cache with block `dst[i]` holding what `src[i]` of `cache` holds.

    Args:
      cache: the device's.
      host_cache: in the host's memory; donate it, and it is written in place.
      src, dst: i32[C], pairs first and then NO_BLOCK; the time goes by the pairs.

    Source: paper section 4.5.
    """
    return _move_blocks(cache, host_cache, src, dst, HOST_MEMORY)


def swap_in(
    cache: KVCache, host_cache: KVCache, src: jax.Array, dst: jax.Array
) -> KVCache:
    """The cache with its block `dst[i]` holding what `src[i]` of the host's holds.

    In place where `cache` is donated; otherwise as `swap_out`.
    """
    return _move_blocks(host_cache, cache, src, dst, DEVICE_MEMORY)


def _move_blocks(source, target, src, dst, memory) -> KVCache:
    """`target`, which lies in `memory`, with blocks of `source`, one after the other.

    Slices, for those go to and from the host's memory by themselves; a gather or a
    scatter there copies a whole pool (docs/decisions/swapping.md).
    """

    def move(i: jax.Array, target: KVCache) -> KVCache:
        def put(pages: jax.Array, to_pages: jax.Array) -> jax.Array:
            block = lax.dynamic_slice_in_dim(pages, src[i], 1, axis=1)
            block = jax.device_put(block, memory)
            return lax.dynamic_update_slice_in_dim(to_pages, block, dst[i], axis=1)

        return jax.tree.map(put, source, target)

    number = jnp.sum((src != NO_BLOCK) & (dst != NO_BLOCK), dtype=jnp.int32)
    return lax.fori_loop(0, number, move, target)
