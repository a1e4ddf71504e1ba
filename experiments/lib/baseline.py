"""Baseline: plain JAX generation with a static batch and a contiguous cache.

This is what a researcher writes in an afternoon. Prompts are padded on the left to the
longest one. The cache is allocated for the longest possible sequence, and attention
reads all of it under a mask. Tokens are greedy, and the batch runs as many steps as the
longest output needs. One jitted function computes the prompts, another one a step; the
loop over steps is in Python (`decode_calls`) or inside one program (`decode_loop`).

The baseline uses the weights of a Llama-shaped `Decoder` and none of its code. Its
layouts are chosen for speed: keys and values are [batch, KV heads, length, head_dim],
one donated array per layer; weights are [in, out]; only the last token of a prompt gets
logits.

Shape symbols: B sequences, T tokens of a prompt, C slots of the cache, H query heads, K
KV heads, G = H // K, D head_dim, E hidden size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.models import Decoder

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BaselineShape:
    """Sizes of the model; static under jit."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float


class StaticBatch(NamedTuple):
    """A static batch during generation."""

    keys: tuple[jax.Array, ...]  # one f32[B, K, C, D] per layer
    values: tuple[jax.Array, ...]  # one f32[B, K, C, D] per layer
    starts: jax.Array  # i32[B], padding slots before each prompt
    slot: jax.Array  # i32[], slot of every sequence's next token
    tokens: jax.Array  # i32[B], last tokens, not in the cache yet


def weights_of(model: Decoder) -> tuple[Weights, BaselineShape]:
    """Extracts the model's weights as a plain dictionary, and its sizes.

    Raises:
      ValueError: The model does not have the shape of Llama.
    """
    config = model.config
    if (config.norm, config.positions, config.gated_mlp) != ("rms", "rotary", True):
        raise ValueError(
            "model: expected Llama's shape (RMS norm, rotary positions, gated MLP), "
            f"got {config.architecture}"
        )
    # Llama has a gated MLP in every layer, an output matrix and a final norm, which
    # the types of other families allow to be None.
    decoder: Any = model
    layers = [
        {
            "attention_norm": layer.attention_norm.weight[...],
            "query": layer.attention.query.weight[...],
            "key": layer.attention.key.weight[...],
            "value": layer.attention.value.weight[...],
            "out": layer.attention.out.weight[...],
            "mlp_norm": layer.mlp_norm.weight[...],
            "gate": layer.mlp.gate.weight[...],
            "up": layer.mlp.up.weight[...],
            "down": layer.mlp.down.weight[...],
        }
        for layer in decoder.layers
    ]
    weights = {"layers": layers, "output": decoder.output.weight[...]}
    weights["final_norm"] = decoder.final_norm.weight[...]
    if model.embedding is not None:
        weights["embedding"] = model.embedding[...]
    shape = BaselineShape(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.rope_theta,
        config.norm_eps,
    )
    return weights, shape


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts on the left.

    Returns:
      Prompts i32[B, T], and the number of padding zeros before each, i32[B].
    """
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
    return tokens, np.array([longest - len(p) for p in prompts], np.int32)


@functools.partial(jax.jit, static_argnames=("shape", "max_len"))
def prefill(
    weights: Weights,
    tokens: jax.Array,
    starts: jax.Array,
    *,
    shape: BaselineShape,
    max_len: int,
) -> StaticBatch:
    """Computes prompts i32[B, T]; returns the state with each first output token."""
    state, logits = prefill_logits(weights, tokens, starts, shape, max_len)
    return state._replace(tokens=_most_probable(logits))


def prefill_logits(
    weights: Weights,
    tokens: jax.Array,
    starts: jax.Array,
    shape: BaselineShape,
    max_len: int,
) -> tuple[StaticBatch, jax.Array]:
    """Computes prompts without choosing the next tokens.

    Args:
      weights: From `weights_of`.
      tokens: i32[B, T], prompts padded on the left.
      starts: i32[B], padding slots before each prompt.
      shape: Sizes of the model.
      max_len: Slots C of the cache.

    Returns:
      The state, whose `tokens` the caller has to replace, and logits f32[B, V].
    """
    _, length = tokens.shape
    slots = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = jnp.maximum(slots - starts[:, None], 0)
    is_real = slots >= starts[:, None]
    is_causal = slots.T >= slots
    # A padding token attends to itself, so that its softmax does not divide by zero.
    mask = (is_causal[None] & is_real[:, None, :]) | jnp.eye(length, dtype=bool)[None]
    keys, values = [], []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        del layer
        padding = ((0, 0), (0, 0), (0, max_len - length), (0, 0))
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        keys.append(jnp.pad(k, padding))
        values.append(jnp.pad(v, padding))
        return _attention(q, k, v, mask)

    x = _trunk(weights, tokens, positions, attend, shape)
    state = StaticBatch(
        keys=tuple(keys),
        values=tuple(values),
        starts=starts,
        slot=jnp.int32(length),
        tokens=tokens[:, -1],
    )
    return state, x[:, -1] @ weights["output"]


def step_logits(
    weights: Weights, state: StaticBatch, shape: BaselineShape
) -> tuple[StaticBatch, jax.Array]:
    """Writes `state.tokens` to the cache; returns the state and logits f32[B, V]."""
    capacity = state.keys[0].shape[2]
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    mask = (slots >= state.starts[:, None]) & (slots <= state.slot)
    keys, values = list(state.keys), list(state.values)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        put = functools.partial(lax.dynamic_update_slice_in_dim, axis=2)
        keys[layer] = put(keys[layer], k.transpose(0, 2, 1, 3), state.slot)
        values[layer] = put(values[layer], v.transpose(0, 2, 1, 3), state.slot)
        return _attention(q, keys[layer], values[layer], mask[:, None, :])

    positions = (state.slot - state.starts)[:, None]
    x = _trunk(weights, state.tokens[:, None], positions, attend, shape)
    state = state._replace(keys=tuple(keys), values=tuple(values), slot=state.slot + 1)
    return state, x[:, 0] @ weights["output"]


def _step(weights: Weights, state: StaticBatch, shape: BaselineShape) -> StaticBatch:
    """Decodes one token of each sequence."""
    state, logits = step_logits(weights, state, shape)
    return state._replace(tokens=_most_probable(logits))


step = jax.jit(_step, static_argnames="shape", donate_argnames="state")


def decode_calls(
    weights: Weights, state: StaticBatch, num_steps: int, *, shape: BaselineShape
) -> tuple[StaticBatch, jax.Array]:
    """Decodes by `num_steps` calls of `step`; returns tokens i32[B, steps + 1] too."""
    tokens = [state.tokens.copy()]
    for _ in range(num_steps):
        state = step(weights, state, shape=shape)
        tokens.append(state.tokens.copy())
    return state, jnp.stack(tokens, axis=1)


def decode_loop(
    weights: Weights, state: StaticBatch, num_steps: int, *, shape: BaselineShape
) -> tuple[StaticBatch, jax.Array]:
    """Computes the result of `decode_calls` in one device call."""
    state, tokens = _loop(weights, state, num_steps, shape=shape)
    return state, tokens[: num_steps + 1].T


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="state")
def _loop(
    weights: Weights, state: StaticBatch, num_steps: int, *, shape: BaselineShape
) -> tuple[StaticBatch, jax.Array]:
    """The state after `num_steps` (traced) steps, and tokens i32[C + 1, B]."""
    batch, _, capacity, _ = state.keys[0].shape
    tokens = jnp.zeros((capacity + 1, batch), jnp.int32).at[0].set(state.tokens)

    def advance(
        index: jax.Array, carry: tuple[StaticBatch, jax.Array]
    ) -> tuple[StaticBatch, jax.Array]:
        state, tokens = carry
        state = _step(weights, state, shape)
        return state, tokens.at[index + 1].set(state.tokens)

    return lax.fori_loop(0, num_steps, advance, (state, tokens))


def _trunk(
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[..., jax.Array],
    shape: BaselineShape,
) -> jax.Array:
    """Hidden states [B, T, E] after the final norm, of tokens i32[B, T]."""
    batch, length = tokens.shape
    if "embedding" in weights:
        x = weights["embedding"][tokens]
    else:
        x = weights["output"].T[tokens]
    half = np.arange(0, shape.head_dim, 2, dtype=np.float32)[None, None, None, :]
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(
        shape.rope_theta ** (-half / shape.head_dim), jnp.float32
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    for index, layer in enumerate(weights["layers"]):
        normed = _rms_norm(x, layer["attention_norm"], shape.norm_eps)
        q, k, v = (
            (normed @ layer[name]).reshape(batch, length, -1, shape.head_dim)
            for name in ("query", "key", "value")
        )
        attended = attend(index, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + attended.reshape(batch, length, -1) @ layer["out"]
        normed = _rms_norm(x, layer["mlp_norm"], shape.norm_eps)
        gated = jax.nn.silu(normed @ layer["gate"]) * (normed @ layer["up"])
        x = x + gated @ layer["down"]
    return _rms_norm(x, weights["final_norm"], shape.norm_eps)


def _attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention of q [B, T, H, D] over keys and values [B, K, C, D].

    `mask` is bool[B, T, C]. Returns [B, T, H, D].
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    # [B, T, K, G, D] -> [B, K, G * T, D]: the queries of a KV head are adjacent.
    q = q.reshape(batch, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    groups = q.shape[2]
    q = q.reshape(batch, num_kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkqd,bkcd->bkqc", q, keys) * head_dim**-0.5
    scores = jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], scores, -jnp.inf)
    out = jnp.einsum("bkqc,bkcd->bkqd", jax.nn.softmax(scores, axis=-1), values)
    out = out.reshape(batch, num_kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _most_probable(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(variance + eps) * weight[None, None, :]


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads [B, T, H, D]; dimension i is paired with i + D / 2."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
