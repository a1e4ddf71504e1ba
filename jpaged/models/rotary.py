"""Rotary positions: angles from positions, and the rotation of heads by them.

Place on the road: positions -> [models.rotary] -> query and key of every layer.
Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; scalings as in transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of dimensions, f32[D / 2]."""
    # The same float32 operations as transformers: another rounding here is
    # multiplied by the position.
    exponents = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(
        config.head_dim
    )
    plain = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    if config.rope_scaling is None:
        return plain
    if config.rope_scaling.kind == "linear":
        return plain / np.float32(config.rope_scaling.factor)
    return _llama3(plain, config.rope_scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's scaling: short waves kept, long ones slowed, a ramp between."""
    original = scaling.original_max_position_embeddings
    wavelengths = np.float32(2 * np.pi) / plain
    slowed = plain / np.float32(scaling.factor)
    ramp = np.float32(original) / wavelengths - np.float32(scaling.low_freq_factor)
    ramp /= np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
    mixed = (np.float32(1.0) - ramp) * slowed + ramp * plain
    is_long = wavelengths > original / scaling.low_freq_factor
    is_short = wavelengths < original / scaling.high_freq_factor
    return np.where(is_long, slowed, np.where(is_short, plain, mixed))


def tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[T, 1, D / 2] for positions i32[T]."""
    per_position = frequencies(config)[None, None, :]
    angles = positions.astype(jnp.float32)[:, None, None] * per_position
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads x [T, H, D] turned by their positions' angles, in x's dtype.

    Dimension i is paired with i + D / 2, as in transformers (not with i + 1).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
