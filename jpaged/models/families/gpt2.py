"""GPT-2.

Pipeline: config.json, tensor names -> [families.gpt2] -> ModelConfig, parameters.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import (
    HF_ACTIVATIONS,
    default_head_dim,
    read_activation,
    refuse,
    required,
)


def read_gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2, whose config.json has its own names for the sizes."""
    refuse(
        hf,
        add_cross_attention=False,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
    )
    num_heads, hidden_size = required(hf, "n_head"), required(hf, "n_embd")
    return {
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": required(hf, "n_layer"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": default_head_dim(hidden_size, num_heads),
        "intermediate_size": hf.get("n_inner") or 4 * hidden_size,
        "max_position_embeddings": hf.get("n_positions") or 1024,
        "activation": read_activation(hf.get("activation_function", "gelu_new")),
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "positions": "learned",
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", True)),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "initializer_range": float(hf.get("initializer_range", 0.02)),
    }


def write_gpt2(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_gpt2` reads."""
    return {
        "n_embd": fields["hidden_size"],
        "n_layer": fields["num_layers"],
        "n_head": fields["num_heads"],
        "n_positions": fields["max_position_embeddings"],
        "n_inner": fields["intermediate_size"],
        "activation_function": HF_ACTIVATIONS[fields["activation"]],
        "layer_norm_epsilon": fields["norm_eps"],
        "initializer_range": fields["initializer_range"],
    }


def _sizes(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    read=read_gpt2,
    write=write_gpt2,
    prefix="transformer.",
    layer_prefix="transformer.h.",
    embedding="transformer.wte.weight",
    modules={
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
    },
    layer_modules={
        "attention_norm": "ln_1",
        "attention.query attention.key attention.value": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    stores_in_out=True,
    ignored=(".attn.bias", ".attn.masked_bias"),
    defaults={"bos_token_id": 50256, "eos_token_id": 50256},
    sizes={
        "gpt2": _sizes(768, 12, 12),
        "gpt2-medium": _sizes(1024, 24, 16),
        "gpt2-large": _sizes(1280, 36, 20),
        "gpt2-xl": _sizes(1600, 48, 25),
    },
)
