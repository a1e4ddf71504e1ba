"""Placing: arrays that are put together on their devices, piece by piece.

Place on the road: parallel, stored -> [models.placing] -> weights, decoder.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding

from jpaged import compat, parallel
from jpaged.models.config import ModelConfig

# Numbers that are read, cast and copied at a time, 2 MiB of float32. More is no faster,
# and three or four such pieces live at once.
PIECE = 2**19

Region = tuple[tuple[int, int], ...]  # of each axis, from where up to where

# (path, shape) of a parameter -> where it lies; None is the default device.
ShardingOf = Callable[[Sequence[str | int], tuple[int, ...]], NamedSharding | None]
Module = TypeVar("Module", bound=nnx.Module)


def placement(config: ModelConfig, mesh: Mesh | None) -> ShardingOf:
    """(path, shape) of a parameter -> where it lies on a mesh; None without one.

    Raises:
      ValueError: the model does not divide over the mesh.
    """
    if mesh is None:
        return lambda path, shape: None
    parallel.check_mesh(mesh, split_sizes(config), config.num_experts)
    return lambda path, shape: parallel.param_sharding(
        mesh, path, shape, config.num_kv_heads
    )


def split_sizes(config: ModelConfig) -> dict[str, int]:
    """What the axis `tensor` of a mesh has to divide, by name."""
    sizes = {"num_heads": config.num_heads}
    for layer in range(config.num_layers):
        if config.has_experts(layer):
            sizes["expert_size"] = config.expert_size
        else:
            sizes["intermediate_size"] = config.intermediate_size
    return sizes


def drawn(make: Callable[[], Module], sharding_of: ShardingOf) -> Module:
    """The module that `make` makes, each parameter made where it is to lie."""
    module = nnx.eval_shape(make)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of([step.key for step in path], leaf.shape),
        nnx.to_pure_dict(nnx.state(module)),
    )
    values = jax.jit(
        lambda: nnx.to_pure_dict(nnx.state(make())), out_shardings=shardings
    )()
    nnx.update(module, values)
    return module


def pieces(region: Region, order: Sequence[int]) -> Iterator[Region]:
    """Regions of at most `PIECE` numbers that cover a region.

    Cut along the first axes in `order`, which says how the numbers lie in their file.
    """
    size = math.prod(stop - start for start, stop in region)
    if size <= PIECE or not order:
        yield region
        return
    axis, *rest = order
    start, stop = region[axis]
    rows = max(1, PIECE * (stop - start) // size)
    for first in range(start, stop, rows):
        part = (first, min(first + rows, stop))
        yield from pieces((*region[:axis], part, *region[axis + 1 :]), rest)


class Shards:
    """An array in the making: on each device, the part that it is to hold.

    Pieces are written in place, so that neither a device nor the host ever holds a part
    twice; only where that is slow, the host puts a part together before it is copied.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None
    ) -> None:
        """A `sharding` of None is the default device, which does not bind the array."""
        self._shape, self._dtype, self._sharding = shape, dtype, sharding
        self._buffers: dict[Any, jax.Array] = {}
        self._staged: dict[Region, tuple[np.ndarray, list[int]]] = {}
        self.devices: dict[Region, list[Any]] = {}
        indices: Any = {None: (slice(None),) * len(shape)}
        platform = jax.default_backend()
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
            platform = next(iter(indices)).platform
        self._is_staged = compat.rewrites_on_update(dtype, platform)
        for device, index in indices.items():
            region = tuple(
                each.indices(size)[:2] for each, size in zip(index, shape, strict=True)
            )
            self.devices.setdefault(region, []).append(device)

    def write(self, region: Region, piece: Region, values: np.ndarray) -> None:
        """Puts the values of a piece on the devices that hold the region around it."""
        shape = tuple(stop - start for start, stop in region)
        starts = [p[0] - r[0] for p, r in zip(piece, region, strict=True)]
        if self._is_staged and values.shape != shape:
            whole = self._stage(region, shape, starts, values)
            if whole is None:
                return
            values = whole
        for device in self.devices[region]:
            if values.shape == shape:
                # A copy, always: a JAX array on CPU may otherwise borrow the memory.
                array = jnp.array(values, self._dtype)
                if device is not None:
                    array = jax.device_put(array, device)
            else:
                held = self._buffers.pop(device, None)
                if held is None:
                    held = jnp.zeros(shape, self._dtype, device=device)
                array = _write(held, values, starts)
            # One after the other, or pieces that wait for their turn fill the memory.
            self._buffers[device] = array.block_until_ready()

    def _stage(
        self,
        region: Region,
        shape: tuple[int, ...],
        starts: list[int],
        values: np.ndarray,
    ) -> np.ndarray | None:
        """The whole region, once its last piece is there."""
        if region not in self._staged:
            whole = np.empty(shape, self._dtype)
            self._staged[region] = whole, [whole.size]
        whole, missing = self._staged[region]
        index = [slice(s, s + n) for s, n in zip(starts, values.shape, strict=True)]
        whole[tuple(index)] = values
        missing[0] -= values.size
        if missing[0]:
            return None
        del self._staged[region]
        return whole

    def array(self) -> jax.Array:
        """The array, once all of it is written."""
        buffers = list(self._buffers.values())
        if self._sharding is None:
            return buffers[0]
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, buffers
        )


@functools.partial(jax.jit, donate_argnums=0)
def _write(held: jax.Array, values: jax.Array, starts: list[int]) -> jax.Array:
    return lax.dynamic_update_slice(held, values, starts)


def gathered(array: jax.Array, first: int | None = None) -> np.ndarray:
    """The array on the host, or its part `first` along its first axis.

    Put together from its shards: JAX would keep what it gathers beside the array.
    """
    shape = array.shape if first is None else array.shape[1:]
    whole = np.empty(shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        index, part = shard.index, np.asarray(shard.data)
        if first is not None:
            start, stop, _ = index[0].indices(array.shape[0])
            if not start <= first < stop:
                continue
            index, part = index[1:], part[first - start]
        whole[index] = part
    return whole
