"""ModelConfig: the structure of a decoder, in one vocabulary for all families.

Pipeline: config.json -> [models.config] -> decoder.

Only `models.families` uses the names of Hugging Face's config.json; all other modules
use the fields below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpaged.models import families

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NORMS = ("rms", "rms_plus_one", "layer")
ROPE_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
QUANTIZATIONS = ("int8",)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled to extend a model's context.

    The kinds "linear" and "dynamic" use only `factor`. "llama3" also uses the next
    three fields; "yarn" uses `original_max_position_embeddings`, `beta_fast`,
    `beta_slow`, `is_truncated` and `attention_factor`; "longrope" uses
    `original_max_position_embeddings`, `attention_factor` and the lists of factors.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True  # yarn: the ends of the ramp are rounded to whole pairs
    attention_factor: float = 1.0  # multiplies the cosines and sines
    short_factors: tuple[float, ...] = ()  # longrope: one per pair of dimensions
    long_factors: tuple[float, ...] = ()
    # DeepSeek's, from which `attention_factor` and the factor of scores are computed.
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope type: expected 'default' or one of {ROPE_KINDS}, "
                f"got {self.kind!r}"
            )
        if self.factor <= 0:
            raise ValueError(f"rope factor: expected more than 0, got {self.factor}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "rope high_freq_factor: expected more than low_freq_factor "
                f"({self.low_freq_factor}), got {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """Sizes of multi-head latent attention, see `models.latent`."""

    rank: int  # of a token's latent, without the rotated key behind it
    rope_dim: int  # rotated dimensions of a query, and of the key of all heads
    nope_dim: int  # dimensions of a head's query and key without rotation
    value_dim: int  # of a head's value
    query_rank: int | None = None  # queries are computed through so many numbers
    interleaved: bool = True  # dimension 2 i is rotated with 2 i + 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "interleaved" and value is not None:
                _check_size(f"latent {field.name}", value)


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a router selects experts, where it differs from the softmax of the best.

    Scores are float32. With groups, only experts of the best groups are selected.
    """

    scores: str = "softmax"  # or "sigmoid"
    num_groups: int = 1  # of consecutive experts
    num_selected_groups: int = 1
    group_scores: str = (
        "max"  # of a group: of its best expert, or the sum of its "top2"
    )
    has_correction: bool = False  # a learned term of the selection, not of the weights
    scale: float = 1.0  # of the selected experts' weights

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scores", ("softmax", "sigmoid")),
            ("group_scores", ("max", "top2")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"routing {name}: expected one of {allowed}, got "
                    f"{getattr(self, name)!r}"
                )
        _check_size("n_group", self.num_groups)
        _check_size("topk_group", self.num_selected_groups)
        if self.num_selected_groups > self.num_groups:
            raise ValueError(
                f"topk_group: expected at most n_group ({self.num_groups}), got "
                f"{self.num_selected_groups}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Structure of a decoder. Hashable, so that it can be static under jit.

    Raises:
      ValueError: a value is out of range or contradicts another one.
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
    norm_first: bool = True  # norm before each sub-layer, else after the residual sum
    sublayer_norms: bool = False  # another norm of each sub-layer's output
    final_norm: bool = True
    positions: str = "rotary"  # "rotary" or "learned"
    position_offset: int = 0  # rows of the learned table before that of position 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of layers with a window, if it differs
    rotary_dim: int | None = None  # leading dimensions that are rotated; None is all
    qk_norm: bool = False  # RMS norm of each query and key head
    attention_scale: float | None = None  # of the scores; head_dim ** -0.5 if None
    attention_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    attention_sinks: bool = False  # a learned score per head that has no value
    # With latents, the pages have one key head of `head_dim` = rank + rope_dim numbers,
    # whose first `rank` are the value; `attention_scale` is that of the heads.
    latent: LatentSizes | None = None
    sliding_window: int | None = None  # visible tokens, including the query's own
    full_layers: tuple[int, ...] = ()  # layers without the window
    scaled_embedding: bool = False  # embeddings are multiplied by hidden_size ** 0.5
    logits_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    embedding_size: int | None = None  # if it differs from hidden_size (OPT-350m)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0  # 0: every layer has an MLP instead of experts
    num_experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of one expert
    expert_bias: bool = False  # router and experts have biases
    normalized_routing: bool = True  # the weights of a token's experts sum to 1
    routing: Routing | None = None  # None: softmax, and the best of all experts
    shared_expert_size: int = 0  # intermediate size of the experts of every token
    dense_layers: tuple[int, ...] = ()  # layers with an MLP instead of experts
    swiglu_limit: float | None = None  # bound of gpt-oss's clamped gate
    swiglu_alpha: float = 1.702
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"  # of the parameters and activations
    quantization: str | None = None  # "int8": 8-bit weights of products
    vocab_first: bool = False  # output weights are stored as [V, E], for TPUs
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
                f"{name}: expected an even number for rotary positions, "
                f"got {self.rotary_size}"
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
        self._check_latent()
        self._check_experts()
        self._check_longrope()

    def _check_latent(self) -> None:
        if self.latent is None:
            return
        width = self.latent.rank + self.latent.rope_dim
        for name, expected in (
            ("num_kv_heads", 1),
            ("head_dim", width),
            ("rotary_dim", self.latent.rope_dim),
            ("positions", "rotary"),
            ("qk_norm", False),
            ("attention_sinks", False),
        ):
            if (got := getattr(self, name)) != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} with latent attention, got {got!r}"
                )

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
        if self.routing is not None:
            self._check_routing(self.routing)

    def _check_routing(self, routing: Routing) -> None:
        groups = routing.num_groups
        least = 2 if routing.group_scores == "top2" and groups > 1 else 1
        if self.num_experts % groups or self.num_experts // groups < least:
            raise ValueError(
                f"n_group: expected a divisor of the {self.num_experts} experts with "
                f"groups of at least {least}, got {groups}"
            )
        selected = self.num_experts // groups * routing.num_selected_groups
        if groups > 1 and self.num_experts_per_token > selected:
            raise ValueError(
                f"num_experts_per_token: expected at most the {selected} experts of "
                f"{routing.num_selected_groups} groups (topk_group), got "
                f"{self.num_experts_per_token}"
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
        """Leading dimensions of a head that are rotated by the position."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def max_length(self) -> int:
        """Length of the longest sequence for which the model is well defined.

        Linear and dynamic scaling stretch `max_position_embeddings` by their factor,
        and YaRN the trained length, as in vLLM; but a longer `max_position_embeddings`
        is kept. That of LongRoPE, and Gemma 3's, already includes the factor.
        """
        scaling, length = self.rope_scaling, self.max_position_embeddings
        if scaling is None or self.local_rope_theta is not None:
            return length
        match scaling.kind:
            case "longrope":
                return max(length, scaling.original_max_position_embeddings)
            case "linear" | "dynamic":
                return max(length, int(length * scaling.factor))
            case "yarn":
                stretched = scaling.original_max_position_embeddings * scaling.factor
                return max(length, int(stretched))
            case _:
                return length

    @property
    def default_length(self) -> int:
        """Length of the longest sequence if none is chosen.

        Dynamic and LongRoPE scaling rotate every position in another way where longer
        sequences than this one are possible, which changes shorter ones, too.
        """
        scaling = self.rope_scaling
        if scaling is None or self.local_rope_theta is not None:
            return self.max_length
        if scaling.kind == "dynamic":
            return self.max_position_embeddings
        if scaling.kind == "longrope" and scaling.short_factors != scaling.long_factors:
            return scaling.original_max_position_embeddings
        return self.max_length

    @property
    def longest_name(self) -> str:
        """What limits `max_length`, in the words of config.json."""
        is_scaled = self.max_length != self.max_position_embeddings
        return f"max_position_embeddings{' times the rope factor' if is_scaled else ''}"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer, the tokens that a query sees; None means all."""
        return tuple(
            None if layer in self.full_layers else self.sliding_window
            for layer in range(self.num_layers)
        )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of one MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Convert a parsed config.json, as written by transformers 4 or 5.

        Args:
          hf: contents of config.json.
          generation: contents of generation_config.json. Its eos_token_id, if any,
            replaces that of config.json, as in transformers' `generate`.

        Raises:
          ValueError: the architecture is unknown (the message lists the supported
            ones), a value is missing or impossible, or the model needs a feature that
            the decoder does not have.
        """
        fields = families.read_fields(hf, generation)
        parts = dict(rope_scaling=RopeScaling, latent=LatentSizes, routing=Routing)
        for name, part in parts.items():
            if fields.get(name) is not None:
                fields[name] = part(**fields[name])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """Contents of a config.json that transformers 4 and 5 can both read."""
        return families.write_fields(dataclasses.asdict(self))


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
