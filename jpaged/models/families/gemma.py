"""Gemma 1, 2 and 3 (text).

Pipeline: config.json, tensor names -> [families.gemma] -> ModelConfig, parameters.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.models.families import rope
from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import (
    all_but_every,
    read_activation,
    read_layer_types,
    refuse,
    required,
    sizes,
    write_layer_types,
)
from jpaged.models.families.llama import (
    ATTENTION,
    GATED_MLP,
    MLP_NORM,
    QK_NORMS,
    ReadRope,
    read_llama,
    without_mlp_bias,
)

_FOUR_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def read_gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with scaled embeddings, norms times 1 + weight, and a gelu gate."""
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    # The first Gemma configs say "gelu" but mean its tanh form; so does transformers.
    return _read_any_gemma(hf, "gelu_pytorch_tanh" if name == "gelu" else name)


def _read_any_gemma(
    hf: Mapping[str, Any], activation: str, read_rope: ReadRope = rope.read_rope
) -> dict[str, Any]:
    refuse(hf, use_bidirectional_attention=False)
    return read_llama(hf, read_rope) | {
        "activation": read_activation(activation),
        "mlp_bias": False,
        "norm": "rms_plus_one",
        "scaled_embedding": True,
    }


def write_gemma(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_gemma` reads."""
    entries = without_mlp_bias(fields)
    return entries | {"hidden_activation": entries["hidden_act"]}


def read_gemma2(
    hf: Mapping[str, Any], read_rope: ReadRope = rope.read_rope, pattern: int = 2
) -> dict[str, Any]:
    """Gemma with norms around each sub-layer, soft caps, and windows.

    Args:
      hf: config.json.
      read_rope: reads the rotary settings.
      pattern: every `pattern`-th layer has no window.
    """
    activation = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    return _read_any_gemma(hf, activation, read_rope) | {
        "sublayer_norms": True,
        "attention_scale": required(hf, "query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": hf.get("attn_logit_softcapping"),
        "logits_soft_cap": hf.get("final_logit_softcapping"),
        **read_layer_types(hf, all_but_every(pattern)),
    }


def write_gemma2(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_gemma2` and `read_gemma3` read."""
    return write_gemma(fields) | {
        "query_pre_attn_scalar": round(fields["attention_scale"] ** -2),
        "attn_logit_softcapping": fields["attention_soft_cap"],
        "final_logit_softcapping": fields["logits_soft_cap"],
        "sliding_window": fields["sliding_window"],
        "layer_types": write_layer_types(fields),
    }


def read_gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 2 with norms of queries and keys, and two rotary bases."""
    # transformers reads this cap but does not apply it.
    refuse(hf, attn_logit_softcapping=None)
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return read_gemma2(hf, rope.read_two_ropes, pattern) | {"qk_norm": True}


def _gemma2(*size: int, head_dim: int, scalar: int) -> dict[str, Any]:
    return sizes(
        *size,
        256000,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        max_position_embeddings=8192,
    )


GEMMA = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    read=read_gemma,
    write=write_gemma,
    layer_modules=ATTENTION | MLP_NORM | GATED_MLP,
    defaults=_DEFAULTS,
    sizes={
        "gemma-2b": sizes(
            *(2048, 18, 8, 1, 16384, 256000), max_position_embeddings=8192
        ),
        "gemma-7b": sizes(
            *(3072, 28, 16, 16, 24576, 256000), max_position_embeddings=8192
        ),
    },
)
GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    read=read_gemma2,
    write=write_gemma2,
    layer_modules=ATTENTION | _FOUR_NORMS | GATED_MLP,
    defaults=_DEFAULTS
    | {
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    sizes={
        "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216, head_dim=256, scalar=256),
        "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14336, head_dim=256, scalar=256),
        "gemma-2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, scalar=144),
    },
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    read=read_gemma3,
    write=write_gemma2,
    layer_modules=ATTENTION | QK_NORMS | _FOUR_NORMS | GATED_MLP,
    defaults=_DEFAULTS
    | {
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
    },
    sizes={
        "gemma-3-1b": sizes(
            *(1152, 26, 4, 1, 6912, 262144),
            max_position_embeddings=32768,
            sliding_window=512,
        ),
    },
)
