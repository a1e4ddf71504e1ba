"""Sharded: the engine's functions on each device of a mesh, with the part it has.

Place on the road: parallel, models, kv_cache -> [sharded] -> engine_state, engine.

One program runs on every device, and all but the decoder is the program of one device:
block tables, requests and counters are whole on each, so each makes the same schedule
without asking. `parallel` says what is split, and what the decoder sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpaged import parallel
from jpaged.kv_cache import KVCache
from jpaged.models.decoder import Decoder
from jpaged.models.placing import placement

WHOLE = PartitionSpec(*parallel.STATE)
_HOST = jax.tree_util.GetAttrKey("host")  # of `EngineState`
State = TypeVar("State")


def state_specs(state: State, mesh: Mesh) -> State:
    """Of each array of an engine's state how it is split: the pages are, by heads."""
    pages = parallel.spec(parallel.cut(mesh), parallel.PAGES)

    def specs(part: Any) -> Any:
        split = pages if isinstance(part, KVCache) else WHOLE
        return jax.tree.map(lambda _: split, part)

    return jax.tree.map(specs, state, is_leaf=lambda part: isinstance(part, KVCache))


def shardings(state: State, mesh: Mesh) -> State:
    """Where each array of an engine's state lies; it may be of shapes only.

    Pages of the state's `host` part lie in the memory of the devices' hosts.
    """

    def sharding(path: Any, spec: PartitionSpec) -> NamedSharding:
        is_host = path[0] == _HOST and spec != WHOLE
        kind = "pinned_host" if is_host else None
        return NamedSharding(parallel.cut(mesh), spec, memory_kind=kind)

    return jax.tree_util.tree_map_with_path(sharding, state_specs(state, mesh))


def made(make: Callable[[], State], mesh: Mesh) -> State:
    """The state that `make` makes, each device's part made where it is to lie."""
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def advance(function: Callable[..., State], model: Any, state: Any, *rest: Any) -> Any:
    """`function(model, state, *rest)`, a state: on each device, with its parts.

    Where the state has no mesh, it is called as it is. `rest` is the same everywhere.
    """
    if state.mesh is None:
        return function(model, state, *rest)
    leaves, tree = jax.tree.flatten(model)

    def on_each(leaves, state, *rest):
        return function(jax.tree.unflatten(tree, leaves), state, *rest)

    specs = state_specs(state, state.mesh)
    mapped = jax.shard_map(
        on_each,
        mesh=parallel.cut(state.mesh),
        in_specs=(_param_specs(model, state.mesh), specs, *(WHOLE for _ in rest)),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, state, *rest)


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
