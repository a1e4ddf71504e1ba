"""The TPU's kernels as attention calls them, with or without a layer axis.

Pipeline: attention -> [pallas.tpu.calls] -> pallas.tpu.attention, pallas.tpu.pages.

XLA cannot split a kernel over devices. On a mesh the engine is one `shard_map` (see
`jpaged.parallel`), and these calls get the heads of one device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pages import operands
from jpaged.pages.layout import LANE_ROWS
from jpaged.pages.packed import packed
from jpaged.pallas.tpu import attention as tpu_attention
from jpaged.pallas.tpu import pages as tpu_pages

Layer = jax.Array | int | None
Arrays = tuple[jax.Array, ...]
Scale = jax.Array | None


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    k_scale: Scale,
    v_scale: Scale,
    layer: Layer,
    sliding_window: jax.Array | int | None,
    sinks: jax.Array | None,
    **static: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the output, and the log-sum-exp or None, as `attend_segments` does.

    The arguments are those of `jpaged.attention.paged_attention`. Pages of small heads
    that are not packed are accepted here and below, and copied.

    Args:
      k_scale: Scales of quantised pages, of any width from P on, or None.
      v_scale: Like k_scale.
      **static: Further options of `attend_segments`.
    """
    has_layers = k_pages.ndim == 5
    k_pages, v_pages = packed(k_pages), packed(v_pages)
    stacked_k, stacked_v = _stacked((k_pages, v_pages), has_layers)
    return tpu_attention.attend_segments(
        q,
        stacked_k,
        stacked_v,
        block_tables,
        context_lens,
        query_start_loc,
        scales=_stacked(_wide(k_pages, k_scale, v_scale), has_layers),
        layer=operands.layer_index(layer),
        window=operands.window_size(sliding_window),
        sinks=sinks,
        **static,
    )


def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scale: Scale,
    v_scale: Scale,
    values: Arrays,
    slots: jax.Array,
    layer: Layer,
) -> Arrays:
    """Return pages and scales with new tokens, as `write_pages` and `write_scales` do.

    Args:
      k_pages: [N, K, P, D] or [L, N, K, P, D].
      v_pages: Like k_pages.
      k_scale: As in `attend`.
      v_scale: Like k_scale.
      values: New values for each of these arrays that is given, [T, K, D] or [T, K].
      slots: i32[T]; slots below 0 or past the pool are skipped.
      layer: Index into stacked pools, or None.
    """
    given = _given(k_pages, v_pages, k_scale, v_scale)
    arrays = (packed(k_pages), packed(v_pages), *_wide(k_pages, k_scale, v_scale))
    stacked = _stacked(arrays, k_pages.ndim == 5)
    written = tpu_pages.write_pages(
        stacked[:2], values[:2], slots, operands.layer_index(layer)
    )
    if scales := stacked[2:]:
        block_size = k_pages.shape[-2]
        written += tpu_pages.write_scales(
            scales, values[2:], slots, operands.layer_index(layer), block_size
        )
    return _as_given(written, given)


def copy(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scale: Scale,
    v_scale: Scale,
    src: jax.Array,
    dst: jax.Array,
    layer: Layer,
) -> Arrays:
    """Return pages and scales with blocks copied, as `copy_pages` does.

    Without `layer`, the blocks of all layers are copied.
    """
    given = _given(k_pages, v_pages, k_scale, v_scale)
    arrays = (packed(k_pages), packed(v_pages), *_wide(k_pages, k_scale, v_scale))
    copied = tpu_pages.copy_pages(
        _stacked(arrays, k_pages.ndim == 5),
        src,
        dst,
        operands.layer_index(layer),
        is_one_layer=layer is not None,
    )
    return _as_given(copied, given)


def _given(*arrays: jax.Array | None) -> Arrays:
    return tuple(array for array in arrays if array is not None)


def _wide(pages: jax.Array, *scales: Scale) -> Arrays:
    """Return scales as wide as a memory tile; narrower ones are copied."""
    width = LANE_ROWS.scale_width(pages.shape[-2])
    return tuple(
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
        for x in _given(*scales)
    )


def _stacked(arrays: Arrays, has_layers: bool) -> Arrays:
    """Return the arrays with a layer axis, [L, N, ...]."""
    return arrays if has_layers else tuple(array[None] for array in arrays)


def _as_given(arrays: Arrays, given: Arrays) -> Arrays:
    """Return the results in the shapes of the arguments."""

    def like(array: jax.Array, one: jax.Array) -> jax.Array:
        is_wide = array.size > one.size
        return (array[..., : one.shape[-1]] if is_wide else array).reshape(one.shape)

    return tuple(map(like, arrays, given))
