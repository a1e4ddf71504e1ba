"""Weights: which tensors of a checkpoint hold which parameters, and the way across.

Place on the road: families, stored, decoder -> [models.weights] -> checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.models.decoder import Decoder
from jpaged.models.loading import families, placing
from jpaged.models.loading.families import Path, Tensor
from jpaged.models.loading.placing import Region, ShardingOf, Shards
from jpaged.models.loading.stored import Stored
from jpaged.models.quantize import round_int8


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
        vocab_first=config.vocab_first,
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


class _Part(NamedTuple):
    """One parameter of a target, and where in the stored tensor it lies."""

    target: Target
    nth: int  # of the target's parameters
    first: int  # along the tensor's last axis, after `transposed`

    @property
    def param(self) -> nnx.Param:
        return getattr(self.target.modules[self.nth], self.target.names[self.nth])

    @property
    def order(self) -> list[int]:
        """Axes of the parameter in the order in which its numbers are stored."""
        axes = list(range(len(self.param.shape)))
        if self.target.tensor.transposed:
            axes[-2:] = axes[:-3:-1]
        return axes

    def within(self, region: Region) -> Region | None:
        """What the tensor holds of a region of the parameter: all, or one expert."""
        expert = self.target.tensor.expert
        if expert is None:
            return region
        start, stop = region[0]
        return ((expert, expert + 1), *region[1:]) if start <= expert < stop else None

    def read(self, stored: Stored, piece: Region, dtype: np.dtype) -> np.ndarray:
        """The numbers of a piece of the parameter, in its axes, cast."""
        tensor, shape = self.target.tensor, [stop - start for start, stop in piece]
        index = [slice(*bounds) for bounds in piece]
        start, stop = piece[-1]
        if tensor.interleaved:
            count = len(self.target.names)
            index[-1] = slice(start * count + self.nth, stop * count, count)
        else:
            index[-1] = slice(self.first + start, self.first + stop)
        if tensor.expert is not None:
            index = index[1:]
        if tensor.transposed:
            index[-2:] = index[:-3:-1]
        view = stored.view(tuple(index))
        view = np.swapaxes(view, -1, -2) if tensor.transposed else view
        return view.astype(dtype, order="C").reshape(shape)


def fill(
    model: Decoder,
    stored: Mapping[str, Stored],
    *,
    sharding_of: ShardingOf,
    check_finite: bool = False,
) -> None:
    """Reads the parameters of an abstract decoder, cast, and quantised where it is.

    Args:
      model: whose parameters are shapes; they become arrays.
      stored: of every tensor that `targets` names, where it is stored.
      sharding_of: of a parameter's path and shape, where it goes.
      check_finite: refuse NaN and infinities.

    Raises:
      ValueError: numbers that are not finite, where that is asked.
    """
    dtype = jnp.dtype(model.config.dtype)
    # The experts of a layer are many tensors and one parameter, so all are ended last.
    shards: dict[Path, tuple[nnx.Param, Shards]] = {}

    def shards_of(path: Path, param: nnx.Param) -> Shards:
        if path not in shards:
            shape = tuple(param.shape)
            empty = Shards(shape, param.dtype, sharding_of(path, shape))
            shards[path] = (param, empty)
        return shards[path][1]

    for target in targets(model):
        tensor = stored[target.tensor.name]
        for path, part in zip(target.tensor.paths, _parts(target), strict=True):
            scale = None
            owner = target.modules[part.nth]
            if path[-1] == "weight" and getattr(owner, "scale", None) is not None:
                scale = _channel_scale(part, tensor, dtype)
                scales = shards_of((*path[:-1], "scale"), owner.scale)
                order = range(scale.ndim)
                _write(scales, part.within, lambda p, s=scale: s[_index(p)], order)

            def read(piece: Region, part=part, tensor=tensor, scale=scale):
                values = part.read(tensor, piece, dtype)
                if check_finite and not np.isfinite(values).all():
                    raise ValueError(
                        f"{tensor.name}: expected finite numbers, got NaN or infinity"
                    )
                if scale is None:
                    return values
                return round_int8(values, scale[_index((*piece[:-2], piece[-1]))])

            _write(shards_of(path, part.param), part.within, read, part.order)
    for param, done in shards.values():
        param.set_value(done.array())


def _parts(target: Target) -> Iterator[_Part]:
    first = 0
    for nth, param in enumerate(target.params):
        yield _Part(target, nth, first)
        first += param.shape[-1]


def _write(
    shards: Shards,
    within: Callable[[Region], Region | None],
    read: Callable[[Region], np.ndarray],
    order: Sequence[int],
) -> None:
    """Fills shards, or what lies `within` a tensor, with what is read of each piece."""
    for region in shards.devices:
        held = within(region)
        if held is not None:
            for piece in placing.pieces(held, order):
                shards.write(region, piece, read(piece))


def _index(piece: Region) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in piece)


def _channel_scale(part: _Part, stored: Stored, dtype: np.dtype) -> np.ndarray:
    """Scales f32[..., out] of a parameter [..., in, out], of its tensor's part of it.

    Read ahead of the weights, since an axis that is split or cut has one scale.
    """
    shape = tuple(part.param.shape)
    largest = np.zeros((*shape[:-2], shape[-1]), np.float32)
    whole = part.within(tuple((0, size) for size in shape))
    assert whole is not None
    for piece in placing.pieces(whole, part.order):
        values = np.abs(part.read(stored, piece, dtype).astype(np.float32))
        index = _index((*piece[:-2], piece[-1]))
        largest[index] = np.maximum(largest[index], values.max(axis=-2))
    return largest / np.float32(127)


def joined(target: Target, dtype: str) -> np.ndarray:
    """What a checkpoint stores for the parameters of a target."""
    tensor = target.tensor
    parts = []
    for param in target.params:
        value = placing.gathered(param.get_value(), tensor.expert)
        parts.append(value.astype(jnp.dtype(dtype), copy=False))
    array = parts[0]
    if tensor.interleaved:
        array = np.stack(parts, axis=-1).reshape(*array.shape[:-1], -1)
    elif len(parts) > 1:
        array = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(
        np.swapaxes(array, -1, -2) if tensor.transposed else array
    )
