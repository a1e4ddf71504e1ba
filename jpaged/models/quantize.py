"""Weight-only quantisation: products with weights stored in 8 bits.

Pipeline: weights -> [models.quantize] -> Linear, ExpertLinear.

The scale of an output channel is its largest magnitude / 127, and each weight is
rounded to the nearest multiple of it. Activations keep their dtype. A product is scaled
after the sum, which is exact because the scale is constant along the summed axis.

Source: Dettmers et al. 2022 for scales per output channel,
https://arxiv.org/abs/2208.07339, section 3 (without its treatment of outliers, which
concerns activations).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.models.config import ModelConfig


def quantize_int8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise weights [..., in, out], one scale per output channel.

    The error is at most half a scale. A channel of zeros has scale 0.

    Returns:
      int8[..., in, out] and scales f32[..., out], with weight ~ int8 * scale.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-2) / 127
    divisor = jnp.where(scale > 0, scale, 1.0)
    rounded = jnp.round(weight / jnp.expand_dims(divisor, -2))
    return rounded.astype(jnp.int8), scale


def round_int8(weight: np.ndarray, scale: np.ndarray, axis: int = -2) -> np.ndarray:
    """Quantise weights [..., in, out] on the host with given scales f32[..., out].

    With `axis` -1, weights and result are [..., out, in].

    Given the scales of `quantize_int8`, the result int8[..., in, out] equals that of
    `quantize_int8`. `weight` may be any part of a matrix.
    """
    divisor = np.expand_dims(np.where(scale > 0, scale, np.float32(1)), axis)
    with np.errstate(invalid="ignore"):  # the loader checks for NaN, on request
        return np.rint(weight.astype(np.float32) / divisor).astype(np.int8)


def product_int8(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., in] @ (weight int8[in, out] * scale f32[out]), in the dtype of x.

    The sum is float32: before scaling, it can exceed the range of float16.
    """
    product = jnp.matmul(
        x,
        weight.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    scale = scale.reshape((1,) * (product.ndim - 1) + scale.shape)
    return (product * scale).astype(x.dtype)


def random_int8(
    shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param]:
    """Random int8 weights [..., in, out] and their scales [..., out]."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32)
    weight, scale = quantize_int8(values * config.initializer_range)
    return nnx.Param(weight), nnx.Param(scale)
