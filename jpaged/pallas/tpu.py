"""The TPU's kernels as attention calls them: pages with or without layers, any mesh.

Place on the road: attention -> [pallas.tpu] -> pallas.tpu_attention, pallas.tpu_pages.

XLA cannot split a kernel over devices by itself. Heads have nothing to do with each
other, so where the mesh that is set (`jax.set_mesh`, or an abstract one) has an axis
`tensor`, pages, q, k and v are split over it by heads; all else is whole everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jpaged.pallas import tpu_attention, tpu_pages
from jpaged.pallas.tpu_segments import EVERYTHING

AXIS = "tensor"
WHOLE = PartitionSpec()
SINKS = PartitionSpec(AXIS)  # [H]
HEADS = PartitionSpec(None, AXIS)  # [T, H, D] and [T, H]
PAGES = PartitionSpec(None, None, AXIS)  # [L, N, K, P, D]

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
    window = jnp.minimum(jnp.asarray(window, jnp.int32), EVERYTHING)

    def call(*arrays):
        *arrays, layer, window, sinks = arrays
        return tpu_attention.attend(
            *arrays, layer=layer, window=window, sinks=sinks, **static
        )

    specs = (HEADS, PAGES, PAGES, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, SINKS)
    return _by_heads(call, k_pages, specs, (HEADS, HEADS))(
        q,
        *_stacked(k_pages, v_pages),
        block_tables,
        context_lens,
        query_start_loc,
        _index(layer),
        window,
        sinks,
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
    specs = (PAGES, PAGES, HEADS, HEADS, WHOLE, WHOLE)
    call = _by_heads(tpu_pages.write, k_pages, specs, (PAGES, PAGES))
    pools = call(*_stacked(k_pages, v_pages), k, v, slots, _index(layer))
    return pools[0].reshape(k_pages.shape), pools[1].reshape(v_pages.shape)


def copy(
    k_pages: jax.Array, v_pages: jax.Array, src: jax.Array, dst: jax.Array, layer: Layer
) -> Pages:
    """As `tpu_pages.copy`; without `layer`, in every layer."""
    one = functools.partial(tpu_pages.copy, is_one_layer=layer is not None)
    specs = (PAGES, PAGES, WHOLE, WHOLE, WHOLE)
    call = _by_heads(one, k_pages, specs, (PAGES, PAGES))
    pools = call(*_stacked(k_pages, v_pages), src, dst, _index(layer))
    return pools[0].reshape(k_pages.shape), pools[1].reshape(v_pages.shape)


def _stacked(k_pages: jax.Array, v_pages: jax.Array) -> Pages:
    """[L, N, K, P, D] of pages with or without layers."""
    if k_pages.ndim == 5:
        return k_pages, v_pages
    return k_pages[None], v_pages[None]


def _index(layer: Layer) -> jax.Array:
    return jnp.asarray(0 if layer is None else layer, jnp.int32)


def _by_heads(
    function: Callable[..., Any], k_pages: jax.Array, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function`, on each device of the set mesh with the heads that are its own."""
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or AxisType.Manual in mesh.axis_types:
        return function
    num_kv_heads, size = k_pages.shape[-3], mesh.shape[AXIS]
    if num_kv_heads % size:
        raise ValueError(
            "implementation: 'mosaic_tpu' cannot serve this ('xla' can): expected a "
            f"`tensor` that divides the {num_kv_heads} kv heads, got a mesh with "
            f"tensor={size}"
        )
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
