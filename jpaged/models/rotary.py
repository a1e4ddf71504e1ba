"""Rotary positions: angles of positions, and the rotation of heads by them.

Pipeline: positions -> [models.rotary] -> query and key of every layer.

Shape symbols: T tokens, H heads, D head_dim, R rotated dimensions of a head.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; scalings as in transformers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import ModelConfig, RopeScaling


def frequencies(
    config: ModelConfig, *, is_local: bool = False, length: int | None = None
) -> np.ndarray:
    """Angle per position of each rotated pair of dimensions, f32[R / 2].

    Args:
      config: of the model.
      is_local: for the layers with a window, whose base may differ.
      length: of the longest possible sequence. Above `config.default_length`, dynamic
        and LongRoPE scaling rotate as transformers does in one pass over so many
        tokens. None is at most that length.
    """
    size, theta = config.rotary_size, config.rope_theta
    if is_local and config.local_rope_theta is not None:
        theta = config.local_rope_theta
    # The same float32 operations as in transformers: a rounding error here would be
    # multiplied by the position.
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    powers = np.power(np.float32(theta), exponents)
    plain = np.float32(1.0) / powers
    scaling = config.rope_scaling
    if scaling is None or is_local:
        return plain
    match scaling.kind:
        case "linear":
            return plain / np.float32(scaling.factor)
        case "dynamic":
            if length is None or length <= config.default_length:
                return plain
            stretch = scaling.factor * length / config.max_position_embeddings
            stretch -= scaling.factor - 1
            theta *= stretch ** (size / (size - 2))
            return np.float32(1.0) / np.power(np.float32(theta), exponents)
        case "longrope":
            is_long = length is not None and length > config.default_length
            factors = scaling.long_factors if is_long else scaling.short_factors
            return np.float32(1.0) / (np.array(factors, np.float32) * powers)
        case "yarn":
            return _yarn(powers, theta, size, scaling)
        case _:
            return _llama3(plain, scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: keep short wavelengths, stretch long ones, interpolate between."""
    original = scaling.original_max_position_embeddings
    wavelengths = np.float32(2 * np.pi) / plain
    slowed = plain / np.float32(scaling.factor)
    ramp = np.float32(original) / wavelengths - np.float32(scaling.low_freq_factor)
    ramp /= np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
    mixed = (np.float32(1.0) - ramp) * slowed + ramp * plain
    is_long = wavelengths > original / scaling.low_freq_factor
    is_short = wavelengths < original / scaling.high_freq_factor
    return np.where(is_long, slowed, np.where(is_short, plain, mixed))


def _yarn(
    powers: np.ndarray, theta: float, size: int, scaling: RopeScaling
) -> np.ndarray:
    """YaRN: keep high frequencies, divide low ones, interpolate between.

    Source: Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2.
    """

    def pair_with(rotations: float) -> float:
        """Index (a real number) of the pair with this many rotations in training."""
        length = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(length) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(size // 2).astype(np.float32)
    slow_share = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    kept_share = np.float32(1) - slow_share
    slowed = np.float32(1) / (np.float32(scaling.factor) * powers)
    kept = np.float32(1) / powers
    return slowed * (np.float32(1) - kept_share) + kept * kept_share


def tables(
    positions: jax.Array,
    config: ModelConfig,
    *,
    is_local: bool = False,
    length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[T, 1, R / 2] of positions i32[T]; see `frequencies`."""
    per_position = frequencies(config, is_local=is_local, length=length)[None, None, :]
    angles = positions.astype(jnp.float32)[:, None, None] * per_position
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.rope_scaling is None or is_local:
        return cos, sin
    factor = jnp.float32(config.rope_scaling.attention_factor)
    return cos * factor, sin * factor


def rotate(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, is_interleaved: bool = False
) -> jax.Array:
    """Rotate heads by the angles of their positions.

    Dimension i is paired with dimension i + R / 2, as in transformers (not with i + 1).
    Dimensions from R on are unchanged.

    Args:
      x: [T, H, D].
      cos: f32[T, 1, R / 2], from `tables`.
      sin: f32[T, 1, R / 2], from `tables`.
      is_interleaved: dimension 2 i is paired with 2 i + 1 instead. In the result, it is
        dimension i, and the other one i + R / 2.

    Returns:
      [T, H, D] in the dtype of x.
    """
    size = 2 * cos.shape[-1]
    wide = x[..., :size].astype(jnp.float32)
    if is_interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    if size == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., size:]], axis=-1)
