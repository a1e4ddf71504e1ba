"""Families: what Hugging Face calls the fields and tensors of each architecture.

Place on the road: config.json, *.safetensors -> [models.families] -> ModelConfig
and parameters. A family is how its config is read, how it is written, and what its
tensors are called. The decoder itself knows nothing of them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# The fields of a ModelConfig, by name; rope_scaling as a dict of its own fields.
Fields = Mapping[str, Any]

# Where a parameter lives in the decoder: attribute names and list indices.
Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One tensor of a checkpoint: its name, and whether it is stored [out, in]."""

    name: str
    transposed: bool


class Family(NamedTuple):
    """How one architecture is written in a Hugging Face folder."""

    model_type: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> Fields
    write: Callable[[Fields], dict[str, Any]]  # and back
    layer_prefix: str
    embedding: str
    modules: Mapping[str, str]  # module of the decoder -> module in the checkpoint
    layer_modules: Mapping[str, str]  # the same inside a layer
    token_ids: Mapping[str, int]  # what a config that is silent about them means


_ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
}


def read(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a ModelConfig from a parsed config.json; see `ModelConfig.from_hf`."""
    architecture = _architecture(hf)
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"quantization_config: expected none, got {method!r}; "
            "quantised checkpoints are not supported, use the unquantised one"
        )
    family = FAMILIES[architecture]
    hf = {**family.token_ids, **hf}
    eos = hf.get("eos_token_id")
    if generation is not None and generation.get("eos_token_id") is not None:
        eos = generation["eos_token_id"]
    eos = [] if eos is None else eos
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    return {
        "architecture": architecture,
        "bos_token_id": hf.get("bos_token_id"),
        "pad_token_id": hf.get("pad_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "dtype": str(dtype).removeprefix("torch."),
    } | family.read(hf)


def write(fields: Fields) -> dict[str, Any]:
    """Contents of config.json from a ModelConfig's fields; see `ModelConfig.to_hf`."""
    family = FAMILIES[fields["architecture"]]
    eos = list(fields["eos_token_ids"])
    return {
        "architectures": [fields["architecture"]],
        "model_type": family.model_type,
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_heads"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": fields["pad_token_id"],
        "torch_dtype": fields["dtype"],
    } | family.write(fields)


def tensors(
    architecture: str, *, num_layers: int, is_tied: bool
) -> Iterator[tuple[Path, Tensor]]:
    """Every parameter that a decoder may have, with the tensor that holds it.

    Biases and projections come too, whether or not this decoder has them.
    """
    family = FAMILIES[architecture]
    if is_tied:
        # One array serves both uses, in the layout of the output product.
        yield ("output", "weight"), Tensor(family.embedding, transposed=True)
    else:
        yield ("embedding",), Tensor(family.embedding, transposed=False)
        yield ("output", "weight"), Tensor("lm_head.weight", transposed=True)
    modules = [((path,), name) for path, name in family.modules.items()] + [
        (("layers", layer, *path.split(".")), f"{family.layer_prefix}{layer}.{name}")
        for layer in range(num_layers)
        for path, name in family.layer_modules.items()
    ]
    for path, name in modules:
        is_norm = str(path[-1]).endswith("norm")
        if path[-1] == "position_embedding":
            yield path, Tensor(f"{name}.weight", transposed=False)
            continue
        yield (*path, "weight"), Tensor(f"{name}.weight", transposed=not is_norm)
        yield (*path, "bias"), Tensor(f"{name}.bias", transposed=False)


def is_harmless(name: str, *, is_tied: bool) -> bool:
    """Whether an extra tensor of a checkpoint repeats what the config says anyway."""
    return name.endswith(("rotary_emb.inv_freq", "decoder.version")) or (
        name == "lm_head.weight" and is_tied
    )


def _architecture(hf: Mapping[str, Any]) -> str:
    """Supported architecture that a config names, by class or by model_type."""
    names = hf.get("architectures") or [
        name
        for name, family in FAMILIES.items()
        if family.model_type == hf.get("model_type")
    ]
    for name in names:
        if name in FAMILIES:
            return name
    raise ValueError(
        f"architectures: expected one of {sorted(FAMILIES)}, "
        f"got {names or hf.get('model_type')!r}"
    )


def _required(hf: Mapping[str, Any], name: str) -> int:
    """A size that a config must hold."""
    value = hf.get(name)
    if value is None:
        raise ValueError(f"config.json: expected a value for {name!r}, found none")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
    return value


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


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either style of config.

    Before transformers 5: `rope_theta` beside `rope_scaling` (with "type" or
    "rope_type"); since: one dict `rope_parameters` that holds both.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling: expected an object, got {rope!r}")
    rope = dict(rope)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    partial = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor: expected 1, got {partial}")
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"rope type: expected 'default', 'linear' or 'llama3', got {kind!r}"
        )
    wanted = ["factor"]
    if kind == "llama3":
        wanted += ["low_freq_factor", "high_freq_factor"]
        wanted += ["original_max_position_embeddings"]
    missing = [name for name in wanted if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r}: expected values for {missing}")
    scaling = {"kind": kind} | {name: rope[name] for name in wanted}
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = _required(hf, "num_attention_heads")
    hidden_size = _required(hf, "hidden_size")
    attention_bias = bool(hf.get("attention_bias", False))
    return {
        "vocab_size": _required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": _required(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": hf.get("head_dim") or _head_dim(hidden_size, num_heads),
        "intermediate_size": _required(hf, "intermediate_size"),
        "max_position_embeddings": hf.get("max_position_embeddings") or 2048,
        "activation": _activation(hf.get("hidden_act", "silu")),
        "norm": "rms",
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "initializer_range": float(hf.get("initializer_range", 0.02)),
        **_rope(hf),
    }


def _write_llama(fields: Fields) -> dict[str, Any]:
    rope = None
    if fields["rope_scaling"] is not None:
        rope = dict(fields["rope_scaling"])
        rope["rope_type"] = rope.pop("kind")
        if rope["rope_type"] == "linear":
            rope = {"rope_type": "linear", "factor": rope["factor"]}
    return {
        "num_key_value_heads": fields["num_kv_heads"],
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["intermediate_size"],
        "hidden_act": _HF_ACTIVATIONS[fields["activation"]],
        "rms_norm_eps": fields["norm_eps"],
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["mlp_bias"],
        "initializer_range": fields["initializer_range"],
        "rope_theta": fields["rope_theta"],
        "rope_scaling": rope,
    }


def _read_opt(hf: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = _required(hf, "num_attention_heads")
    hidden_size = _required(hf, "hidden_size")
    norm_first = bool(hf.get("do_layer_norm_before", True))
    bias = bool(hf.get("enable_bias", True))
    embedding_size = hf.get("word_embed_proj_dim") or hidden_size
    if not hf.get("layer_norm_elementwise_affine", True):
        raise ValueError("layer_norm_elementwise_affine: expected true, got false")
    return {
        "vocab_size": _required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": _required(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": _head_dim(hidden_size, num_heads),
        "intermediate_size": _required(hf, "ffn_dim"),
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


def _write_opt(fields: Fields) -> dict[str, Any]:
    return {
        "ffn_dim": fields["intermediate_size"],
        "activation_function": _HF_ACTIVATIONS[fields["activation"]],
        "do_layer_norm_before": fields["norm_first"],
        "_remove_final_layer_norm": fields["norm_first"] and not fields["final_norm"],
        "word_embed_proj_dim": fields["embedding_size"] or fields["hidden_size"],
        "enable_bias": fields["qkv_bias"],
        "init_std": fields["initializer_range"],
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        read=_read_llama,
        write=_write_llama,
        layer_prefix="model.layers.",
        embedding="model.embed_tokens.weight",
        modules={"final_norm": "model.norm"},
        layer_modules={
            "attention_norm": "input_layernorm",
            "attention.query": "self_attn.q_proj",
            "attention.key": "self_attn.k_proj",
            "attention.value": "self_attn.v_proj",
            "attention.out": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
        },
        token_ids={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "OPTForCausalLM": Family(
        model_type="opt",
        read=_read_opt,
        write=_write_opt,
        layer_prefix="model.decoder.layers.",
        embedding="model.decoder.embed_tokens.weight",
        modules={
            "position_embedding": "model.decoder.embed_positions",
            "project_in": "model.decoder.project_in",
            "project_out": "model.decoder.project_out",
            "final_norm": "model.decoder.final_layer_norm",
        },
        layer_modules={
            "attention_norm": "self_attn_layer_norm",
            "attention.query": "self_attn.q_proj",
            "attention.key": "self_attn.k_proj",
            "attention.value": "self_attn.v_proj",
            "attention.out": "self_attn.out_proj",
            "mlp_norm": "final_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        token_ids={"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    ),
}
