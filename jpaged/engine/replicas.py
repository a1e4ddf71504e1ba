"""Replicas: the engine's functions on each device of a mesh, on that device's part.

Pipeline: parallel, models, kv_cache -> [replicas] -> state, api, host.

One program runs on every device. Except for the decoder, it is the program of a single
device: each device has whole block tables, requests and counters, so all devices
compute the same schedule without communication. `parallel` says which arrays are split,
and what the decoder sums over devices.

If the `data` axis of the mesh has size D > 1, the state of D replicas is the state of
one engine with an additional first axis of length D, split over `data`. This module
removes the axis and adds it again: a function that runs on a device sees the state of
that device's replica only. Pages do not have this axis, because some compilers would
copy them: the replicas' blocks are side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpaged import parallel
from jpaged.attention.kv_cache import KVCache
from jpaged.models.decoder import Decoder
from jpaged.models.loading.placing import placement

WHOLE = PartitionSpec(*parallel.STATE)
_HOST = jax.tree_util.GetAttrKey("host")  # of `EngineState`
State = TypeVar("State")


def _is_pages(part: Any) -> bool:
    return isinstance(part, KVCache)


def _map_but_pages(
    function: Callable[[Any], Any], tree: State, pages: Any = None
) -> State:
    """Apply `function` to all arrays but the pages; these become `pages`, if given."""

    def map_part(part: Any) -> Any:
        if not _is_pages(part):
            return function(part)
        return part if pages is None else jax.tree.map(lambda _: pages, part)

    return jax.tree.map(map_part, tree, is_leaf=_is_pages)


def _but_pages_spec(mesh: Mesh) -> PartitionSpec:
    """How every array but the pages is split: by replicas, if there are several."""
    is_many = parallel.num_replicas(mesh) > 1
    return PartitionSpec(parallel.REPLICAS, *parallel.STATE) if is_many else WHOLE


def state_specs(state: State, mesh: Mesh) -> State:
    """Return the partition spec of each array of an engine's state.

    Pages are split by kv heads. If there are several replicas, all arrays are also
    split by replicas.
    """
    pages = parallel.partition_spec(parallel.split_tensor_axis(mesh), parallel.PAGES)
    return _map_but_pages(lambda _: _but_pages_spec(mesh), state, pages)


def shardings(state: State, mesh: Mesh) -> State:
    """Return the sharding of each array of an engine's state.

    Pages of the state's `host` part are in the memory of the devices' hosts.

    Args:
      state: an engine's state, of arrays or of shapes.
      mesh: the state's mesh.
    """
    pages = parallel.partition_spec(parallel.split_tensor_axis(mesh), parallel.PAGES)

    def sharding(path: Any, spec: PartitionSpec, array: Any) -> NamedSharding:
        if not array.size:  # JAX never splits an empty array
            spec = WHOLE
        is_host = path[:1] == (_HOST,) and spec == pages
        kind = "pinned_host" if is_host else None
        return NamedSharding(parallel.split_tensor_axis(mesh), spec, memory_kind=kind)

    specs = state_specs(state, mesh)
    return jax.tree_util.tree_map_with_path(sharding, specs, state)


def init_on_mesh(make: Callable[[], State], mesh: Mesh | None) -> State:
    """Create a state with `make`, each device's part on that device.

    All replicas get the same state. `make` returns the state of one replica, but the
    pages of all of them.
    """
    if mesh is None:
        return make()

    def make_all() -> State:
        return broadcast_to_replicas(make(), mesh)

    return jax.jit(make_all, out_shardings=shardings(jax.eval_shape(make_all), mesh))()


def shapes_on_mesh(make: Callable[[], State], mesh: Mesh | None) -> State:
    """Return the shapes, dtypes and placements of what `init_on_mesh` would create."""
    shapes = jax.eval_shape(lambda: broadcast_to_replicas(make(), mesh))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=sharding
        ),
        shapes,
        shardings(shapes, mesh),
    )


def broadcast_to_replicas(tree: Any, mesh: Mesh | None) -> Any:
    """Add the axis of replicas to each array; return `tree` if there is one replica."""
    number = parallel.num_replicas(mesh)
    if number == 1:
        return tree
    return _map_but_pages(lambda x: jnp.broadcast_to(x, (number, *x.shape)), tree)


def run_on_mesh(
    function: Callable[..., State], model: Any, state: Any, *rest: Any
) -> Any:
    """Call `function(model, state, *rest) -> state` on each device with its parts.

    Args:
      function: the program of one device.
      model: the model, on the state's mesh.
      state: the engine's state. Without a mesh, `function` is called directly.
      *rest: the same on all devices.
    """
    if state.mesh is None:
        return function(model, state, *rest)
    leaves, tree = jax.tree.flatten(model)
    is_many = parallel.num_replicas(state.mesh) > 1

    def on_each(leaves: list[jax.Array], state: Any, *rest: Any) -> Any:
        state = _without_axis(state) if is_many else state
        state = function(jax.tree.unflatten(tree, leaves), state, *rest)
        return _with_axis(state) if is_many else state

    specs = state_specs(state, state.mesh)
    mapped = jax.shard_map(
        on_each,
        mesh=parallel.split_tensor_axis(state.mesh),
        in_specs=(_param_specs(model, state.mesh), specs, *(WHOLE for _ in rest)),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, state, *rest)


def per_device(
    function: Callable[..., Any],
    mesh: Mesh | None,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Callable[..., Any]:
    """Return `function` as a function of arrays that are split over a mesh.

    The result takes the leaves of the model in place of the model, because flattening
    them once costs less than in each call.

    Args:
      function: the program of one device. It returns a tuple.
      mesh: the mesh; None is one device.
      model: the model, for its structure.
      inputs: what each argument is: "model", "pages"; "state": split over replicas and
        without their axis in `function`; or "whole": the same on all devices.
      outputs: what each result is: "pages" or "state".
    """
    structure = jax.tree.structure(model)
    is_many = parallel.num_replicas(mesh) > 1

    def on_each(*parts: Any) -> tuple[Any, ...]:
        parts = tuple(
            jax.tree.unflatten(structure, part)
            if kind == "model"
            else _without_axis(part)
            if kind == "state" and is_many
            else part
            for kind, part in zip(inputs, parts, strict=True)
        )
        results = function(*parts)
        return tuple(
            _with_axis(result) if kind == "state" and is_many else result
            for kind, result in zip(outputs, results, strict=True)
        )

    if mesh is None:
        return on_each
    specs: dict[str, Any] = {
        "pages": parallel.partition_spec(
            parallel.split_tensor_axis(mesh), parallel.PAGES
        ),
        "state": _but_pages_spec(mesh),
        "whole": WHOLE,
    }
    if "model" in inputs:
        specs["model"] = _param_specs(model, mesh)
    return jax.shard_map(
        on_each,
        mesh=parallel.split_tensor_axis(mesh),
        in_specs=tuple(specs[kind] for kind in inputs),
        out_specs=tuple(specs[kind] for kind in outputs),
        check_vma=False,
    )


def update_each(function: Callable[..., State], state: Any, *parts: Any) -> Any:
    """Call `function(state, *parts) -> state` for each replica.

    If there are several replicas, they are the first axis of `parts`, as of the state.
    The function does not see the pages, which stay unchanged and in place.
    """
    after = _map_replicas(function, state, parts, state_specs)
    return jax.tree.map(
        lambda old, new: old if _is_pages(old) else new,
        state,
        after,
        is_leaf=_is_pages,
    )


def read_each(function: Callable[..., Any], state: Any, *parts: Any) -> Any:
    """Return the arrays `function(state, *parts)` of each replica; it sees no pages.

    If there are several replicas, they are the first axis of the results, as of `parts`
    and the state.
    """
    return _map_replicas(function, state, parts, lambda _, mesh: _but_pages_spec(mesh))


def _map_replicas(
    function: Callable[..., Any],
    state: Any,
    parts: tuple[Any, ...],
    out_specs: Callable[[Any, Mesh], Any],
) -> Any:
    if parallel.num_replicas(state.mesh) == 1:
        return function(state, *parts)

    def on_each(state: Any, *parts: Any) -> Any:
        return _with_axis(function(_without_axis(state), *_without_axis(parts)))

    state = jax.tree.map(
        lambda part: None if _is_pages(part) else part, state, is_leaf=_is_pages
    )
    specs = state_specs(state, state.mesh)
    mapped = jax.shard_map(
        on_each,
        mesh=parallel.split_tensor_axis(state.mesh),
        in_specs=(specs, *(_but_pages_spec(state.mesh) for _ in parts)),
        out_specs=out_specs(state, state.mesh),
        check_vma=False,
    )
    return mapped(state, *parts)


def update_one(
    function: Callable[..., State],
    state: Any,
    replica: int | jax.Array,
    *rest: Any,
) -> Any:
    """Call `function(state, *rest) -> state` for one replica only."""
    number = parallel.num_replicas(state.mesh)
    if number == 1:
        return function(state, *rest)

    def if_mine(state: Any, is_mine: jax.Array, *rest: Any) -> Any:
        # Arrays that the function returns unchanged need no select.
        return jax.tree.map(
            lambda new, old: old if new is old else jnp.where(is_mine, new, old),
            function(state, *rest),
            state,
        )

    is_mine = jnp.arange(number, dtype=jnp.int32) == replica
    return update_each(
        if_mine, state, is_mine, *broadcast_to_replicas(rest, state.mesh)
    )


def filled_like(array: jax.Array, value: np.integer | np.floating) -> jax.Array:
    """Return an array with the shape, dtype and placement of `array`, of one value."""
    filled = np.full(array.shape, value.astype(array.dtype))
    if not array.committed:
        # A committed array would compile the engine's program again.
        return jnp.asarray(filled)
    return jax.make_array_from_callback(
        array.shape, array.sharding, lambda index: filled[index]
    )


def select_replica(tree: State, mesh: Mesh | None, replica: int) -> State:
    """Return a replica's arrays, without the axis of replicas.

    Only for arrays that are whole on each device of the replica. They are copied to the
    first of these devices. Returns `tree` itself if there is one replica.
    """
    if parallel.num_replicas(mesh) == 1:
        return tree

    def own(array: jax.Array) -> jax.Array:
        if not array.size:  # JAX never splits an empty array
            return jnp.zeros((1, *array.shape[1:]), array.dtype)
        shards = array.addressable_shards
        return next(s.data for s in shards if s.index[0].start == replica)

    return _first(jax.tree.map(own, tree))


@jax.jit
def _first(tree: Any) -> Any:
    return _without_axis(tree)


def _without_axis(tree: Any) -> Any:
    """Remove the axis of replicas, which has length 1 on a device."""
    return _map_but_pages(lambda x: jnp.squeeze(x, 0), tree)


def _with_axis(tree: Any) -> Any:
    return _map_but_pages(lambda x: jnp.expand_dims(x, 0), tree)


def _param_specs(model: Any, mesh: Mesh) -> list[PartitionSpec]:
    """How each parameter is split, in the order of the tree's leaves."""
    return [sharding.spec for sharding in _param_shardings(model, mesh)]


def _param_shardings(model: Any, mesh: Mesh) -> list[NamedSharding]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [[_name(step) for step in path] for path, _ in leaves]
    found = []
    for path, (_, leaf) in zip(names, leaves, strict=True):
        decoder, path = model, path[:-1]  # the last step is a Param's own
        if not isinstance(model, Decoder):  # a DraftedModel: its target or its draft
            decoder, path = getattr(model, str(path[0])), path[1:]
        sharding_of = placement(decoder.config, mesh)
        found.append(sharding_of(path, leaf.shape))
    return found


def _name(step: Any) -> str | int:
    return step.idx if hasattr(step, "idx") else step.name


def shard_model(model: Decoder, mesh: Mesh) -> Decoder:
    """Place each parameter of the model on the mesh, as the sharding rules say.

    Raises:
      ValueError: the model cannot be divided over the mesh.
    """
    leaves, tree = jax.tree.flatten(model)
    placed = jax.device_put(leaves, _param_shardings(model, mesh))
    return jax.tree.unflatten(tree, placed)
