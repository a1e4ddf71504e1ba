"""Served models: how much of a model is read, computed and kept for each token.

Place on the road: name or folder -> ModelConfig -> [served_models] -> roofline,
number of KV slots. Host only: sizes, no weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.attention import kv_cache
from jpaged.models import shapes
from jpaged.models.config import ModelConfig
from jpaged.models.loading import checkpoint
from jpaged.simulator.costs.chips import Chip, find_chip


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """Sizes of a model, over all its layers and all its chips.

    Parameters of layers are those of matrix products, biases and norms; of experts
    apart, because a step reads only the chosen ones.
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
    head_params: int  # of the product that gives logits
    num_experts: int  # in a layer; 0: none
    num_experts_per_token: int
    param_bytes: int  # of all parameters
    layer_param_bytes: float  # of one parameter of a layer or expert
    dtype_bytes: int  # of one activation, and of one other parameter
    kv_bytes_per_token: int
    activation_bytes_per_token: int  # that operations between the products move
    sliding_window: int | None  # tokens that a sliding layer sees
    num_sliding_layers: int

    @property
    def flops_per_token(self) -> float:
        """Of a token's matrix products in all layers: no attention, no logits."""
        share = self.num_experts_per_token / max(self.num_experts, 1)
        return 2 * (self.layer_params + self.expert_params * share)

    @property
    def flops_per_pair(self) -> float:
        """Of one query and one key in all layers: a score, and a share of the sum."""
        return 4 * self.num_heads * self.head_dim * self.num_layers

    @classmethod
    def of(
        cls, name: str, config: ModelConfig, kv_dtype: str | None = None
    ) -> ServedModel:
        """Sizes of a configuration, in its dtype; `kv_dtype` where the pool's differs.

        "int8" counts a byte for each weight of the layers, and not its scales, which
        are under a thousandth.
        """
        size = jnp.dtype(config.dtype).itemsize
        layers, experts = _layer_params(config)
        head = config.vocab_size * config.input_size
        params = layers + experts + _outer_params(config)
        layer_size = 1 if config.quantization == "int8" else size
        others = (params - layers - experts) * size
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
            param_bytes=(layers + experts) * layer_size + others,
            layer_param_bytes=layer_size,
            dtype_bytes=size,
            kv_bytes_per_token=kv_cache.bytes_per_block(
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                block_size=1,
                head_dim=config.head_dim,
                dtype=kv_dtype or config.dtype,
            ),
            activation_bytes_per_token=_activations(config) * size,
            sliding_window=config.sliding_window,
            num_sliding_layers=max(sliding - len(config.full_layers), 0),
        )


def served_model(
    name: str | os.PathLike[str], *, dtype: str = "auto", kv_dtype: str | None = None
) -> ServedModel:
    """Sizes of a model by name, such as "opt-13b", or of a checkpoint's config.json.

    Args:
      name: one of `jpaged.models.shapes.SHAPES`, or a folder in Hugging Face layout.
      dtype: of the parameters; "auto": the checkpoint's, bfloat16 for a name.
      kv_dtype: of keys and values; None: as the parameters.

    Raises:
      ValueError: no shape has this name, or config.json is not supported.
      FileNotFoundError: the folder has no config.json.
    """
    text = os.fspath(name)
    if os.path.isdir(text):
        config = checkpoint.load_config(text)
    elif os.sep in text:
        raise FileNotFoundError(f"model: no such folder: {text}")
    else:
        config = shapes.random_config(text)
    if dtype != "auto":
        config = dataclasses.replace(config, dtype=dtype)
    return ServedModel.of(text, config, kv_dtype)


def _layer_params(config: ModelConfig) -> tuple[int, int]:
    """Parameters of all layers without experts, and of all their experts."""
    hidden, layers = config.hidden_size, config.num_layers
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    norm = hidden * (2 if config.norm == "layer" else 1)
    each = hidden * (queries + 2 * keys) + queries * hidden
    each += (queries + 2 * keys) * config.qkv_bias + hidden * config.out_bias
    each += norm * (4 if config.sublayer_norms else 2)
    each += 2 * config.head_dim * config.qk_norm
    each += config.num_heads * config.attention_sinks
    rising = 2 if config.gated_mlp else 1

    def mlp(size: int, bias: bool) -> int:
        return hidden * size * (rising + 1) + (rising * size + hidden) * bias

    plain = mlp(config.intermediate_size, config.mlp_bias)
    if not config.num_experts:
        return layers * (each + plain), 0
    dense = len(config.dense_layers)
    router = (hidden + config.expert_bias) * config.num_experts
    experts = config.num_experts * mlp(config.expert_size, config.expert_bias)
    rest = layers - dense
    return layers * each + dense * plain + rest * router, rest * experts


def _outer_params(config: ModelConfig) -> int:
    """Parameters of embeddings, logits and the last norm."""
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
    """Numbers that the operations between products read and write, for one token.

    Norms (two a layer) and rotation read and write once, residual sums (two) read
    twice, and the activation reads what the products up gave.
    """
    size = config.intermediate_size
    if config.num_experts:
        size = config.expert_size * config.num_experts_per_token
    turned = (config.num_heads + config.num_kv_heads) * config.head_dim
    turned *= 2 * (config.positions == "rotary")
    acted = size * (3 if config.gated_mlp else 2)
    return config.num_layers * (10 * config.hidden_size + turned + acted)


def kv_bytes_on_chip(model: ServedModel, num_chips: int) -> float:
    """Bytes of a token on each of the chips over which its heads are divided.

    With more chips than key heads each holds a whole head, some the same.
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
    """Tokens whose keys and values fit beside the parameters, in whole blocks.

    Args:
      model: parameters and heads are divided over the chips.
      chip: each of them.
      num_chips: tensor parallelism.
      memory_fraction: of each chip's memory that may be used.
      block_size: tokens of a block.
      reserved_bytes: on each chip, for activations.

    Raises:
      ValueError: not one block fits, or a number is out of its range.
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
            f"num_chips: {model.name} has {model.param_bytes / 1e9:.1f} GB of "
            f"parameters, and {num_chips} x {chip.name} have no room for a block of "
            f"keys and values beside them at memory_fraction {memory_fraction:g}; take "
            "more chips"
        )
    return blocks * block_size


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model on its chips, with the memory that the paper gives to keys and values."""

    model: str
    chip: str
    num_chips: int
    kv_slots: int
    source: str

    def sizes(self) -> tuple[ServedModel, Chip]:
        """The model in 16 bits, and the chip."""
        return served_model(self.model), find_chip(self.chip)


_TABLE_1 = "Kwon et al. 2023, table 1"
# 12 GiB hold 15,728 tokens of 800 KiB and 264 GiB 60,074 of 4.5 MiB, printed as 15.7K
# and 60.1K. The 21 GB of OPT-66B are rounded (9,557 tokens of 2.25 MiB), so the printed
# 9.7K stand.
PAPER_SETTINGS: Mapping[str, Setting] = {
    "opt-13b": Setting("opt-13b", "a100-40g", 1, 15_728, f"{_TABLE_1}: 12 GB"),
    "opt-66b": Setting("opt-66b", "a100-40g", 4, 9_700, f"{_TABLE_1}: 9.7K slots"),
    "opt-175b": Setting("opt-175b", "a100-80g", 8, 60_074, f"{_TABLE_1}: 264 GB"),
    "llama-13b": Setting(
        "llama-13b",
        "a100-40g",
        1,
        15_728,
        "section 6.4; the memory is OPT-13B's, whose sizes it has",
    ),
}


def paper_setting(name: str) -> Setting:
    """The paper's own setting for a model.

    Raises:
      ValueError: the paper has none; the message lists those there are.
    """
    if name.lower() not in PAPER_SETTINGS:
        raise ValueError(
            f"model: expected one of the paper's, {', '.join(PAPER_SETTINGS)}, "
            f"got {name!r}"
        )
    return PAPER_SETTINGS[name.lower()]
