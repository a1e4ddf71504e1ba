"""The "mosaic_gpu" backend: attention as a Pallas kernel for Hopper GPUs.

Pipeline: attention.backends -> [pallas.gpu.backend] -> pallas.gpu.calls.

Page updates are those of the "xla" backend.
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
from jpaged.pages.operands import AttentionOperands
from jpaged.pages.quantised import is_quantised
from jpaged.xla.backend import XLA


def attend(
    operands: AttentionOperands, *, return_lse: bool = True, dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Return attention as `calls.attend`; it always has the log-sum-exp."""
    # Imported here: it takes most of a second, and most processes have no such GPU.
    from jpaged.pallas.gpu import calls

    del return_lse
    return calls.attend(
        operands.q,
        operands.pools.k,
        operands.pools.values,
        operands.block_tables,
        operands.context_lens,
        operands.query_start_loc,
        layer=operands.layer,
        scale=operands.scale,
        sliding_window=operands.sliding_window,
        logits_soft_cap=operands.logits_soft_cap,
        sinks=operands.sinks,
        dtype=dtype,
    )


def unsupported(pages: jax.ShapeDtypeStruct, call: AttentionCall | None) -> str | None:
    """Say what the kernel does not support, or None.

    It needs pages of bfloat16 or float16, a block_size of 16, 32 or a multiple of 64, a
    head_dim of 64, 128 or 256, and at most 64 query heads per key/value head. Page
    updates, which are XLA's, support all floats.
    """
    if call is None and not is_quantised(pages.dtype):
        return None
    *_, num_kv_heads, block_size, head_dim = pages.shape
    if pages.dtype not in (jnp.bfloat16, jnp.float16):
        return f"k_pages: expected bfloat16 or float16, got {pages.dtype}"
    if call is None:
        return None
    if head_dim not in (64, 128, 256):
        return f"k_pages: expected a head_dim of 64, 128 or 256, got {head_dim}"
    if block_size not in (16, 32) and block_size % 64:
        return (
            "k_pages: expected a block_size of 16, 32 or a multiple of 64, got "
            f"{block_size}"
        )
    group = call.q.shape[1] // num_kv_heads
    if group > 64:
        return f"q: expected at most 64 heads to a key/value head, got {group}"
    return unsupported_numbers(call)


def _tile_sizes() -> type:
    from jpaged.pallas.gpu.plan import GpuTiles

    return GpuTiles


MOSAIC_GPU = Backend(
    name="mosaic_gpu",
    attend=attend,
    write=XLA.write,
    copy=XLA.copy,
    unsupported=unsupported,
    cascade=CascadeOptions(branches=False),
    unrolls_layers=True,
    platform="gpu",
    device="Hopper GPU",
    tile_sizes=_tile_sizes,
)
