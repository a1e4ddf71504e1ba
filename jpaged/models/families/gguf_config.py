"""GGUF metadata: the config.json that it stands for.

Pipeline: metadata of a GGUF file -> [families.gguf_config] -> entries of config.json.

The entries are those of transformers, so that the families check and interpret them.

Source: https://github.com/ggml-org/llama.cpp, conversion/ and src/models/.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jpaged.gguf_file import GGUFFile
from jpaged.models.families import gguf_names

Entries = dict[str, Any]
_NUMBER = (int, float)
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are never part of a word
# Texts of tokens that end a turn or a text, beside those that the metadata names.
# llama.cpp ends a generation at the same ones.
_END_TEXTS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>"),
    *("[EOT]", "</s>", "<｜end▁of▁sentence｜>"),
}
# Keys that change what the decoder computes in a way that it does not have, with the
# values that mean "unchanged".
_UNSUPPORTED = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias"), (0.0,)),
    **dict.fromkeys(("attention.temperature_scale", "attention.scale"), (0.0, 1.0)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (0.0, 1.0)),
}


class Architecture(NamedTuple):
    """What a value of `general.architecture` stands for.

    Attributes:
      entries: reads what is special about it.
      has_pairs: rows of queries and keys are in the order of rotated pairs.
      norm_offset: is added to the stored weights of norms.
    """

    entries: Callable[["_Reader"], Entries]
    has_pairs: bool = False
    norm_offset: float = 0.0


class _Reader:
    """Reads keys below the architecture's name, with their usual checks."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, key: str, kind: Any = int, default: Any = None) -> Any:
        return self.file.get(f"{self.architecture}.{key}", kind, default)

    def size(self, key: str) -> int:
        """A size; a list of one per layer is accepted where all are equal."""
        name = f"{self.architecture}.{key}"
        value = self.file.require(name, (int, list))
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(
                    f"{self.file.path}: {name}: expected the same number for all "
                    f"layers, got {value!r:.60}"
                )
            value = value[0]
        return value

    def optional_size(self, key: str) -> int | None:
        is_given = f"{self.architecture}.{key}" in self.file.metadata
        return self.size(key) if is_given else None

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def rows(self, tensor: str) -> int | None:
        """Rows of a tensor, if the file has it."""
        entry = self.file.tensors.get(tensor)
        return entry.shape[0] if entry is not None and entry.shape else None


def architecture_of(file: GGUFFile) -> Architecture:
    """The record of a file's architecture.

    Raises:
      ValueError: it is not supported.
    """
    name = file.require("general.architecture", str)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    is_tower = name == "clip"
    what = (
        "a vision or audio tower without a language model" if is_tower else repr(name)
    )
    raise ValueError(
        f"{file.path}: general.architecture: expected one of {sorted(ARCHITECTURES)}, "
        f"got {what}"
    )


def read_config(file: GGUFFile, factors: Callable[[str], list[float]]) -> Entries:
    """The config.json of a GGUF file.

    Args:
      file: the file.
      factors: reads a tensor of rotary factors by its name.

    Raises:
      ValueError: a key is missing or invalid, or the model is not supported.
    """
    architecture = architecture_of(file)
    reader = _Reader(file, file.metadata["general.architecture"])
    for key, neutral in _UNSUPPORTED.items():
        value = reader.get(key, (int, float, bool), neutral[0])
        if value not in neutral:
            raise ValueError(
                f"{file.path}: {reader.architecture}.{key}: expected {neutral[0]!r} or "
                f"none, got {value!r}, which is not supported"
            )
    vocab_size = reader.rows("token_embd.weight")
    if vocab_size is None:
        raise ValueError(
            f"{file.path}: token_embd.weight: expected this tensor, got a file without "
            "it; if it is one part of a model, download all parts"
        )
    entries = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": not reader.has("output.weight"),
        "bos_token_id": _token_id(file, "bos", vocab_size),
        "pad_token_id": _token_id(file, "padding", vocab_size),
        "eos_token_id": _end_ids(file, vocab_size),
    }
    entries |= architecture.entries(reader)
    return _with_factors(entries, reader, factors)


def _token_id(file: GGUFFile, role: str, vocab_size: int) -> int | None:
    """Id of a special token; None if there is none."""
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.get(key, int)
    if value is None or value in (-1, 2**32 - 1):  # how some converters write "none"
        return None
    if not 0 <= value < vocab_size:
        raise ValueError(
            f"{file.path}: {key}: expected an id below the vocabulary's size "
            f"{vocab_size}, got {value}"
        )
    return value


def _end_ids(file: GGUFFile, vocab_size: int) -> list[int]:
    """Ids of all tokens that end a text or a turn, that of the metadata first."""
    ids = [_token_id(file, role, vocab_size) for role in ("eos", "eot", "eom")]
    tokens = file.get("tokenizer.ggml.tokens", list, [])
    kinds = file.get("tokenizer.ggml.token_type", list, [])
    ids += [
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and token in _END_TEXTS
    ]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _llama_like(reader: _Reader, model: str, **more: Any) -> Entries:
    """The entries that all families with one size of heads but GPT-2 have."""
    entries = _without_heads(reader, model)
    heads = entries["num_attention_heads"]
    query_rows = reader.rows("blk.0.attn_q.weight")
    head_dim = reader.get("attention.key_length")
    if head_dim is None and query_rows is not None:
        head_dim = query_rows // heads
    kv_heads = reader.optional_size("attention.head_count_kv") or heads
    entries["num_key_value_heads"] = kv_heads
    if head_dim is not None:
        entries["head_dim"] = head_dim
    head_dim = head_dim or entries["hidden_size"] // heads
    value_size = reader.get("attention.value_length", int, head_dim)
    if value_size != head_dim:
        raise ValueError(
            f"{reader.file.path}: {reader.architecture}.attention.value_length: "
            f"expected the size of keys ({head_dim}), got {value_size}"
        )
    rotated = reader.get("rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        entries["partial_rotary_factor"] = rotated / head_dim
    return entries | more


def _without_heads(reader: _Reader, model: str) -> Entries:
    """The entries that all families but GPT-2 have, without sizes of heads."""
    return {
        "architectures": [model],
        "hidden_size": reader.size("embedding_length"),
        "intermediate_size": reader.size("feed_forward_length"),
        "num_hidden_layers": reader.size("block_count"),
        "num_attention_heads": reader.size("attention.head_count"),
        "max_position_embeddings": reader.size("context_length"),
        "rms_norm_eps": reader.file.require(
            f"{reader.architecture}.attention.layer_norm_rms_epsilon", float
        ),
        "rope_theta": reader.get("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(reader),
    }


def _rope_scaling(reader: _Reader) -> Entries | None:
    """The rope_scaling of config.json, without tensors of factors."""
    factor = reader.get("rope.scaling.factor", _NUMBER)
    if factor is None:
        factor = reader.get("rope.scale_linear", _NUMBER)  # older files
    kind = reader.get("rope.scaling.type", str, "none" if factor is None else "linear")
    original = reader.get("rope.scaling.original_context_length")
    if kind in ("none", "longrope") or (kind == "linear" and factor in (None, 0, 1)):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{reader.file.path}: {reader.architecture}.rope.scaling.type: expected "
            f"'none', 'linear', 'yarn' or 'longrope', got {kind!r}"
        )
    rope = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
        rope["beta_fast"] = reader.get("rope.scaling.yarn_beta_fast", _NUMBER, 32.0)
        rope["beta_slow"] = reader.get("rope.scaling.yarn_beta_slow", _NUMBER, 1.0)
    return rope


def _with_factors(
    entries: Entries, reader: _Reader, factors: Callable[[str], list[float]]
) -> Entries:
    """The entries with the rotary factors that tensors of the file hold."""
    has_short, has_long = map(reader.has, (gguf_names.ROPE_SHORT, gguf_names.ROPE_LONG))
    if has_short or has_long:
        if has_short != has_long:
            raise ValueError(
                f"{reader.file.path}: expected {gguf_names.ROPE_SHORT} and "
                f"{gguf_names.ROPE_LONG}, got only one of them"
            )
        original = reader.get("rope.scaling.original_context_length")
        rope = {
            "short_factor": factors(gguf_names.ROPE_SHORT),
            "long_factor": factors(gguf_names.ROPE_LONG),
            "original_max_position_embeddings": original,
            "attention_factor": reader.get("rope.scaling.attn_factor", float, 1.0),
        }
    elif reader.has(gguf_names.ROPE_FREQS):
        # Llama 3's scaling is stored as its result, one factor per frequency.
        each = factors(gguf_names.ROPE_FREQS)
        original = entries["max_position_embeddings"]
        rope = {
            "short_factor": each,
            "long_factor": each,
            "factor": 1.0,
            "original_max_position_embeddings": original,
            "attention_factor": 1.0,
        }
    else:
        return entries
    return entries | {"rope_scaling": {"rope_type": "longrope", **rope}}


def _llama(reader: _Reader) -> Entries:
    """Llama, and Mistral and Mixtral, which have no architecture of their own."""
    biases = {
        "attention_bias": reader.has("blk.0.attn_q.bias"),
        "mlp_bias": reader.has("blk.0.ffn_up.bias"),
    }
    if reader.get("expert_count", int, 0):
        return _llama_like(reader, "MixtralForCausalLM", **biases) | {
            "num_local_experts": reader.size("expert_count"),
            "num_experts_per_tok": reader.size("expert_used_count"),
            "sliding_window": None,
        }
    if window := reader.get("attention.sliding_window", int, 0):
        return _llama_like(
            reader, "MistralForCausalLM", sliding_window=window, **biases
        )
    return _llama_like(reader, "LlamaForCausalLM", **biases)


def _qwen2(reader: _Reader) -> Entries:
    return _llama_like(reader, "Qwen2ForCausalLM") | _no_window(reader)


def _qwen3(reader: _Reader) -> Entries:
    return _llama_like(reader, "Qwen3ForCausalLM") | _no_window(reader)


def _qwen3_moe(reader: _Reader) -> Entries:
    size = reader.size("expert_feed_forward_length")
    dense = reader.optional_size("feed_forward_length") or size
    return (
        _llama_like(reader, "Qwen3MoeForCausalLM")
        | _no_window(reader)
        | {
            "intermediate_size": dense,
            "moe_intermediate_size": size,
            "num_experts": reader.size("expert_count"),
            "num_experts_per_tok": reader.size("expert_used_count"),
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        }
    )


def _no_window(reader: _Reader) -> Entries:
    """Refuse a window: the file does not say which layers have it."""
    window = reader.get("attention.sliding_window", int, 0)
    if window:
        raise ValueError(
            f"{reader.file.path}: {reader.architecture}.attention.sliding_window: "
            f"expected none, got {window}, which is not supported"
        )
    return {"use_sliding_window": False}


def _gemma(reader: _Reader) -> Entries:
    act = "gelu_pytorch_tanh"
    return _llama_like(reader, "GemmaForCausalLM", hidden_activation=act)


def _gemma2(reader: _Reader) -> Entries:
    return _newer_gemma(reader, "Gemma2ForCausalLM", large_layers=46) | {
        "attn_logit_softcapping": reader.get("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": reader.get("final_logit_softcapping", float, 30.0),
    }


def _gemma3(reader: _Reader) -> Entries:
    entries = _newer_gemma(reader, "Gemma3ForCausalLM", large_layers=62)
    return entries | {
        "rope_local_base_freq": reader.get("rope.freq_base_swa", float, 10000.0),
        "rope_theta": reader.get("rope.freq_base", float, 1e6),
        "final_logit_softcapping": reader.get("final_logit_softcapping", float),
    }


def _newer_gemma(reader: _Reader, model: str, large_layers: int) -> Entries:
    """The entries that Gemma 2 and 3 share.

    The scale of the scores is not in the metadata: it is that of a head's size, but in
    the largest model that of hidden_size / heads.
    """
    entries = _llama_like(reader, model, hidden_activation="gelu_pytorch_tanh")
    heads, hidden = entries["num_attention_heads"], entries["hidden_size"]
    is_large = entries["num_hidden_layers"] == large_layers
    scalar = hidden // heads if is_large else entries.get("head_dim", hidden // heads)
    entries["query_pre_attn_scalar"] = scalar
    entries["sliding_window"] = reader.get("attention.sliding_window") or None
    pattern = reader.get("attention.sliding_window_pattern", (int, list))
    if isinstance(pattern, list):
        entries["layer_types"] = [
            "sliding_attention" if is_local else "full_attention"
            for is_local in pattern[: entries["num_hidden_layers"]]
        ]
    elif pattern is not None:
        entries["sliding_window_pattern"] = pattern
    return entries


def _phi3(reader: _Reader) -> Entries:
    window = reader.get("attention.sliding_window", int, 0) or None
    return _llama_like(reader, "Phi3ForCausalLM", sliding_window=window)


# Groups of the published models, by experts, for files that do not say them.
_GROUPS = {160: (8, 3), 256: (8, 4)}
_SIGMOID = 2  # value of expert_gating_func


def _deepseek2(reader: _Reader) -> Entries:
    """DeepSeek-V2 and V3; sigmoid scores tell V3."""
    is_v3 = reader.get("expert_gating_func", int, 1) == _SIGMOID
    entries = _without_heads(reader, f"DeepseekV{3 if is_v3 else 2}ForCausalLM")
    key, value = (
        reader.get(f"attention.{part}_length_mla")
        or reader.size(f"attention.{part}_length")
        for part in ("key", "value")
    )
    rotated = reader.size("rope.dimension_count")
    experts = reader.size("expert_count")
    groups, selected = _GROUPS.get(experts, (1, 1))
    groups = reader.get("expert_group_count") or groups
    selected = reader.get("expert_group_used_count") or selected
    # Stored as a tenth of mscale_all_dim, in float32; mscale is the same.
    multiplier = reader.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if entries["rope_scaling"] is not None and multiplier:
        mscale = round(10 * multiplier, 6)
        entries["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    if not is_v3:
        entries["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"
    return entries | {
        "kv_lora_rank": reader.size("attention.kv_lora_rank"),
        "q_lora_rank": reader.get("attention.q_lora_rank") or None,
        "qk_nope_head_dim": key - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value,
        "first_k_dense_replace": reader.size("leading_dense_block_count"),
        "n_routed_experts": experts,
        "num_experts_per_tok": reader.size("expert_used_count"),
        "n_shared_experts": reader.size("expert_shared_count"),
        "moe_intermediate_size": reader.size("expert_feed_forward_length"),
        "n_group": groups,
        "topk_group": selected,
        "norm_topk_prob": reader.get("expert_weights_norm", bool, False),
        "routed_scaling_factor": reader.get("expert_weights_scale", float, 1.0),
    }


def _gpt2(reader: _Reader) -> Entries:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": reader.size("embedding_length"),
        "n_inner": reader.size("feed_forward_length"),
        "n_layer": reader.size("block_count"),
        "n_head": reader.size("attention.head_count"),
        "n_positions": reader.size("context_length"),
        "layer_norm_epsilon": reader.file.require(
            f"{reader.architecture}.attention.layer_norm_epsilon", float
        ),
    }


_GEMMA_OFFSET = -1.0  # llama.cpp stores 1 + weight
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama, has_pairs=True),
    "mistral": Architecture(_llama, has_pairs=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3_moe),
    "gemma": Architecture(_gemma, norm_offset=_GEMMA_OFFSET),
    "gemma2": Architecture(_gemma2, norm_offset=_GEMMA_OFFSET),
    "gemma3": Architecture(_gemma3, norm_offset=_GEMMA_OFFSET),
    "phi3": Architecture(_phi3),
    "deepseek2": Architecture(_deepseek2),
    "gpt2": Architecture(_gpt2),
}
