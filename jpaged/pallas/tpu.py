"""The TPU's kernels as attention calls them: pages with or without layers.

Place on the road: attention -> [pallas.tpu] -> pallas.tpu_attention, pallas.tpu_pages.

XLA cannot split a kernel over devices by itself: on a mesh they run inside of the
`shard_map` of `sharded`, on the heads of one device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pallas import tpu_attention, tpu_pages
from jpaged.pallas.tpu_segments import EVERYTHING

Layer = jax.Array | int | None
Pages = tuple[jax.Array, jax.Array]


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    layer: Layer,
    sliding_window: jax.Array | int | None,
    sinks: jax.Array | None,
    **static: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """As `tpu_attention.attend`, whose `static` options are passed on."""
    window = EVERYTHING if sliding_window is None else sliding_window
    return tpu_attention.attend(
        q,
        *_stacked(k_pages, v_pages),
        block_tables,
        context_lens,
        query_start_loc,
        layer=_index(layer),
        window=jnp.minimum(jnp.asarray(window, jnp.int32), EVERYTHING),
        sinks=sinks,
        **static,
    )


def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    layer: Layer,
) -> Pages:
    """As `tpu_pages.write`."""
    pools = tpu_pages.write(*_stacked(k_pages, v_pages), k, v, slots, _index(layer))
    return pools[0].reshape(k_pages.shape), pools[1].reshape(v_pages.shape)


def copy(
    k_pages: jax.Array, v_pages: jax.Array, src: jax.Array, dst: jax.Array, layer: Layer
) -> Pages:
    """As `tpu_pages.copy`; without `layer`, in every layer."""
    pools = tpu_pages.copy(
        *_stacked(k_pages, v_pages),
        src,
        dst,
        _index(layer),
        is_one_layer=layer is not None,
    )
    return pools[0].reshape(k_pages.shape), pools[1].reshape(v_pages.shape)


def _stacked(k_pages: jax.Array, v_pages: jax.Array) -> Pages:
    """[L, N, K, P, D] of pages with or without layers."""
    if k_pages.ndim == 5:
        return k_pages, v_pages
    return k_pages[None], v_pages[None]


def _index(layer: Layer) -> jax.Array:
    return jnp.asarray(0 if layer is None else layer, jnp.int32)
