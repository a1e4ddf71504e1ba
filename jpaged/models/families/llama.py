"""Llama 1 to 3.2, and what most other families share with it.

Pipeline: config.json, tensor names -> [families.llama] -> ModelConfig, parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jpaged.models.families import rope
from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import (
    HF_ACTIVATIONS,
    default_head_dim,
    read_activation,
    required,
    sizes,
)

ReadRope = Callable[..., dict[str, Any]]  # see rope.read_rope

QKV = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
}
ATTENTION = {
    "attention_norm": "input_layernorm",
    **QKV,
    "attention.out": "self_attn.o_proj",
}
QK_NORMS = {
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
MLP_NORM = {"mlp_norm": "post_attention_layernorm"}
GATED_MLP = {
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def read_llama(
    hf: Mapping[str, Any], read_rope: ReadRope = rope.read_rope
) -> dict[str, Any]:
    """Fields of a ModelConfig from the config.json of a Llama.

    Args:
      hf: config.json.
      read_rope: reads the rotary settings, for families that differ in them.
    """
    num_heads = required(hf, "num_attention_heads")
    hidden_size = required(hf, "hidden_size")
    attention_bias = bool(hf.get("attention_bias", False))
    head_dim = hf.get("head_dim") or default_head_dim(hidden_size, num_heads)
    return {
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": required(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "intermediate_size": required(hf, "intermediate_size"),
        "max_position_embeddings": hf.get("max_position_embeddings") or 2048,
        "activation": read_activation(hf.get("hidden_act", "silu")),
        "norm": "rms",
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "initializer_range": float(hf.get("initializer_range", 0.02)),
        **read_rope(hf, head_dim=head_dim),
    }


def write_llama(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_llama` reads."""
    return {
        "num_key_value_heads": fields["num_kv_heads"],
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["intermediate_size"],
        "hidden_act": HF_ACTIVATIONS[fields["activation"]],
        "rms_norm_eps": fields["norm_eps"],
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["mlp_bias"],
        "initializer_range": fields["initializer_range"],
        **rope.write_rope(fields),
    }


def without_mlp_bias(fields: Fields) -> dict[str, Any]:
    """What `write_llama` writes, for classes that have no entry `mlp_bias`."""
    entries = write_llama(fields)
    del entries["mlp_bias"]
    return entries


def _llama1(*size: int) -> dict[str, Any]:
    return sizes(*size, 32000, rms_norm_eps=1e-6, max_position_embeddings=2048)


def _llama2(*size: int) -> dict[str, Any]:
    return sizes(*size, 32000, rms_norm_eps=1e-5, max_position_embeddings=4096)


def _llama3(*size: int, factor: float | None = None, **more: Any) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return sizes(
        *size,
        128256,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192 if factor is None else 131072,
        rope_theta=5e5,
        rope_scaling=None if factor is None else scaling,
        bos_token_id=128000,
        eos_token_id=128001,
        **more,
    )


def _llama32(*size: int, head_dim: int) -> dict[str, Any]:
    return _llama3(*size, factor=32.0, head_dim=head_dim, tie_word_embeddings=True)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    read=read_llama,
    write=write_llama,
    layer_modules=ATTENTION | MLP_NORM | GATED_MLP,
    defaults=TOKEN_IDS,
    sizes={
        "llama-7b": _llama1(4096, 32, 32, 32, 11008),
        "llama-13b": _llama1(5120, 40, 40, 40, 13824),
        "llama-33b": _llama1(6656, 60, 52, 52, 17920),
        "llama-65b": _llama1(8192, 80, 64, 64, 22016),
        "llama-2-7b": _llama2(4096, 32, 32, 32, 11008),
        "llama-2-13b": _llama2(5120, 40, 40, 40, 13824),
        "llama-2-70b": _llama2(8192, 80, 64, 8, 28672),
        "llama-3-8b": _llama3(4096, 32, 32, 8, 14336),
        "llama-3-70b": _llama3(8192, 80, 64, 8, 28672),
        "llama-3.1-8b": _llama3(4096, 32, 32, 8, 14336, factor=8.0),
        "llama-3.1-70b": _llama3(8192, 80, 64, 8, 28672, factor=8.0),
        "llama-3.1-405b": _llama3(16384, 126, 128, 8, 53248, factor=8.0),
        "llama-3.2-1b": _llama32(2048, 16, 32, 8, 8192, head_dim=64),
        "llama-3.2-3b": _llama32(3072, 28, 24, 8, 8192, head_dim=128),
    },
)
