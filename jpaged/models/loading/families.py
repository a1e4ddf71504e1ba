"""Families: what Hugging Face calls the fields and tensors of each architecture.

Place on the road: config.json, *.safetensors -> [models.families] -> ModelConfig
and parameters. A family is how its config is read, how it is written, and what its
tensors are called. The decoder itself knows nothing of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jpaged.models.loading import hf_fields
from jpaged.models.loading.hf_fields import Fields

# Where a parameter lives in the decoder: attribute names and list indices.
Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and the parameters that it holds.

    Several parameters lie behind each other along its last axis (after `transposed`),
    or, interleaved, number by number.
    """

    name: str
    paths: tuple[Path, ...]
    transposed: bool = False  # its last two axes are [out, in], ours [in, out]
    interleaved: bool = False
    expert: int | None = None  # it holds this expert's part of the parameter


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is written in a Hugging Face folder.

    Modules of a layer and their names: a key with spaces names several that share one
    tensor. `experts` names those of one expert, or with `stacks_experts` the tensors of
    all experts at once, [X, in, out], whose first holds gate and up, interleaved.
    """

    model_type: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> Fields
    write: Callable[[Fields], dict[str, Any]]  # and back
    prefix: str  # of all names; a checkpoint of the bare model lacks it
    layer_prefix: str
    embedding: str
    modules: Mapping[str, str]  # module of the decoder -> module in the checkpoint
    layer_modules: Mapping[str, str]  # the same inside a layer
    router: str = ""
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stacks_experts: bool = False
    stores_in_out: bool = False  # its products' weights are [in, out] (GPT-2)
    # What a config that is silent about them means.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a ModelConfig from a parsed config.json; see `ModelConfig.from_hf`."""
    architecture = _architecture(hf)
    if hf.get("quantization_config"):
        quantization = hf["quantization_config"]
        is_object = isinstance(quantization, Mapping)
        method = quantization.get("quant_method", "unknown") if is_object else "unknown"
        raise ValueError(
            f"quantization_config: expected none, got {method!r}; "
            "quantised checkpoints are not supported, use the unquantised one "
            "(and quantization='int8' to load it in 8 bits)"
        )
    family = FAMILIES[architecture]
    hf = {**family.defaults, **hf}
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
    architecture: str,
    *,
    num_layers: int,
    num_experts: int,
    is_tied: bool,
    vocab_first: bool,
) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of the architecture may have.

    Biases, projections and experts come too, whether or not this decoder has them.
    """
    family = FAMILIES[architecture]
    if not is_tied:
        yield Tensor(family.embedding, (("embedding",),))
    # Tied: one array serves both uses, in the layout of the output product.
    name = family.embedding if is_tied else "lm_head.weight"
    weights: Path = ("output", "rows" if vocab_first else "weight")
    yield Tensor(name, (weights,), transposed=not vocab_first)
    for paths, name in family.modules.items():
        yield from _module(family, (), paths, name)
    for layer in range(num_layers):
        top, prefix = ("layers", layer), f"{family.layer_prefix}{layer}."
        for paths, name in family.layer_modules.items():
            yield from _module(family, top, paths, prefix + name)
        if num_experts:
            yield from _experts(family, (*top, "experts"), prefix, num_experts)


def _module(family: Family, top: Path, modules: str, name: str) -> Iterator[Tensor]:
    """The tensors of one module of a checkpoint, which may be several of ours."""
    paths: list[Path] = [(*top, *path.split(".")) for path in modules.split()]
    last = str(paths[0][-1])
    if last == "sinks":
        yield Tensor(name, tuple(paths))
        return
    is_table = last == "position_embedding"
    transposed = not (is_table or last.endswith("norm") or family.stores_in_out)
    weights = paths if is_table else [(*path, "weight") for path in paths]
    yield Tensor(f"{name}.weight", tuple(weights), transposed)
    if not is_table:
        yield Tensor(f"{name}.bias", tuple((*path, "bias") for path in paths))


def _experts(family: Family, top: Path, prefix: str, count: int) -> Iterator[Tensor]:
    yield from _module(family, top, "router", prefix + family.router)
    for modules, name in family.experts.items():
        paths = [(*top, module) for module in modules.split()]
        weights = tuple((*path, "weight") for path in paths)
        if family.stacks_experts:
            biases = tuple((*path, "bias") for path in paths)
            mixed = len(paths) > 1
            yield Tensor(prefix + name, weights, interleaved=mixed)
            yield Tensor(f"{prefix}{name}_bias", biases, interleaved=mixed)
            continue
        for expert in range(count):
            stored = f"{prefix}{name.format(expert=expert)}.weight"
            yield Tensor(stored, weights, transposed=True, expert=expert)


def is_harmless(name: str, *, is_tied: bool) -> bool:
    """Whether an extra tensor of a checkpoint repeats what the config says anyway."""
    return name.endswith(
        ("rotary_emb.inv_freq", "decoder.version", ".attn.bias", ".attn.masked_bias")
    ) or (name == "lm_head.weight" and is_tied)


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


_QKV = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
}
_ATTENTION = {"attention_norm": "input_layernorm", **_QKV} | {
    "attention.out": "self_attn.o_proj"
}
_GATED_MLP = {
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_QK_NORMS = {
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
_TWO_NORMS = {"mlp_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_MODEL = {
    "prefix": "model.",
    "layer_prefix": "model.layers.",
    "embedding": "model.embed_tokens.weight",
    "modules": {"final_norm": "model.norm"},
}
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_GEMMA = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        read=hf_fields.read_llama,
        write=hf_fields.write_llama,
        **_MODEL,
        layer_modules=_ATTENTION | _TWO_NORMS | _GATED_MLP,
        defaults=_LLAMA_IDS,
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        read=hf_fields.read_mistral,
        write=hf_fields.write_mistral,
        **_MODEL,
        layer_modules=_ATTENTION | _TWO_NORMS | _GATED_MLP,
        defaults=_LLAMA_IDS | {"sliding_window": 4096},
    ),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        read=hf_fields.read_mixtral,
        write=hf_fields.write_mixtral,
        **_MODEL,
        layer_modules=_ATTENTION | _TWO_NORMS,
        router="block_sparse_moe.gate",
        experts={
            "gate": "block_sparse_moe.experts.{expert}.w1",
            "up": "block_sparse_moe.experts.{expert}.w3",
            "down": "block_sparse_moe.experts.{expert}.w2",
        },
        defaults=_LLAMA_IDS
        | {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        read=hf_fields.read_qwen2,
        write=hf_fields.write_qwen,
        **_MODEL,
        layer_modules=_ATTENTION | _TWO_NORMS | _GATED_MLP,
        defaults={"use_sliding_window": False, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        read=hf_fields.read_qwen3,
        write=hf_fields.write_qwen,
        **_MODEL,
        layer_modules=_ATTENTION | _QK_NORMS | _TWO_NORMS | _GATED_MLP,
        defaults={
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        read=hf_fields.read_qwen3_moe,
        write=hf_fields.write_qwen3_moe,
        **_MODEL,
        layer_modules=_ATTENTION | _QK_NORMS | _TWO_NORMS | _GATED_MLP,
        router="mlp.gate",
        experts={
            "gate": "mlp.experts.{expert}.gate_proj",
            "up": "mlp.experts.{expert}.up_proj",
            "down": "mlp.experts.{expert}.down_proj",
        },
        defaults={"num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "GemmaForCausalLM": Family(
        model_type="gemma",
        read=hf_fields.read_gemma,
        write=hf_fields.write_gemma,
        **_MODEL,
        layer_modules=_ATTENTION | _TWO_NORMS | _GATED_MLP,
        defaults=_GEMMA,
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2",
        read=hf_fields.read_gemma2,
        write=hf_fields.write_gemma2,
        **_MODEL,
        layer_modules=_ATTENTION | _FOUR_NORMS | _GATED_MLP,
        defaults=_GEMMA
        | {
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        read=hf_fields.read_gemma3,
        write=hf_fields.write_gemma2,
        **_MODEL,
        layer_modules=_ATTENTION | _QK_NORMS | _FOUR_NORMS | _GATED_MLP,
        defaults=_GEMMA
        | {
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
        },
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        read=hf_fields.read_phi3,
        write=hf_fields.write_mistral,
        **_MODEL,
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
    ),
    "GptOssForCausalLM": Family(
        model_type="gpt_oss",
        read=hf_fields.read_gpt_oss,
        write=hf_fields.write_gpt_oss,
        **_MODEL,
        layer_modules=_ATTENTION | _TWO_NORMS | {"attention.sinks": "self_attn.sinks"},
        router="mlp.router",
        experts={
            "gate up": "mlp.experts.gate_up_proj",
            "down": "mlp.experts.down_proj",
        },
        stacks_experts=True,
        defaults={
            "head_dim": 64,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
        },
    ),
    "OPTForCausalLM": Family(
        model_type="opt",
        read=hf_fields.read_opt,
        write=hf_fields.write_opt,
        prefix="model.",
        layer_prefix="model.decoder.layers.",
        embedding="model.decoder.embed_tokens.weight",
        modules={
            "position_embedding": "model.decoder.embed_positions",
            "project_in": "model.decoder.project_in",
            "project_out": "model.decoder.project_out",
            "final_norm": "model.decoder.final_layer_norm",
        },
        layer_modules=_QKV
        | {
            "attention_norm": "self_attn_layer_norm",
            "attention.out": "self_attn.out_proj",
            "mlp_norm": "final_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        defaults={"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    ),
    "GPT2LMHeadModel": Family(
        model_type="gpt2",
        read=hf_fields.read_gpt2,
        write=hf_fields.write_gpt2,
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
        defaults={"bos_token_id": 50256, "eos_token_id": 50256},
    ),
}
