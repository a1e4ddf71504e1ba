"""Fields: helpers that read and write single entries of a config.json.

Pipeline: config.json -> [models.families] -> ModelConfig.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jpaged.models.families.family import Fields

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
}


def required(hf: Mapping[str, Any], name: str) -> int:
    """A size that config.json must contain.

    Raises:
      ValueError: the entry is missing or not a positive integer.
    """
    value = hf.get(name)
    if value is None:
        raise ValueError(f"{name}: expected a value in config.json, got none")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
    return value


def refuse(hf: Mapping[str, Any], **supported: Any) -> None:
    """Check that entries have the only supported value, or are missing.

    Raises:
      ValueError: an entry asks for a feature that the decoder does not have.
    """
    for name, value in supported.items():
        got = hf.get(name, value)
        if got is not None and got != value:
            raise ValueError(f"{name}: expected {value!r}, got {got!r}")


def default_head_dim(hidden_size: int, num_heads: int) -> int:
    """Head size of a config that does not contain one."""
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size: expected a multiple of num_attention_heads ({num_heads}), "
            f"got {hidden_size}"
        )
    return hidden_size // num_heads


def read_activation(name: str) -> str:
    """Name of an activation in a ModelConfig, from its name in config.json."""
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {sorted(_ACTIVATIONS)}, got {name!r}"
        )
    return _ACTIVATIONS[name]


def read_layer_types(
    hf: Mapping[str, Any],
    is_sliding: Callable[[Mapping[str, Any], int], bool],
) -> dict[str, Any]:
    """The fields sliding_window and full_layers.

    Args:
      hf: config.json.
      is_sliding: (config.json, layer) -> whether the layer has a window, for a config
        without `layer_types`.
    """
    num_layers = required(hf, "num_hidden_layers")
    window = hf.get("sliding_window")
    if not hf.get("use_sliding_window", True):
        window = None
    names = hf.get("layer_types")
    if names is None:
        slides = [is_sliding(hf, layer) for layer in range(num_layers)]
    else:
        known = ("full_attention", "sliding_attention")
        unknown = [name for name in names if name not in known]
        if unknown or len(names) != num_layers:
            raise ValueError(
                f"layer_types: expected {num_layers} of {known}, got {names!r:.120}"
            )
        slides = [name == "sliding_attention" for name in names]
    if window is None or not any(slides):
        return {"sliding_window": None, "full_layers": ()}
    full = tuple(layer for layer, slid in enumerate(slides) if not slid)
    return {"sliding_window": window, "full_layers": full}


def write_layer_types(fields: Fields) -> list[str]:
    """The entry `layer_types` of config.json."""
    is_full = fields["sliding_window"] is None
    return [
        "full_attention"
        if is_full or layer in fields["full_layers"]
        else "sliding_attention"
        for layer in range(fields["num_layers"])
    ]


def all_but_every(pattern: int) -> Callable[[Mapping[str, Any], int], bool]:
    """`is_sliding` of models in which every `pattern`-th layer has no window."""
    return lambda hf, layer: (layer + 1) % pattern != 0


def read_block_size(hf: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a stored weight that share a scale; None: not quantised.

    Raises:
      ValueError: the checkpoint is quantised in another way.
    """
    quantization = hf.get("quantization_config")
    if not quantization:
        return None
    is_object = isinstance(quantization, Mapping)
    method = quantization.get("quant_method", "unknown") if is_object else "unknown"
    size: Any = quantization.get("weight_block_size") if is_object else None
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    if method == "fp8" and is_pair and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    blocks = f" with weight_block_size {size!r}" if method == "fp8" else ""
    raise ValueError(
        f"quantization_config: expected none, got {method!r}{blocks}; of quantised "
        "checkpoints, only 'fp8' with a weight_block_size of two numbers is supported. "
        "Use the unquantised one, with quantization='int8' to load it in 8 bits"
    )


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


def sizes(*size: int, **more: Any) -> dict[str, Any]:
    """Sizes of a model, by the names that most config.json files use.

    Args:
      *size: hidden size, layers, heads, kv heads, intermediate size, vocabulary.
      **more: further entries of config.json.
    """
    return {**dict(zip(_SIZES, size, strict=True)), **more}
