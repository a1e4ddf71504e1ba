"""Fields of a config.json, family by family: how they are read and written.

Place on the road: config.json -> [models.hf_fields] -> ModelConfig. What a config
leaves out has the value of its transformers class: `families.py` puts it in before.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jpaged.models.loading import hf_rope

Fields = Mapping[str, Any]  # of a ModelConfig, by name; rope_scaling as a dict
ReadRope = Callable[..., dict[str, Any]]  # see hf_rope.read_rope

_ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
}


def required(hf: Mapping[str, Any], name: str) -> int:
    """A size that a config must hold."""
    value = hf.get(name)
    if value is None:
        raise ValueError(f"config.json: expected a value for {name!r}, found none")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
    return value


def refuse(hf: Mapping[str, Any], **harmless: Any) -> None:
    """Raises ValueError for a feature that is asked for and not there, by its name."""
    for name, value in harmless.items():
        got = hf.get(name, value)
        if got is not None and got != value:
            raise ValueError(f"{name}: expected {value!r}, got {got!r}")


def read_llama(
    hf: Mapping[str, Any], read_rope: ReadRope = hf_rope.read_rope
) -> dict[str, Any]:
    """Llama, and what most later families share with it."""
    num_heads = required(hf, "num_attention_heads")
    hidden_size = required(hf, "hidden_size")
    attention_bias = bool(hf.get("attention_bias", False))
    head_dim = hf.get("head_dim") or _head_dim(hidden_size, num_heads)
    return {
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": required(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "intermediate_size": required(hf, "intermediate_size"),
        "max_position_embeddings": hf.get("max_position_embeddings") or 2048,
        "activation": _activation(hf.get("hidden_act", "silu")),
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
    """The entries of a config.json that `read_llama` reads."""
    return {
        "num_key_value_heads": fields["num_kv_heads"],
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["intermediate_size"],
        "hidden_act": HF_ACTIVATIONS[fields["activation"]],
        "rms_norm_eps": fields["norm_eps"],
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["mlp_bias"],
        "initializer_range": fields["initializer_range"],
        **hf_rope.write_rope(fields),
    }


def read_mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama without biases, and a window in every layer where one is given."""
    refuse(hf, attention_bias=False, mlp_bias=False, layer_types=None)
    return read_llama(hf) | {"sliding_window": hf.get("sliding_window")}


def write_mistral(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that `read_mistral` reads."""
    return write_llama(fields) | {"sliding_window": fields["sliding_window"]}


def read_mixtral(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral with experts in every layer; the chosen ones' weights sum to 1."""
    return read_mistral(hf) | {
        "num_experts": required(hf, "num_local_experts"),
        "num_experts_per_token": required(hf, "num_experts_per_tok"),
        "expert_size": required(hf, "intermediate_size"),
    }


def write_mixtral(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that `read_mixtral` reads."""
    return write_mistral(fields) | {
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_token"],
    }


def read_qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with biases of query, key and value, and windows from some layer on."""
    biases = {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return read_llama(hf) | biases | _read_layer_types(hf, _from_max_window_layers)


def read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with norms of queries and keys, and windows as in Qwen2."""
    fields = read_llama(hf) | {"qk_norm": True, "mlp_bias": False}
    return fields | _read_layer_types(hf, _from_max_window_layers)


def write_qwen(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that `read_qwen2` and `read_qwen3` read."""
    entries = write_llama(fields)
    del entries["mlp_bias"]
    return entries | {
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "layer_types": _layer_types(fields),
    }


def read_qwen3_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3 with experts in most layers, and one window in all of them."""
    num_layers = required(hf, "num_hidden_layers")
    step = hf.get("decoder_sparse_step") or 1
    mlp_only = hf.get("mlp_only_layers") or []
    num_experts = hf.get("num_experts", hf.get("num_local_experts", 128))
    uses_window = bool(hf.get("use_sliding_window"))
    return read_llama(hf) | {
        "qk_norm": True,
        "mlp_bias": False,
        "sliding_window": hf.get("sliding_window") if uses_window else None,
        "num_experts": num_experts,
        "num_experts_per_token": required(hf, "num_experts_per_tok"),
        "expert_size": required(hf, "moe_intermediate_size"),
        "normalized_routing": bool(hf.get("norm_topk_prob", False)),
        "dense_layers": tuple(
            i for i in range(num_layers) if i in mlp_only or (i + 1) % step
        ),
    }


def write_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that `read_qwen3_moe` reads."""
    entries = write_llama(fields)
    del entries["mlp_bias"]
    return entries | {
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "num_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_token"],
        "moe_intermediate_size": fields["expert_size"],
        "norm_topk_prob": fields["normalized_routing"],
        "mlp_only_layers": list(fields["dense_layers"]),
        "decoder_sparse_step": 1,
    }


def read_gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with scaled embeddings, norms times 1 + weight, and a gelu gate."""
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    # The first Gemma configs say "gelu" and mean its tanh form, as transformers knows.
    return _read_gemma(hf, "gelu_pytorch_tanh" if name == "gelu" else name)


def _read_gemma(
    hf: Mapping[str, Any], activation: str, read_rope: ReadRope = hf_rope.read_rope
) -> dict[str, Any]:
    refuse(hf, use_bidirectional_attention=False)
    return read_llama(hf, read_rope) | {
        "activation": _activation(activation),
        "mlp_bias": False,
        "norm": "rms_plus_one",
        "scaled_embedding": True,
    }


def write_gemma(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that the Gemma readers read."""
    entries = write_llama(fields)
    del entries["mlp_bias"]
    return entries | {"hidden_activation": entries["hidden_act"]}


def read_gemma2(
    hf: Mapping[str, Any], read_rope: ReadRope = hf_rope.read_rope, pattern: int = 2
) -> dict[str, Any]:
    """Gemma with norms around each sub-layer, soft caps, and every other window."""
    activation = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    return _read_gemma(hf, activation, read_rope) | {
        "sublayer_norms": True,
        "attention_scale": required(hf, "query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": hf.get("attn_logit_softcapping"),
        "logits_soft_cap": hf.get("final_logit_softcapping"),
        **_read_layer_types(hf, _every(pattern)),
    }


def write_gemma2(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that `read_gemma2` and `read_gemma3` read."""
    return write_gemma(fields) | {
        "query_pre_attn_scalar": round(fields["attention_scale"] ** -2),
        "attn_logit_softcapping": fields["attention_soft_cap"],
        "final_logit_softcapping": fields["logits_soft_cap"],
        "sliding_window": fields["sliding_window"],
        "layer_types": _layer_types(fields),
    }


def read_gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 2 with norms of queries and keys, and two rotary bases."""
    # transformers reads this cap and does not apply it; so it is refused.
    refuse(hf, attn_logit_softcapping=None)
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return read_gemma2(hf, hf_rope.read_two_ropes, pattern) | {"qk_norm": True}


def read_phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with a window in every layer; part of a head may turn."""
    refuse(hf, attention_bias=False, mlp_bias=False)
    read_rope = functools.partial(
        hf_rope.read_rope,
        may_be_partial=True,
        aliases={"su": "longrope", "yarn": "longrope"},
    )
    return read_llama(hf, read_rope) | {"sliding_window": hf.get("sliding_window")}


def read_gpt_oss(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with sinks, every other window, and experts with a clamped gate."""
    return (
        read_llama(hf)
        | _read_layer_types(hf, _every(2))
        | {
            "attention_sinks": True,
            "mlp_bias": False,
            "num_experts": required(hf, "num_local_experts"),
            "num_experts_per_token": required(hf, "num_experts_per_tok"),
            "expert_size": required(hf, "intermediate_size"),
            "expert_bias": True,
            "swiglu_limit": float(hf.get("swiglu_limit", 7.0)),
            "swiglu_alpha": float(hf.get("swiglu_alpha", 1.702)),
        }
    )


def write_gpt_oss(fields: Fields) -> dict[str, Any]:
    """The entries of a config.json that `read_gpt_oss` reads."""
    entries = write_llama(fields)
    del entries["mlp_bias"]
    return entries | {
        "sliding_window": fields["sliding_window"],
        "layer_types": _layer_types(fields),
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_token"],
        "swiglu_limit": fields["swiglu_limit"],
        "swiglu_alpha": fields["swiglu_alpha"],
    }


def read_opt(hf: Mapping[str, Any]) -> dict[str, Any]:
    """OPT, also with norms after its sub-layers and narrow embeddings (350m)."""
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
        "head_dim": _head_dim(hidden_size, num_heads),
        "intermediate_size": required(hf, "ffn_dim"),
        "max_position_embeddings": hf.get("max_position_embeddings") or 2048,
        "activation": _activation(hf.get("activation_function", "relu")),
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
    """The entries of a config.json that `read_opt` reads."""
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


def read_gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2, whose config has names of its own for the sizes."""
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
        "head_dim": _head_dim(hidden_size, num_heads),
        "intermediate_size": hf.get("n_inner") or 4 * hidden_size,
        "max_position_embeddings": hf.get("n_positions") or 1024,
        "activation": _activation(hf.get("activation_function", "gelu_new")),
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
    """The entries of a config.json that `read_gpt2` reads."""
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


def _head_dim(hidden_size: int, num_heads: int) -> int:
    """Head size of a config that does not give it."""
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size: expected a multiple of num_attention_heads ({num_heads}), "
            f"got {hidden_size}"
        )
    return hidden_size // num_heads


def _activation(name: str) -> str:
    if name not in _ACTIVATION_NAMES:
        raise ValueError(
            f"activation: expected one of {sorted(_ACTIVATION_NAMES)}, got {name!r}"
        )
    return _ACTIVATION_NAMES[name]


def _read_layer_types(
    hf: Mapping[str, Any],
    is_sliding: Callable[[Mapping[str, Any], int], bool],
) -> dict[str, Any]:
    """sliding_window and full_layers, from layer_types or by the family's rule."""
    num_layers = required(hf, "num_hidden_layers")
    window = hf.get("sliding_window")
    if not hf.get("use_sliding_window", True):
        window = None
    names = hf.get("layer_types")
    if names is None:
        slides = [is_sliding(hf, layer) for layer in range(num_layers)]
    else:
        known = ("full_attention", "sliding_attention")
        strange = [name for name in names if name not in known]
        if strange or len(names) != num_layers:
            raise ValueError(
                f"layer_types: expected {num_layers} of {known}, got {names!r:.120}"
            )
        slides = [name == "sliding_attention" for name in names]
    if window is None or not any(slides):
        return {"sliding_window": None, "full_layers": ()}
    full = tuple(layer for layer, slid in enumerate(slides) if not slid)
    return {"sliding_window": window, "full_layers": full}


def _every(pattern: int) -> Callable[[Mapping[str, Any], int], bool]:
    """All layers slide, but every `pattern`-th sees everything."""
    return lambda hf, layer: (layer + 1) % pattern != 0


def _from_max_window_layers(hf: Mapping[str, Any], layer: int) -> bool:
    return layer >= hf.get("max_window_layers", 28)


def _layer_types(fields: Fields) -> list[str]:
    is_full = fields["sliding_window"] is None
    return [
        "full_attention"
        if is_full or layer in fields["full_layers"]
        else "sliding_attention"
        for layer in range(fields["num_layers"])
    ]
