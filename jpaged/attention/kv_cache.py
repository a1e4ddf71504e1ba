"""KV cache: the pages of all layers.

Pipeline: block manager (which block) -> [kv_cache] (what a block contains).

Keys of all layers are one array, and so are values. Reads and writes get the index of
the layer: a slice of the pool would be a copy of it.

Source: Kwon et al. 2023, section 4.1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention import api
from jpaged.attention.backends import choose_backend, layout
from jpaged.compat import DEVICE_MEMORY, HOST_MEMORY, zeros
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.pages.quantised import is_quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every block in all layers.

    Blocks are the second axis of every leaf, so an operation on blocks can map over the
    leaves. Latent pages have no values: they are the first numbers of the keys.
    """

    k_pages: jax.Array  # [L, N, K, P, D]; the last two axes as in `page_shape`
    v_pages: jax.Array | None  # [L, N, K, P, D]; None: latent pages
    k_scale: jax.Array | None = None  # f32[L, N, K, P'], of quantised pages
    v_scale: jax.Array | None = None  # f32[L, N, K, P'], P' as in `scale_width`


def init_kv_cache(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str,
    memory: Any = DEVICE_MEMORY,
    implementation: str | None = None,
    is_latent: bool = False,
) -> KVCache:
    """Return a cache of zeros, in the page layout of the attention backend.

    Args:
      num_layers, num_blocks, num_kv_heads, block_size, head_dim: sizes of the pool.
      dtype: name of a floating dtype, "int8" or "fp8".
      memory: `compat.DEVICE_MEMORY` or `compat.HOST_MEMORY`.
      implementation: name of the backend; None: the preferred one.
      is_latent: the keys are the values too, so there are no pages of values.

    Raises:
      ValueError: the backend does not support quantised pages of these sizes.
    """
    stored = layout(implementation)
    dtype = stored.stored_dtype(dtype)
    page = stored.page_shape(block_size, head_dim, dtype)
    shape = (num_layers, num_blocks, num_kv_heads, *page)

    def pool(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array | None]:
        keys = zeros(shape, dtype, memory)
        return keys, None if is_latent else zeros(shape, dtype, memory)

    if not is_quantised(dtype):
        return KVCache(*pool(shape, dtype))
    # With one head: a mesh decides how many heads a device has.
    one = jax.ShapeDtypeStruct((1, 1, 1, *page), dtype)
    choose_backend(implementation, one, is_latent=is_latent)
    scales = (*shape[:3], stored.scale_width(block_size))
    return KVCache(*pool(shape, dtype), *pool(scales, "float32"))


def bytes_per_block(
    *,
    num_layers: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str,
    implementation: str | None = None,
    is_latent: bool = False,
) -> int:
    """Return the bytes of one block: keys and values of all layers (paper section 3).

    Includes the scales if `dtype` is "int8" or "fp8". Arguments as of `init_kv_cache`.
    """
    stored = layout(implementation)
    dtype = stored.stored_dtype(dtype)
    page = stored.page_shape(block_size, head_dim, dtype)
    head = math.prod(page) * jnp.dtype(dtype).itemsize
    if is_quantised(dtype):
        head += stored.scale_width(block_size) * jnp.dtype("float32").itemsize
    return (1 if is_latent else 2) * num_layers * num_kv_heads * head


def write_tokens(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array | None,
    slot_mapping: jax.Array,
    layer: jax.Array | int,
    implementation: Any = None,
) -> KVCache:
    """Write `k` and `v` [T, K, D] of a layer to the slots `slot_mapping` i32[T].

    `v` is None for latent pages. Updates in place if the caller donates the cache.
    """
    pages = api.write_kv(
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
    return _like(cache, pages)


def _like(cache: KVCache, arrays: tuple[jax.Array, ...]) -> KVCache:
    """Return a cache with the arrays, in place of those that `cache` has."""
    return jax.tree.unflatten(jax.tree.structure(cache), arrays)


def copy_blocks(
    cache: KVCache,
    src: jax.Array,
    dst: jax.Array,
    implementation: Any = None,
) -> KVCache:
    """Overwrite block `dst[i]` with the contents of block `src[i]`, in every layer.

    `src`, `dst`: i32[C]; NO_BLOCK skips the pair. Updates in place if the caller
    donates the cache.
    """
    pages = api.copy_blocks(
        cache.k_pages,
        cache.v_pages,
        src,
        dst,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        implementation=implementation,
    )
    return _like(cache, pages)


def swap_out_pages(
    cache: KVCache, host_cache: KVCache, src: jax.Array, dst: jax.Array
) -> KVCache:
    """Copy block `src[i]` of the device's cache to block `dst[i]` of the host's cache.

    Args:
      cache: the device's cache.
      host_cache: in the host's memory; it is updated in place if donated.
      src, dst: i32[C], pairs first and then NO_BLOCK; the time is proportional to the
        number of pairs.

    Returns:
      The host's cache.

    Source: paper section 4.5.
    """
    return _move_blocks(cache, host_cache, src, dst, HOST_MEMORY)


def swap_in_pages(
    cache: KVCache, host_cache: KVCache, src: jax.Array, dst: jax.Array
) -> KVCache:
    """Copy block `src[i]` of the host's cache to block `dst[i]` of the device's cache.

    Args: as of `swap_out_pages`; `cache` is updated in place if donated.

    Returns:
      The device's cache.
    """
    return _move_blocks(host_cache, cache, src, dst, DEVICE_MEMORY)


def _move_blocks(
    source: KVCache, target: KVCache, src: jax.Array, dst: jax.Array, memory: Any
) -> KVCache:
    """Copy blocks of `source` into `target`, which lies in `memory`, one at a time.

    Slices move to and from the host's memory by themselves. A gather or a scatter there
    copies a whole pool (docs/decisions/swapping.md).
    """

    def move(i: jax.Array, target: KVCache) -> KVCache:
        def put(pages: jax.Array, to_pages: jax.Array) -> jax.Array:
            block = lax.dynamic_slice_in_dim(pages, src[i], 1, axis=1)
            block = jax.device_put(block, memory)
            return lax.dynamic_update_slice_in_dim(to_pages, block, dst[i], axis=1)

        return jax.tree.map(put, source, target)

    number = jnp.sum((src != NO_BLOCK) & (dst != NO_BLOCK), dtype=jnp.int32)
    return lax.fori_loop(0, number, move, target)
