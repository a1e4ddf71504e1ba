"""Weight-only quantisation: products whose weights are held in 8 bits.

Place on the road: weights -> [models.quantize] -> Linear, ExpertLinear.

Each output channel has a scale, its largest magnitude over 127, and the weights are the
nearest multiples. Activations keep their dtype, and a product is scaled after its sum,
which is exact: the scale does not depend on what is summed over.

Source: Dettmers et al. 2022 for scales by output channel,
https://arxiv.org/abs/2208.07339, section 3 (without its treatment of outliers, which
concerns activations).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.models.config import ModelConfig


def quantize_int8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8[..., in, out] and scales f32[..., out], with weight ~ int8 * scale.

    Off by at most half a scale; a channel of zeros has scale 0.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-2) / 127
    divisor = jnp.where(scale > 0, scale, 1.0)
    rounded = jnp.round(weight / jnp.expand_dims(divisor, -2))
    return rounded.astype(jnp.int8), scale


def round_int8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8[..., in, out] of weights on the host, by scales f32[..., out] chosen before.

    With the scales of `quantize_int8`, its integers, of any part of a matrix.
    """
    divisor = np.expand_dims(np.where(scale > 0, scale, np.float32(1)), -2)
    with np.errstate(invalid="ignore"):  # NaN is the loader's to refuse, on request
        return np.rint(weight.astype(np.float32) / divisor).astype(np.int8)


def product_int8(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., in] @ (weight int8[in, out] * scale f32[out]), in x's dtype.

    Summed in float32: before the scale, sums of 127s pass float16's range.
    """
    product = jnp.matmul(
        x,
        weight.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    scale = scale.reshape((1,) * (product.ndim - 1) + scale.shape)
    return (product * scale).astype(x.dtype)


def empty_int8(
    shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param]:
    """Random int8 weights [..., in, out] and their scales [..., out]."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32)
    weight, scale = quantize_int8(values * config.initializer_range)
    return nnx.Param(weight), nnx.Param(scale)
