"""Weight reading: the arrays of a weight update, from any form, after all checks.

Pipeline: trainer -> [weight_reading] -> weight_update. Host only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh

from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.loading import sources
from jpaged.models.loading.checkpoint import load_model
from jpaged.models.quantize import quantize_int8
from jpaged.parallel import distributed
from jpaged.serving.weights import leaf_name, named_leaves
from jpaged.validation import error, flag, number, one_of

REQUESTS = ("recompute", "keep", "abort")
PREFIX_CACHES = ("reset", "keep")
_LORA = ("_lora_a", "_lora_b")
# By dtype: an unsigned integer of its size, and the bits that only NaN and infinity
# set.
_EXPONENT_BITS = {
    "float32": (np.uint32, 0x7F800000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}
_CHUNK = 1 << 16  # values that are checked at a time, small enough for a cache


class Adapter(NamedTuple):
    """A low-rank addition to a weight [..., in, out]: scale * a @ b."""

    a: Any  # [..., in, rank]
    b: Any  # [..., rank, out]
    scale: float


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
    """The options of `LLM.update_weights`, see there.

    Raises:
      ValueError: an option is invalid, or two contradict each other.
    """

    prefix_cache: str = "reset"
    requests: str | None = None
    copy: bool = True
    cast: bool = False
    check_finite: bool = True
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the options, and choose the default of `requests`."""
        one_of("prefix_cache", self.prefix_cache, PREFIX_CACHES)
        if self.requests is None:
            default = "recompute" if self.prefix_cache == "reset" else "keep"
            object.__setattr__(self, "requests", default)
        one_of("requests", self.requests, REQUESTS)
        if (self.prefix_cache, self.requests) == ("keep", "recompute"):
            raise ValueError(
                "prefix_cache: expected 'reset' with requests='recompute', because "
                "requests would map the old keys and values again, got 'keep'"
            )
        for name in ("copy", "cast", "check_finite"):
            flag(name, getattr(self, name))
        if self.lora_alpha is not None:
            number("lora_alpha", self.lora_alpha, above=0)


@dataclasses.dataclass(frozen=True)
class NewWeights:
    """A checked update: new arrays and adapters by name of the weight."""

    arrays: Mapping[str, Any]
    adapters: Mapping[str, Adapter]


def read_weights(
    weights: Any, model: Decoder, mesh: Mesh | None, options: UpdateOptions
) -> NewWeights:
    """Return the arrays of an update after all checks.

    Args:
      weights: see `LLM.update_weights`.
      model: the model that they are for.
      mesh: its mesh.
      options: of the update.

    Raises:
      ValueError: the weights do not fit; the message names the array.
      FileNotFoundError: a folder does not exist or is not a checkpoint.
    """
    own, cast = named_leaves(model), options.cast
    found = _named_arrays(weights, model, mesh, cast)
    for name, array in found.items():
        _check_array(name, array, mesh)
    adapters = {name: found.pop(name) for name in list(found) if name.endswith(_LORA)}
    if cast:
        found = _quantised_like(own, found)
    _check_names(own, found, is_partial=bool(adapters) and not found)
    for name, array in found.items():
        _check_like(name, array, own[name], cast)
    pairs = _pair_adapters(own, adapters, options.lora_alpha)
    if options.check_finite:
        for name, array in [*found.items(), *adapters.items()]:
            if not is_finite(array):
                raise _wrong(name, "finite numbers", "NaN or infinity")
    return NewWeights(found, pairs)


def _named_arrays(
    weights: Any, model: Decoder, mesh: Mesh | None, cast: bool
) -> dict[str, Any]:
    """Return the arrays of `weights` by name, in any of the accepted forms."""
    if isinstance(weights, str | os.PathLike):
        config = model.config
        name = os.fspath(weights)
        folder = name if sources.is_random(name) else sources.find_checkpoint(name)
        weights = load_model(
            folder, config.dtype, quantization=config.quantization, mesh=mesh
        )
    if isinstance(weights, Decoder):
        _check_config(model.config, weights.config, cast)
        return named_leaves(weights)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        weights, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    found = {
        leaf_name(path): each.get_value() if isinstance(each, nnx.Variable) else each
        for path, each in leaves
    }
    # The tree of a module has a step into each variable.
    found = {name.removesuffix(".value"): array for name, array in found.items()}
    if not found or "" in found:
        raise error(
            "weights",
            "a Decoder, an nnx state, a pytree of arrays with the names of its "
            "parameters, or a folder",
            weights,
        )
    return found


def _check_config(expected: ModelConfig, config: ModelConfig, cast: bool) -> None:
    """Raise ValueError for another model, or another dtype that is not to be cast."""
    ignored = ("dtype", "quantization") if cast else ()
    for field in dataclasses.fields(expected):
        name = field.name
        values = getattr(expected, name), getattr(config, name)
        if name not in ignored and values[0] != values[1]:
            is_dtype = name in ("dtype", "quantization")
            raise ValueError(
                f"weights: expected a model with {name}={values[0]!r}, as the LLM has, "
                f"got {values[1]!r}"
                + ("; cast=True converts it" if is_dtype else "; create another LLM")
            )


def _check_names(
    own: Mapping[str, Any], found: Mapping[str, Any], is_partial: bool
) -> None:
    unknown = [name for name in found if name not in own]
    if unknown:
        raise ValueError(
            f"weights: expected the arrays of the LLM's model, got {unknown[0]!r} and "
            f"{len(unknown) - 1} others that it does not have; it has {_some(own)}"
        )
    missing = [name for name in own if name not in found]
    if missing and not is_partial:
        raise ValueError(
            f"weights: expected all {len(own)} arrays of the LLM's model, got none for "
            f"{missing[0]!r} and {len(missing) - 1} others; only adapters "
            f"(names that end in {' and '.join(_LORA)}) may come alone"
        )


def _some(names: Mapping[str, Any]) -> str:
    first = list(names)[:3]
    return ", ".join(map(repr, first)) + (", ..." if len(names) > 3 else "")


def _check_array(name: str, array: Any, mesh: Mesh | None) -> None:
    """Raise ValueError if `array` is no array whose values can be read here."""
    if isinstance(array, Tracer):
        raise _wrong(name, "an array", "a traced value; call it outside of jit")
    if not isinstance(array, jax.Array | np.ndarray):
        raise _wrong(name, "an array", f"{type(array).__name__} {array!r:.60}")
    if not isinstance(array, jax.Array):
        return
    if array.is_deleted():
        raise _wrong(name, "an array", "a deleted one, which a function has donated")
    if not array.is_fully_addressable and not distributed.is_shared(mesh):
        raise _wrong(
            name,
            "an array on devices of this process, as the LLM's mesh has",
            f"one on {len(array.devices())} devices of several processes",
        )


def _check_like(name: str, array: Any, own: jax.Array, cast: bool) -> None:
    if array.shape != own.shape:
        raise _wrong(name, f"shape {own.shape}", f"shape {array.shape}")
    if array.dtype == own.dtype:
        return
    if not cast:
        raise _wrong(
            name, f"dtype {own.dtype}", f"{array.dtype}; cast=True converts it"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise _wrong(name, "a dtype of floats", str(array.dtype))


def _wrong(name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"weights: {name}: expected {expected}, got {got}")


_quantise = jax.jit(quantize_int8)


def _quantised_like(own: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Quantise the float weights for which the model has int8 and scales."""
    result = dict(found)
    for name, array in found.items():
        if name not in own or own[name].dtype != jnp.int8 or array.dtype == jnp.int8:
            continue
        scale = name.removesuffix("weight") + "scale"
        result[name], result[scale] = _quantise(array)
    return {name: result.pop(name) for name in own if name in result} | result


def _pair_adapters(
    own: Mapping[str, Any], adapters: Mapping[str, Any], alpha: float | None
) -> dict[str, Adapter]:
    """Return the adapters by the name of their weight, after checks."""
    if adapters and alpha is None:
        raise ValueError(
            "lora_alpha: expected the alpha of the adapters (an update is alpha / rank "
            f"* a @ b), because weights has {next(iter(adapters))!r}, got None"
        )
    if alpha is not None and not adapters:
        raise ValueError(
            f"lora_alpha: expected None for weights without adapters (names that end "
            f"in {' and '.join(_LORA)}), got {alpha!r}"
        )
    pairs: dict[str, Adapter] = {}
    for name in adapters:
        weight = name[: -len(_LORA[0])]
        if weight not in own:
            raise ValueError(
                f"weights: {name}: expected an adapter of an array of the LLM's model "
                f"({_some(own)}), got one of {weight!r}"
            )
        base = own[weight]
        if not jnp.issubdtype(base.dtype, jnp.floating):
            raise _wrong(name, "weights of floats under an adapter", str(base.dtype))
        a, b = (adapters.get(weight + suffix) for suffix in _LORA)
        if a is None or b is None:
            raise _wrong(name, f"both {' and '.join(_LORA)}", "one of them")
        rank = a.shape[-1] if a.ndim else 0
        shapes = (*base.shape[:-1], rank), (*base.shape[:-2], rank, base.shape[-1])
        if (a.shape, b.shape) != shapes or not rank:
            raise _wrong(
                weight,
                f"adapters of {(*base.shape[:-1], 'rank')} and "
                f"{(*base.shape[:-2], 'rank', base.shape[-1])}",
                f"{a.shape} and {b.shape}",
            )
        assert alpha is not None
        pairs[weight] = Adapter(a, b, float(alpha) / rank)
    return pairs


_all_finite = jax.jit(lambda array: jnp.isfinite(array).all())


def is_finite(array: Any) -> bool:
    """Whether all values are finite; on a CPU, without compilation or copies."""
    name = jnp.dtype(array.dtype).name
    if name not in _EXPONENT_BITS:
        return not jnp.issubdtype(array.dtype, jnp.floating) or bool(_all_finite(array))
    if isinstance(array, np.ndarray):
        return _are_finite(array, name)
    if next(iter(array.devices())).platform != "cpu":
        return bool(_all_finite(array))
    shards = {str(each.index): each for each in array.addressable_shards}
    return all(_are_finite(np.asarray(each.data), name) for each in shards.values())


def _are_finite(values: np.ndarray, name: str) -> bool:
    flat = np.ravel(values)
    kind, mask = _EXPONENT_BITS[name]
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        # The sum of squares reads at the speed of memory, and is finite in most cases.
        with np.errstate(all="ignore"):
            if name == "float32" and np.isfinite(np.dot(chunk, chunk)):
                continue
        if (chunk.view(kind) & kind(mask) == mask).any():
            return False
    return True
