"""Decoder: one Flax NNX module for all families, put together from its config.

Place on the road: StepInputs -> [decoder] -> paged attention -> logits.

The decoder knows nothing of pages. Whoever calls `trunk` passes `attend`: the
engine's writes keys and values into pages and reads them through block tables;
`__call__` passes plain causal attention, for training and scoring.

Shape letters: B batch, T tokens, H query heads, K kv heads, D head_dim,
E hidden size, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged.models import rotary
from jpaged.models.config import ModelConfig
from jpaged.models.layers import (
    Attend,
    AttendInLoop,
    Cache,
    Linear,
    Mlp,
    causal_attention,
    make_norm,
    random_param,
)

# Cosines and sines of the step's positions; None for learned positions.
RotaryTables = tuple[jax.Array, jax.Array] | None


class Attention(nnx.Module):
    """Query, key and value of x [T, E], attention by the caller, and the way back.

    Three matrices and not one: fused, they gain nothing on a CPU, and apart each
    can be sharded over its own heads.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        hidden = config.hidden_size
        qkv = {"use_bias": config.qkv_bias, "config": config, "rngs": rngs}
        self.query = Linear(hidden, q_size, **qkv)
        self.key = Linear(hidden, kv_size, **qkv)
        self.value = Linear(hidden, kv_size, **qkv)
        self.out = Linear(
            q_size, hidden, use_bias=config.out_bias, config=config, rngs=rngs
        )

    def project(
        self, x: jax.Array, angles: RotaryTables
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [T, H, D], k and v [T, K, D] of x [T, E], positions in q and k."""
        num_tokens = x.shape[0]
        q, k, v = (
            linear(x).reshape(num_tokens, -1, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        if angles is not None:
            q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
        return q, k, v

    def merge(self, attended: jax.Array) -> jax.Array:
        """What the residual stream gains [T, E] of the heads' outputs [T, H, D]."""
        return self.out(attended.reshape(attended.shape[0], -1))


class DecoderLayer(nnx.Module):
    """x [T, E] -> [T, E]: attention and MLP, each with its norm and residual."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config, rngs)

    def before(
        self, x: jax.Array, angles: RotaryTables
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v of x [T, E], for attention."""
        normed = self.attention_norm(x) if self.norm_first else x
        return self.attention.project(normed, angles)

    def after(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x [T, E] after this layer, from what attention gave, [T, H, D]."""
        x = x + self.attention.merge(attended)
        if self.norm_first:
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.mlp(x))


class Decoder(nnx.Module):
    """A language model: tokens in, logits of the next token out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Random weights; see `init_model`, and `load_model` for a checkpoint's."""
        self.config = config
        width, hidden, vocab = config.input_size, config.hidden_size, config.vocab_size
        # Tied: the one array is the output's, [E, V], since a product with a
        # [V, E] array costs more than looking tokens up by columns.
        self.embedding = (
            None
            if config.tie_word_embeddings
            else random_param((vocab, width), config, rngs)
        )
        plain = {"use_bias": False, "config": config, "rngs": rngs}
        self.output = Linear(width, vocab, **plain)
        self.position_embedding = (
            random_param(
                (config.max_position_embeddings + config.position_offset, hidden),
                config,
                rngs,
            )
            if config.positions == "learned"
            else None
        )
        is_projected = width != hidden
        self.project_in = Linear(width, hidden, **plain) if is_projected else None
        self.project_out = Linear(hidden, width, **plain) if is_projected else None
        self.layers = nnx.List(
            [DecoderLayer(config, rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = make_norm(config) if config.final_norm else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits f32[B, T, V] for tokens i32[B, T]; causal, differentiable.

        Raises:
          ValueError: tokens is not of rank 2, or longer than learned positions reach.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected shape [B, T], got {tokens.shape}")
        batch, length = tokens.shape
        limit = self.config.max_position_embeddings
        if self.position_embedding is not None and length > limit:
            raise ValueError(
                f"tokens: expected at most max_position_embeddings ({limit}) "
                f"positions, got {length}"
            )

        def attend(layer, q, k, v):
            del layer
            rows = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
            return causal_attention(*rows).reshape(q.shape)

        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        hidden = self.trunk(tokens.reshape(-1), positions, attend)
        return self.logits(hidden.reshape(batch, length, -1))

    def trunk(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend
    ) -> jax.Array:
        """Hidden states [T, E] after the last norm, for flat tokens and positions.

        Args:
          tokens: i32[T], of one or many sequences.
          positions: i32[T], each token's place in its sequence. Learned positions
            past max_position_embeddings are the caller's mistake; nothing is
            raised under jit.
          attend: see `layers.Attend`; called once per layer, in order.
        """
        x, angles = self._start(tokens, positions)
        for i, layer in enumerate(self.layers):
            x = layer.after(x, attend(i, *layer.before(x, angles)))
        return self._end(x)

    def trunk_loop(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: AttendInLoop,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """What `trunk` gives, and the cache that `attend` handed from layer to layer.

        A loop over the layers, whose attention is compiled once and whose weights are
        chosen by a switch: unrolled, a program with many step sizes compiles for
        minutes, and a scan over stacked weights copies each layer's weights on a CPU.

        Args:
          tokens, positions: as for `trunk`.
          attend: see `layers.AttendInLoop`; the layer's index is traced.
          cache: a pytree; updated in place where it is donated.
        """
        x, angles = self._start(tokens, positions)
        qkv = self.layers[0].before(x, angles)

        def dense(layer: int, x: jax.Array, attended: jax.Array):
            x = self.layers[layer].after(x, attended)
            if layer + 1 == len(self.layers):
                return x, jax.tree.map(jnp.zeros_like, qkv)
            return x, self.layers[layer + 1].before(x, angles)

        branches = [functools.partial(dense, i) for i in range(len(self.layers))]

        def body(layer: jax.Array, carry):
            x, qkv, cache = carry
            attended, cache = attend(layer, *qkv, cache)
            x, qkv = jax.lax.switch(layer, branches, x, attended)
            return x, qkv, cache

        num_layers = jnp.int32(len(self.layers))
        carry = (x, qkv, cache)
        x, _, cache = jax.lax.fori_loop(jnp.int32(0), num_layers, body, carry)
        return self._end(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V] of hidden states [..., E] from `trunk`."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.output(hidden).astype(jnp.float32)

    def _start(
        self, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, RotaryTables]:
        """x [T, E] before the first layer, and the rotary tables."""
        x = self._embed(tokens)
        if self.position_embedding is None:
            return x, rotary.tables(positions, self.config)
        rows = positions + self.config.position_offset
        return x + self.position_embedding[...][rows], None

    def _end(self, x: jax.Array) -> jax.Array:
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [T, E] of tokens i32[T], in the width of the layers."""
        if self.embedding is None:
            x = self.output.weight[...].T[tokens]
        else:
            x = self.embedding[...][tokens]
        return x if self.project_in is None else self.project_in(x)


def init_model(config: ModelConfig, seed: int = 0, dtype: str | None = None) -> Decoder:
    """Decoder with random weights as transformers draws them: normal, std 0.02.

    Biases are zero and norms one. `dtype` replaces the config's.
    """
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    return Decoder(config, rngs=nnx.Rngs(seed))
