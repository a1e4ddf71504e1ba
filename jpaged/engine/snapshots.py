"""Snapshots: an engine in the middle of its work, saved to a folder and gone on with.

Place on the road: engine -> [snapshots] -> disk -> [snapshots] -> engine. Host code.

    snapshots.save("runs/at_500", state)
    state = snapshots.load("runs/at_500", model)
    state = engine.run(model, state)

Into an engine of the same sizes everything comes back as it was, pages included. Into
one with another pool (more blocks, other rows, no prefix cache, ...) the requests come
back and what they had generated; their pages are computed again, as after a preemption.
So one saved state can be forked into several policies, or moved to another machine:
onto a mesh, onto another or off it, where each device takes the pages of its own heads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jpaged import parallel, scheduler
from jpaged.config import EngineConfig, Speculation
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.engine import limits, request_table
from jpaged.engine import state as engine_state
from jpaged.engine.request_table import RequestTable
from jpaged.engine.speculation import DraftedModel
from jpaged.engine.state import EngineState, Model
from jpaged.models.config import ModelConfig
from jpaged.parallel import distributed

FORMAT = 1
# What comes back into any engine, and what only into one with the same pool.
_REQUESTS = (".requests", ".states", ".counters")
_SCHEDULER_PARAMS = ".scheduler_params"
# Arrays in which kv heads, their axis 2, are stored as often as the mesh asks.
_PAGES = re.compile(r"\.(draft_)?cache\.[kv]_(pages|scale)$")
# Fields of the config that are dataclasses themselves.
_PARTS = dict(rules=RuleSizes, automata=AutomataSizes, speculation=Speculation)


def save(folder: str | os.PathLike[str], state: EngineState) -> None:
    """Writes the state to a new folder, which is there whole or not at all.

    `state` is not donated, and can go on. Processes that share a mesh all call it, with
    a folder that all of them see.

    Raises:
      FileExistsError: something is there already.
      ValueError: the state is of several replicas.
    """
    import orbax.checkpoint as ocp

    if (number := parallel.num_replicas(state.mesh)) > 1:
        raise ValueError(
            f"state: wanted that of one engine, got {number} replicas over `data` of "
            "its mesh, which are not saved yet; let them end and collect their results"
        )
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"folder: wanted a new one, {folder} is there already")
    is_shared = distributed.is_shared(state.mesh)
    number = distributed.number_of_process_0(os.getpid()) if is_shared else os.getpid()
    partial = folder.with_name(f"{folder.name}.partial-{number}")
    requests, pool = _halves(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "requests", requests)
        checkpointer.save(partial / "pool", pool)
    about = {
        "format": FORMAT,
        "tensor": _tensor(state.mesh),
        "config": _describe(state.config),
    }
    if not is_shared or jax.process_index() == 0:
        (partial / "config.json").write_text(json.dumps(about, indent=2))
        partial.rename(folder)
    if is_shared:
        multihost_utils.sync_global_devices(str(folder))


def load(
    folder: str | os.PathLike[str],
    model: Model,
    config: EngineConfig | None = None,
    *,
    kv_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> EngineState:
    """The state that was saved, in an engine for `model`.

    Args:
      folder: as given to `save`.
      model: with the weights that the state was saved with; nothing checks them.
      config: None is the saved one. Another may change whatever is not about the
        request table's shapes: the pool, the rows, the policy, ... .
      kv_dtype: of the pages; None takes the model's.
      mesh: on which the model lies; None is one device. Any without replicas,
        whatever the state was saved on.

    Raises:
      FileNotFoundError: no snapshot there.
      ValueError: the mesh has replicas; the config's request table has other shapes;
        it has to be given, for it holds functions; or a request would never fit into
        its pool.
    """
    if (number := parallel.num_replicas(mesh)) > 1:
        raise ValueError(
            f"mesh: wanted data=1, for the state of one engine, got data={number}"
        )
    folder = pathlib.Path(folder).absolute()
    saved = _read_config(folder)
    if config is None:
        config = _restore_config(saved)
    empty = _empty(model, config, kv_dtype, mesh)
    requests, pool = _halves(empty)
    if not _fits(folder / "requests", requests):
        raise ValueError(_difference(saved, config))
    arrays = _restore(folder / "requests", requests)
    # Snapshots of before there were meshes do not say.
    stored = _stored_heads(model, saved.get("tensor", 1))
    if _fits(folder / "pool", pool, stored):
        return _with_leaves(empty, arrays | _restore(folder / "pool", pool, stored))
    return _relocated(_with_leaves(empty, arrays), config)


def _empty(
    model: Model, config: EngineConfig, kv_dtype: str | None, mesh: Mesh | None
) -> EngineState:
    def init() -> EngineState:
        return engine_state.init(model, config, kv_dtype=kv_dtype, mesh=mesh)

    # One program, and not one for each array; on a mesh it is one already.
    return jax.jit(init)() if mesh is None else init()


def _tensor(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["tensor"]


def _stored_heads(model: Model, tensor: int) -> dict[str | None, int]:
    """Kv heads in the pages of the model and its draft on so many devices."""
    models: dict[str | None, ModelConfig] = {None: model.config}
    if isinstance(model, DraftedModel):
        models["draft_"] = model.draft.config
    return {
        which: parallel.stored_kv_heads(sizes.num_kv_heads, tensor)
        for which, sizes in models.items()
    }


def _halves(state: EngineState) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The arrays by name: the requests, and what only the same pool can hold.

    The knobs are in neither: they follow from the config.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.size}
    arrays = {
        n: leaf for n, leaf in arrays.items() if not n.startswith(_SCHEDULER_PARAMS)
    }
    requests = {n: leaf for n, leaf in arrays.items() if n.startswith(_REQUESTS)}
    return requests, {n: leaf for n, leaf in arrays.items() if n not in requests}


def _fits(
    folder: pathlib.Path,
    wanted: dict[str, jax.Array],
    stored: dict[str | None, int] | None = None,
) -> bool:
    """Whether the saved arrays have the names, shapes and types of `wanted`.

    But pages hold `stored` heads.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        known = checkpointer.metadata(folder).item_metadata.tree
    return known.keys() == wanted.keys() and all(
        _saved_shape(name, leaf, stored) == tuple(known[name].shape)
        and leaf.dtype == known[name].dtype
        for name, leaf in wanted.items()
    )


def _saved_shape(
    name: str, leaf: jax.Array, stored: dict[str | None, int] | None
) -> tuple[int, ...]:
    is_pages = _PAGES.search(name)
    if stored is None or is_pages is None:
        return leaf.shape
    return (*leaf.shape[:2], stored[is_pages[1]], *leaf.shape[3:])


def _restore(
    folder: pathlib.Path,
    like: dict[str, jax.Array],
    stored: dict[str | None, int] | None = None,
) -> dict[str, jax.Array]:
    """The saved arrays, where those of `like` are, which make room for them.

    Each device reads its own part; but pages with other than the `stored` heads come
    by way of the host.
    """
    import orbax.checkpoint as ocp

    target: dict[str, Any] = {}
    for name, leaf in like.items():
        shape = _saved_shape(name, leaf, stored)
        if shape == leaf.shape:
            target[name] = jax.ShapeDtypeStruct(
                shape, leaf.dtype, sharding=leaf.sharding
            )
        else:
            target[name] = np.broadcast_to(np.zeros((), leaf.dtype), shape)
        leaf.delete()
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder, target)
    return {
        name: _copied(array, like[name]) if isinstance(array, np.ndarray) else array
        for name, array in arrays.items()
    }


def _copied(pages: np.ndarray, like: jax.Array) -> jax.Array:
    """Pages with each head as often, and where, as `like` has it."""
    saved, wanted = pages.shape[2], like.shape[2]
    # Copies of a head follow each other, so those of any number lie in proportion.
    heads = np.arange(wanted) * saved // wanted

    def part(index: Any) -> np.ndarray:
        return pages[*index[:2], heads[index[2]], *index[3:]]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _with_leaves(state: EngineState, arrays: dict[str, jax.Array]) -> EngineState:
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree.unflatten(
        tree, [arrays.get(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    )


def _relocated(state: EngineState, config: EngineConfig) -> EngineState:
    """The engine in which every sequence that ran has to be computed again.

    What the sequences of a request have in common they share again.
    """
    table = jax.jit(_waiting)(state.requests)
    largest = limits.largest_request(table, config)
    pinned = limits.num_pinned_blocks(table, config.block_size)
    if largest + pinned > config.num_blocks:
        raise ValueError(
            f"config: expected num_blocks of at least {largest + pinned}, for the "
            f"largest saved request and {pinned} pinned blocks, got "
            f"{config.num_blocks}"
        )
    counters = dataclasses.replace(state.counters, is_stalled=jnp.bool_(False))
    return dataclasses.replace(state, requests=table, counters=counters)


def _waiting(table: RequestTable) -> RequestTable:
    queue = table.queue
    was_held = (queue.status == scheduler.RETAINED) & table.params.is_prefix
    ran = (queue.status == scheduler.RUNNING) | (queue.status == scheduler.SWAPPED)
    queue = dataclasses.replace(
        queue, status=jnp.where(ran | was_held, scheduler.WAITING, queue.status)
    )
    own = jnp.arange(ran.shape[0], dtype=jnp.int32)
    # Other requests' sequences, whom one waited for, hold nothing now.
    is_own = queue.arrivals[queue.sources] == queue.arrivals
    is_own |= table.params.is_prefix[queue.sources]
    queue = dataclasses.replace(
        queue,
        sources=jnp.where(is_own, queue.sources, own),
        shared_lens=jnp.where(is_own, queue.shared_lens, 0),
    )
    table = dataclasses.replace(table, queue=queue)
    return request_table.share_again(table, jnp.where(ran, own, ran.shape[0]))


def _difference(saved: dict[str, Any], config: EngineConfig) -> str:
    given = _describe(config)
    differ = {
        name: (value, given[name])
        for name, value in saved["config"].items()
        if given[name] != value
    }
    return (
        "config: expected one whose request table has the saved shapes, and these "
        f"fields (saved, given) differ: {differ}. max_model_len, max_num_requests, "
        "max_num_stop_ids, num_logprobs, max_beam_width, rules, automata and "
        "algorithms have to stay"
    )


def _describe(config: EngineConfig) -> dict[str, Any]:
    """The config as JSON; functions by their names."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in _PARTS:
        if fields[name] is not None:
            fields[name] = dataclasses.asdict(fields[name])
    if callable(config.policy):
        fields["policy"] = {"function": getattr(config.policy, "__name__", "unnamed")}
    fields["algorithms"] = [
        {"function": type(algorithm).__name__, "num_rows": rows}
        for algorithm, rows in config.algorithms
    ]
    return json.loads(json.dumps(fields))


def _restore_config(saved: dict[str, Any]) -> EngineConfig:
    fields = dict(saved["config"])
    if isinstance(fields["policy"], dict) or fields["algorithms"]:
        raise ValueError(
            "config: expected the one that the state was saved with, for it holds "
            f"functions: policy {fields['policy']}, algorithms {fields['algorithms']}"
        )
    for name, kind in _PARTS.items():
        if fields[name] is not None:
            fields[name] = kind(**fields[name])
    fields["policy_parameters"] = tuple(fields["policy_parameters"])
    return EngineConfig(**fields | {"algorithms": ()})


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"folder: wanted one that snapshots.save wrote, {folder} has no config.json"
        )
    saved = json.loads(file.read_text())
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"folder: wanted a snapshot of format {FORMAT}, got {saved.get('format')!r}"
        )
    unknown = set(saved["config"]) ^ {f.name for f in dataclasses.fields(EngineConfig)}
    if unknown:
        raise ValueError(
            "folder: wanted a snapshot of this version of jpaged; these fields of the "
            f"config are only in one of the two: {sorted(unknown)}"
        )
    return saved


__all__ = ["FORMAT", "load", "save"]
