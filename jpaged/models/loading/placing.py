"""Placing: build arrays on their devices, piece by piece.

Pipeline: parallel, stored -> [models.loading.placing] -> weights, decoder.
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

# Number of values that are read, cast and copied at a time: 2 MiB of float32. Larger
# pieces are no faster, and three or four of them are in memory at the same time.
PIECE = 2**19

Region = tuple[tuple[int, int], ...]  # (start, stop) along each axis

# (path, shape) of a parameter -> its sharding; None is the default device.
ShardingOf = Callable[[Sequence[str | int], tuple[int, ...]], NamedSharding | None]
Module = TypeVar("Module", bound=nnx.Module)


def placement(config: ModelConfig, mesh: Mesh | None) -> ShardingOf:
    """The function from (path, shape) of a parameter to its sharding on a mesh.

    Without a mesh, the function returns None.

    Raises:
      ValueError: the model cannot be divided over the mesh.
    """
    if mesh is None:
        return lambda path, shape: None
    parallel.check_mesh(mesh, split_sizes(config), config.num_experts)
    return lambda path, shape: parallel.param_sharding(
        mesh, path, shape, config.num_kv_heads
    )


def split_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes that the axis `tensor` of a mesh must divide, by name."""
    sizes = {"num_heads": config.num_heads}
    for layer in range(config.num_layers):
        if config.has_experts(layer):
            sizes["expert_size"] = config.expert_size
            if config.shared_expert_size:
                sizes["shared_expert_size"] = config.shared_expert_size
        else:
            sizes["intermediate_size"] = config.intermediate_size
    return sizes


def init_sharded(make: Callable[[], Module], sharding_of: ShardingOf) -> Module:
    """The module that `make` returns, with each parameter computed on its devices."""
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
    """Split a region into regions of at most `PIECE` values.

    Args:
      region: the region to split.
      order: axes in the order in which they are stored, outermost first. The region is
        split along the first of them.
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
    """An array that is being built: for each device, a buffer for its part.

    Pieces are written in place, so that neither a device nor the host holds a part
    twice. If in-place writes are slow, the host collects a part before copying it.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None
    ) -> None:
        """Create the buffers.

        Args:
          shape: of the whole array.
          dtype: of the array.
          sharding: of the array; None is the default device, uncommitted.
        """
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
        """Write a piece to all devices that hold `region`, which contains it."""
        shape = tuple(stop - start for start, stop in region)
        starts = [p[0] - r[0] for p, r in zip(piece, region, strict=True)]
        if self._is_staged and values.shape != shape:
            whole = self._stage(region, shape, starts, values)
            if whole is None:
                return
            values = whole
        for device in self.devices[region]:
            if values.shape == shape:
                array = jax.device_put(_unaligned(values, self._dtype), device)
            else:
                buffer = self._buffers.pop(device, None)
                if buffer is None:
                    buffer = jnp.zeros(shape, self._dtype, device=device)
                array = _write(buffer, values, starts)
            # Wait for each copy: pending pieces would otherwise fill the memory.
            self._buffers[device] = array.block_until_ready()

    def _stage(
        self,
        region: Region,
        shape: tuple[int, ...],
        starts: list[int],
        values: np.ndarray,
    ) -> np.ndarray | None:
        """Collect a piece; return the whole region once its last piece has arrived."""
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
        """The complete array; call this after the last `write`."""
        buffers = list(self._buffers.values())
        if self._sharding is None:
            return buffers[0]
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, buffers
        )


def _unaligned(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy to unaligned memory, which JAX copies again, so its array can be donated.

    On a CPU, JAX shares aligned memory of NumPy, even with `may_alias=False`.
    `jnp.array` always copies, but compiles a program for each shape.
    """
    copied = np.empty(values.size + 1, dtype)[1:].reshape(values.shape)
    copied[...] = values
    return copied


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, values: jax.Array, starts: list[int]) -> jax.Array:
    return lax.dynamic_update_slice(buffer, values, starts)


def gathered(array: jax.Array, first: int | None = None) -> np.ndarray:
    """Copy an array to the host, or only its part `first` along the first axis.

    The copy is assembled from the shards: `np.asarray` would make JAX keep a second
    copy of the array.
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
