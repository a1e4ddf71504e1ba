"""Dtypes of page numbers inside the TPU's kernels: conversion to wider ones and back.

Pipeline: pallas.tpu.key_tiles, pallas.tpu.pages -> [pallas.tpu.numbers].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def product_dtype(pages: Any, q: Any) -> Any:
    """Return the dtype of the products.

    With pages of 8 bits it is that of q: bfloat16 and float32 both hold their numbers
    exactly. Otherwise it is that of the pages.
    """
    return q if jnp.dtype(pages).itemsize == 1 else pages


def to_product_dtype(numbers: jax.Array, dtype: Any) -> jax.Array:
    """Convert page numbers, without their scales, to the dtype of the products."""
    if numbers.dtype == jnp.uint8:
        numbers = lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn)
    return numbers.astype(dtype)


def from_float8_bits(wide: jax.Array, dtype: Any) -> jax.Array:
    """Convert to `dtype` what `quantised.float8_bits` returned and a cast widened."""
    if dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(wide.astype(jnp.uint8), dtype)
    return wide.astype(dtype)
