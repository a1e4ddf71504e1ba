"""Decoder: one Flax NNX module for all families, built from a ModelConfig.

Pipeline: StepInputs -> [models.decoder] -> paged attention -> logits.

The decoder knows nothing about pages. The caller of `trunk` passes the function
`attend`: that of the engine writes keys and values into pages and reads them through
block tables; `__call__` passes plain causal attention, for training and scoring.

Shape symbols: B batch, T tokens, H query heads, K kv heads, D head_dim,
E hidden size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.attention import invariant as invariant_attention
from jpaged.models import invariant, rotary
from jpaged.models.config import ModelConfig
from jpaged.models.invariant import settled
from jpaged.models.latent import LatentAttention
from jpaged.models.layers import (
    Attend,
    AttendInLoop,
    Cache,
    Linear,
    Mlp,
    Output,
    apply_all,
    causal_attention,
    make_norm,
    random_param,
    soft_cap,
)
from jpaged.models.loading import placing
from jpaged.models.moe import Experts

# Cosines and sines of the positions; None for learned positions.
RotaryTables = tuple[jax.Array, jax.Array] | None


class Attention(nnx.Module):
    """The projections around attention; attention itself is the caller's.

    Query, key and value are separate matrices, multiplied in one call where the
    backend has one: they can each be sharded over their own heads.
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
        """q [T, H, D], k and v [T, K, D] of x [T, E]; q and k are rotated."""
        num_tokens = x.shape[0]
        q, k, v = (
            out.reshape(num_tokens, -1, self.head_dim)
            for out in apply_all([self.query, self.key, self.value], x)
        )
        k, v = (parallel.select_kv_heads(x, self.num_kv_heads) for x in (k, v))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
        return settled((q, k, v))

    def merge(self, attended: jax.Array) -> jax.Array:
        """Output [T, E] for the residual stream, from the heads' outputs [T, H, D]."""
        return self.out(attended.reshape(attended.shape[0], -1))


class DecoderLayer(nnx.Module):
    """x [T, E] -> [T, E]: attention, then MLP or experts, with norms and residuals."""

    def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.norm_first = config.norm_first
        self.is_local = layer not in config.full_layers
        self.attention_norm = make_norm(config)
        is_latent = config.latent is not None
        self.attention = (LatentAttention if is_latent else Attention)(config, rngs)
        self.mlp_norm = make_norm(config)
        has_experts = config.has_experts(layer)
        self.mlp = None if has_experts else Mlp(config, rngs)
        self.experts = Experts(config, rngs) if has_experts else None
        has_out_norms = config.sublayer_norms
        self.attention_out_norm = make_norm(config) if has_out_norms else None
        self.mlp_out_norm = make_norm(config) if has_out_norms else None

    def before(
        self, x: jax.Array, angles: RotaryTables
    ) -> tuple[jax.Array, jax.Array, Any]:
        """q, k and v of x [T, E], for attention; see `layers.Attend`."""
        normed = self.attention_norm(x) if self.norm_first else x
        return self.attention.project(normed, angles)

    def after(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x [T, E] after this layer, given the output of attention [T, H, D]."""
        gain = self.attention.merge(attended)
        if self.attention_out_norm is not None:
            gain = self.attention_out_norm(gain)
        x = settled(x + gain)
        if self.norm_first:
            gain = self._feed_forward(self.mlp_norm(x))
            if self.mlp_out_norm is not None:
                gain = self.mlp_out_norm(gain)
            return settled(x + gain)
        x = self.attention_norm(x)
        return self.mlp_norm(settled(x + self._feed_forward(x)))

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        if self.experts is not None:
            return self.experts(x)
        assert self.mlp is not None
        return self.mlp(x)


class Decoder(nnx.Module):
    """A language model: maps tokens to the logits of their next tokens."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Initialise random weights; see also `init_model` and `load_model`."""
        self.config = config
        width, hidden, vocab = config.input_size, config.hidden_size, config.vocab_size
        # A tied model uses the output's array.
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

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        length: int | None = None,
    ) -> jax.Array:
        """Logits f32[B, T, V] of tokens i32[B, T]; causal, differentiable.

        Args:
          tokens: of sequences that all start at position 0.
          segment_ids: i32[B, T], which sequence of its row each token belongs to: equal
            numbers side by side (`jpaged.rl.pack`). Tokens see only their own sequence,
            and positions start at 0 in each. None: one sequence in each row.
          length: of the longest possible sequence, for rotary scaling that depends on
            it; see `rotary.frequencies`. None is T, as in transformers.

        Raises:
          ValueError: `tokens` does not have rank 2, or T exceeds the positions of a
            model with learned positions or length-dependent rotary scaling; or there
            are segments inside `batch_invariant`.
        """
        return self.logits(self.hidden_states(tokens, segment_ids, length=length))

    def hidden_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        length: int | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, E] of tokens i32[B, T]; `logits` maps them to logits.

        Args:
          tokens: see `__call__`.
          segment_ids: see `__call__`.
          length: see `__call__`.

        Raises:
          ValueError: see `__call__`.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected shape [B, T], got {tokens.shape}")
        batch, size = tokens.shape
        self._check_length(size)
        setting, mask = invariant.invariant(), None
        if segment_ids is not None:
            mask = segment_ids[:, :, None] == segment_ids[:, None, :]
        if setting is not None and self.config.latent is not None:
            raise ValueError(
                "batch_invariant: expected a model without latent attention, whose "
                f"products of heads depend on the batch, got {self.config.architecture}"
            )
        if segment_ids is not None and setting is not None:
            raise ValueError(
                "segment_ids: expected None inside batch_invariant, got segments; use "
                "one sequence in each row (jpaged.rl.pad)"
            )

        def attend(layer: int, q: jax.Array, k: jax.Array, v: Any) -> jax.Array:
            rows = jax.tree.map(
                lambda x: x.reshape(batch, size, *x.shape[1:]), (q, k, v)
            )
            options = self.attention_options(layer)
            if setting is not None:
                options["implementation"] = setting.implementation
                options["gradient"] = causal_attention
                out = invariant_attention.causal_attention(*rows, **options)
                return out.reshape(q.shape)
            options["mask"] = mask
            return causal_attention(*rows, **options).reshape(q.shape)

        positions = _positions(tokens, segment_ids).reshape(-1)
        length = size if length is None else length
        hidden = self.trunk(tokens.reshape(-1), positions, attend, length=length)
        return hidden.reshape(batch, size, -1)

    def trunk(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        length: int | None = None,
    ) -> jax.Array:
        """Hidden states [T, E] after the final norm.

        Args:
          tokens: i32[T], of one or several sequences, concatenated.
          positions: i32[T], position of each token in its sequence. The caller ensures
            that learned positions are below max_position_embeddings; under jit no
            error is raised.
          attend: see `layers.Attend`; called once per layer, in order.
          length: of the longest possible sequence; see `rotary.frequencies`.
        """
        x, angles = self._start(tokens, positions, length)
        for i, layer in enumerate(self.layers):
            x = layer.after(x, attend(i, *layer.before(x, angles[layer.is_local])))
        return self._end(x)

    def trunk_loop(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: AttendInLoop,
        cache: Cache,
        *,
        is_unrolled: bool = False,
        length: int | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Any, Cache]:
        """Hidden states as from `trunk`, with a cache that `attend` updates.

        `docs/decisions/layers.md` compares the two forms.

        Args:
          tokens: as in `trunk`.
          positions: as in `trunk`.
          attend: see `layers.AttendInLoop`; called once per layer, in order, with the
            layer's number if `is_unrolled`, else once with a traced index.
          cache: a pytree; updated in place if it is donated.
          is_unrolled: whether every layer has its own code, without branches. Otherwise
            the layers are a loop with one attention, which compiles faster.
          length: as in `trunk`.
          taps: layers whose hidden states are returned too.

        Returns:
          Hidden states [T, E] after the final norm, and the updated cache. With `taps`,
          a pair comes instead of the hidden states: they, and a tuple of those after
          each of these layers, without the final norm.
        """
        x, angles = self._start(tokens, positions, length)
        if not is_unrolled:
            x, cache, tapped = self._loop(x, angles, attend, cache, taps)
            return (self._end(x), tapped) if taps else self._end(x), cache
        found = []
        for i, layer in enumerate(self.layers):
            attended, cache = attend(i, *layer.before(x, angles[layer.is_local]), cache)
            x = layer.after(x, attended)
            found.append(x)
        x = self._end(x)
        return (x, tuple(found[i] for i in taps)) if taps else x, cache

    def _loop(
        self,
        x: jax.Array,
        angles: tuple[RotaryTables, RotaryTables],
        attend: AttendInLoop,
        cache: Cache,
        taps: Sequence[int],
    ) -> tuple[jax.Array, Cache, tuple[jax.Array, ...]]:
        """x [T, E] after all layers, the updated cache, and x after the layers `taps`.

        A switch selects each layer's weights: a scan over stacked weights copies each
        layer's weights on a CPU. The pages do not pass through the switch.
        """
        qkv = self.layers[0].before(x, angles[self.layers[0].is_local])

        def dense(
            layer: int, x: jax.Array, attended: jax.Array
        ) -> tuple[jax.Array, Any]:
            x = self.layers[layer].after(x, attended)
            if layer + 1 == len(self.layers):
                return x, jax.tree.map(jnp.zeros_like, qkv)
            following = self.layers[layer + 1]
            return x, following.before(x, angles[following.is_local])

        branches = [functools.partial(dense, i) for i in range(len(self.layers))]

        def body(
            layer: jax.Array,
            carry: tuple[jax.Array, tuple[jax.Array, jax.Array, Any], Cache, Any],
        ) -> Any:
            x, qkv, cache, tapped = carry
            attended, cache = attend(layer, *qkv, cache)
            x, qkv = jax.lax.switch(layer, branches, x, attended)
            tapped = tuple(
                jnp.where(layer == tap, x, before)
                for tap, before in zip(taps, tapped, strict=True)
            )
            return x, qkv, cache, tapped

        num_layers = jnp.int32(len(self.layers))
        carry = (x, qkv, cache, (jnp.zeros_like(x),) * len(taps))
        x, _, cache, tapped = jax.lax.fori_loop(jnp.int32(0), num_layers, body, carry)
        return x, cache, tapped

    def attention_options(self, layer: int | jax.Array) -> dict[str, Any]:
        """Options of a layer's attention, as arguments of `paged_attention`.

        Args:
          layer: number of the layer, or a traced index in a loop over layers. If the
            layers differ in their window, a traced index makes the window traced as
            well, so that one compiled attention serves all layers.
        """
        config, windows = self.config, self.config.windows
        options: dict[str, Any] = {"scale": config.attention_scale}
        options["logits_soft_cap"] = config.attention_soft_cap
        if isinstance(layer, int) or len(set(windows)) == 1:
            options["sliding_window"] = windows[layer if isinstance(layer, int) else 0]
        else:
            unlimited = jnp.iinfo(jnp.int32).max
            sizes = [unlimited if w is None else w for w in windows]
            options["sliding_window"] = jnp.asarray(sizes, jnp.int32)[layer]
        sinks = [each.attention.sinks for each in self.layers]
        if config.attention_sinks and isinstance(layer, int):
            options["sinks"] = _values(sinks[layer])
        elif config.attention_sinks:
            options["sinks"] = jnp.stack([_values(each) for each in sinks])[layer]
        return options

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V] of hidden states [..., E] from `trunk`."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        logits = self.output(hidden)
        logits = parallel.gather_logits(logits, self.config.vocab_size)
        logits = soft_cap(logits.astype(jnp.float32), self.config.logits_soft_cap)
        return settled(logits)

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
        self, tokens: jax.Array, positions: jax.Array, length: int | None
    ) -> tuple[jax.Array, tuple[RotaryTables, RotaryTables]]:
        """x [T, E] before the first layer, and rotary tables by `layer.is_local`."""
        x, config = self._embed(tokens), self.config
        if self.position_embedding is not None:
            rows = positions + config.position_offset
            x = settled(x + self.position_embedding[...][rows])
            return x, (None, None)
        angles = settled(rotary.tables(positions, config, length=length))
        if config.local_rope_theta is None:
            return x, (angles, angles)
        local_angles = rotary.tables(positions, config, is_local=True)
        return x, (angles, settled(local_angles))

    def _end(self, x: jax.Array) -> jax.Array:
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [T, E] of tokens i32[T], projected to the hidden size."""
        if self.embedding is None:
            x = self.output.embed(tokens, self.config)
        else:
            table = self.embedding[...]
            x = parallel.embed_tokens(table, tokens, self.config.vocab_size)
        if self.config.scaled_embedding:
            # The factor is rounded to the dtype, as in transformers.
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        x = settled(x)
        return x if self.project_in is None else self.project_in(x)


def _positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Positions i32[B, T] of tokens in their sequences."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    if segment_ids.shape != tokens.shape:
        raise ValueError(
            f"segment_ids: expected the shape of tokens {tokens.shape}, got "
            f"{segment_ids.shape}"
        )
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = jnp.where(segment_ids != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def _values(param: nnx.Param | None) -> jax.Array:
    assert param is not None
    return param[...]


def as_stored(config: ModelConfig) -> ModelConfig:
    """The config with the weight layout that is fastest on this process's backend."""
    is_tpu = jax.default_backend() == "tpu"
    return dataclasses.replace(config, vocab_first=config.vocab_first or is_tpu)


def init_model(
    config: ModelConfig,
    seed: int = 0,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Decoder with random weights, distributed as in transformers.

    Weights are normal with standard deviation `config.initializer_range`, biases are
    zero and norms one.

    Args:
      config: structure of the decoder.
      seed: of the random numbers.
      dtype: replaces the config's.
      mesh: a mesh from `jpaged.make_mesh`. Each device initialises only its own part.
        The values equal those without a mesh up to rounding.

    Raises:
      ValueError: the model cannot be divided over the mesh.
    """
    config = as_stored(config)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)

    def make() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(seed))

    sharding_of = placing.placement(config, mesh)
    if mesh is None:
        return make()
    return placing.init_sharded(make, sharding_of)
