"""Decoder: one Flax NNX module for all families, put together from its config.

Place on the road: StepInputs -> [decoder] -> paged attention -> logits.

The decoder knows nothing of pages. Whoever calls `trunk` passes `attend`: the
engine's writes keys and values into pages and reads them through block tables;
`__call__` passes plain causal attention, for training and scoring.

Shape letters: B batch, T tokens, H query heads, K kv heads, D head_dim,
E hidden size, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged.models import rotary
from jpaged.models.config import ModelConfig
from jpaged.models.layers import (
    Attend,
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

    def __call__(
        self, x: jax.Array, angles: RotaryTables, layer: int, attend: Attend
    ) -> jax.Array:
        """What the residual stream x [T, E] gains."""
        num_tokens = x.shape[0]
        q, k, v = (
            linear(x).reshape(num_tokens, -1, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        if angles is not None:
            q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
        return self.out(attend(layer, q, k, v).reshape(num_tokens, -1))


class DecoderLayer(nnx.Module):
    """x [T, E] -> [T, E]: attention and MLP, each with its norm and residual."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: jax.Array, angles: RotaryTables, layer: int, attend: Attend
    ) -> jax.Array:
        """x [T, E] after this layer; `layer` is its index, for `attend`."""
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), angles, layer, attend)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, angles, layer, attend))
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
        x = self._embed(tokens)
        angles = None
        if self.position_embedding is None:
            angles = rotary.tables(positions, self.config)
        else:
            rows = positions + self.config.position_offset
            x = x + self.position_embedding[...][rows]
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, i, attend)
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V] of hidden states [..., E] from `trunk`."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.output(hidden).astype(jnp.float32)

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
