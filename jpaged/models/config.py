"""ModelConfig: the shape of a decoder, in one vocabulary for all families.

Place on the road: config.json -> [models.config] -> decoder. Hugging Face's
names stop at `families.py`; the rest of the code sees only the fields below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpaged.models.loading import families

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NORMS = ("rms", "rms_plus_one", "layer")
ROPE_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
QUANTIZATIONS = ("int8",)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched to reach a longer context.

    `kind` "linear" and "dynamic" use `factor` alone; "llama3" the next three fields
    as well, "yarn" `original_max_position_embeddings` and those from `beta_fast` on,
    "longrope" the two lists of factors.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True  # yarn: the ramp's ends are rounded to whole pairs
    attention_factor: float = 1.0  # multiplies cosines and sines
    short_factors: tuple[float, ...] = ()  # longrope: one for each pair
    long_factors: tuple[float, ...] = ()

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
    norm: str = "rms"  # "rms", "rms_plus_one" (times 1 + weight) or "layer"
    norm_eps: float = 1e-6
    norm_first: bool = True  # norm before each sub-layer, else after its residual
    sublayer_norms: bool = False  # and a norm of what each sub-layer gives
    final_norm: bool = True
    positions: str = "rotary"  # "rotary" or "learned"
    position_offset: int = 0  # rows of a learned table that come before position 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of the sliding layers, where it differs
    rotary_dim: int | None = None  # leading dimensions that turn, where not all do
    qk_norm: bool = False  # an RMS norm of each query and key head
    attention_scale: float | None = None  # of the scores; head_dim ** -0.5 if None
    attention_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    attention_sinks: bool = False  # a learned score per head that takes no value
    sliding_window: int | None = None  # tokens seen, the query's own included
    full_layers: tuple[int, ...] = ()  # layers that see all, where others slide
    scaled_embedding: bool = False  # embeddings times the root of hidden_size
    logits_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    embedding_size: int | None = None  # where it differs from hidden_size (OPT-350m)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0  # 0: every layer has an MLP in place of experts
    num_experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of one expert
    expert_bias: bool = False  # of router and experts
    normalized_routing: bool = True  # the chosen experts' weights sum to 1
    dense_layers: tuple[int, ...] = ()  # layers with an MLP, where others have experts
    swiglu_limit: float | None = None  # gpt-oss's clamped gate
    swiglu_alpha: float = 1.702
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"  # of the parameters and activations
    quantization: str | None = None  # "int8": weights of the layers' products
    vocab_first: bool = False  # the output's weights are stored [V, E], for TPUs
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
            _check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads ({self.num_heads}), "
                f"got {self.num_kv_heads}"
            )
        if self.positions == "rotary" and self.rotary_size % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(
                f"{name}: rotary positions need an even number, got {self.rotary_size}"
            )
        if not 0 < self.rotary_size <= self.head_dim:
            raise ValueError(
                f"rotary_dim: expected from 2 to head_dim ({self.head_dim}), "
                f"got {self.rotary_dim}"
            )
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("positions", ("rotary", "learned")),
            ("dtype", DTYPES),
            ("quantization", (None, *QUANTIZATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {allowed}, got {getattr(self, name)!r}"
                )
        if not self.norm_first and self.final_norm:
            raise ValueError("final_norm: expected False where norm_first is False")
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window)
        for name in ("attention_soft_cap", "logits_soft_cap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0 or None, got {value!r}")
        self._check_experts()
        self._check_longrope()

    def _check_experts(self) -> None:
        if not self.num_experts:
            return
        for name in ("num_experts", "num_experts_per_token", "expert_size"):
            _check_size(name, getattr(self, name))
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                "num_experts_per_token: expected at most num_experts "
                f"({self.num_experts}), got {self.num_experts_per_token}"
            )

    def _check_longrope(self) -> None:
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return
        for name in ("short_factors", "long_factors"):
            count = len(getattr(scaling, name))
            if count != self.rotary_size // 2:
                raise ValueError(
                    f"rope {name}: expected one for each of {self.rotary_size // 2} "
                    f"pairs of dimensions, got {count}"
                )

    @property
    def input_size(self) -> int:
        """Width of a token's embedding, before any projection to hidden_size."""
        return self.embedding_size or self.hidden_size

    @property
    def rotary_size(self) -> int:
        """Leading dimensions of a head that turn with the position."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that is computed as its authors meant it.

        Dynamic and long rotary scalings turn every position of a sequence by its
        whole length once that exceeds the trained one, and with it keys that are
        stored already. So such a model ends where that begins.
        """
        return getattr(
            self.rope_scaling, self.longest_name, self.max_position_embeddings
        )

    @property
    def longest_name(self) -> str:
        """What Hugging Face calls `max_length` in this model's config.json."""
        is_long = self.rope_scaling is not None and self.rope_scaling.kind == "longrope"
        return f"{'original_' if is_long else ''}max_position_embeddings"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, the tokens that its queries see; None sees all."""
        return tuple(
            None if layer in self.full_layers else self.sliding_window
            for layer in range(self.num_layers)
        )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

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


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
