"""The "xla" backend: attention and page updates in plain XLA, on every platform.

Pipeline: attention.backends -> [xla.backend] -> xla.gradients, xla.pages.

It supports every call, so it is the last choice of `implementation=None`.
"""

from __future__ import annotations

from typing import Any

import jax

from jpaged.pages.backend import Backend
from jpaged.pages.layout import PLAIN_OR_BITS
from jpaged.pages.operands import AttentionOperands, NewTokens, Pools, merge_layers
from jpaged.xla import gradients, pages
from jpaged.xla.chunks import XlaTiles


def attend(
    operands: AttentionOperands, *, return_lse: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return attention as `xla.gradients.attend`; it always has the log-sum-exp."""
    del return_lse
    return gradients.attend(merge_layers(operands))


def write(pools: Pools, new: NewTokens, slot_mapping: jax.Array, layer: Any) -> Pools:
    """Return the pools with the new tokens at their slots, and their scales."""
    block_size = pools.k.shape[-2]

    def put(pool: jax.Array, values: jax.Array) -> jax.Array:
        return pages.write(pool, values, slot_mapping, layer, block_size)

    return jax.tree.map(put, pools, Pools(*new))


def copy(pools: Pools, src: jax.Array, dst: jax.Array, layer: Any) -> Pools:
    """Return the pools with the blocks `src` copied to `dst`, and their scales."""
    is_stacked = pools.k.ndim == 5
    return Pools(*pages.copy(pools, src, dst, layer, is_stacked=is_stacked))


XLA = Backend(
    name="xla",
    attend=attend,
    write=write,
    copy=copy,
    layout=PLAIN_OR_BITS,
    is_differentiable=True,
    serves_latents=True,
    tile_sizes=lambda: XlaTiles,
)
