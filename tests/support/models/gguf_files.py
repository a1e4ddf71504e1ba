"""Small GGUF files, written with gguf.GGUFWriter as llama.cpp's converter writes them.

`write_case` converts a checkpoint of `tests/support/golden/families.json`. What the
loader undoes is done here in other words, from the converter's description.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np

from tests.support.models import checkpoints
from tests.support.paths import ROOT

GOLDEN = json.loads(
    (ROOT / "tests" / "support" / "golden" / "families.json").read_text("utf-8")
)
# Cases by architecture of GGUF. The other cases need what a file cannot say.
CASES = {
    **{"llama": "llama", "llama_tied": "llama", "llama_biases": "llama"},
    **{"llama_linear": "llama", "llama_yarn": "llama", "llama_llama3": "llama"},
    **{"mistral": "llama", "mistral_without_window": "llama", "mixtral": "llama"},
    **{"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3"},
    **{"gemma3_linear": "gemma3", "phi3": "phi3", "phi3_longrope": "phi3"},
    "gpt2": "gpt2",
    **dict.fromkeys(("deepseek_v2_lite", "deepseek_v2", "deepseek_v3"), "deepseek2"),
}
_RENAMED = [
    (r"^(model|transformer)\.(embed_tokens|wte)\.", "token_embd."),
    (r"^transformer\.wpe\.", "position_embd."),
    (r"^lm_head\.", "output."),
    (r"^(model\.norm|transformer\.ln_f)\.", "output_norm."),
    (r"^(model\.layers|transformer\.h)\.", "blk."),
    (r"\.(input_layernorm|ln_1)\.", ".attn_norm."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn_\1."),
    (r"\.self_attn\.([qk])_norm\.", r".attn_\1_norm."),
    (r"\.(self_attn\.qkv_proj|attn\.c_attn)\.", ".attn_qkv."),
    (r"\.(self_attn\.o_proj|attn\.c_proj)\.", ".attn_output."),
    (r"\.self_attn\.q_([ab])_proj\.", r".attn_q_\1."),
    (r"\.self_attn\.(q|kv)_a_layernorm\.", r".attn_\1_a_norm."),
    (r"\.self_attn\.kv_a_proj_with_mqa\.", ".attn_kv_a_mqa."),
    (r"\.self_attn\.kv_b_proj\.", ".attn_kv_b."),
    (r"\.mlp\.shared_experts\.(gate|up|down)_proj\.", r".ffn_\1_shexp."),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".exp_probs_b.bias"),
    (r"\.mlp\.gate_proj\.", ".ffn_gate."),
    (r"\.mlp\.(gate_up_proj|up_proj|c_fc)\.", ".ffn_up."),
    (r"\.mlp\.(down_proj|c_proj)\.", ".ffn_down."),
    (r"\.(block_sparse_moe|mlp)\.gate\.", ".ffn_gate_inp."),
]
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.")
_EXPERT_NAMES = {"w1": "gate", "w3": "up", "w2": "down"}


def vocabulary(size: int) -> dict[str, Any]:
    """A tokenizer's metadata with `size` tokens of one character."""
    return {"model": "llama", "tokens": [chr(0x4E00 + i) for i in range(size)]}


def write_case(
    path: pathlib.Path, name: str, *, kind: str = "F32", **changes: Any
) -> pathlib.Path:
    """Write a case of the golden results as a GGUF file.

    Args:
      path: of the file.
      name: of the case.
      kind: quantisation of the matrices.
      changes: entries of config.json that replace those of the case.
    """
    case = GOLDEN[name]
    folder = checkpoints.write_shapes(
        path.parent / f"{path.name}.folder",
        case["config"] | changes,
        case["shapes"],
        seed=case["seed"],
    )
    return write(path, folder, CASES[name], kind=kind)


def write(
    path: pathlib.Path, folder: pathlib.Path, architecture: str, *, kind: str = "F32"
) -> pathlib.Path:
    """Convert a folder in Hugging Face layout.

    Args:
      path: of the file.
      folder: with config.json and model.safetensors.
      architecture: that llama.cpp's converter gives it.
      kind: quantisation of the matrices; norms and biases are stored as F32.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = checkpoints.read_tensors(folder)
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, metadata(config, architecture))
    write_tokens(writer, config)
    for key, array in converted(tensors, config, architecture):
        add_tensor(writer, key, array, kind if array.ndim > 1 else "F32")
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all parts of a file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(
    writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str
) -> None:
    """Add a tensor, quantised by the library."""
    number = gguf.GGMLQuantizationType[kind]
    array = np.ascontiguousarray(array, np.float32)
    writer.add_tensor(name, gguf.quantize(array, number), raw_dtype=number)


def write_metadata(writer: gguf.GGUFWriter, entries: Mapping[str, Any]) -> None:
    """Write keys whose types follow from their values."""
    for key, value in entries.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_tokens(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write a vocabulary of single characters and the special ids of a config."""
    size = config["vocab_size"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(0x4E00 + i) for i in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([1] * size)
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (number := config.get(f"{role}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)


def metadata(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys that describe a config.json, below the architecture's name."""
    if architecture == "gpt2":
        found = {
            "block_count": config["n_layer"],
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": 4 * config["n_embd"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
        return {f"gpt2.{key}": value for key, value in found.items()}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
    }
    if config.get("sliding_window") is not None:
        found["attention.sliding_window"] = config["sliding_window"]
    if architecture == "phi3" and config.get("sliding_window") is None:
        found["attention.sliding_window"] = 0
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            found[key] = config[key]
    if architecture == "gemma3":
        found["attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config["layer_types"]
        ]
    if experts := config.get("num_local_experts", config.get("num_experts")):
        found["expert_count"] = experts
        found["expert_used_count"] = config["num_experts_per_tok"]
        if "moe_intermediate_size" in config:
            found["expert_feed_forward_length"] = config["moe_intermediate_size"]
    found |= _rope(config, head_dim, architecture)
    if architecture == "deepseek2":
        found |= _latent(config)
    return {f"{architecture}.{key}": value for key, value in found.items()}


def _latent(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is special about DeepSeek; keys and values are those of one latent head."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    found = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": 2 if config["model_type"] == "deepseek_v3" else 1,
    }
    if config["q_lora_rank"]:
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if config["n_group"]:
        found["expert_group_count"] = config["n_group"]
        found["expert_group_used_count"] = config["topk_group"]
    if mscale := config["rope_parameters"].get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * mscale
    return found


def _rope(
    config: Mapping[str, Any], head_dim: int, architecture: str
) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    partial = rope.get("partial_rotary_factor") or 1
    found: dict[str, Any] = {
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(head_dim * partial),
    }
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn" or architecture == "phi3":
        found["rope.scaling.original_context_length"] = (
            original or config["max_position_embeddings"]
        )
    if kind == "longrope":
        scale = config["max_position_embeddings"] / original
        factor = np.sqrt(1 + np.log(scale) / np.log(original))
        found["rope.scaling.attn_factor"] = float(factor)
    return found


def converted(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], architecture: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, with llama.cpp's names and layouts."""
    experts: dict[str, list[np.ndarray]] = {}
    for name, array in sorted(tensors.items(), key=lambda item: _order(item[0])):
        if (expert := _EXPERT.match(name)) is not None:
            part = _EXPERT_NAMES.get(expert[3]) or expert[3].removesuffix("_proj")
            layer = re.search(r"\.(\d+)\.", name)
            assert layer is not None
            stacked = f"blk.{layer[1]}.ffn_{part}_exps.weight"
            experts.setdefault(stacked, []).append(array)
            continue
        stored = array
        if "kv_b_proj" in name and config["model_type"] == "deepseek_v3":
            # Newer files; V2's are written as older ones.
            heads = array.reshape(config["num_attention_heads"], -1, array.shape[-1])
            size = config["qk_nope_head_dim"]
            top = _renamed(name, architecture).removesuffix("attn_kv_b.weight")
            yield f"{top}attn_k_b.weight", heads[:, :size].swapaxes(1, 2)
            yield f"{top}attn_v_b.weight", heads[:, size:]
            continue
        if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            which = "key_value" if "k_proj" in name else "attention"
            stored = _as_pairs(array, config[f"num_{which}_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            stored = array + 1
        if architecture == "gpt2" and ".c_" in name and array.ndim == 2:
            stored = array.T
        yield _renamed(name, architecture), stored
    for name, arrays in experts.items():
        yield name, np.stack(arrays)
    yield from _factors(config)


def _order(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _as_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1, ..."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(array.shape)


def _renamed(name: str, architecture: str) -> str:
    norms = {"post_attention_layernorm": "ffn_norm", "ln_2": "ffn_norm"}
    if architecture in ("gemma2", "gemma3"):
        norms = {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    for pattern, new in [
        *_RENAMED,
        *((rf"\.{a}\.", f".{b}.") for a, b in norms.items()),
    ]:
        name = re.sub(pattern, new, name)
    return name


def _factors(config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of rotary factors."""
    rope = config.get("rope_parameters", {})
    for name in ("long", "short"):
        if f"{name}_factor" in rope:
            factors = np.array(rope[f"{name}_factor"], np.float32)
            yield f"rope_factors_{name}.weight", factors
    if rope.get("rope_type") != "llama3":
        return
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, config["head_dim"], 2):
        length = 2 * np.pi * rope["rope_theta"] ** (i / config["head_dim"])
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(factor)
        else:
            share = (original / length - low) / (high - low)
            factors.append(1 / ((1 - share) / factor + share))
    yield "rope_freqs.weight", np.array(factors, np.float32)
