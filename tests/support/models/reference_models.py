"""Reference implementations of Llama and OPT in float64 numpy.

Written from the formulas and the tensor names alone, with loops over tokens and heads.
Shares no code with the package.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

Weights = dict[str, np.ndarray]


def relative_error(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest magnitude of the reference."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def reference_logits(folder: pathlib.Path, tokens: list[int]) -> np.ndarray:
    """Logits f64[T, V] of one sequence, for a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    weights = {name: array.astype(np.float64) for name, array in stored.items()}
    return forward(config, weights, tokens)


def forward(config: dict[str, Any], weights: Weights, tokens: list[int]) -> np.ndarray:
    """Logits f64[T, V] of one sequence."""
    family = {"llama": llama, "opt": opt}[config["model_type"]]
    return family(config, weights, tokens)


def llama(config: dict[str, Any], weights: Weights, tokens: list[int]) -> np.ndarray:
    eps = config["rms_norm_eps"]
    head_dim, num_heads = config["head_dim"], config["num_attention_heads"]
    thetas = rotary_frequencies(config)
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        h = rms_norm(x, weights[name + "input_layernorm.weight"], eps)
        q, k, v = (
            split_heads(dense(weights, f"{name}self_attn.{p}_proj", h), head_dim)
            for p in "qkv"
        )
        q, k = rotate_all(q, thetas), rotate_all(k, thetas)
        attended = attend(q, k, v, num_heads)
        x = x + dense(weights, name + "self_attn.o_proj", attended)
        h = rms_norm(x, weights[name + "post_attention_layernorm.weight"], eps)
        gate = dense(weights, name + "mlp.gate_proj", h)
        up = dense(weights, name + "mlp.up_proj", h)
        x = x + dense(weights, name + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    tied = config["tie_word_embeddings"]
    out = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return x @ out.T


def opt(config: dict[str, Any], weights: Weights, tokens: list[int]) -> np.ndarray:
    top, num_heads = "model.decoder.", config["num_attention_heads"]
    head_dim = config["hidden_size"] // num_heads
    is_pre_norm = config["do_layer_norm_before"]
    x = weights[top + "embed_tokens.weight"][tokens]
    if top + "project_in.weight" in weights:
        x = x @ weights[top + "project_in.weight"].T
    x = x + weights[top + "embed_positions.weight"][2 : 2 + len(tokens)]
    for i in range(config["num_hidden_layers"]):
        name = f"{top}layers.{i}."
        h = layer_norm(weights, name + "self_attn_layer_norm", x) if is_pre_norm else x
        q, k, v = (
            split_heads(dense(weights, f"{name}self_attn.{p}_proj", h), head_dim)
            for p in "qkv"
        )
        attended = attend(q, k, v, num_heads)
        x = x + dense(weights, name + "self_attn.out_proj", attended)
        if not is_pre_norm:
            x = layer_norm(weights, name + "self_attn_layer_norm", x)
        h = layer_norm(weights, name + "final_layer_norm", x) if is_pre_norm else x
        inner = np.maximum(dense(weights, name + "fc1", h), 0)
        x = x + dense(weights, name + "fc2", inner)
        if not is_pre_norm:
            x = layer_norm(weights, name + "final_layer_norm", x)
    if is_pre_norm:
        x = layer_norm(weights, top + "final_layer_norm", x)
    if top + "project_out.weight" in weights:
        x = x @ weights[top + "project_out.weight"].T
    tied = config["tie_word_embeddings"]
    return x @ weights[top + "embed_tokens.weight" if tied else "lm_head.weight"].T


def dense(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    out = x @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if name + ".bias" in weights else out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * weights[name + ".weight"] + weights[name + ".bias"]


def split_heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    return x.reshape(len(x), -1, head_dim)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, num_heads: int) -> np.ndarray:
    """Causal attention [T, H, D] -> [T, H * D], with loops over tokens and heads."""
    num_kv_heads, head_dim = k.shape[1:]
    rows = []
    for t in range(len(q)):
        heads = []
        for h in range(num_heads):
            kv = h * num_kv_heads // num_heads
            scores = k[: t + 1, kv] @ q[t, h] / math.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            heads.append(weights @ v[: t + 1, kv] / weights.sum())
        rows.append(np.concatenate(heads))
    return np.stack(rows)


def rotate_all(x: np.ndarray, thetas: list[float]) -> np.ndarray:
    """Rotate dimensions i and i + D / 2 as one complex number, times e^(i t)."""
    half = len(thetas)
    rotations = np.exp(1j * np.outer(np.arange(len(x)), thetas))[:, None, :]
    rotated = (x[..., :half] + 1j * x[..., half:]) * rotations
    return np.concatenate([rotated.real, rotated.imag], -1)


def rotary_frequencies(config: dict[str, Any]) -> list[float]:
    """Angle per position of each pair of dimensions, with Llama 3.1's scaling.

    Source: https://github.com/meta-llama/llama-models, apply_scaling.
    """
    head_dim, base = config["head_dim"], config["rope_theta"]
    freqs = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    scaling = config.get("rope_scaling")
    if scaling is None:
        return freqs
    factor = scaling["factor"]
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return [freq / factor for freq in freqs]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    scaled = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < original / high:
            scaled.append(freq)
        elif wavelength > original / low:
            scaled.append(freq / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * freq / factor + smooth * freq)
    return scaled
