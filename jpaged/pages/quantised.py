"""Quantised pages: 8-bit numbers, and a float32 scale for each token and KV head.

Pipeline: keys, values -> [quantised] -> xla, attention, kv_cache.

A token's key or value of one head is `number * scale`. The scale maps its largest entry
to the largest number of the dtype. It is known when the token is written, and never
changes. `docs/decisions/quantised_kv.md` compares coarser scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# `kv_dtype` of a user, and the dtype of the pages. fp8 is float8_e4m3fn, stored as
# bits: on a CPU, XLA widens a whole array of float8 to update a slice of it, but not an
# array of bytes.
PAGE_DTYPES = {"int8": "int8", "fp8": "uint8"}

# Pages of bfloat16 as bits, on a CPU: see `layout.PageLayout`.
BITS_OF_BFLOAT16 = "uint16"

_LARGEST = {"int8": 127.0, "uint8": 448.0, "float8_e4m3fn": 448.0}
# Pages that may have scales: e5m2 has the range of float16, so casts suffice without.
_MAY_SCALE = {"float8_e5m2": 57344.0}


def page_dtype(name: str) -> str:
    """Return the dtype of pages for a `kv_dtype`: "int8", "fp8" or a float's name."""
    return PAGE_DTYPES.get(name, name)


def is_quantised(dtype: jnp.dtype | str) -> bool:
    """Whether pages of this dtype need scales: int8, float8_e4m3fn or its bits."""
    return jnp.dtype(dtype).name in _LARGEST


def quantise(values: jax.Array, dtype: jnp.dtype | str) -> tuple[jax.Array, jax.Array]:
    """Quantise vectors, each with its own scale.

    A vector with NaN or infinity gets a scale that is not finite either, so that it
    shows in the results that read it.

    Args:
      values: `[..., D]`.
      dtype: of the pages.

    Returns:
      Numbers `[..., D]` in `dtype`, and scales f32`[...]`.
    """
    name = jnp.dtype(dtype).name
    values = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=-1)
    # A vector of zeros gets a positive scale too, to avoid a division by zero.
    scale = jnp.maximum(
        largest / (_LARGEST | _MAY_SCALE)[name], jnp.finfo(jnp.float32).tiny
    )
    numbers = values / scale[..., None]
    if name == "int8":
        return jnp.round(numbers).astype(dtype), scale
    if name in _MAY_SCALE:
        return numbers.astype(dtype), scale
    numbers = numbers.astype(jnp.float8_e4m3fn)
    return (float8_bits(numbers) if name == "uint8" else numbers), scale


def widen(numbers: jax.Array) -> jax.Array:
    """Return numbers of quantised pages as float32, without their scales.

    The bits of bfloat16 become float32 too. Numbers of other pages stay as they are.
    """
    if numbers.dtype == BITS_OF_BFLOAT16:
        numbers = lax.bitcast_convert_type(numbers, jnp.bfloat16)
        return numbers.astype(jnp.float32)
    if not is_quantised(numbers.dtype) and numbers.dtype.name not in _MAY_SCALE:
        return numbers
    if numbers.dtype == jnp.uint8:
        numbers = lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn)
    return numbers.astype(jnp.float32)


def stored(values: jax.Array, dtype: jnp.dtype | str) -> jax.Array:
    """Return `values` as pages of `dtype` hold them: cast, or the bits of bfloat16."""
    if dtype == BITS_OF_BFLOAT16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), dtype)
    return values.astype(dtype)


def float8_bits(numbers: jax.Array) -> jax.Array:
    """Return float8_e4m3fn as uint8, without a copy, and other arrays as they are."""
    if numbers.dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(numbers, jnp.uint8)
    return numbers


def check_scales(
    pages: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    width: int,
    is_whole: bool = False,
    has_values: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Check scales, and broadcast them to the shape of the pages.

    Args:
      pages: `[..., P, D]`.
      k_scale, v_scale: floats that broadcast to `[..., P]`, or `[..., width]`; None for
        pages that need no scales.
      width: last axis of wider scales, which keep their shape; entries after P are not
        read.
      is_whole: the scales must have one of the two shapes, because they are written.
      has_values: whether there are pages of values. Without them, the scales of keys
        are those of values, and v_scale must be None.

    Returns:
      f32`[..., P]` or f32`[..., width]` each, or None twice; None for v_scale without
      pages of values.

    Raises:
      ValueError: quantised pages without scales, other pages with scales (those of
        float8_e5m2 may have them), or scales whose shape does not broadcast to that of
        the pages.
    """
    may_scale = jnp.dtype(pages.dtype).name in _MAY_SCALE
    if not has_values and v_scale is not None:
        raise ValueError(
            "v_scale: expected None without v_pages, whose values are the keys with "
            f"k_scale, got {v_scale.dtype}{list(v_scale.shape)}"
        )
    v_scale = v_scale if has_values else k_scale
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if may_scale and (k_scale is None) == (v_scale is None):
            continue
        if may_scale:
            raise ValueError(
                f"{name}: expected both k_scale and v_scale beside pages of "
                f"{pages.dtype}, or neither, got one of them"
            )
        if (scale is None) == is_quantised(pages.dtype):
            expected, got = ("one", "None") if scale is None else ("None", "one")
            raise ValueError(
                f"{name}: expected {expected} beside pages of {pages.dtype}, got {got}"
                f"; pages of {', '.join(_LARGEST)} have scales, others none"
            )
    if k_scale is None or v_scale is None:
        return None, None
    k_scale = _checked_scale("k_scale", k_scale, pages, width=width, is_whole=is_whole)
    if not has_values:
        return k_scale, None
    return (
        k_scale,
        _checked_scale("v_scale", v_scale, pages, width=width, is_whole=is_whole),
    )


def _checked_scale(
    name: str, scale: jax.Array, pages: jax.Array, *, width: int, is_whole: bool
) -> jax.Array:
    shape, scale = pages.shape[:-1], jnp.asarray(scale)
    own = (*shape[:-1], width) if scale.shape == (*shape[:-1], width) else shape
    fits = scale.shape == own or (not is_whole and _broadcasts(scale, shape))
    if not fits or not jnp.issubdtype(scale.dtype, jnp.floating):
        kind = "floats of shape" if is_whole else "floats that broadcast to"
        raise ValueError(
            f"{name}: expected {kind} {shape} (pages {pages.shape}), got "
            f"{scale.dtype}{list(scale.shape)}"
        )
    return jnp.broadcast_to(scale, own).astype(jnp.float32)


def _broadcasts(scale: jax.Array, shape: tuple[int, ...]) -> bool:
    last = shape[len(shape) - scale.ndim :]
    return scale.ndim <= len(shape) and all(
        size in (1, own) for size, own in zip(scale.shape, last, strict=True)
    )
