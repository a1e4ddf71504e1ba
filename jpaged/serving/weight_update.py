"""Weight update: new weights for a running engine, without compilation.

Pipeline: weight_reading -> [weight_update] -> model of the engine. Host only.

The arrays of the engine's model are replaced one by one, so that memory holds one array
twice and never the model. Compiled programs have the weights as arguments, so they stay
as they are.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.models.decoder import Decoder
from jpaged.serving.batcher import Batcher
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.weight_reading import NewWeights, UpdateOptions, read_weights
from jpaged.serving.weights import leaf_name, named_leaves

_ALIGNMENT = 64  # bytes


class WeightUpdate(NamedTuple):
    """What an update of the weights did.

    Attributes:
      version: number of updates of this LLM, this one included.
      num_arrays: arrays that were replaced.
      num_bytes: their size.
      read_s: seconds of reading and checking; requests run meanwhile in other threads.
      update_s: seconds of replacing, in which no request runs.
    """

    version: int
    num_arrays: int
    num_bytes: int
    read_s: float
    update_s: float


class WeightUpdater:
    """Replaces the weights of an engine's model.

    Attributes:
      version: number of updates so far.
    """

    def __init__(self) -> None:
        self.version = 0
        self._running = threading.Lock()
        # Weights without adapters, of those that have one.
        self._base: dict[str, jax.Array] = {}
        self._is_partial = False

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Allow one update at a time; raise RuntimeError if another one runs."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                "update_weights: expected no other update at the same time, got one "
                "that another thread has not finished"
            )
        try:
            yield
        finally:
            self._running.release()

    def check(self) -> None:
        """Raise RuntimeError if an update has failed in the middle."""
        if self._is_partial:
            raise RuntimeError(
                "weights: an update failed after some arrays were replaced, so the "
                "model has weights of two versions; call update_weights again"
            )

    def forget(self) -> None:
        """Forget the weights under adapters, because others took their place."""
        self._base.clear()
        self._is_partial = False

    def update(
        self, host: EngineHost, batcher: Batcher, weights: Any, options: UpdateOptions
    ) -> WeightUpdate:
        """Update the weights of an engine; see `LLM.update_weights`."""
        with self._exclusive():
            start = time.perf_counter()
            copy = options.copy and weights is not host.model
            new = read_weights(weights, host.model, host.runner.mesh, options)
            read_s = time.perf_counter() - start
            with host.lock:
                if options.requests == "abort":
                    batcher.abort_open()
                try:
                    update = self._replace(host, new, copy)
                except BaseException:
                    batcher.abort_open()  # no request goes on with mixed weights
                    raise
                if options.prefix_cache == "reset":
                    host.change_weights(options.requests or "recompute")
        return update._replace(read_s=read_s)

    def _replace(self, host: EngineHost, new: NewWeights, copy: bool) -> WeightUpdate:
        """Replace the arrays of the engine's model; the caller holds the host's lock.

        The engine gets a new Decoder, so that Decoders of callers keep their arrays.

        Args:
          host: the engine, in which no step runs.
          new: from `read_weights`.
          copy: copy arrays that could be used in place.
        """
        start = time.perf_counter()
        host.use_model(_clone(host.model))
        own = named_leaves(host.model)
        params = _params(host.model)
        names = [*new.arrays, *(n for n in new.adapters if n not in new.arrays)]
        num_bytes = sum(own[name].nbytes for name in names)
        self._is_partial = True
        for name in names:
            like = own.pop(name)
            array = self._new_array(name, new, like, copy)
            del like  # frees the old array, if nothing else refers to it
            params[name].set_value(array.block_until_ready())
            del array
        self._is_partial = False
        self.version += 1
        seconds = time.perf_counter() - start
        return WeightUpdate(self.version, len(names), num_bytes, 0.0, seconds)

    def _new_array(
        self, name: str, new: NewWeights, like: jax.Array, copy: bool
    ) -> jax.Array:
        if name not in new.adapters:
            self._base.pop(name, None)
            return place(new.arrays[name], like, copy)
        if name in new.arrays:
            self._base[name] = place(new.arrays[name], like, copy)
        base = self._base.setdefault(name, like)
        adapter = new.adapters[name]
        a, b = (place(side, None, False) for side in (adapter.a, adapter.b))
        return place(_add(base, a, b, np.float32(adapter.scale)), like, False)


@jax.jit
def _add(base: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + scale * product).astype(base.dtype)


def place(array: Any, like: jax.Array | None, copy: bool) -> jax.Array:
    """Return `array` in the dtype and on the devices of another array.

    Args:
      array: of JAX or NumPy. NumPy arrays are always copied.
      like: an array; None keeps dtype and devices.
      copy: the result shares no memory with `array`.
    """
    if like is None:
        return jnp.asarray(array)
    if array.dtype != like.dtype:
        array, copy = array.astype(like.dtype), False
    if not isinstance(array, jax.Array):
        target = like.sharding if like.committed else None
        return jax.device_put(_aligned_copy(array), target)
    if like.committed or array.devices() != like.sharding.device_set:
        placed = jax.device_put(array, like.sharding, may_alias=False if copy else None)
        if copy and _shares_memory(placed, array):  # a shard was already in its place
            placed = jax.device_put(placed, like.sharding, may_alias=False)
        return placed
    if not copy:
        return array
    # Uncommitted arrays stay uncommitted: jitted functions that see the engine's state
    # would otherwise be compiled again.
    if next(iter(array.devices())).platform == "cpu":
        return jax.device_put(_aligned_copy(np.asarray(array)))
    return jnp.copy(array)


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    """Return a copy whose memory XLA's CPU client can use as it is."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    memory = memory[start : start + array.nbytes]
    copied = memory.view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


def _shares_memory(a: jax.Array, b: jax.Array) -> bool:
    shards = [
        {each.data.unsafe_buffer_pointer() for each in array.addressable_shards}
        for array in (a, b)
    ]
    return not shards[0].isdisjoint(shards[1])


def _clone(model: Decoder) -> Decoder:
    """Return a Decoder with the same arrays."""
    leaves, tree = jax.tree.flatten(model)
    return jax.tree.unflatten(tree, leaves)


def _params(model: Decoder) -> dict[str, Any]:
    """Return the parameters (nnx.Param) of a model by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return {leaf_name(path): param for path, param in leaves}
