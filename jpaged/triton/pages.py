"""Page updates on NVIDIA GPUs, in place where the caller donates the pages.

Place on the road: attention -> [triton.pages] -> triton.launch.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jpaged.triton.launch import launch

_COPY_SIZE = 4096  # elements that one program copies of the keys, and of the values

Layer = jax.Array | int | None
Pages = tuple[jax.Array, jax.Array]


def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    layer: Layer,
) -> Pages:
    """The pages ([L,] N, K, P, D) with `k`, `v` [T, K, D] at `slots` i32[T].

    Slots below 0 or past the pool are skipped.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    arrays = (k, v, slots.astype(jnp.int32), _settings(k_pages, layer))
    k_pages, v_pages = launch(
        "write",
        (num_tokens,),
        (*arrays, k_pages, v_pages),
        _like(k_pages, v_pages),
        aliases={4: 0, 5: 1},
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=k_pages.shape[-2],
        SIZE=1 << (num_kv_heads * head_dim - 1).bit_length(),
    )
    return k_pages, v_pages


def copy(
    k_pages: jax.Array, v_pages: jax.Array, src: jax.Array, dst: jax.Array, layer: Layer
) -> Pages:
    """The pages with block `dst[i]` as `src[i]` was, of one layer or of all.

    Pairs with a block outside the pool are skipped; no block is in both.
    """
    is_all = layer is None and k_pages.ndim == 5
    block_size = math.prod(k_pages.shape[-3:])
    pieces = -(-block_size // _COPY_SIZE)
    arrays = (src.astype(jnp.int32), dst.astype(jnp.int32), _settings(k_pages, layer))
    k_pages, v_pages = launch(
        "copy",
        (src.shape[0], k_pages.shape[0] if is_all else 1, pieces),
        (*arrays, k_pages, v_pages),
        _like(k_pages, v_pages),
        aliases={3: 0, 4: 1},
        BLOCK_SIZE=block_size,
        SIZE=_COPY_SIZE,
    )
    return k_pages, v_pages


def _settings(k_pages: jax.Array, layer: Layer) -> jax.Array:
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    return jnp.stack([layer, jnp.int32(k_pages.shape[-4])])


def _like(*pages: jax.Array) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in pages]
