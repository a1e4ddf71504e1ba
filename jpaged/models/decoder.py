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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.models import rotary
from jpaged.models.config import ModelConfig
from jpaged.models.layers import (
    Attend,
    AttendInLoop,
    Cache,
    Linear,
    Mlp,
    Output,
    causal_attention,
    make_norm,
    random_param,
    soft_cap,
)
from jpaged.models.loading import placing
from jpaged.models.moe import Experts

# Cosines and sines of the step's positions; None for learned positions.
RotaryTables = tuple[jax.Array, jax.Array] | None


class Attention(nnx.Module):
    """Query, key and value of x [T, E], attention by the caller, and the way back.

    Three matrices and not one: fused, they gain nothing on a CPU, and apart each
    can be sharded over its own heads.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.head_dim, self.num_kv_heads = config.head_dim, config.num_kv_heads
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        hidden = config.hidden_size
        qkv = {"use_bias": config.qkv_bias, "config": config, "rngs": rngs}
        self.query = Linear(hidden, q_size, **qkv)
        self.key = Linear(hidden, kv_size, **qkv)
        self.value = Linear(hidden, kv_size, **qkv)
        self.out = Linear(
            q_size,
            hidden,
            use_bias=config.out_bias,
            config=config,
            rngs=rngs,
            part="attention.out",
        )
        has_norms = config.qk_norm
        self.query_norm = make_norm(config, config.head_dim) if has_norms else None
        self.key_norm = make_norm(config, config.head_dim) if has_norms else None
        self.sinks = (
            random_param((config.num_heads,), config, rngs)
            if config.attention_sinks
            else None
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
        k, v = (parallel.select_kv_heads(x, self.num_kv_heads) for x in (k, v))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
        return q, k, v

    def merge(self, attended: jax.Array) -> jax.Array:
        """What the residual stream gains [T, E] of the heads' outputs [T, H, D]."""
        return self.out(attended.reshape(attended.shape[0], -1))


class DecoderLayer(nnx.Module):
    """x [T, E] -> [T, E]: attention, then MLP or experts, with norms and residuals."""

    def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.norm_first = config.norm_first
        self.is_local = layer not in config.full_layers
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = make_norm(config)
        has_experts = config.has_experts(layer)
        self.mlp = None if has_experts else Mlp(config, rngs)
        self.experts = Experts(config, rngs) if has_experts else None
        has_more = config.sublayer_norms
        self.attention_out_norm = make_norm(config) if has_more else None
        self.mlp_out_norm = make_norm(config) if has_more else None

    def before(
        self, x: jax.Array, angles: RotaryTables
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v of x [T, E], for attention."""
        normed = self.attention_norm(x) if self.norm_first else x
        return self.attention.project(normed, angles)

    def after(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x [T, E] after this layer, from what attention gave, [T, H, D]."""
        gain = self.attention.merge(attended)
        if self.attention_out_norm is not None:
            gain = self.attention_out_norm(gain)
        x = x + gain
        if self.norm_first:
            gain = self._feed_forward(self.mlp_norm(x))
            if self.mlp_out_norm is not None:
                gain = self.mlp_out_norm(gain)
            return x + gain
        x = self.attention_norm(x)
        return self.mlp_norm(x + self._feed_forward(x))

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        if self.experts is not None:
            return self.experts(x)
        assert self.mlp is not None
        return self.mlp(x)


class Decoder(nnx.Module):
    """A language model: tokens in, logits of the next token out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Random weights; see `init_model`, and `load_model` for a checkpoint's."""
        self.config = config
        width, hidden, vocab = config.input_size, config.hidden_size, config.vocab_size
        # Tied: the one array is the output's.
        self.embedding = (
            None
            if config.tie_word_embeddings
            else random_param((vocab, width), config, rngs)
        )
        plain = {
            "use_bias": False,
            "config": config,
            "rngs": rngs,
            "may_be_quantized": False,
        }
        self.output = Output(width, vocab, config, rngs)
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
            [DecoderLayer(config, i, rngs) for i in range(config.num_layers)]
        )
        self.final_norm = make_norm(config) if config.final_norm else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits f32[B, T, V] for tokens i32[B, T]; causal, differentiable.

        Raises:
          ValueError: tokens is not of rank 2, or longer than learned positions or a
            dynamic rotary scaling reach.
        """
        return self.logits(self.hidden_states(tokens))

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """What `__call__` makes its logits of, [B, T, E]; raises as it does."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected shape [B, T], got {tokens.shape}")
        batch, length = tokens.shape
        self._check_length(length)

        def attend(layer, q, k, v):
            rows = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
            options = self.attention_options(layer)
            return causal_attention(*rows, **options).reshape(q.shape)

        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        hidden = self.trunk(tokens.reshape(-1), positions, attend)
        return hidden.reshape(batch, length, -1)

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
            x = layer.after(x, attend(i, *layer.before(x, angles[layer.is_local])))
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
        qkv = self.layers[0].before(x, angles[self.layers[0].is_local])

        def dense(layer: int, x: jax.Array, attended: jax.Array):
            x = self.layers[layer].after(x, attended)
            if layer + 1 == len(self.layers):
                return x, jax.tree.map(jnp.zeros_like, qkv)
            following = self.layers[layer + 1]
            return x, following.before(x, angles[following.is_local])

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

    def attention_options(self, layer: int | jax.Array) -> dict[str, Any]:
        """What a layer asks of its attention, as arguments of `paged_attention`.

        `layer` may be traced, as in `trunk_loop`; where layers differ in their window,
        that is traced then as well, so that one attention serves them all.
        """
        config = self.config
        options: dict[str, Any] = {"scale": config.attention_scale}
        options["logits_soft_cap"] = config.attention_soft_cap
        windows = config.windows
        if len(set(windows)) == 1 or isinstance(layer, int):
            is_one = not isinstance(layer, int)
            options["sliding_window"] = windows[0 if is_one else layer]
        else:
            everything = jnp.iinfo(jnp.int32).max
            sizes = [everything if w is None else w for w in windows]
            options["sliding_window"] = jnp.asarray(sizes, jnp.int32)[layer]
        if config.attention_sinks:
            sinks = [each.attention.sinks for each in self.layers]
            options["sinks"] = jnp.stack([s[...] for s in sinks if s is not None])[
                layer
            ]
        return options

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V] of hidden states [..., E] from `trunk`."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        logits = self.output(hidden)
        logits = parallel.gather_logits(logits, self.config.vocab_size)
        return soft_cap(logits.astype(jnp.float32), self.config.logits_soft_cap)

    def _check_length(self, length: int) -> None:
        config = self.config
        scaling = config.rope_scaling
        is_bounded = config.positions == "learned" or (
            scaling is not None and scaling.kind in ("dynamic", "longrope")
        )
        if is_bounded and length > config.max_length:
            raise ValueError(
                f"tokens: expected at most {config.longest_name} "
                f"({config.max_length}) positions, got {length}"
            )

    def _start(
        self, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, tuple[RotaryTables, RotaryTables]]:
        """x [T, E] before the first layer, and rotary tables: not local, local."""
        x, config = self._embed(tokens), self.config
        if self.position_embedding is not None:
            rows = positions + config.position_offset
            return x + self.position_embedding[...][rows], (None, None)
        angles = rotary.tables(positions, config)
        if config.local_rope_theta is None:
            return x, (angles, angles)
        return x, (angles, rotary.tables(positions, config, is_local=True))

    def _end(self, x: jax.Array) -> jax.Array:
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [T, E] of tokens i32[T], in the width of the layers."""
        tied = self.embedding is None
        table = self.output.table if tied else self.embedding[...]
        x = parallel.embed_tokens(table, tokens, self.config.vocab_size)
        if self.config.scaled_embedding:
            # Rounded to the dtype first, as transformers does.
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return x if self.project_in is None else self.project_in(x)


def as_stored(config: ModelConfig) -> ModelConfig:
    """The config with weights in the order that this process's backend wants."""
    is_tpu = jax.default_backend() == "tpu"
    return dataclasses.replace(config, vocab_first=config.vocab_first or is_tpu)


def init_model(
    config: ModelConfig,
    seed: int = 0,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Decoder with random weights as transformers draws them: normal, std 0.02.

    Biases are zero and norms one. `dtype` replaces the config's. On a `mesh` of
    `jpaged.make_mesh` each device draws its own part, of the same numbers but for
    rounding.

    Raises:
      ValueError: the model does not divide over the mesh.
    """
    config = as_stored(config)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)

    def draw() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(seed))

    sharding_of = placing.placement(config, mesh)
    if mesh is None:
        return draw()
    return placing.drawn(draw, sharding_of)
