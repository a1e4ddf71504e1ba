"""Served models: the bytes and FLOPs of a model, and the KV slots that fit beside it.

Pipeline: name or folder -> ModelConfig -> [served_models] -> roofline, KV slots. Host
only: sizes, no weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.attention import kv_cache
from jpaged.models import shapes
from jpaged.models.config import LatentSizes, ModelConfig
from jpaged.models.loading import checkpoint, sources
from jpaged.simulator.costs.chips import Chip, find_chip


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """Sizes of a model, summed over all layers and all chips.

    Parameters of layers are those of matrix products, biases and norms. Experts are
    counted separately, because a step reads only the experts that its tokens use.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_params: int
    layer_params: int  # of all layers, without experts
    expert_params: int  # of all experts of all layers
    head_params: int  # of the matrix product that computes logits
    num_experts: int  # per layer; 0: no experts
    num_experts_per_token: int
    param_bytes: int  # of all parameters
    matrix_param_bytes: float  # of one parameter of a layer, expert or the output
    dtype_bytes: int  # of one activation, and of any other parameter
    kv_bytes_per_token: int
    activation_bytes_per_token: int  # moved by operations between products
    sliding_window: int | None  # tokens that a sliding layer attends to
    num_sliding_layers: int

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a token in the matrix products of all layers, without logits."""
        share = self.num_experts_per_token / max(self.num_experts, 1)
        return 2 * (self.layer_params + self.expert_params * share)

    @property
    def flops_per_pair(self) -> float:
        """FLOPs of a query and a key in all layers: a score, and a term of the sum."""
        return 4 * self.num_heads * self.head_dim * self.num_layers

    @classmethod
    def of(
        cls, name: str, config: ModelConfig, kv_dtype: str | None = None
    ) -> ServedModel:
        """Compute the sizes of a model's configuration.

        Quantised weights ("int8") count as a byte each, without their scales, which are
        less than a thousandth.

        Args:
          name: of the model, for messages.
          config: the model's, with its dtype.
          kv_dtype: dtype of keys and values; None: the dtype of the model.
        """
        size = jnp.dtype(config.dtype).itemsize
        layers, experts = _layer_params(config)
        head = config.vocab_size * config.input_size
        params = layers + experts + _outer_params(config)
        layer_size = 1 if config.quantization == "int8" else size
        others = (params - layers - experts - head) * size
        sliding = 0 if config.sliding_window is None else config.num_layers
        return cls(
            name=name,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_params=params,
            layer_params=layers,
            expert_params=experts,
            head_params=head,
            num_experts=config.num_experts,
            num_experts_per_token=config.num_experts_per_token,
            param_bytes=(layers + experts + head) * layer_size + others,
            matrix_param_bytes=layer_size,
            dtype_bytes=size,
            kv_bytes_per_token=kv_cache.bytes_per_block(
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                block_size=1,
                head_dim=config.head_dim,
                dtype=kv_dtype or config.dtype,
                is_latent=config.latent is not None,
            ),
            activation_bytes_per_token=_activations(config) * size,
            sliding_window=config.sliding_window,
            num_sliding_layers=max(sliding - len(config.full_layers), 0),
        )


def served_model(
    name: str | os.PathLike[str], *, dtype: str = "auto", kv_dtype: str | None = None
) -> ServedModel:
    """Compute the sizes of a named model, such as "opt-13b", or of a checkpoint.

    Args:
      name: one of `jpaged.models.shapes.SHAPES`, a bundled or packaged model, or a
        GGUF file or folder in Hugging Face layout, of which only the config is read.
      dtype: of the parameters; "auto": the checkpoint's, bfloat16 for a name.
      kv_dtype: of keys and values; None: the dtype of the parameters.

    Raises:
      ValueError: the name is unknown, or config.json is not supported.
      FileNotFoundError: the folder has no config.json.
    """
    text = os.fspath(name)
    if os.path.exists(text) or text in sources.named_models():
        config = checkpoint.load_config(text)
    elif os.sep in text:
        raise FileNotFoundError(f"model: expected a folder or GGUF file, got {text}")
    else:
        config = shapes.random_config(text)
    if dtype != "auto":
        config = dataclasses.replace(config, dtype=dtype)
    return ServedModel.of(text, config, kv_dtype)


def _layer_params(config: ModelConfig) -> tuple[int, int]:
    """Count parameters of all layers without experts, and of all experts."""
    hidden, layers = config.hidden_size, config.num_layers
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    norm = hidden * (2 if config.norm == "layer" else 1)
    if config.latent is None:
        each = hidden * (queries + 2 * keys) + queries * hidden
    else:
        each = _latent_params(config, config.latent)
    if config.latent is None:
        each += (queries + 2 * keys) * config.qkv_bias
    each += hidden * config.out_bias
    each += norm * (4 if config.sublayer_norms else 2)
    each += 2 * config.head_dim * config.qk_norm
    each += config.num_heads * config.attention_sinks
    num_up = 2 if config.gated_mlp else 1  # products to the intermediate size

    def mlp(size: int, bias: bool) -> int:
        return hidden * size * (num_up + 1) + (num_up * size + hidden) * bias

    plain = mlp(config.intermediate_size, config.mlp_bias)
    if not config.num_experts:
        return layers * (each + plain), 0
    dense = len(config.dense_layers)
    router = (hidden + config.expert_bias) * config.num_experts
    if config.routing is not None:
        router += config.num_experts * config.routing.has_correction
    if config.shared_expert_size:
        router += mlp(config.shared_expert_size, config.mlp_bias)
    experts = config.num_experts * mlp(config.expert_size, config.expert_bias)
    rest = layers - dense
    return layers * each + dense * plain + rest * router, rest * experts


def _latent_params(config: ModelConfig, sizes: LatentSizes) -> int:
    """Count parameters of one layer's latent attention, without the output's bias."""
    hidden, heads, rank = config.hidden_size, config.num_heads, sizes.query_rank
    queries = heads * (sizes.nope_dim + sizes.rope_dim)
    params = hidden * queries
    if rank is not None:
        params = (hidden + config.qkv_bias) * rank + rank + rank * queries
    params += (hidden + config.qkv_bias) * config.head_dim + sizes.rank
    params += heads * (sizes.nope_dim + sizes.value_dim) * sizes.rank
    return params + heads * sizes.value_dim * hidden


def _outer_params(config: ModelConfig) -> int:
    """Count parameters of embeddings, logits and the last norm."""
    hidden, width = config.hidden_size, config.input_size
    params = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    if width != hidden:
        params += 2 * width * hidden
    if config.positions == "learned":
        params += (config.max_position_embeddings + config.position_offset) * hidden
    if config.final_norm:
        params += hidden * (2 if config.norm == "layer" else 1)
    return params


def _activations(config: ModelConfig) -> int:
    """Count numbers that operations between products read and write for a token.

    Two norms per layer and the rotation read and write once. Two residual sums per
    layer read two inputs. The activation reads the results of the up projections.
    """
    size = config.intermediate_size
    if config.num_experts:
        size = config.expert_size * config.num_experts_per_token
    rotated = (config.num_heads + config.num_kv_heads) * config.head_dim
    rotated *= 2 * (config.positions == "rotary")
    activated = size * (3 if config.gated_mlp else 2)
    return config.num_layers * (10 * config.hidden_size + rotated + activated)


def kv_bytes_on_chip(model: ServedModel, num_chips: int) -> float:
    """Compute the bytes of a token's keys and values on each chip.

    Heads are divided over the chips. With more chips than key heads, each chip holds a
    whole head, so some heads are held several times.

    Raises:
      ValueError: num_chips is below 1.
    """
    if num_chips < 1:
        raise ValueError(f"num_chips: expected at least 1, got {num_chips}")
    heads = cdiv(model.num_kv_heads, num_chips)
    return model.kv_bytes_per_token * heads / model.num_kv_heads


def kv_slots(
    model: ServedModel,
    chip: Chip,
    num_chips: int = 1,
    *,
    memory_fraction: float = 0.9,
    block_size: int = 16,
    reserved_bytes: int = 0,
) -> int:
    """Count the tokens whose keys and values fit beside the parameters.

    Args:
      model: parameters and heads are divided over the chips.
      chip: each of them.
      num_chips: tensor parallelism.
      memory_fraction: of each chip's memory that may be used.
      block_size: tokens of a block; the result is a multiple of it.
      reserved_bytes: on each chip, for activations.

    Raises:
      ValueError: not one block fits, or an argument is out of its range.
    """
    if not 0 < memory_fraction <= 1:
        raise ValueError(
            f"memory_fraction: expected more than 0 and at most 1, got "
            f"{memory_fraction}"
        )
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    token_bytes = kv_bytes_on_chip(model, num_chips)
    free = memory_fraction * chip.memory_bytes - reserved_bytes
    free -= model.param_bytes / num_chips
    blocks = int(free // (token_bytes * block_size))
    if blocks < 1:
        raise ValueError(
            f"num_chips: expected memory for {model.param_bytes / 1e9:.1f} GB of "
            f"parameters of {model.name} and a block of keys and values, got "
            f"{num_chips} x {chip.name} at memory_fraction {memory_fraction:g}; use "
            "more chips"
        )
    return blocks * block_size


@dataclasses.dataclass(frozen=True)
class PaperSetting:
    """A model on its chips, with the KV memory that the paper states."""

    model: str
    chip: str
    num_chips: int
    kv_slots: int
    source: str

    def sizes(self) -> tuple[ServedModel, Chip]:
        """Return the model in 16 bits, and the chip."""
        return served_model(self.model), find_chip(self.chip)


_TABLE_1 = "Kwon et al. 2023, table 1"
# 12 GiB hold 15,728 tokens of 800 KiB, and 264 GiB hold 60,074 tokens of 4.5 MiB; the
# table prints them as 15.7K and 60.1K. The 21 GB of OPT-66B are rounded (they hold
# 9,557 tokens of 2.25 MiB), so the printed 9.7K are used.
PAPER_SETTINGS: Mapping[str, PaperSetting] = {
    "opt-13b": PaperSetting("opt-13b", "a100-40g", 1, 15_728, f"{_TABLE_1}: 12 GB"),
    "opt-66b": PaperSetting("opt-66b", "a100-40g", 4, 9_700, f"{_TABLE_1}: 9.7K slots"),
    "opt-175b": PaperSetting("opt-175b", "a100-80g", 8, 60_074, f"{_TABLE_1}: 264 GB"),
    "llama-13b": PaperSetting(
        "llama-13b",
        "a100-40g",
        1,
        15_728,
        "section 6.4; the memory is OPT-13B's, whose sizes it has",
    ),
}


def paper_setting(name: str) -> PaperSetting:
    """Return the paper's setting for a model.

    Raises:
      ValueError: the paper has no such model; the message lists its models.
    """
    if name.lower() not in PAPER_SETTINGS:
        raise ValueError(
            f"model: expected one of the paper's, {', '.join(PAPER_SETTINGS)}, "
            f"got {name!r}"
        )
    return PAPER_SETTINGS[name.lower()]
