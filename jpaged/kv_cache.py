"""KV cache: the pages of all layers.

Place on the road: block manager (which block) -> [kv_cache] (what is in it).

One array of all layers for the keys and one for the values, and the layer's index goes
into whatever reads or writes them: a slice of the pool would be a copy of it.

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

    k_pages: jax.Array  # [L, N, K, P, D]
    v_pages: jax.Array  # [L, N, K, P, D]


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
    shape = (num_layers, num_blocks, num_kv_heads, block_size, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


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
    return KVCache(*attention.copy_blocks(cache.k_pages, cache.v_pages, src, dst))
