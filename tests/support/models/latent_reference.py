"""DeepSeek-V2 and V3 in float64 numpy, from the formulas and tensor names alone.

Keys and values of every head are computed from the latents, pairs of dimensions are
rotated as complex numbers, and each token is sent to its experts in a loop. Shares no
code with the package.

Source: https://arxiv.org/abs/2405.04434, https://arxiv.org/abs/2412.19437
"""

import json
import math
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

Weights = dict[str, np.ndarray]


def reference_logits(folder: pathlib.Path, tokens: list[int]) -> np.ndarray:
    """Logits f64[T, V] of one sequence, for a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    weights = {name: array.astype(np.float64) for name, array in stored.items()}
    x = weights["model.embed_tokens.weight"][tokens]
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        top = f"model.layers.{layer}."
        own = {
            name.removeprefix(top): array
            for name, array in weights.items()
            if name.startswith(top)
        }
        h = norm(x, own["input_layernorm.weight"], eps)
        x = x + attention(config, own, h)
        h = norm(x, own["post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + mlp(own, "mlp", h)
        else:
            x = x + np.stack([experts(config, own, token) for token in h])
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def dense(own: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0.0)


def mlp(own: Weights, name: str, x: np.ndarray) -> np.ndarray:
    gate, up = dense(own, f"{name}.gate_proj", x), dense(own, f"{name}.up_proj", x)
    return dense(own, f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)


def attention(config: dict[str, Any], own: Weights, x: np.ndarray) -> np.ndarray:
    num_heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    length = len(x)
    if config["q_lora_rank"] is None:
        q = dense(own, "self_attn.q_proj", x)
    else:
        down = dense(own, "self_attn.q_a_proj", x)
        down = norm(down, own["self_attn.q_a_layernorm.weight"], 1e-6)
        q = dense(own, "self_attn.q_b_proj", down)
    q = q.reshape(length, num_heads, nope + rope)
    latent = dense(own, "self_attn.kv_a_proj_with_mqa", x)
    normed = norm(latent[:, :rank], own["self_attn.kv_a_layernorm.weight"], 1e-6)
    both = dense(own, "self_attn.kv_b_proj", normed).reshape(length, num_heads, -1)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    angles = np.arange(length)[:, None] * frequencies(config, rope)
    factor = attention_factor(scaling)
    shared = rotate(latent[:, rank:], angles, factor)
    out = np.zeros((length, num_heads, config["v_head_dim"]))
    scale = (nope + rope) ** -0.5 * grown(scaling, "mscale_all_dim") ** 2
    for head in range(num_heads):
        rotated = rotate(q[:, head, nope:], angles, factor)
        keys, values = both[:, head, :nope], both[:, head, nope:]
        scores = q[:, head, :nope] @ keys.T + rotated @ shared.T
        scores = np.where(np.tri(length, dtype=bool), scores * scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ values
    return dense(own, "self_attn.o_proj", out.reshape(length, -1))


def rotate(x: np.ndarray, angles: np.ndarray, factor: float) -> np.ndarray:
    """Pairs of neighbours as complex numbers, turned by their angles."""
    turned = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angles) * factor
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def grown(scaling: dict[str, Any], name: str) -> float:
    if not scaling.get(name):
        return 1.0
    return 0.1 * scaling[name] * math.log(scaling["factor"]) + 1.0


def attention_factor(scaling: dict[str, Any]) -> float:
    if scaling.get("rope_type", "default") == "default":
        return 1.0
    return grown(scaling, "mscale") / grown(scaling, "mscale_all_dim")


def frequencies(config: dict[str, Any], size: int) -> np.ndarray:
    """Angle per position of each pair; YaRN's if the config has it."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta", 10000.0)
    plain = theta ** (-np.arange(0, size, 2) / size)
    if scaling.get("rope_type", "default") == "default":
        return plain

    def pair_with(rotations: float) -> float:
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * rotations)
        return size * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(pair_with(32)), 0)
    high = min(math.ceil(pair_with(1)), size - 1)
    ramp = (np.arange(size // 2) - low) / max(high - low, 0.001)
    slowed = np.clip(ramp, 0, 1)
    return plain / scaling["factor"] * slowed + plain * (1 - slowed)


def experts(config: dict[str, Any], own: Weights, token: np.ndarray) -> np.ndarray:
    """Output [E] of the selected and the shared experts for one token [E]."""
    logits = own["mlp.gate.weight"] @ token
    count, is_v3 = config["num_experts_per_tok"], config["model_type"] == "deepseek_v3"
    if is_v3:
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + own["mlp.gate.e_score_correction_bias"]
    else:
        scores = choice = np.exp(logits) / np.exp(logits).sum()
    if is_v3 or config["topk_method"] == "group_limited_greedy":
        groups = np.split(choice, config["n_group"])
        number = 2 if is_v3 else 1
        best = [np.sort(group)[-number:].sum() for group in groups]
        kept = np.argsort(best)[-config["topk_group"] :]
        groups = [
            group if i in kept else np.full_like(group, -np.inf)
            for i, group in enumerate(groups)
        ]
        choice = np.concatenate(groups)
    chosen = np.argsort(choice)[-count:]
    weights = scores[chosen]
    if is_v3 and config["norm_topk_prob"]:
        weights = weights / weights.sum()
    out = mlp(own, "mlp.shared_experts", token)
    for expert, weight in zip(chosen, weights, strict=True):
        routed = mlp(own, f"mlp.experts.{expert}", token)
        out = out + config["routed_scaling_factor"] * weight * routed
    return out
