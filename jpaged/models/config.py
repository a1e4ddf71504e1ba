"""ModelConfig: the shape of a decoder, in one vocabulary for all families.

Place on the road: config.json -> [models.config] -> decoder. Hugging Face's
names stop at `families.py`; the rest of the code sees only the fields below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpaged.models import families

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
ROPE_KINDS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched to reach a longer context.

    `kind` "linear" uses `factor` alone; "llama3" uses all fields.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope type: expected default or one of {ROPE_KINDS}, got {self.kind!r}"
            )
        if self.factor <= 0:
            raise ValueError(f"rope factor: expected more than 0, got {self.factor}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "rope high_freq_factor: expected more than low_freq_factor "
                f"({self.low_freq_factor}), got {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder needs to know; hashable, so it is static under jit.

    Raises ValueError on construction for values that fit no model.
    """

    architecture: str  # Hugging Face's class name, such as "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    norm: str = "rms"  # "rms" or "layer"
    norm_eps: float = 1e-6
    norm_first: bool = True  # norm before each sub-layer, else after its residual
    final_norm: bool = True
    positions: str = "rotary"  # "rotary" or "learned"
    position_offset: int = 0  # rows of a learned table that come before position 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    embedding_size: int | None = None  # where it differs from hidden_size (OPT-350m)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"  # of the parameters and activations
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads ({self.num_heads}), "
                f"got {self.num_kv_heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"head_dim: rotary positions need an even number, got {self.head_dim}"
            )
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("norm", ("rms", "layer")),
            ("positions", ("rotary", "learned")),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {allowed}, got {getattr(self, name)!r}"
                )
        if not self.norm_first and self.final_norm:
            raise ValueError("final_norm: expected False where norm_first is False")

    @property
    def input_size(self) -> int:
        """Width of a token's embedding, before any projection to hidden_size."""
        return self.embedding_size or self.hidden_size

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """ModelConfig from a parsed config.json, in the style before or since 5.x.

        Args:
          hf: the contents of config.json.
          generation: the contents of generation_config.json, whose eos_token_id
            then replaces the config's, as in transformers' `generate`.

        Raises:
          ValueError: unknown architecture (names the supported ones), a missing
            or impossible value, or a feature that this decoder does not have.
        """
        fields = families.read(hf, generation)
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """Contents of a config.json that transformers 4 and 5 both read."""
        return families.write(dataclasses.asdict(self))
