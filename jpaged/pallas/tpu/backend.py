"""The "mosaic_tpu" backend: attention and page updates as Pallas kernels for TPUs.

Pipeline: attention.backends -> [pallas.tpu.backend] -> pallas.tpu.calls.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pages import packed
from jpaged.pages.backend import (
    AttentionCall,
    Backend,
    CascadeOptions,
    unsupported_numbers,
)
from jpaged.pages.layout import LANE_ROWS
from jpaged.pages.operands import AttentionOperands, NewTokens, Pools
from jpaged.pages.packed import LANES
from jpaged.pages.quantised import is_quantised

# Block tables are kept in a TPU core's scalar memory of 1 MiB; the rest is for others.
_TABLE_BYTES = 896 * 1024
_ROWS = 16  # rows of a memory tile of bfloat16


def _calls() -> Any:
    # Imported here: it takes a while, and most processes have no TPU.
    from jpaged.pallas.tpu import calls

    return calls


def _tile_sizes() -> type:
    from jpaged.pallas.tpu.plan import TpuTiles

    return TpuTiles


def attend(
    operands: AttentionOperands, *, return_lse: bool = True, dtype: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """Return attention as `calls.attend`."""
    calls = _calls()
    pools = operands.pools
    return calls.attend(
        operands.q,
        pools.k,
        pools.v,
        operands.block_tables,
        operands.context_lens,
        operands.query_start_loc,
        k_scale=pools.k_scale,
        v_scale=pools.v_scale,
        layer=operands.layer,
        sliding_window=operands.sliding_window,
        sinks=operands.sinks,
        scale=operands.scale,
        logits_soft_cap=operands.logits_soft_cap,
        return_lse=return_lse,
        dtype=dtype,
    )


def write(pools: Pools, new: NewTokens, slot_mapping: jax.Array, layer: Any) -> Pools:
    """Return the pools with the new tokens as `calls.write` writes them."""
    values = tuple(array for array in new if array is not None)
    return Pools(*_calls().write(*pools, values, slot_mapping, layer))


def copy(pools: Pools, src: jax.Array, dst: jax.Array, layer: Any) -> Pools:
    """Return the pools with blocks copied as `calls.copy` copies them."""
    return Pools(*_calls().copy(*pools, src, dst, layer))


def unsupported(pages: jax.ShapeDtypeStruct, call: AttentionCall | None) -> str | None:
    """Say what the kernels do not support, or None.

    They need pages of bfloat16, float32 or 8 bits, with a block_size that is a multiple
    of 16, and a head_dim of 16, 32, 64 or a multiple of 128. Small heads need blocks
    that fill packed rows; 8 bits need a block_size of 16, 32, 64 or a multiple of 128
    and 1, 2, 4 or a multiple of 8 key/value heads.
    """
    problem = _unsupported_pages(pages)
    if problem or call is None:
        return problem
    if call.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q: expected bfloat16 or float32, got {call.q.dtype}"
    if problem := unsupported_numbers(call):
        return problem
    if 4 * call.block_tables.size > _TABLE_BYTES:
        return (
            f"block_tables: expected at most {_TABLE_BYTES // 4} entries in all, "
            f"got shape {call.block_tables.shape}; larger blocks need fewer"
        )
    return None


def _unsupported_pages(pages: jax.ShapeDtypeStruct) -> str | None:
    *_, num_kv_heads, block_size, head_dim = pages.shape
    is_narrow = is_quantised(pages.dtype)
    if pages.dtype not in (jnp.bfloat16, jnp.float32) and not is_narrow:
        return (
            "k_pages: expected bfloat16, float32, int8, float8_e4m3fn or its bits as "
            f"uint8, got {pages.dtype}"
        )
    if block_size % _ROWS:
        return f"k_pages: expected a block_size of a multiple of 16, got {block_size}"
    if is_narrow and LANES % block_size and block_size % LANES:
        return (
            "k_pages: expected a block_size of 16, 32, 64 or a multiple of 128 for "
            f"pages of {pages.dtype}, got {block_size}"
        )
    if is_narrow and num_kv_heads not in (1, 2, 4) and num_kv_heads % 8:
        return (
            "k_pages: expected 1, 2, 4 or a multiple of 8 key/value heads on a device "
            f"for pages of {pages.dtype}, got {num_kv_heads}"
        )
    per_row = packed.per_row(head_dim, pages.dtype)
    if head_dim % LANES and per_row == 1:
        return (
            "k_pages: expected a head_dim of 16, 32 or 64 of floats, or a multiple of "
            "128 (other pages are stored with zeros behind each head, q is not), got "
            f"{head_dim}"
        )
    if per_row > 1 and not packed.fits(block_size, per_row):
        few = ", ".join(str(size) for size in (16, 32) if size < 8 * per_row)
        return (
            f"k_pages: expected a block_size of {few} or a multiple of {8 * per_row} "
            f"for a head_dim of {head_dim}, got {block_size}"
        )
    return None


MOSAIC_TPU = Backend(
    name="mosaic_tpu",
    attend=attend,
    write=write,
    copy=copy,
    unsupported=unsupported,
    layout=LANE_ROWS,
    accepts_stored_pages=True,
    cascade=CascadeOptions(branches=True),
    platform="tpu",
    device="TPU",
    tile_sizes=_tile_sizes,
)
