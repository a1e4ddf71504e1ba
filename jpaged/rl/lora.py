"""LoRA: low-rank adapters of a decoder's weights, as a tree of their own.

Pipeline: trainer -> [lora] -> forward pass, `LLM.update_weights`. Pure functions.

An adapter of a weight [in, out] is a [in, r] and b [r, out]; the weight becomes
weight + alpha / r * a @ b. The sum is computed once per forward pass, not per token, so
the trainer multiplies with the same numbers as the LLM after `update_weights`.

Source: Hu et al. 2021. https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jpaged.models.decoder import Decoder

Adapters = Mapping[str, jax.Array]
PATTERNS = ("*.attention.*.weight", "*.mlp.*.weight")


def init_adapters(
    model: Decoder, key: jax.Array, rank: int, patterns: Sequence[str] = PATTERNS
) -> dict[str, jax.Array]:
    """Return adapters that change nothing yet: a is random, b is zero.

    Args:
      model: the decoder.
      key: of the random numbers.
      rank: r, at least 1.
      patterns: which weights get an adapter, by name ("layers.0.mlp.up.weight"), as
        shell patterns.

    Returns:
      f32 arrays `NAME_lora_a` and `NAME_lora_b`, as `LLM.update_weights` accepts them.

    Raises:
      ValueError: no matrix has such a name.
    """
    found: dict[str, jax.Array] = {}
    for name, weight in _weights(model).items():
        is_matrix = weight.ndim == 2 and name.endswith(".weight")
        if is_matrix and any(fnmatch.fnmatch(name, each) for each in patterns):
            key, own = jax.random.split(key)
            rows, columns = weight.shape
            a = jax.random.normal(own, (rows, rank), jnp.float32) * rows**-0.5
            found[f"{name}_lora_a"] = a
            found[f"{name}_lora_b"] = jnp.zeros((rank, columns), jnp.float32)
    if not found:
        raise ValueError(
            "patterns: expected names of matrices such as "
            f"'layers.0.mlp.up.weight', got {tuple(patterns)}"
        )
    return found


def add_adapters(model: Decoder, adapters: Adapters, alpha: float) -> Decoder:
    """Return the decoder with alpha / r * a @ b added to its weights; differentiable.

    Args:
      model: the decoder; it does not change.
      adapters: from `init_adapters`.
      alpha: the scale.
    """

    def add(path: Sequence[jax.tree_util.KeyEntry], weight: jax.Array) -> jax.Array:
        name = _name(path)
        if f"{name}_lora_a" not in adapters:
            return weight
        a, b = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        added = weight.astype(jnp.float32) + alpha / a.shape[1] * product
        return added.astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(add, model)


def _weights(model: Decoder) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Sequence[jax.tree_util.KeyEntry]) -> str:
    """Name of a leaf; the last step is a variable's own."""
    steps = (getattr(step, "idx", getattr(step, "name", step)) for step in path[:-1])
    return ".".join(map(str, steps))
