"""Families: everything that is known about each supported architecture.

Pipeline: config.json, tensor names -> [models.families] -> ModelConfig, parameters.

To add a family, write its `Family` record in a module of this folder and list it in
`FAMILIES`. The decoder knows nothing of families: it is built from a ModelConfig.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from jpaged.models.families.deepseek import DEEPSEEK2, DEEPSEEK3
from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import read_block_size
from jpaged.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from jpaged.models.families.gpt2 import GPT2
from jpaged.models.families.gpt_oss import GPT_OSS
from jpaged.models.families.llama import LLAMA
from jpaged.models.families.mistral import MISTRAL, MIXTRAL
from jpaged.models.families.opt import OPT
from jpaged.models.families.phi3 import PHI3
from jpaged.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        OPT,
        GPT2,
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        GPT_OSS,
        DEEPSEEK2,
        DEEPSEEK3,
    )
}


def read_fields(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a ModelConfig from a parsed config.json; see `ModelConfig.from_hf`."""
    family = _family(hf)
    read_block_size(hf)  # refuses what is quantised in another way
    has_own_end = hf.get("eos_token_id") is not None
    hf = {**family.defaults, **hf}
    eos = hf.get("eos_token_id")
    if generation is not None and generation.get("eos_token_id") is not None:
        eos, has_own_end = generation["eos_token_id"], True
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    fields = {
        "architecture": family.architecture,
        "bos_token_id": hf.get("bos_token_id"),
        "pad_token_id": hf.get("pad_token_id"),
        "dtype": str(dtype).removeprefix("torch."),
    } | family.read(hf)
    ends = _end_ids(eos, fields["vocab_size"], warns=has_own_end)
    return fields | {"eos_token_ids": ends}


def _end_ids(eos: Any, vocab_size: int, *, warns: bool) -> tuple[int, ...]:
    """The different EOS tokens of the vocabulary.

    Args:
      eos: the entry eos_token_id: an id, a list of ids, or None.
      vocab_size: of the model.
      warns: warn about ids that the vocabulary does not have.

    Raises:
      ValueError: an id is no integer.
    """
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(
                f"eos_token_id: expected a token id or a list of them, got {eos!r:.80}"
            )
    known = [token for token in ids if 0 <= token < vocab_size]
    if len(known) < len(ids) and warns:
        warnings.warn(
            f"eos_token_id: expected ids below vocab_size ({vocab_size}), got {eos}; "
            "the others end no text",
            stacklevel=4,
        )
    return tuple(dict.fromkeys(known))


def write_fields(fields: Fields) -> dict[str, Any]:
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


def _family(hf: Mapping[str, Any]) -> Family:
    """Family that a config.json names, by class or by model_type."""
    names = hf.get("architectures") or [
        name
        for name, family in FAMILIES.items()
        if family.model_type == hf.get("model_type")
    ]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(
        f"architectures: expected one of {sorted(FAMILIES)}, "
        f"got {names or hf.get('model_type')!r}"
    )
