"""Weights: which tensors of a checkpoint hold which parameters, and their conversion.

Pipeline: families, stored, decoder -> [models.loading.weights] -> checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.models.decoder import Decoder
from jpaged.models.families import FAMILIES
from jpaged.models.families.family import Path, Tensor
from jpaged.models.loading import placing
from jpaged.models.loading.placing import Region, ShardingOf, Shards
from jpaged.models.loading.stored import Stored
from jpaged.models.quantize import round_int8
from jpaged.progress import progress_bar


class Target(NamedTuple):
    """One tensor of a checkpoint, and the parameters of a decoder that it holds."""

    tensor: Tensor
    modules: tuple[Any, ...]  # modules that own the parameters
    names: tuple[str, ...]  # names of the parameters in these modules

    @property
    def params(self) -> list[nnx.Param]:
        """The parameters, in the order in which the tensor holds them."""
        pairs = zip(self.modules, self.names, strict=True)
        return [getattr(module, name) for module, name in pairs]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in a checkpoint."""
        skipped = 0 if self.tensor.expert is None else 1
        if self.tensor.by_head:
            rows = sum(math.prod(param.shape[:-1]) for param in self.params)
            return (rows, self.params[0].shape[-1])
        shapes = [param.shape[skipped:] for param in self.params]
        shape = [*shapes[0][:-1], sum(shape[-1] for shape in shapes)]
        if self.tensor.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)


def targets(model: Decoder) -> list[Target]:
    """All tensors of a checkpoint of this decoder."""
    config = model.config
    found = []
    for tensor in FAMILIES[config.architecture].tensors(
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
    covered = {id(param) for target in found for param in target.params}
    scales = sum("scale" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
    num_params = len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert len(covered) + scales == num_params, (len(covered), scales, num_params)
    return found


def _owner(model: Decoder, path: Path) -> Any:
    node: Any = model
    for step in path[:-1]:
        node = node[step] if isinstance(step, int) else getattr(node, step, None)
    return node


class _Part(NamedTuple):
    """One parameter of a target, and its location in the stored tensor."""

    target: Target
    nth: int  # index among the target's parameters
    first: int  # offset along the tensor's last axis, after `transposed`; or in a head

    @property
    def param(self) -> nnx.Param:
        return getattr(self.target.modules[self.nth], self.target.names[self.nth])

    @property
    def order(self) -> list[int]:
        """Axes of the parameter in the order in which they are stored."""
        axes = list(range(len(self.param.shape)))
        if self.target.tensor.transposed:
            axes[-2:] = axes[:-3:-1]
        return axes

    def within(self, region: Region) -> Region | None:
        """The part of a region of the parameter that the tensor holds, if any."""
        expert = self.target.tensor.expert
        if expert is None:
            return region
        start, stop = region[0]
        return ((expert, expert + 1), *region[1:]) if start <= expert < stop else None

    def read(self, stored: Stored, piece: Region, dtype: np.dtype) -> np.ndarray:
        """Values of a piece of the parameter, in its axes and cast to `dtype`."""
        tensor, shape = self.target.tensor, [stop - start for start, stop in piece]
        if tensor.by_head:
            (head, last), (row, end), columns = piece
            rows = sum(param.shape[1] for param in self.target.params)
            view = stored.view((slice(head * rows, last * rows), slice(*columns)))
            view = view.reshape(last - head, rows, -1)
            view = view[:, self.first + row : self.first + end]
            return view.astype(dtype, order="C")
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
    """Read, cast and, for a quantised config, quantise the parameters of a decoder.

    Args:
      model: a decoder whose parameters are abstract; they become arrays.
      stored: location of the tensor of each of `targets`, by name.
      sharding_of: see `placing.ShardingOf`.
      check_finite: raise if a value is NaN or infinite.

    Raises:
      ValueError: a value is not finite, with `check_finite`.
    """
    dtype = jnp.dtype(model.config.dtype)
    # One parameter can need many tensors (the experts of a layer), so all arrays are
    # completed at the end.
    shards: dict[Path, tuple[nnx.Param, Shards]] = {}

    def shards_of(path: Path, param: nnx.Param) -> Shards:
        if path not in shards:
            shape = tuple(param.shape)
            empty = Shards(shape, param.dtype, sharding_of(path, shape))
            shards[path] = (param, empty)
        return shards[path][1]

    found = targets(model)
    bar = progress_bar(len(found), "loading weights", "tensor", leave=False)
    for target in found:
        bar.update()
        tensor = stored[target.tensor.name]
        for path, part in zip(target.tensor.paths, _parts(target), strict=True):
            scale = None
            owner = target.modules[part.nth]
            is_matrix = path[-1] in ("weight", "rows")  # [in, out], or [out, in]
            axis = -1 if path[-1] == "rows" else -2  # which is summed
            if is_matrix and getattr(owner, "scale", None) is not None:
                scale = _channel_scale(part, tensor, dtype, axis)
                scales = shards_of((*path[:-1], "scale"), owner.scale)
                order = range(scale.ndim)
                _write(scales, part.within, lambda p, s=scale: s[_index(p)], order)

            def read(
                piece: Region,
                part: _Part = part,
                tensor: Stored = tensor,
                scale: np.ndarray | None = scale,
                axis: int = axis,
            ) -> np.ndarray:
                kind = part.param.dtype if scale is None else dtype
                values = part.read(tensor, piece, np.dtype(kind))
                if check_finite and not np.isfinite(values).all():
                    raise ValueError(
                        f"{tensor.name}: expected finite numbers, got NaN or infinity"
                    )
                if scale is None:
                    return values
                return round_int8(values, scale[_scale_index(piece, axis)], axis)

            _write(shards_of(path, part.param), part.within, read, part.order)
    for param, done in shards.values():
        param.set_value(done.array())


def _parts(target: Target) -> Iterator[_Part]:
    first = 0
    for nth, param in enumerate(target.params):
        yield _Part(target, nth, first)
        first += param.shape[1 if target.tensor.by_head else -1]


def _write(
    shards: Shards,
    within: Callable[[Region], Region | None],
    read: Callable[[Region], np.ndarray],
    order: Sequence[int],
) -> None:
    """Write to the shards what `read` returns for each piece `within` the tensor."""
    for region in shards.devices:
        available = within(region)
        if available is not None:
            for piece in placing.pieces(available, order):
                shards.write(region, piece, read(piece))


def _index(piece: Region) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in piece)


def _scale_index(piece: Region, axis: int) -> tuple[slice, ...]:
    """Index of a piece's scales; `axis` is the axis that a product sums."""
    return _index((*piece[:-2], piece[-3 - axis]))


def _channel_scale(
    part: _Part, stored: Stored, dtype: np.dtype, axis: int
) -> np.ndarray:
    """Scales f32[..., out] of the tensor's part of a parameter [..., in, out].

    The parameter may be [..., out, in]; `axis` is that of the inputs, -2 or -1.

    This is a separate pass before the weights are read, because the rows that share a
    scale can be in different pieces and on different devices.
    """
    shape = tuple(part.param.shape)
    largest = np.zeros((*shape[:-2], shape[-3 - axis]), np.float32)
    whole = part.within(tuple((0, size) for size in shape))
    assert whole is not None
    for piece in placing.pieces(whole, part.order):
        values = np.abs(part.read(stored, piece, dtype).astype(np.float32))
        index = _scale_index(piece, axis)
        largest[index] = np.maximum(largest[index], values.max(axis=axis))
    return largest / np.float32(127)


def stored_array(target: Target, dtype: str) -> np.ndarray:
    """The tensor that a checkpoint stores for the parameters of a target."""
    tensor = target.tensor
    parts = []
    for param in target.params:
        value = placing.gathered(param.get_value(), tensor.expert)
        parts.append(value.astype(jnp.dtype(dtype), copy=False))
    array = parts[0]
    if tensor.by_head:
        array = np.concatenate(parts, axis=1)
        return np.ascontiguousarray(array.reshape(-1, array.shape[-1]))
    if tensor.interleaved:
        array = np.stack(parts, axis=-1).reshape(*array.shape[:-1], -1)
    elif len(parts) > 1:
        array = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(
        np.swapaxes(array, -1, -2) if tensor.transposed else array
    )
