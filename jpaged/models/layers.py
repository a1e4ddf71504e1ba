"""Layers: the small parts that every decoder family is put together from.

Place on the road: decoder -> [models.layers] -> attention.

Weights are stored [in, out]: with few rows, as in a decode step, XLA's CPU
product is up to 1.7 times as fast as from [out, in]. Shape letters: T tokens,
H query heads, K kv heads, D head_dim, E hidden size.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged import parallel
from jpaged.models.config import ModelConfig
from jpaged.models.quantize import empty_int8, product_int8

# (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]. q and k carry their
# positions already; q is not scaled yet.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

# The same with the cache handed through: (layer i32[], q, k, v, cache) -> (out, cache).
Cache = TypeVar("Cache")
AttendInLoop = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]
]

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def random_param(
    shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs
) -> nnx.Param:
    """Parameter with normal values of the config's standard deviation."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param((values * config.initializer_range).astype(config.dtype))


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out], in float32 with all of its bits.

    GPUs and TPUs would otherwise multiply float32 with 10 or 7 bits of mantissa.
    """
    is_full = weight.dtype == jnp.float32
    return jnp.matmul(
        x, weight, precision=jax.lax.Precision.HIGHEST if is_full else None
    )


class Linear(nnx.Module):
    """x [..., in] -> [..., out], with a bias where asked for.

    Where the config is quantised, the weight is int8 and has scales of its own, except
    for products that are small or decide much: `may_be_quantized=False`. On many
    devices a product may be a part of a sum, `part` of `parallel.PARTIAL_SUMS`.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        use_bias: bool,
        config: ModelConfig,
        rngs: nnx.Rngs,
        may_be_quantized: bool = True,
        part: str | None = None,
    ) -> None:
        shape = (in_size, out_size)
        scale = None
        if config.quantization is None or not may_be_quantized:
            self.weight = random_param(shape, config, rngs)
        else:
            self.weight, scale = empty_int8(shape, config, rngs)
        self.scale = scale
        self.bias = nnx.Param(jnp.zeros(out_size, config.dtype)) if use_bias else None
        self.part = part

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product [..., out], in the dtype of the weight, or x's where int8."""
        if self.scale is None:
            out = matmul(x, self.weight[...])
        else:
            out = product_int8(x, self.weight[...], self.scale[...])
        if self.part is not None:
            out = parallel.sum_partials(out, self.part)
        if self.bias is None:
            return out
        return out + _as_last_axis(self.bias[...], out.ndim)


class Output(nnx.Module):
    """x [..., E] -> [..., V], the product that gives logits.

    Its weight is [E, V], or where `config.vocab_first` in its place `rows` [V, E]: a
    TPU keeps a [E, V] array in the other order where V is no multiple of 128, and
    copies it for each product; and tied words are looked up in rows.
    """

    def __init__(
        self, in_size: int, vocab_size: int, config: ModelConfig, rngs: nnx.Rngs
    ) -> None:
        weight = random_param((in_size, vocab_size), config, rngs)
        self.weight = None if config.vocab_first else weight
        self.rows = nnx.Param(weight[...].T) if config.vocab_first else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product [..., V], in the dtype of the weights."""
        return matmul(x, self.weight[...] if self.rows is None else self.rows[...].T)

    @property
    def table(self) -> jax.Array:
        """The words' rows, [V, E]."""
        return self.weight[...].T if self.rows is None else self.rows[...]


class RMSNorm(nnx.Module):
    """x [..., E] over its root mean square, times a weight; statistics in float32."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.weight = nnx.Param(jnp.ones(size, config.dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x normed over its last axis, in x's dtype."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        # Rounded before the weight, as transformers does.
        normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * _as_last_axis(self.weight[...], x.ndim)


class RMSNormPlusOne(nnx.Module):
    """x [..., E] over its root mean square, times 1 + weight, in float32 (Gemma)."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.weight = nnx.Param(jnp.zeros(size, config.dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x normed over its last axis, in x's dtype."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        weight = _as_last_axis(self.weight[...], x.ndim).astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(variance + self.eps) * (1.0 + weight)
        return normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """x [..., E] to mean 0 and variance 1, times a weight plus a bias, in float32."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.weight = nnx.Param(jnp.ones(size, config.dtype))
        self.bias = nnx.Param(jnp.zeros(size, config.dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x normed over its last axis, in x's dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        weight = _as_last_axis(self.weight[...], x.ndim).astype(jnp.float32)
        bias = _as_last_axis(self.bias[...], x.ndim).astype(jnp.float32)
        return (normed * weight + bias).astype(x.dtype)


Norm = RMSNorm | RMSNormPlusOne | LayerNorm
_NORMS = {"rms": RMSNorm, "rms_plus_one": RMSNormPlusOne, "layer": LayerNorm}


def make_norm(config: ModelConfig, size: int | None = None) -> Norm:
    """Norm over `size`, or the hidden size, of the kind that the config names."""
    return _NORMS[config.norm](size or config.hidden_size, config)


class Mlp(nnx.Module):
    """x [..., E] -> [..., E] through the intermediate size, gated or plain."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        inner, hidden = config.intermediate_size, config.hidden_size
        shared = {"use_bias": config.mlp_bias, "config": config, "rngs": rngs}
        self.gate = Linear(hidden, inner, **shared) if config.gated_mlp else None
        self.up = Linear(hidden, inner, **shared)
        self.down = Linear(inner, hidden, part="mlp.down", **shared)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the residual stream x [..., E] gains."""
        act = ACTIVATION_FUNCTIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x)))
        return self.down(act(self.gate(x)) * self.up(x))


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which stays within the cap; x where there is none."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Every position attends to itself and what came before; softmax in float32.

    q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]. Head h reads kv head
    h // (H // K). The options are those of `attention.paged_attention`. Materialises
    the scores, f32[B, H, T, T]: for training and scoring, not for serving.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = (batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "btkgd,bskd->bkgts",
        q.reshape(grouped),
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = soft_cap(scores * (scale or head_dim**-0.5), logits_soft_cap)
    positions = jnp.arange(length)
    distance = positions[:, None] - positions[None, :]
    is_visible = distance >= 0
    if sliding_window is not None:
        is_visible &= distance < sliding_window
    scores = jnp.where(is_visible[None, None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length].astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=precision)
    return out.reshape(q.shape)


def _as_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """vector [E] as [1, ..., 1, E]: rank promotion is never left to chance."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
