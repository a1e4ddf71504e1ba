"""Shapes: the sizes of common models, for random weights in benchmarks and tests.

Place on the road: "random:NAME" -> [models.shapes] -> ModelConfig -> decoder.

Each entry is what the published config.json says about sizes; the tests
holds their numbers of parameters against the published ones.
"""

import os
from collections.abc import Mapping
from typing import Any

from jpaged.models.config import ModelConfig
from jpaged.models.loading.sources import RANDOM


def _sizes(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    } | more


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = _sizes(hidden, layers, heads, ffn_dim=4 * hidden, vocab_size=50272)
    return {"model_type": "opt", "max_position_embeddings": 2048} | sizes | more


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


def _gated(model_type: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """hidden, layers, heads, kv heads, intermediate, vocabulary; then what differs."""
    hidden, layers, heads, kv_heads, intermediate, vocab_size = sizes
    return _sizes(
        hidden,
        layers,
        heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        model_type=model_type,
        **more,
    )


def _llama(*sizes: int, positions: int, **more: Any) -> dict[str, Any]:
    more = {"rms_norm_eps": 1e-5, "max_position_embeddings": positions} | more
    return _gated("llama", sizes, **more)


def _llama3(*sizes: int, factor: float | None = None, **more: Any) -> dict[str, Any]:
    more = {"rope_theta": 5e5, "bos_token_id": 128000, "eos_token_id": 128001} | more
    if factor is None:
        return _llama(*sizes, 128256, positions=8192, **more)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama(*sizes, 128256, positions=131072, rope_scaling=scaling, **more)


def _qwen(kind: str, *sizes: int, positions: int, **more: Any) -> dict[str, Any]:
    more = {"rope_theta": 1e6, "max_position_embeddings": positions} | more
    return _gated(kind, sizes, **more)


def _gemma2(*sizes: int, head_dim: int, scalar: int) -> dict[str, Any]:
    more = {"head_dim": head_dim, "query_pre_attn_scalar": scalar}
    more |= {"max_position_embeddings": 8192}
    return _gated("gemma2", (*sizes, 256000), **more)


def _mixtral(*sizes: int, positions: int) -> dict[str, Any]:
    return _gated("mixtral", (*sizes, 32000), max_position_embeddings=positions)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    yarn = {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    return _gated(
        "gpt_oss",
        (2880, layers, 64, 8, 2880, 201088),
        num_local_experts=experts,
        max_position_embeddings=131072,
        rope_scaling=yarn,
    )


_TIED = {"tie_word_embeddings": True}
_LLAMA1 = {"rms_norm_eps": 1e-6}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama-7b": _llama(4096, 32, 32, 32, 11008, 32000, positions=2048, **_LLAMA1),
    "llama-13b": _llama(5120, 40, 40, 40, 13824, 32000, positions=2048, **_LLAMA1),
    "llama-33b": _llama(6656, 60, 52, 52, 17920, 32000, positions=2048, **_LLAMA1),
    "llama-65b": _llama(8192, 80, 64, 64, 22016, 32000, positions=2048, **_LLAMA1),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, positions=4096),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, positions=4096),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, positions=4096),
    "llama-3-8b": _llama3(4096, 32, 32, 8, 14336),
    "llama-3-70b": _llama3(8192, 80, 64, 8, 28672),
    "llama-3.1-8b": _llama3(4096, 32, 32, 8, 14336, factor=8.0),
    "llama-3.1-70b": _llama3(8192, 80, 64, 8, 28672, factor=8.0),
    "llama-3.1-405b": _llama3(16384, 126, 128, 8, 53248, factor=8.0),
    "llama-3.2-1b": _llama3(2048, 16, 32, 8, 8192, factor=32.0, head_dim=64, **_TIED),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8, 8192, factor=32.0, head_dim=128, **_TIED),
    "mistral-7b": _gated(
        "mistral",
        (4096, 32, 32, 8, 14336, 32000),
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
    ),
    "mixtral-8x7b": _mixtral(4096, 32, 32, 8, 14336, positions=32768),
    "mixtral-8x22b": _mixtral(6144, 56, 48, 8, 16384, positions=65536),
    "qwen2.5-0.5b": _qwen(
        "qwen2", 896, 24, 14, 2, 4864, 151936, positions=32768, **_TIED
    ),
    "qwen2.5-1.5b": _qwen(
        "qwen2", 1536, 28, 12, 2, 8960, 151936, positions=32768, **_TIED
    ),
    "qwen2.5-3b": _qwen(
        "qwen2", 2048, 36, 16, 2, 11008, 151936, positions=32768, **_TIED
    ),
    "qwen2.5-7b": _qwen("qwen2", 3584, 28, 28, 4, 18944, 152064, positions=131072),
    "qwen2.5-14b": _qwen("qwen2", 5120, 48, 40, 8, 13824, 152064, positions=131072),
    "qwen2.5-32b": _qwen("qwen2", 5120, 64, 40, 8, 27648, 152064, positions=131072),
    "qwen2.5-72b": _qwen("qwen2", 8192, 80, 64, 8, 29568, 152064, positions=131072),
    "qwen3-0.6b": _qwen(
        "qwen3", 1024, 28, 16, 8, 3072, 151936, positions=40960, **_TIED
    ),
    "qwen3-1.7b": _qwen(
        "qwen3", 2048, 28, 16, 8, 6144, 151936, positions=40960, **_TIED
    ),
    "qwen3-4b": _qwen("qwen3", 2560, 36, 32, 8, 9728, 151936, positions=40960, **_TIED),
    "qwen3-8b": _qwen("qwen3", 4096, 36, 32, 8, 12288, 151936, positions=40960),
    "qwen3-14b": _qwen("qwen3", 5120, 40, 40, 8, 17408, 151936, positions=40960),
    "qwen3-32b": _qwen("qwen3", 5120, 64, 64, 8, 25600, 151936, positions=40960),
    "qwen3-30b-a3b": _qwen(
        "qwen3_moe",
        *(2048, 48, 32, 4, 6144, 151936),
        positions=40960,
        head_dim=128,
        num_experts=128,
        norm_topk_prob=True,
    ),
    "gemma-2b": _gated(
        "gemma", (2048, 18, 8, 1, 16384, 256000), max_position_embeddings=8192
    ),
    "gemma-7b": _gated(
        "gemma", (3072, 28, 16, 16, 24576, 256000), max_position_embeddings=8192
    ),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216, head_dim=256, scalar=256),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14336, head_dim=256, scalar=256),
    "gemma-2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, scalar=144),
    "gemma-3-1b": _gated(
        "gemma3_text",
        (1152, 26, 4, 1, 6912, 262144),
        max_position_embeddings=32768,
        sliding_window=512,
    ),
    "phi-3-mini-4k": _gated(
        "phi3",
        (3072, 32, 32, 32, 8192, 32064),
        max_position_embeddings=4096,
        sliding_window=2047,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}


def random_config(name: str | os.PathLike[str]) -> ModelConfig:
    """ModelConfig of "random:NAME" or NAME, its dtype bfloat16.

    Raises:
      ValueError: no shape has this name.
    """
    shape = os.fspath(name).removeprefix(RANDOM).lower()
    if shape not in SHAPES:
        raise ValueError(
            f"model: expected '{RANDOM}' and one of {', '.join(SHAPES)}, got {name!r}"
        )
    return ModelConfig.from_hf({"torch_dtype": "bfloat16", **SHAPES[shape]})
