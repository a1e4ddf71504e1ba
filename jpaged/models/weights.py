"""Weights: which tensors of a checkpoint hold which parameters, and the way across.

Place on the road: families, decoder -> [models.weights] -> checkpoint.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.models import families
from jpaged.models.decoder import Decoder
from jpaged.models.families import Path, Tensor
from jpaged.models.quantize import quantize_int8


class Target(NamedTuple):
    """One tensor of a checkpoint, with the parameters of a decoder that it holds."""

    tensor: Tensor
    modules: tuple[Any, ...]  # that own the parameters
    names: tuple[str, ...]  # of the parameters in them

    @property
    def params(self) -> list[nnx.Param]:
        """The parameters, in the order in which they lie in the tensor."""
        pairs = zip(self.modules, self.names, strict=True)
        return [getattr(module, name) for module, name in pairs]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape that the tensor has in a checkpoint."""
        skipped = 0 if self.tensor.expert is None else 1
        shapes = [param.shape[skipped:] for param in self.params]
        shape = [*shapes[0][:-1], sum(shape[-1] for shape in shapes)]
        if self.tensor.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)


def targets(model: Decoder) -> list[Target]:
    """All tensors that a checkpoint of this decoder has."""
    config = model.config
    found = []
    for tensor in families.tensors(
        config.architecture,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        is_tied=config.tie_word_embeddings,
    ):
        owners = [_owner(model, path) for path in tensor.paths]
        names = tuple(str(path[-1]) for path in tensor.paths)
        if all(
            getattr(owner, name, None) is not None
            for owner, name in zip(owners, names, strict=True)
        ):
            found.append(Target(tensor, tuple(owners), names))
    held = {id(param) for target in found for param in target.params}
    scales = sum("scale" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
    num_params = len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert len(held) + scales == num_params, (len(held), scales, num_params)
    return found


def _owner(model: Decoder, path: Path) -> Any:
    node: Any = model
    for step in path[:-1]:
        node = node[step] if isinstance(step, int) else getattr(node, step, None)
    return node


def fill(target: Target, stored: np.ndarray, dtype: str) -> None:
    """Puts a tensor into its parameters, cast, and quantised where the model is."""
    tensor = target.tensor
    array = np.swapaxes(stored, -1, -2) if tensor.transposed else stored
    first, count = 0, len(target.names)
    for index, (module, name) in enumerate(
        zip(target.modules, target.names, strict=True)
    ):
        param = getattr(module, name)
        size = param.shape[-1]
        if tensor.interleaved:
            part = array[..., index::count]
        else:
            part = array[..., first : first + size]
        first += size
        # A copy, always: on CPU a JAX array may otherwise borrow numpy's memory.
        value = jnp.array(part.astype(jnp.dtype(dtype), copy=False))
        if name == "weight" and getattr(module, "scale", None) is not None:
            value, scale = _quantize(value)
            _put(module.scale, scale, tensor.expert)
        _put(param, value, tensor.expert)


def _put(param: nnx.Param, value: jax.Array, expert: int | None) -> None:
    if expert is None:
        param.set_value(value)
        return
    held = param.get_value()
    if isinstance(held, jax.ShapeDtypeStruct):
        held = jnp.zeros(held.shape, value.dtype)
    param.set_value(_put_expert(held, value, jnp.int32(expert)))


@functools.partial(jax.jit, donate_argnums=0)
def _put_expert(held: jax.Array, value: jax.Array, expert: jax.Array) -> jax.Array:
    return held.at[expert].set(value)


_quantize = jax.jit(quantize_int8)


def joined(target: Target, dtype: str) -> np.ndarray:
    """What a checkpoint stores for the parameters of a target."""
    tensor = target.tensor
    parts = []
    for param in target.params:
        value = param[...] if tensor.expert is None else param[...][tensor.expert]
        parts.append(np.asarray(value.astype(dtype)))
    array = parts[0]
    if tensor.interleaved:
        array = np.stack(parts, axis=-1).reshape(*array.shape[:-1], -1)
    elif len(parts) > 1:
        array = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(
        np.swapaxes(array, -1, -2) if tensor.transposed else array
    )
