"""Phi-3.

Pipeline: config.json, tensor names -> [families.phi3] -> ModelConfig, parameters.
"""

import functools
from collections.abc import Mapping
from typing import Any

from jpaged.models.families import rope
from jpaged.models.families.family import Family
from jpaged.models.families.fields import refuse, sizes
from jpaged.models.families.llama import read_llama
from jpaged.models.families.mistral import write_mistral


def read_phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with a window in every layer; part of a head may be rotated."""
    refuse(hf, attention_bias=False, mlp_bias=False)
    read_rope = functools.partial(
        rope.read_rope,
        may_be_partial=True,
        aliases={"su": "longrope", "yarn": "longrope"},
    )
    return read_llama(hf, read_rope) | {"sliding_window": hf.get("sliding_window")}


PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    read=read_phi3,
    write=write_mistral,
    layer_modules={
        "attention_norm": "input_layernorm",
        "attention.query attention.key attention.value": "self_attn.qkv_proj",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate mlp.up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    },
    defaults={
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-5,
    },
    sizes={
        "phi-3-mini-4k": sizes(
            *(3072, 32, 32, 32, 8192, 32064),
            max_position_embeddings=4096,
            sliding_window=2047,
        ),
    },
)
