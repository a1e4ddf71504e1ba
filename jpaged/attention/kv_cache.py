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
from jpaged.pages.operands import Pools
from jpaged.pages.packed import plain
from jpaged.pages.quantised import is_quantised
from jpaged.xla.block_statistics import block_keys


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
    # Extremes of each full block's keys, for retention; f32[L, N, K, D] each.
    k_min: jax.Array | None = None
    k_max: jax.Array | None = None


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
    has_key_extremes: bool = False,
) -> int:
    """Return the bytes of one block: keys and values of all layers (paper section 3).

    Includes the scales if `dtype` is "int8" or "fp8", and with `has_key_extremes` what
    `with_key_extremes` adds. Other arguments as of `init_kv_cache`.
    """
    stored = layout(implementation)
    dtype = stored.stored_dtype(dtype)
    page = stored.page_shape(block_size, head_dim, dtype)
    head = math.prod(page) * jnp.dtype(dtype).itemsize
    if is_quantised(dtype):
        head += stored.scale_width(block_size) * jnp.dtype("float32").itemsize
    pools = 1 if is_latent else 2
    extremes = 2 * head_dim * jnp.dtype("float32").itemsize if has_key_extremes else 0
    return num_layers * num_kv_heads * (pools * head + extremes)


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
    return _with_extremes(_like(cache, pages), cache, k, slot_mapping, layer)


def _like(cache: KVCache, arrays: tuple[jax.Array, ...]) -> KVCache:
    """Return a cache with the arrays, in place of those that `cache` has.

    It has no key extremes.
    """
    cache = dataclasses.replace(cache, k_min=None, k_max=None)
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
    copied = _like(cache, pages)
    if cache.k_min is None:
        return copied
    target = jnp.where((src < 0) | (dst < 0), cache.k_min.shape[1], dst)

    def copy(extremes: jax.Array | None) -> jax.Array:
        assert extremes is not None
        return extremes.at[:, target].set(extremes[:, src], mode="drop")

    return dataclasses.replace(copied, k_min=copy(cache.k_min), k_max=copy(cache.k_max))


def with_key_extremes(cache: KVCache, head_dim: int) -> KVCache:
    """Return the cache with space for the extremes of each block's keys."""
    num_layers, num_blocks, num_kv_heads = cache.k_pages.shape[:3]
    shape = (num_layers, num_blocks, num_kv_heads, head_dim)
    return dataclasses.replace(
        cache, k_min=jnp.zeros(shape, jnp.float32), k_max=jnp.zeros(shape, jnp.float32)
    )


def _with_extremes(
    cache: KVCache,
    before: KVCache,
    k: jax.Array,
    slot_mapping: jax.Array,
    layer: jax.Array | int,
) -> KVCache:
    """Return the cache with the extremes of the blocks that new tokens have filled."""
    if before.k_min is None or before.k_max is None:
        return cache
    head_dim, num_blocks = k.shape[-1], cache.k_pages.shape[1]
    pages = plain(cache.k_pages, head_dim)
    block_size = pages.shape[-2]
    fills = (slot_mapping >= 0) & (slot_mapping % block_size == block_size - 1)
    blocks = jnp.where(fills, slot_mapping // block_size, num_blocks)
    keys = block_keys(Pools(pages, pages, cache.k_scale), blocks, layer)
    keys = keys[..., :head_dim].astype(jnp.float32)
    return dataclasses.replace(
        cache,
        k_min=before.k_min.at[layer, blocks].set(keys.min(axis=2), mode="drop"),
        k_max=before.k_max.at[layer, blocks].set(keys.max(axis=2), mode="drop"),
    )


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
