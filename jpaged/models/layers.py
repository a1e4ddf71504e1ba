"""Layers: the parts from which every decoder is built.

Pipeline: decoder -> [models.layers] -> attention.

Weights are stored as [in, out]. With few rows, as in a decode step, XLA's product on a
CPU is up to 1.7 times as fast as with [out, in].

Shape symbols: B batch, T tokens, H query heads, K kv heads, D head_dim, E hidden size,
V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged import parallel
from jpaged.models.config import ModelConfig
from jpaged.models.invariant import mean, settled
from jpaged.models.layer_kernels import (
    ACTIVATION_FUNCTIONS,
    gated,
    matmul,
    matmuls,
    rms_norm,
)
from jpaged.models.quantize import random_int8

# (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]. q and k are already
# rotated by their positions; q is not scaled. v is None where the keys are the values
# (`models.latent`).
Attend = Callable[[int, jax.Array, jax.Array, Any], jax.Array]

# The same with a cache: (layer, q, k, v, cache) -> (out, cache). The layer is a number,
# or i32[] in a loop over layers.
Cache = TypeVar("Cache")
AttendInLoop = Callable[
    [int | jax.Array, jax.Array, jax.Array, Any, Cache], tuple[jax.Array, Cache]
]


def random_param(
    shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs
) -> nnx.Param:
    """Parameter with normal values of standard deviation `config.initializer_range`."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param((values * config.initializer_range).astype(config.dtype))


def random_weight(
    shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param | None]:
    """A product's weights [..., in, out]; if the config quantises, with scales."""
    if config.quantization is None:
        return random_param(shape, config, rngs), None
    return random_int8(shape, config, rngs)


class Linear(nnx.Module):
    """x [..., in] -> [..., out], with an optional bias.

    Args:
      in_size: size of the last axis of x.
      out_size: size of the last axis of the result.
      use_bias: whether to add a bias.
      config: of the model. With `quantization`, the weight is int8 with a scale per
        output.
      rngs: random numbers for the weight.
      may_be_quantized: False for products that are small or need high precision.
      part: a name in `parallel.PARTIAL_SUMS`, if the product on one device is a part of
        a sum over devices; None otherwise.
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
        if not may_be_quantized:
            config = dataclasses.replace(config, quantization=None)
        weight, scale = random_weight(shape, config, rngs)
        self.weight, self.scale = weight, scale
        self.bias = nnx.Param(jnp.zeros(out_size, config.dtype)) if use_bias else None
        self.part = part

    def __call__(self, x: jax.Array) -> jax.Array:
        """x @ weight + bias, [..., out]; in the dtype of x if the weight is int8."""
        return apply_all([self], x)[0]

    def finish(self, out: jax.Array) -> jax.Array:
        """The result from x @ weight: summed over devices, with the bias."""
        if self.part is not None:
            out = parallel.sum_partials(out, self.part)
        if self.bias is None:
            return out
        return settled(out + _as_last_axis(self.bias[...], out.ndim))


def apply_all(linears: Sequence[Linear], x: jax.Array) -> list[jax.Array]:
    """The results of several linear layers for one x, [..., out] each."""
    weights = [linear.weight[...] for linear in linears]
    scales = [None if each.scale is None else each.scale[...] for each in linears]
    products = matmuls(x, weights, scales)
    return [linear.finish(out) for linear, out in zip(linears, products, strict=True)]


class Output(nnx.Module):
    """x [..., E] -> [..., V], the product that computes logits.

    The parameter is `weight` [E, V], or with `config.vocab_first` instead `rows`
    [V, E]. A TPU stores an [E, V] array in transposed order if V is not a multiple of
    128, and then copies it for each product. A tied embedding is also looked up by row.
    With `config.quantization`, the parameter is int8 and has scales, `scale` f32[V].
    """

    def __init__(
        self, in_size: int, vocab_size: int, config: ModelConfig, rngs: nnx.Rngs
    ) -> None:
        weight, scale = random_weight((in_size, vocab_size), config, rngs)
        self.scale = scale
        self.weight = None if config.vocab_first else weight
        self.rows = nnx.Param(weight[...].T) if config.vocab_first else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product [..., V], in the dtype of x."""
        weight = self.table.T if self.weight is None else self.weight[...]
        return matmul(x, weight, None if self.scale is None else self.scale[...])

    def embed(self, tokens: jax.Array, config: ModelConfig) -> jax.Array:
        """The weights as embeddings [T, E] of tokens i32[T], in the model's dtype."""
        if self.scale is None:
            return parallel.embed_tokens(self.table, tokens, config.vocab_size)
        scaled = self.table, self.scale[...]
        rows = parallel.embed_tokens(scaled, tokens, config.vocab_size)
        return rows.astype(config.dtype)

    @property
    def table(self) -> jax.Array:
        """The weights as an embedding table, [V, E]."""
        if self.weight is not None:
            return self.weight[...].T
        assert self.rows is not None
        return self.rows[...]


class RMSNorm(nnx.Module):
    """x [..., E] / its root mean square * a weight; statistics in float32."""

    def __init__(
        self, size: int, config: ModelConfig, eps: float | None = None
    ) -> None:
        self.weight = nnx.Param(jnp.ones(size, config.dtype))
        self.eps = config.norm_eps if eps is None else eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x normed over its last axis, in x's dtype."""
        return rms_norm(x, self.weight[...], self.eps)


class RMSNormPlusOne(nnx.Module):
    """x [..., E] / its root mean square * (1 + weight), in float32 (Gemma)."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.weight = nnx.Param(jnp.zeros(size, config.dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x normed over its last axis, in x's dtype."""
        weight = 1.0 + self.weight[...].astype(jnp.float32)
        return rms_norm(x, weight, self.eps)


class LayerNorm(nnx.Module):
    """x [..., E] with mean 0 and variance 1, * a weight + a bias, in float32."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.weight = nnx.Param(jnp.ones(size, config.dtype))
        self.bias = nnx.Param(jnp.zeros(size, config.dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x normed over its last axis, in x's dtype."""
        wide = x.astype(jnp.float32)
        centred = settled(wide - mean(wide))
        variance = mean(jnp.square(centred))
        normed = settled(centred * jax.lax.rsqrt(variance + self.eps))
        weight = _as_last_axis(self.weight[...], x.ndim).astype(jnp.float32)
        bias = _as_last_axis(self.bias[...], x.ndim).astype(jnp.float32)
        return settled((normed * weight + bias).astype(x.dtype))


Norm = RMSNorm | RMSNormPlusOne | LayerNorm
_NORMS = {"rms": RMSNorm, "rms_plus_one": RMSNormPlusOne, "layer": LayerNorm}


def make_norm(config: ModelConfig, size: int | None = None) -> Norm:
    """Norm of the kind `config.norm` over `size`, by default the hidden size."""
    return _NORMS[config.norm](size or config.hidden_size, config)


class Mlp(nnx.Module):
    """x [..., E] -> [..., E]: a feed-forward layer, gated or plain.

    `size` replaces `config.intermediate_size`.
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, size: int | None = None
    ) -> None:
        inner, hidden = size or config.intermediate_size, config.hidden_size
        shared = {"use_bias": config.mlp_bias, "config": config, "rngs": rngs}
        self.gate = Linear(hidden, inner, **shared) if config.gated_mlp else None
        self.up = Linear(hidden, inner, **shared)
        self.down = Linear(inner, hidden, part="mlp.down", **shared)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Output [..., E] for the residual stream."""
        if self.gate is None:
            return self.down(ACTIVATION_FUNCTIONS[self.activation](self.up(x)))
        gate, up = apply_all([self.gate, self.up], x)
        return self.down(gated(gate, up, self.activation))


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which is within [-cap, cap]; x if `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    *,
    scale: float | None = None,
    sliding_window: int | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Attention of every position to itself and to earlier ones; softmax in float32.

    Materialises the scores f32[B, H, T, T], so it is meant for training and scoring,
    not for serving.

    Args:
      q: [B, T, H, D]; head h reads kv head h // (H // K).
      k: [B, T, K, D].
      v: [B, T, K, D]; None: the keys.
      scale: as in `attention.paged_attention`, like the following options.
      sliding_window: see there; may be traced.
      logits_soft_cap: see there.
      sinks: [H], see there.
      mask: bool[B, T, T], which positions each may see besides; all see themselves.

    Returns:
      [B, T, H, D], in the dtype of v.
    """
    v = k if v is None else v
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
    is_visible = is_visible[None, None, None]
    if mask is not None:
        is_visible &= mask[:, None, None] | (distance == 0)[None, None, None]
    scores = jnp.where(is_visible, scores, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length].astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=precision)
    return out.reshape(q.shape)


def _as_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """vector [E] as [1, ..., 1, E], so that nothing is broadcast implicitly."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
