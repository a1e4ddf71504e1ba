"""Rotary settings of a config.json: read in both styles, written in the older one.

Pipeline: config.json -> [models.families.rope] -> ModelConfig.

transformers 4 writes `rope_theta` and `rope_scaling`. transformers 5 writes one object
`rope_parameters` for both; for Gemma 3, one object for each kind of layer.
"""

import math
from collections.abc import Mapping
from typing import Any

from jpaged.models.families.fields import required

# Required entries of each rope type.
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# Types whose trained length is, by default, the whole length.
_TRAINED = ("yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(
    hf: Mapping[str, Any],
    *,
    head_dim: int,
    may_be_partial: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields rope_theta, rope_scaling and rotary_dim of a ModelConfig.

    Args:
      hf: config.json, including the defaults of its class.
      head_dim: size of a head.
      may_be_partial: whether this class supports `partial_rotary_factor`.
      aliases: additional names of rope types in this class.

    Raises:
      ValueError: the rope type is unknown, or values are missing.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    _check_object(rope)
    if any(name in rope for name in _LAYER_TYPES):
        raise ValueError(
            "rope_parameters: expected one object for all layers of a "
            f"{hf.get('model_type')!r} model, got one for each of {sorted(rope)}"
        )
    fields = _read_one(rope, hf, aliases or {})
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
    if partial != 1:
        if not may_be_partial:
            raise ValueError(f"partial_rotary_factor: expected 1, got {partial}")
        fields["rotary_dim"] = int(head_dim * partial)
    return fields


def read_two_ropes(hf: Mapping[str, Any], *, head_dim: int) -> dict[str, Any]:
    """The same for Gemma 3, whose layers with a window have their own base."""
    del head_dim  # all dimensions are rotated
    nested = hf.get("rope_parameters") or {}
    _check_object(nested)
    local = dict(nested.get("sliding_attention") or {})
    kind = local.pop("rope_type", None) or "default"
    if kind != "default":
        raise ValueError(
            f"rope type of sliding_attention: expected 'default', got {kind!r}"
        )
    local_theta = local.get("rope_theta") or hf.get("rope_local_base_freq") or 10000.0
    rope = nested.get("full_attention") or hf.get("rope_scaling") or {}
    _check_object(rope)
    return _read_one(rope, hf, {}) | {"local_rope_theta": float(local_theta)}


def _read_one(
    rope: Mapping[str, Any], hf: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = aliases.get(kind, kind)
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    fields: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": None}
    if kind == "default":
        return fields
    if kind not in _REQUIRED:
        raise ValueError(
            f"rope type: expected 'default' or one of {sorted(_REQUIRED)}, got {kind!r}"
        )
    original: int = (
        hf.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or (hf.get("max_position_embeddings") if kind in _TRAINED else None)
        or 0
    )
    missing = [name for name in _REQUIRED[kind] if rope.get(name) is None]
    if not original and kind in ("llama3", *_TRAINED):
        missing.append("original_max_position_embeddings")
    if missing:
        raise ValueError(f"rope type {kind!r}: expected values for {missing}, got none")
    factor = rope.get("factor")
    if factor is None:
        factor = required(hf, "max_position_embeddings") / original
    scaling: dict[str, Any] = {"kind": kind, "factor": factor}
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name) is not None:
            scaling[name] = float(rope[name])
    if kind in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = original
    if kind == "llama3":
        scaling["low_freq_factor"] = rope["low_freq_factor"]
        scaling["high_freq_factor"] = rope["high_freq_factor"]
    if kind == "yarn":
        scaling["beta_fast"] = float(rope.get("beta_fast") or 32.0)
        scaling["beta_slow"] = float(rope.get("beta_slow") or 1.0)
        scaling["is_truncated"] = bool(rope.get("truncate", True))
    if kind == "longrope":
        scaling["short_factors"] = _numbers(rope, "short_factor")
        scaling["long_factors"] = _numbers(rope, "long_factor")
    if kind in ("yarn", "longrope"):
        given = rope.get("attention_factor")
        scaling["attention_factor"] = (
            float(given)
            if given is not None
            else _attention_factor(kind, factor, original, rope)
        )
    fields["rope_scaling"] = scaling
    return fields


def _attention_factor(
    kind: str, factor: float, original: int, rope: Mapping[str, Any]
) -> float:
    """Factor of cosines and sines for a config that does not contain one.

    Source: YaRN, https://arxiv.org/abs/2309.00071, section 3.4; LongRoPE,
    https://arxiv.org/abs/2402.13753, appendix.
    """
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    if numerator and denominator:
        grown = [
            0.1 * scale * math.log(factor) + 1 for scale in (numerator, denominator)
        ]
        return grown[0] / grown[1]
    return 0.1 * math.log(factor) + 1


def write_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json, in the style of transformers 4."""
    entries: dict[str, Any] = {"rope_theta": fields["rope_theta"], "rope_scaling": None}
    if fields["rotary_dim"] is not None:
        entries["partial_rotary_factor"] = fields["rotary_dim"] / fields["head_dim"]
    if fields["local_rope_theta"] is not None:
        entries["rope_local_base_freq"] = fields["local_rope_theta"]
    scaling = fields["rope_scaling"]
    if scaling is None:
        return entries
    kind = scaling["kind"]
    rope = {"rope_type": kind, "factor": scaling["factor"]}
    for name in ("mscale", "mscale_all_dim"):
        if scaling[name] is not None:
            rope[name] = scaling[name]
    if kind in ("llama3", "yarn", "longrope"):
        name = "original_max_position_embeddings"
        rope[name] = scaling[name]
    if kind == "llama3":
        rope["low_freq_factor"] = scaling["low_freq_factor"]
        rope["high_freq_factor"] = scaling["high_freq_factor"]
    if kind == "yarn":
        rope["beta_fast"] = scaling["beta_fast"]
        rope["beta_slow"] = scaling["beta_slow"]
        rope["truncate"] = scaling["is_truncated"]
    if kind in ("yarn", "longrope"):
        rope["attention_factor"] = scaling["attention_factor"]
    if kind == "longrope":
        rope["short_factor"] = list(scaling["short_factors"])
        rope["long_factor"] = list(scaling["long_factors"])
        # transformers 4 reads it here, and transformers 5 prefers this entry.
        entries["original_max_position_embeddings"] = rope.pop(
            "original_max_position_embeddings"
        )
    entries["rope_scaling"] = rope
    return entries


def _check_object(rope: Any) -> None:
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling: expected an object, got {rope!r}")


def _numbers(rope: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = rope[name]
    if not isinstance(values, list) or not all(
        isinstance(value, int | float) for value in values
    ):
        raise ValueError(f"rope {name}: expected a list of numbers, got {values!r:.60}")
    return tuple(float(value) for value in values)
