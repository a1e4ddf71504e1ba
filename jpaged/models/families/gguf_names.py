"""GGUF tensor names: their names in transformers, and what llama.cpp changed in them.

Pipeline: tensor names of a GGUF file -> [families.gguf_names] -> loading.gguf_tensors.

Source: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py, conversion/.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jpaged.models.families.family import Family

# Names inside a layer ("blk.3.attn_q.weight"), by modules of the decoder.
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.query attention.key attention.value": "attn_qkv",
    "attention.out": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention.query_down": "attn_q_a",
    "attention.query_down_norm": "attn_q_a_norm",
    "attention.query_up": "attn_q_b",
    "attention.latent": "attn_kv_a_mqa",
    "attention.latent_norm": "attn_kv_a_norm",
    "attention.key_up attention.value_up": "attn_kv_b",
    "attention_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.gate mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_out_norm": "post_ffw_norm",
    "experts.shared.gate": "ffn_gate_shexp",
    "experts.shared.up": "ffn_up_shexp",
    "experts.shared.down": "ffn_down_shexp",
    "experts.correction": "exp_probs_b",
}
# Newer files store the two halves of each head apart, keys transposed.
KEYS_AND_VALUES, KEYS, VALUES = (f"attn_{part}_b.weight" for part in ("kv", "k", "v"))
_TOP_NAMES = {"final_norm": "output_norm", "position_embedding": "position_embd"}
# Tensors that hold a part of the config.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
OF_CONFIG = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_PAIRED = ("attn_q", "attn_k")


class Change(NamedTuple):
    """What has to be undone to get the tensor of transformers.

    Attributes:
      transposed: the axes are swapped.
      pairs_of: rows of a head whose pairs of rotated rows are neighbours; 0 if none.
      offset: is added to all values.
      expert: the tensor is that expert's part of the stored one.
    """

    transposed: bool = False
    pairs_of: int = 0
    offset: float = 0.0
    expert: int | None = None


class Names:
    """The tensors of one model, in a GGUF file and in transformers."""

    def __init__(
        self,
        family: Family,
        *,
        num_layers: int,
        num_experts: int = 0,
        pairs_of: int = 0,
        norm_offset: float = 0.0,
    ) -> None:
        """Collect the names.

        Args:
          family: of the model.
          num_layers: of the model.
          num_experts: of each layer.
          pairs_of: see `Change`, for queries and keys.
          norm_offset: see `Change.offset`, for norms.
        """
        self._pairs_of, self._norm_offset = pairs_of, norm_offset
        self._transposes = family.stores_in_out
        # Without ".weight" and ".bias".
        self._theirs: dict[str, list[tuple[str, int | None]]] = {}
        for ours, theirs, expert in _pairs(family, num_layers, num_experts):
            self._theirs.setdefault(ours, []).append((theirs, expert))

    def translate(self, name: str, rank: int) -> list[tuple[str, Change]]:
        """Names in transformers of a tensor in the file, and its changes.

        A stored tensor of all experts has one name for each. An unknown tensor keeps
        its name.

        Args:
          name: in the file.
          rank: number of its axes.
        """
        module, _, suffix = name.rpartition(".")
        if module not in self._theirs or suffix not in ("weight", "bias"):
            return [(name, Change())]
        last = module.rpartition(".")[2]
        is_in_layer = module.startswith("blk.")
        is_norm = last.endswith("norm") and suffix == "weight"
        change = Change(
            transposed=self._transposes and is_in_layer and rank == 2,
            pairs_of=self._pairs_of if is_in_layer and last in _PAIRED else 0,
            offset=self._norm_offset if is_norm else 0.0,
        )
        return [
            (_with_suffix(theirs, suffix), change._replace(expert=expert))
            for theirs, expert in self._theirs[module]
        ]

    def in_file(self, name: str) -> str:
        """The name in the file of a tensor of transformers."""
        module, _, suffix = name.rpartition(".")
        for ours, pairs in self._theirs.items():
            if any(theirs == module for theirs, _ in pairs):
                return f"{ours}.{suffix}"
            if any(theirs == name for theirs, _ in pairs):
                return f"{ours}.bias"
        return name


def _with_suffix(module: str, suffix: str) -> str:
    """Name of a tensor; that of the router's correction is not a module's."""
    return module if module.endswith("_bias") else f"{module}.{suffix}"


def _pairs(
    family: Family, num_layers: int, num_experts: int
) -> Iterator[tuple[str, str, int | None]]:
    """(name in the file, name in transformers, expert) of each module."""
    yield "token_embd", family.embedding.removesuffix(".weight"), None
    yield "output", "lm_head", None
    for modules, theirs in family.modules.items():
        if modules in _TOP_NAMES:
            yield _TOP_NAMES[modules], theirs, None
    for layer in range(num_layers):
        top, prefix = f"blk.{layer}.", f"{family.layer_prefix}{layer}."
        for modules, theirs in family.layer_modules.items():
            if modules in _LAYER_NAMES:
                yield top + _LAYER_NAMES[modules], prefix + theirs, None
        if num_experts and not family.stacks_experts:
            yield top + "ffn_gate_inp", prefix + family.router, None
            for module, theirs in family.experts.items():
                for expert in range(num_experts):
                    stored = f"{top}ffn_{module}_exps"
                    yield stored, prefix + theirs.format(expert=expert), expert
