"""The "triton" backend: attention and page updates for NVIDIA GPUs from Ampere on.

Pipeline: attention.backends -> [triton.backend] -> triton.attention, triton.pages.

Triton itself is imported when a kernel is launched.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pages.backend import (
    AttentionCall,
    Backend,
    CascadeOptions,
    unsupported_numbers,
)
from jpaged.pages.operands import AttentionOperands, NewTokens, Pools
from jpaged.pages.quantised import is_quantised
from jpaged.triton import attention, pages
from jpaged.triton.tiles import TritonTiles, query_rows


def attend(
    operands: AttentionOperands, *, return_lse: bool = True, dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Return attention as `triton.attention.attend`, always with the log-sum-exp."""
    del return_lse
    pools = operands.pools
    return attention.attend(
        operands.q,
        pools.k,
        pools.values,
        operands.block_tables,
        operands.context_lens,
        operands.query_start_loc,
        layer=operands.layer,
        scale=operands.scale,
        sliding_window=operands.sliding_window,
        logits_soft_cap=operands.logits_soft_cap,
        sinks=operands.sinks,
        k_scale=pools.k_scale,
        v_scale=pools.v_scale,
        dtype=dtype,
    )


def write(pools: Pools, new: NewTokens, slot_mapping: jax.Array, layer: Any) -> Pools:
    """Return the pools with the new tokens, as `triton.pages.write` writes them."""
    return Pools(*pages.write(_given(pools), _given(new), slot_mapping, layer))


def copy(pools: Pools, src: jax.Array, dst: jax.Array, layer: Any) -> Pools:
    """Return the pools with blocks copied, as `triton.pages.copy` copies them."""
    return Pools(*pages.copy(_given(pools), src, dst, layer))


def _given(arrays: Pools | NewTokens) -> tuple[jax.Array, ...]:
    return tuple(array for array in arrays if array is not None)


def unsupported(pages: jax.ShapeDtypeStruct, call: AttentionCall | None) -> str | None:
    """Say what the kernels do not support, or None.

    They need pages of floats, int8 or the bits of float8_e4m3fn, a head_dim of 16, 32,
    64, 128 or 256, and no mesh axis `tensor`.
    """
    head_dim = pages.shape[-1]
    floats = (jnp.bfloat16, jnp.float16, jnp.float32)
    if pages.dtype not in floats and not is_quantised(pages.dtype):
        return (
            "k_pages: expected bfloat16, float16, float32, int8 or the bits of "
            f"float8_e4m3fn, got {pages.dtype}"
        )
    if not 16 <= head_dim <= 256 or head_dim & (head_dim - 1):
        return f"k_pages: expected a head_dim of 16, 32, 64, 128 or 256, got {head_dim}"
    if "tensor" in jax.sharding.get_abstract_mesh().axis_names:
        return "mesh: expected none with an axis `tensor`"
    return unsupported_numbers(call)


TRITON = Backend(
    name="triton",
    attend=attend,
    write=write,
    copy=copy,
    unsupported=unsupported,
    cascade=CascadeOptions(
        branches=False, tile_rows=lambda dtype: query_rows(jnp.dtype(dtype).itemsize)
    ),
    unrolls_layers=True,
    platform="gpu",
    device="NVIDIA GPU",
    requires=("jax_triton",),
    tile_sizes=lambda: TritonTiles,
)
