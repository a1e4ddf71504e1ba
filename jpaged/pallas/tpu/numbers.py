"""Numbers of pages inside of the TPU's kernels: how they become wider, and come back.

Place on the road: pallas.tpu_key_tiles, pallas.tpu_pages -> [pallas.tpu_numbers].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def product_dtype(pages: Any, q: Any) -> Any:
    """The dtype of the products: 8 bits are exact in both that q may have."""
    return q if jnp.dtype(pages).itemsize == 1 else pages


def widened(numbers: jax.Array, dtype: Any) -> jax.Array:
    """Numbers of a page in the `dtype` of the product, without their scales."""
    if numbers.dtype == jnp.uint8:
        numbers = lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn)
    return numbers.astype(dtype)


def bits(numbers: jax.Array) -> jax.Array:
    """Numbers of a float8 as bytes, which convert to 32 bits and back unchanged."""
    if numbers.dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(numbers, jnp.uint8)
    return numbers


def of_bits(wide: jax.Array, dtype: Any) -> jax.Array:
    """Numbers of `dtype` of what `bits` gave, whatever it was widened to since."""
    if dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(wide.astype(jnp.uint8), dtype)
    return wide.astype(dtype)
