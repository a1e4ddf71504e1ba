"""KV cache: the pages of all layers.

Place on the road: block manager (which block) -> [kv_cache] (what is in it).

A pair of arrays per layer, and not one array of all layers: a decoder with unrolled
layers then updates each in place, and nothing ever slices the pool (a slice is a copy).

Source: Kwon et al. 2023, section 4.1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every block, layer by layer."""

    k_pages: tuple[jax.Array, ...]  # L arrays [N, K, P, D]
    v_pages: tuple[jax.Array, ...]  # L arrays [N, K, P, D]


def init_cache(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str,
) -> KVCache:
    """A cache of zeros."""
    shape = (num_blocks, num_kv_heads, block_size, head_dim)

    def pages() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))

    return KVCache(pages(), pages())


def bytes_per_block(
    *, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: str
) -> int:
    """Bytes that one block takes: keys and values, all layers (paper section 3)."""
    itemsize = jnp.dtype(dtype).itemsize
    return 2 * num_layers * num_kv_heads * block_size * head_dim * itemsize


def copy_blocks(cache: KVCache, src: jax.Array, dst: jax.Array) -> KVCache:
    """The cache with block `dst[i]` holding what `src[i]` held, in every layer.

    `src`, `dst`: i32[C], NO_BLOCK skips the pair. In place where the cache is donated.
    """
    pairs = [
        attention.copy_blocks(k, v, src, dst)
        for k, v in zip(cache.k_pages, cache.v_pages, strict=True)
    ]
    k_pages, v_pages = zip(*pairs, strict=True)
    return KVCache(k_pages, v_pages)
