"""OPT.

Pipeline: config.json, tensor names -> [families.opt] -> ModelConfig, parameters.
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
from jpaged.models.families.llama import QKV


def read_opt(hf: Mapping[str, Any]) -> dict[str, Any]:
    """OPT, including norms after the sub-layers and narrow embeddings (350m)."""
    num_heads = required(hf, "num_attention_heads")
    hidden_size = required(hf, "hidden_size")
    norm_first = bool(hf.get("do_layer_norm_before", True))
    bias = bool(hf.get("enable_bias", True))
    embedding_size = hf.get("word_embed_proj_dim") or hidden_size
    refuse(hf, layer_norm_elementwise_affine=True)
    return {
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": required(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": default_head_dim(hidden_size, num_heads),
        "intermediate_size": required(hf, "ffn_dim"),
        "max_position_embeddings": hf.get("max_position_embeddings") or 2048,
        "activation": read_activation(hf.get("activation_function", "relu")),
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_first": norm_first,
        "final_norm": norm_first and not hf.get("_remove_final_layer_norm", False),
        "positions": "learned",
        "position_offset": 2,
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", True)),
        "embedding_size": None if embedding_size == hidden_size else embedding_size,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "initializer_range": float(hf.get("init_std", 0.02)),
    }


def write_opt(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_opt` reads."""
    return {
        "ffn_dim": fields["intermediate_size"],
        "activation_function": HF_ACTIVATIONS[fields["activation"]],
        "do_layer_norm_before": fields["norm_first"],
        "_remove_final_layer_norm": fields["norm_first"] and not fields["final_norm"],
        "word_embed_proj_dim": fields["embedding_size"] or fields["hidden_size"],
        "enable_bias": fields["qkv_bias"],
        "init_std": fields["initializer_range"],
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _sizes(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        **more,
    }


OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    read=read_opt,
    write=write_opt,
    layer_prefix="model.decoder.layers.",
    embedding="model.decoder.embed_tokens.weight",
    modules={
        "position_embedding": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "final_norm": "model.decoder.final_layer_norm",
    },
    layer_modules=QKV
    | {
        "attention_norm": "self_attn_layer_norm",
        "attention.out": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    },
    ignored=("decoder.version",),
    defaults={"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    sizes={
        "opt-125m": _sizes(768, 12, 12),
        "opt-350m": _sizes(
            *(1024, 24, 16), word_embed_proj_dim=512, do_layer_norm_before=False
        ),
        "opt-1.3b": _sizes(2048, 24, 32),
        "opt-2.7b": _sizes(2560, 32, 32),
        "opt-6.7b": _sizes(4096, 32, 32),
        "opt-13b": _sizes(5120, 40, 40),
        "opt-30b": _sizes(7168, 48, 56),
        "opt-66b": _sizes(9216, 64, 72),
        "opt-175b": _sizes(12288, 96, 96),
    },
)
