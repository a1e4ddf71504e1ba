"""Sharded: the engine's functions on each device of a mesh, with the part it has.

Place on the road: parallel, models, kv_cache -> [sharded] -> engine_state, engine.

One program runs on every device, and all but the decoder is the program of one device:
block tables, requests and counters are whole on each, so each makes the same schedule
without asking. `parallel` says what is split, and what the decoder sums.

Where `data` of the mesh is more than one, the state of D replicas is that of one with a
first axis of length D, split over `data`. Here it is taken off and put on again: what
runs on a device sees the state of one replica, its own. Pages have no such axis, or
some compilers would copy them: the replicas' blocks lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
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


def _but_pages(function: Callable[[Any], Any], tree: State, pages: Any = None) -> State:
    """The tree with `function` of each array, and of pages `pages`, or as they are."""

    def of(part: Any) -> Any:
        if not _is_pages(part):
            return function(part)
        return part if pages is None else jax.tree.map(lambda _: pages, part)

    return jax.tree.map(of, tree, is_leaf=_is_pages)


def _whole_or_each(mesh: Mesh) -> PartitionSpec:
    """How all but the pages is split: by replicas, where there are several."""
    is_many = parallel.num_replicas(mesh) > 1
    return PartitionSpec(parallel.REPLICAS, *parallel.STATE) if is_many else WHOLE


def state_specs(state: State, mesh: Mesh) -> State:
    """Of each array of an engine's state how it is split: the pages are, by heads.

    All are split by replicas, where there are several.
    """
    pages = parallel.partition_spec(parallel.split_tensor_axis(mesh), parallel.PAGES)
    return _but_pages(lambda _: _whole_or_each(mesh), state, pages)


def shardings(state: State, mesh: Mesh) -> State:
    """Where each array of an engine's state lies; it may be of shapes only.

    Pages of the state's `host` part lie in the memory of the devices' hosts.
    """
    pages = parallel.partition_spec(parallel.split_tensor_axis(mesh), parallel.PAGES)

    def sharding(path: Any, spec: PartitionSpec, array: Any) -> NamedSharding:
        if not array.size:  # JAX splits none of these, whatever is asked for
            spec = WHOLE
        is_host = path[:1] == (_HOST,) and spec == pages
        kind = "pinned_host" if is_host else None
        return NamedSharding(parallel.split_tensor_axis(mesh), spec, memory_kind=kind)

    specs = state_specs(state, mesh)
    return jax.tree_util.tree_map_with_path(sharding, specs, state)


def made(make: Callable[[], State], mesh: Mesh | None) -> State:
    """The state that `make` makes, each device's part made where it is to lie.

    Where there are several replicas, all get the same; only of pages `make` makes those
    of all.
    """
    if mesh is None:
        return make()

    def make_all() -> State:
        return stacked(make(), mesh)

    return jax.jit(make_all, out_shardings=shardings(jax.eval_shape(make_all), mesh))()


def stacked(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays for each of a mesh's replicas; as they are, where there is one."""
    number = parallel.num_replicas(mesh)
    if number == 1:
        return tree
    return _but_pages(lambda x: jnp.broadcast_to(x, (number, *x.shape)), tree)


def advance(function: Callable[..., State], model: Any, state: Any, *rest: Any) -> Any:
    """`function(model, state, *rest)`, a state: on each device, with its parts.

    Where the state has no mesh, it is called as it is. `rest` is the same everywhere.
    """
    if state.mesh is None:
        return function(model, state, *rest)
    leaves, tree = jax.tree.flatten(model)
    is_many = parallel.num_replicas(state.mesh) > 1

    def on_each(leaves, state, *rest):
        state = _peeled(state) if is_many else state
        state = function(jax.tree.unflatten(tree, leaves), state, *rest)
        return _wrapped(state) if is_many else state

    specs = state_specs(state, state.mesh)
    mapped = jax.shard_map(
        on_each,
        mesh=parallel.split_tensor_axis(state.mesh),
        in_specs=(_param_specs(model, state.mesh), specs, *(WHOLE for _ in rest)),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, state, *rest)


def each(function: Callable[..., State], state: Any, *parts: Any) -> State:
    """The state after `function(state, *part)`, a state, of each replica.

    Where there are several, `parts` have them as the first axis, as the state has. The
    function does not see pages, which stay as they are and where they are.
    """
    after = _each(function, state, parts, state_specs)
    return jax.tree.map(
        lambda old, new: old if _is_pages(old) else new,
        state,
        after,
        is_leaf=_is_pages,
    )


def read(function: Callable[..., Any], state: Any, *parts: Any) -> Any:
    """What `function(state, *part)` gives of each replica, arrays; not of pages.

    Where there are several, they are the first axis, here as in `parts` and the state.
    """
    return _each(function, state, parts, lambda _, mesh: _whole_or_each(mesh))


def _each(function, state, parts, out_specs) -> Any:
    if parallel.num_replicas(state.mesh) == 1:
        return function(state, *parts)

    def on_each(state, *parts):
        return _wrapped(function(_peeled(state), *_peeled(parts)))

    state = jax.tree.map(
        lambda part: None if _is_pages(part) else part, state, is_leaf=_is_pages
    )
    specs = state_specs(state, state.mesh)
    mapped = jax.shard_map(
        on_each,
        mesh=parallel.split_tensor_axis(state.mesh),
        in_specs=(specs, *(_whole_or_each(state.mesh) for _ in parts)),
        out_specs=out_specs(state, state.mesh),
        check_vma=False,
    )
    return mapped(state, *parts)


def one(function: Callable[..., State], state: Any, replica: Any, *rest: Any) -> State:
    """The state after `function(state, *rest)`, a state, of one replica alone."""
    number = parallel.num_replicas(state.mesh)
    if number == 1:
        return function(state, *rest)

    def if_mine(state, is_mine, *rest):
        # What the function leaves as it is is no choice.
        return jax.tree.map(
            lambda new, old: old if new is old else jnp.where(is_mine, new, old),
            function(state, *rest),
            state,
        )

    is_mine = jnp.arange(number, dtype=jnp.int32) == replica
    return each(if_mine, state, is_mine, *stacked(rest, state.mesh))


def part(tree: State, mesh: Mesh | None, replica: int) -> State:
    """A replica's arrays, without the axis of replicas; of those whole on its devices.

    They are copied to the first of these devices. `tree` itself, where there is one
    replica.
    """
    if parallel.num_replicas(mesh) == 1:
        return tree

    def own(array: jax.Array) -> jax.Array:
        if not array.size:  # JAX splits no such array
            return jnp.zeros((1, *array.shape[1:]), array.dtype)
        shards = array.addressable_shards
        return next(s.data for s in shards if s.index[0].start == replica)

    return _first(jax.tree.map(own, tree))


@jax.jit
def _first(tree: Any) -> Any:
    return _peeled(tree)


def _peeled(tree: Any) -> Any:
    """A device's own replica, of arrays that have one as the first axis."""
    return _but_pages(lambda x: jnp.squeeze(x, 0), tree)


def _wrapped(tree: Any) -> Any:
    return _but_pages(lambda x: jnp.expand_dims(x, 0), tree)


def _param_specs(model: Any, mesh: Mesh) -> list[PartitionSpec]:
    """How each parameter is split, in the order of the tree's leaves."""
    return [sharding.spec for sharding in _param_shardings(model, mesh)]


def _param_shardings(model: Any, mesh: Mesh) -> list[NamedSharding]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [[_name(step) for step in path] for path, _ in leaves]
    found = []
    for path, (_, leaf) in zip(names, leaves, strict=True):
        decoder, path = model, path[:-1]  # the last step is a Param's own
        if not isinstance(model, Decoder):  # a target or a draft
            decoder, path = getattr(model, str(path[0])), path[1:]
        sharding_of = placement(decoder.config, mesh)
        found.append(sharding_of(path, leaf.shape))
    return found


def _name(step: Any) -> str | int:
    return step.idx if hasattr(step, "idx") else step.name


def spread(model: Decoder, mesh: Mesh) -> Decoder:
    """The model with each parameter where the rules want it on a mesh.

    Raises:
      ValueError: it does not divide over the mesh.
    """
    leaves, tree = jax.tree.flatten(model)
    placed = jax.device_put(leaves, _param_shardings(model, mesh))
    return jax.tree.unflatten(tree, placed)
