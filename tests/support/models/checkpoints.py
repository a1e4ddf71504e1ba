"""Small checkpoints in Hugging Face layout, the same on every machine.

`load_model(write_tiny_llama(tmp_path))` returns a model whose logits differ clearly
between tokens, so that greedy decoding has no ties. The weights need only numpy.
"""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "word_embed_proj_dim": 64,
    "enable_bias": True,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that some of the 8 wavelengths are kept, some stretched, some between.
    "original_max_position_embeddings": 32,
}

# Variants of the two families.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama_wide_heads": ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "llama_linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama_llama3": ("llama", {"rope_scaling": LLAMA3_SCALING}),
    "opt": ("opt", {}),
    "opt_350m_shape": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    "opt_without_biases": ("opt", {"enable_bias": False}),
    "opt_untied": ("opt", {"tie_word_embeddings": False}),
}


def write_tiny_llama(
    path: str | pathlib.Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> pathlib.Path:
    """Folder with a random Llama: vocabulary 128, hidden 64, 2 layers, 4 and 2 heads.

    `overrides` replace entries of config.json.
    """
    config = LLAMA | overrides
    return _write(pathlib.Path(path), config, llama_shapes(config), seed, dtype)


def write_tiny_opt(
    path: str | pathlib.Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> pathlib.Path:
    """Folder with a random OPT: vocabulary 128, hidden 64, 2 layers, 4 heads."""
    config = OPT | overrides
    return _write(pathlib.Path(path), config, opt_shapes(config), seed, dtype)


def write_case(path: str | pathlib.Path, name: str, **options: Any) -> pathlib.Path:
    """Folder with one of `CASES`."""
    family, overrides = CASES[name]
    write = {"llama": write_tiny_llama, "opt": write_tiny_opt}[family]
    return write(path, **overrides, **options)


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a folder with a single weights file."""
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write_tensors(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace the weights of a folder."""
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def shard(folder: pathlib.Path, num_shards: int) -> None:
    """Split the weights of a folder into several files with an index."""
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::num_shards]}
        safetensors.numpy.save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors in transformers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        products = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in products.items():
            shapes[f"{layer}{name}.weight"] = shape
            if config["mlp_bias" if name.startswith("mlp") else "attention_bias"]:
                shapes[f"{layer}{name}.bias"] = shape[:1]
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def opt_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an OPT's tensors in transformers."""
    hidden, inner = config["hidden_size"], config["ffn_dim"]
    width, vocab = config["word_embed_proj_dim"], config["vocab_size"]
    top = "model.decoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{top}embed_tokens.weight": (vocab, width),
        f"{top}embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    if width != hidden:
        shapes[f"{top}project_in.weight"] = (hidden, width)
        shapes[f"{top}project_out.weight"] = (width, hidden)
    norms = [f"{top}final_layer_norm"] if config["do_layer_norm_before"] else []
    for i in range(config["num_hidden_layers"]):
        layer = f"{top}layers.{i}."
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        sizes = {f"self_attn.{name}": (hidden, hidden) for name in names}
        sizes |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
        for name, shape in sizes.items():
            shapes[f"{layer}{name}.weight"] = shape
            if config["enable_bias"]:
                shapes[f"{layer}{name}.bias"] = shape[:1]
        norms += [f"{layer}self_attn_layer_norm", f"{layer}final_layer_norm"]
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (hidden,)
    return shapes


def write_shapes(
    folder: str | pathlib.Path,
    config: dict[str, Any],
    shapes: dict[str, Any],
    *,
    seed: int = 0,
    dtype: str = "float32",
) -> pathlib.Path:
    """Folder with a config.json and random tensors of these names and shapes."""
    return _write(pathlib.Path(folder), config, shapes, seed, dtype)


def _write(
    folder: pathlib.Path,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    dtype: str,
) -> pathlib.Path:
    rng = np.random.default_rng(seed)
    is_gemma = config["model_type"].startswith("gemma")
    tensors = {}
    for name, shape in shapes.items():
        # Uniform numbers are computed directly from random bits: a new version of numpy
        # can change normal numbers, and with them the stored logits.
        noise = rng.random(shape) * 2 - 1
        is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
        is_norm &= not is_gemma  # Gemma multiplies by 1 + weight
        # With larger embeddings, a tied model would only repeat its last token.
        is_position = "embed_positions" in name or "wpe" in name
        scale = 1.0 if is_position else 0.3
        if is_gemma and "embed" in name:
            scale = 0.05  # the decoder multiplies it by hidden_size ** 0.5
        tensors[name] = (is_norm + scale * noise).astype(DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors)
    text = json.dumps(config | {"torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text, "utf-8")
    return folder
