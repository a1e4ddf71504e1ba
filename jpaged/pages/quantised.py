"""Quantised pages: numbers of 8 bits, and a float32 scale for each token and KV head.

Place on the road: keys, values -> [quantised_pages] -> xla, attention, kv_cache.

A token's key or value of one head is `number * scale`, with the scale that takes its
largest entry to the largest number: it is known when the token is written, and never
changes. `docs/decisions/quantised_kv.md` compares coarser scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# What a user asks for, and the dtype of the pages. fp8 is float8_e4m3fn, as bits: XLA
# widens a whole array of float8 to update a slice of it on a CPU, and not one of bytes.
PAGE_DTYPES = {"int8": "int8", "fp8": "uint8"}

# Pages of bfloat16 as bits, for a CPU: see `implementations.stored_dtype`.
BITS_OF_BFLOAT16 = "uint16"

_LARGEST = {"int8": 127.0, "uint8": 448.0, "float8_e4m3fn": 448.0}


def page_dtype(name: str) -> str:
    """The dtype of the pages for a `kv_dtype`: "int8", "fp8" or a float's name."""
    return PAGE_DTYPES.get(name, name)


def is_quantised(dtype: jnp.dtype | str) -> bool:
    """Whether pages of this dtype need scales: int8, float8_e4m3fn or its bits."""
    return jnp.dtype(dtype).name in _LARGEST


def encode(values: jax.Array, dtype: jnp.dtype | str) -> tuple[jax.Array, jax.Array]:
    """Numbers [..., D] of the pages' `dtype` and scales f32[...] of `values` [..., D].

    A vector that holds NaN or infinity gets a scale that is none either, so that it
    shows in what reads it.
    """
    name = jnp.dtype(dtype).name
    values = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=-1)
    # A vector of zeros has a scale too, so that nothing is divided by zero.
    scale = jnp.maximum(largest / _LARGEST[name], jnp.finfo(jnp.float32).tiny)
    numbers = values / scale[..., None]
    if name == "int8":
        return jnp.round(numbers).astype(dtype), scale
    numbers = numbers.astype(jnp.float8_e4m3fn)
    return bits(numbers) if name == "uint8" else numbers, scale


def decode(numbers: jax.Array) -> jax.Array:
    """`numbers` of quantised pages in float32, still without their scales.

    Bits of bfloat16 become float32 too; numbers of other pages stay as they are.
    """
    if numbers.dtype == BITS_OF_BFLOAT16:
        numbers = lax.bitcast_convert_type(numbers, jnp.bfloat16)
        return numbers.astype(jnp.float32)
    if not is_quantised(numbers.dtype):
        return numbers
    if numbers.dtype == jnp.uint8:
        numbers = lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn)
    return numbers.astype(jnp.float32)


def stored(values: jax.Array, dtype: jnp.dtype | str) -> jax.Array:
    """`values` as pages of `dtype` hold them: cast, or the bits of their bfloat16."""
    if dtype == BITS_OF_BFLOAT16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), dtype)
    return values.astype(dtype)


def bits(numbers: jax.Array) -> jax.Array:
    """`numbers` of float8_e4m3fn as uint8, others as they are; nothing is copied."""
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
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """The scales of `pages` [..., P, D] as f32[..., P]; None twice where it needs none.

    Those of f32[..., width] keep their shape: what is behind P nobody reads.
    `is_whole`: they must have one of the two shapes already, to be written.

    Raises:
      ValueError: quantised pages without scales, other pages with some, or scales whose
        shape does not broadcast to that of the pages.
    """
    shape, given = pages.shape[:-1], {"k_scale": k_scale, "v_scale": v_scale}
    for name, scale in given.items():
        if (scale is None) == is_quantised(pages.dtype):
            wanted, got = ("one", "None") if scale is None else ("None", "one")
            raise ValueError(
                f"{name}: expected {wanted} beside pages of {pages.dtype}, got {got}; "
                f"pages of {', '.join(_LARGEST)} have scales, others none"
            )
    if k_scale is None or v_scale is None:
        return None, None
    whole = []
    for name, scale in given.items():
        scale = jnp.asarray(scale)
        own = (*shape[:-1], width) if scale.shape == (*shape[:-1], width) else shape
        fits = scale.shape == own or (not is_whole and _broadcasts(scale, shape))
        if not fits or not jnp.issubdtype(scale.dtype, jnp.floating):
            kind = "floats of shape" if is_whole else "floats that broadcast to"
            raise ValueError(
                f"{name}: expected {kind} {shape} (pages {pages.shape}), got "
                f"{scale.dtype}{list(scale.shape)}"
            )
        whole.append(jnp.broadcast_to(scale, own).astype(jnp.float32))
    return whole[0], whole[1]


def _broadcasts(scale: jax.Array, shape: tuple[int, ...]) -> bool:
    last = shape[len(shape) - scale.ndim :]
    return scale.ndim <= len(shape) and all(
        size in (1, own) for size, own in zip(scale.shape, last, strict=True)
    )
