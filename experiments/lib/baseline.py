"""Baseline: generation as a researcher writes it in an afternoon, without jpaged.

A static batch, prompts padded on the left to the longest, a contiguous cache that is
allocated for the longest possible sequence, attention over the whole of it under a
mask, greedy tokens, and as many steps as the longest answer needs. One jitted function
for the prompts and one for a step; the loop over the steps in Python (`decode_calls`)
or inside one program (`decode_loop`).

It takes the weights of a Llama-shaped `Decoder` and none of its code. It is given what
helps it: keys and values lie [batch, kv heads, length, head_dim], one array for each
layer, donated; weights are stored [in, out]; only the last token of a prompt gets
logits.

Letters: B sequences, T tokens of a prompt, C slots of the cache, H query heads, K kv
heads, G = H // K, D head_dim, E hidden size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.models import Decoder

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the functions below need to know beside the weights; static under jit."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float


class State(NamedTuple):
    """A static batch in mid-generation."""

    keys: tuple[jax.Array, ...]  # of each layer, f32[B, K, C, D]
    values: tuple[jax.Array, ...]  # of each layer, f32[B, K, C, D]
    starts: jax.Array  # i32[B], slots of padding before the prompt
    slot: jax.Array  # i32[], where every sequence's next token goes
    tokens: jax.Array  # i32[B], the last tokens, not in the cache yet


def weights_of(model: Decoder) -> tuple[Weights, Shape]:
    """The model's weights as a plain dictionary, and its shape.

    Raises:
      ValueError: the model is not Llama-shaped.
    """
    config = model.config
    if (config.norm, config.positions, config.gated_mlp) != ("rms", "rotary", True):
        raise ValueError(
            "model: expected Llama's shape (RMS norm, rotary positions, gated MLP), "
            f"got {config.architecture}"
        )
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
        for layer in model.layers
    ]
    weights = {"layers": layers, "output": model.output.weight[...]}
    weights["final_norm"] = model.final_norm.weight[...]
    if model.embedding is not None:
        weights["embedding"] = model.embedding[...]
    shape = Shape(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.rope_theta,
        config.norm_eps,
    )
    return weights, shape


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts i32[B, T] with zeros before the shorter ones, and how many, i32[B]."""
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
    shape: Shape,
    max_len: int,
) -> State:
    """The batch after its prompts i32[B, T], with the first token of each answer."""
    state, logits = prefill_logits(weights, tokens, starts, shape, max_len)
    return state._replace(tokens=_most_probable(logits))


def prefill_logits(
    weights: Weights, tokens: jax.Array, starts: jax.Array, shape: Shape, max_len: int
) -> tuple[State, jax.Array]:
    """The batch after its prompts, and f32[B, V]; its `tokens` are still to be chosen.

    `starts` i32[B] are the slots of padding before each prompt.
    """
    _, length = tokens.shape
    slots = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = jnp.maximum(slots - starts[:, None], 0)
    is_real = slots >= starts[:, None]
    is_causal = slots.T >= slots
    # A padding token sees itself, so that its softmax is no division by zero.
    mask = (is_causal[None] & is_real[:, None, :]) | jnp.eye(length, dtype=bool)[None]
    keys, values = [], []

    def attend(layer, q, k, v):
        del layer
        room = ((0, 0), (0, 0), (0, max_len - length), (0, 0))
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        keys.append(jnp.pad(k, room))
        values.append(jnp.pad(v, room))
        return _attention(q, k, v, mask)

    x = _trunk(weights, tokens, positions, attend, shape)
    state = State(
        keys=tuple(keys),
        values=tuple(values),
        starts=starts,
        slot=jnp.int32(length),
        tokens=tokens[:, -1],
    )
    return state, x[:, -1] @ weights["output"]


def step_logits(
    weights: Weights, state: State, shape: Shape
) -> tuple[State, jax.Array]:
    """The batch with `state.tokens` in the cache, and f32[B, V] behind them."""
    capacity = state.keys[0].shape[2]
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    mask = (slots >= state.starts[:, None]) & (slots <= state.slot)
    keys, values = list(state.keys), list(state.values)

    def attend(layer, q, k, v):
        put = functools.partial(lax.dynamic_update_slice_in_dim, axis=2)
        keys[layer] = put(keys[layer], k.transpose(0, 2, 1, 3), state.slot)
        values[layer] = put(values[layer], v.transpose(0, 2, 1, 3), state.slot)
        return _attention(q, keys[layer], values[layer], mask[:, None, :])

    positions = (state.slot - state.starts)[:, None]
    x = _trunk(weights, state.tokens[:, None], positions, attend, shape)
    state = state._replace(keys=tuple(keys), values=tuple(values), slot=state.slot + 1)
    return state, x[:, 0] @ weights["output"]


def _step(weights: Weights, state: State, shape: Shape) -> State:
    """The batch with one token more each."""
    state, logits = step_logits(weights, state, shape)
    return state._replace(tokens=_most_probable(logits))


step = jax.jit(_step, static_argnames="shape", donate_argnames="state")


def decode_calls(
    weights: Weights, state: State, num_steps: int, *, shape: Shape
) -> tuple[State, jax.Array]:
    """The batch after `num_steps` calls of `step`, and its tokens i32[B, steps + 1]."""
    tokens = [state.tokens.copy()]
    for _ in range(num_steps):
        state = step(weights, state, shape=shape)
        tokens.append(state.tokens.copy())
    return state, jnp.stack(tokens, axis=1)


def decode_loop(
    weights: Weights, state: State, num_steps: int, *, shape: Shape
) -> tuple[State, jax.Array]:
    """What `decode_calls` gives, from one device call."""
    state, tokens = _loop(weights, state, num_steps, shape=shape)
    return state, tokens[: num_steps + 1].T


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="state")
def _loop(weights, state, num_steps, *, shape):
    """The batch after `num_steps` steps, a number that is traced, and its tokens."""
    batch, _, capacity, _ = state.keys[0].shape
    tokens = jnp.zeros((capacity + 1, batch), jnp.int32).at[0].set(state.tokens)

    def advance(index, carry):
        state, tokens = carry
        state = _step(weights, state, shape)
        return state, tokens.at[index + 1].set(state.tokens)

    return lax.fori_loop(0, num_steps, advance, (state, tokens))


def cache_bytes(shape: Shape, num_layers: int, batch: int, max_len: int) -> int:
    """Bytes of the cache in float32: allocated for every sequence's longest."""
    return 2 * 4 * num_layers * batch * max_len * shape.num_kv_heads * shape.head_dim


def _trunk(weights, tokens, positions, attend, shape) -> jax.Array:
    """Hidden states [B, T, E] after the last norm, for tokens i32[B, T]."""
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


def _attention(q, keys, values, mask) -> jax.Array:
    """[B, T, H, D] of q [B, T, H, D] over keys and values [B, K, C, D].

    `mask` is bool[B, T, C].
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    # [B, T, K, G, D] -> [B, K, G * T, D]: the queries of a kv head side by side.
    q = q.reshape(batch, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    groups = q.shape[2]
    q = q.reshape(batch, num_kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkqd,bkcd->bkqc", q, keys) * head_dim**-0.5
    scores = jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], scores, -jnp.inf)
    out = jnp.einsum("bkqc,bkcd->bkqd", jax.nn.softmax(scores, axis=-1), values)
    out = out.reshape(batch, num_kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _most_probable(logits) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _rms_norm(x, weight, eps) -> jax.Array:
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(variance + eps) * weight[None, None, :]


def _rotate(x, cos, sin) -> jax.Array:
    """Heads [B, T, H, D] turned; dimension i is paired with i + D / 2."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
