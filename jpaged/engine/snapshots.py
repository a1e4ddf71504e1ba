"""Snapshots: save an engine during a run to a folder, and continue it later.

Pipeline: engine -> [snapshots] -> disk -> [snapshots] -> engine. Host code.

    snapshots.save("runs/at_500", state)
    state = snapshots.load("runs/at_500", model)
    state = engine.run(model, state)

An engine of the same sizes gets the whole state back, pages included. An engine with
another pool (more blocks, another number of rows, no prefix cache, ...) gets the
requests and their generated tokens; their pages are recomputed, as after a preemption.
So a saved state can be forked into several policies, or moved to another machine: onto
a mesh, onto a different mesh, or from a mesh to a single device. Each device then reads
the pages of its own kv heads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jpaged import parallel, policies, scheduler
from jpaged.config import EngineConfig, Speculation
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.engine import limits, sharing
from jpaged.engine import state as engine_state
from jpaged.engine.request_table import RequestTable
from jpaged.engine.speculation import DraftedModel
from jpaged.engine.state import EngineState, Model
from jpaged.models.config import ModelConfig
from jpaged.parallel import distributed

# The version of the saved format. Increase it whenever a field of `EngineState`, of its
# parts or of `EngineConfig` is renamed or changes its meaning.
FORMAT = 3
# Arrays that any engine can load; all others need an engine with the same pool.
_REQUESTS = (".requests", ".states", ".counters")
# Columns that only some policies have; another engine sets them again.
_ATTRIBUTES = ".requests.queue.attributes"
_SCHEDULER_PARAMS = ".scheduler_params"
# Pages: kv heads are axis 2, and their number depends on the mesh.
_PAGES = re.compile(r"\.(draft_)?cache\.[kv]_(pages|scale)$")
# Fields of the config that are dataclasses.
_PARTS: dict[str, Callable[..., Any]] = dict(
    rules=RuleSizes, automata=AutomataSizes, speculation=Speculation
)


def save(folder: str | os.PathLike[str], state: EngineState) -> None:
    """Write the state to a new folder.

    The folder appears under its name only after everything is written. If several
    processes share the mesh, all of them must call this function, with a folder that
    all of them can access.

    Args:
      folder: the new folder.
      state: the engine's state. It is not donated, so the engine can continue.

    Raises:
      FileExistsError: the folder exists.
      ValueError: the state has several replicas.
    """
    import orbax.checkpoint as ocp

    if (number := parallel.num_replicas(state.mesh)) > 1:
        raise ValueError(
            f"state: expected one replica, got {number} over the `data` axis of its "
            "mesh, which cannot be saved; let them finish and collect their results"
        )
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"folder: expected a new folder, got {folder}")
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
    """Load a saved state into an engine for `model`.

    Args:
      folder: the folder that `save` wrote.
      model: a model with the weights of the saved engine's; they are not checked.
      config: None: the saved config. Another config may change everything but the
        request table's shapes: the pool, the rows, the policy, ... .
      kv_dtype: dtype of the pages; None uses the model's.
      mesh: the mesh on which the model is placed; None is one device. It may differ
        from the mesh of the saved engine, but must have no replicas.

    Raises:
      FileNotFoundError: the folder has no snapshot.
      ValueError: the snapshot has another format; the mesh has replicas; the config's
        request table has other shapes; the config must be given, because the saved one
        has functions; or a saved request can never fit into the config's pool.
    """
    if (number := parallel.num_replicas(mesh)) > 1:
        raise ValueError(
            f"mesh: expected data=1, because a snapshot has one replica, got "
            f"data={number}"
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
    # Snapshots that were saved before meshes existed have no "tensor".
    stored = _stored_heads(model, saved.get("tensor", 1))
    if _fits(folder / "pool", pool, stored):
        return _with_leaves(empty, arrays | _restore(folder / "pool", pool, stored))
    return _relocated(_with_leaves(empty, arrays), config)


def _empty(
    model: Model, config: EngineConfig, kv_dtype: str | None, mesh: Mesh | None
) -> EngineState:
    def init() -> EngineState:
        return engine_state.init(model, config, kv_dtype=kv_dtype, mesh=mesh)

    # One program instead of one for each array; on a mesh it is one already.
    return jax.jit(init)() if mesh is None else init()


def _tensor(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["tensor"]


def _stored_heads(model: Model, tensor: int) -> dict[str | None, int]:
    """Kv heads in the pages of the model and of its draft, on `tensor` devices."""
    models: dict[str | None, ModelConfig] = {None: model.config}
    if isinstance(model, DraftedModel):
        models["draft_"] = model.draft.config
    return {
        which: parallel.stored_kv_heads(sizes.num_kv_heads, tensor)
        for which, sizes in models.items()
    }


def _halves(state: EngineState) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The arrays by name: those that any engine can load, and all others.

    Without the scheduler parameters, which follow from the config.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.size}
    arrays = {
        n: leaf for n, leaf in arrays.items() if not n.startswith(_SCHEDULER_PARAMS)
    }
    requests = {
        n: leaf
        for n, leaf in arrays.items()
        if n.startswith(_REQUESTS) and not n.startswith(_ATTRIBUTES)
    }
    return requests, {n: leaf for n, leaf in arrays.items() if n not in requests}


def _fits(
    folder: pathlib.Path,
    like: dict[str, jax.Array],
    stored: dict[str | None, int] | None = None,
) -> bool:
    """Whether the saved arrays have the names, shapes and dtypes of `like`.

    Pages are expected with `stored` kv heads, if given.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        known = checkpointer.metadata(folder).item_metadata.tree
    return known.keys() == like.keys() and all(
        _saved_shape(name, leaf, stored) == tuple(known[name].shape)
        and leaf.dtype == known[name].dtype
        for name, leaf in like.items()
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
    """Read the saved arrays with the shardings of `like`, whose arrays are deleted.

    Each device reads its own part. Only pages whose number of kv heads differs from
    `stored` are read by the host first.
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
    """Copy pages to the sharding of `like`, with its number of kv heads."""
    saved, expected = pages.shape[2], like.shape[2]
    # Copies of a head are adjacent, so the indices are proportional.
    heads = np.arange(expected) * saved // expected

    def part(index: Any) -> np.ndarray:
        return pages[*index[:2], heads[index[2]], *index[3:]]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _with_leaves(state: EngineState, arrays: dict[str, jax.Array]) -> EngineState:
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree.unflatten(
        tree, [arrays.get(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    )


def _relocated(state: EngineState, config: EngineConfig) -> EngineState:
    """Prepare the state for another pool: all running sequences are recomputed.

    Sequences of a request share their common prefixes again. Their deadlines and users
    are not kept.
    """
    table = jax.jit(_all_waiting)(state.requests)
    largest = limits.largest_request(table, config)
    pinned = limits.num_pinned_blocks(table, config)
    if largest + pinned > config.num_blocks:
        raise ValueError(
            f"config: expected num_blocks of at least {largest + pinned}, for the "
            f"largest saved request and {pinned} pinned blocks, got {config.num_blocks}"
        )
    counters = dataclasses.replace(state.counters, is_stalled=jnp.bool_(False))
    return dataclasses.replace(state, requests=table, counters=counters)


def _all_waiting(table: RequestTable) -> RequestTable:
    """Set running, swapped and pinned sequences to WAITING."""
    queue = table.queue
    was_pinned = (queue.status == scheduler.RETAINED) & table.params.is_prefix
    ran = (queue.status == scheduler.RUNNING) | (queue.status == scheduler.SWAPPED)
    queue = dataclasses.replace(
        queue, status=jnp.where(ran | was_pinned, scheduler.WAITING, queue.status)
    )
    own = jnp.arange(ran.shape[0], dtype=jnp.int32)
    # Sources in other requests have no blocks now, unless they are pinned prefixes.
    is_own = queue.arrivals[queue.sources] == queue.arrivals
    is_own |= table.params.is_prefix[queue.sources]
    queue = dataclasses.replace(
        queue,
        sources=jnp.where(is_own, queue.sources, own),
        shared_lens=jnp.where(is_own, queue.shared_lens, 0),
    )
    if (attributes := queue.attributes) is not None:
        most = table.params.token_limits - queue.prompt_lens
        attributes = dataclasses.replace(attributes, max_tokens=most)
        queue = dataclasses.replace(queue, attributes=attributes)
    table = dataclasses.replace(table, queue=queue)
    lost = jnp.where(ran, own, ran.shape[0])
    if table.params.retention is not None:
        return sharing.without_sources(table, lost)
    return sharing.reassign_sources(table, lost)


def _difference(saved: dict[str, Any], config: EngineConfig) -> str:
    given = _describe(config)
    differ = {
        name: (value, given[name])
        for name, value in saved["config"].items()
        if given[name] != value
    }
    return (
        "config: expected the saved max_model_len, max_num_requests, "
        "max_num_stop_ids, num_logprobs, max_beam_width, rules, automata, "
        "group_windows, algorithms and processors, got other fields (saved, given): "
        f"{differ}"
    )


def _describe(config: EngineConfig) -> dict[str, Any]:
    """Return the config as JSON values, functions by their names."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in _PARTS:
        if fields[name] is not None:
            fields[name] = dataclasses.asdict(fields[name])
    for kind in policies.KINDS:
        if callable(policy := fields[kind.argument]):
            name = getattr(policy, "__name__", "unnamed")
            fields[kind.argument] = {"function": name}
    if (method := config.retention) is not None:
        name = getattr(method.score, "__name__", "unnamed")
        fields["retention"] = {"function": name, "parameters": dict(method.parameters)}
    fields["processors"] = [
        [getattr(kind.function, "__name__", "unnamed") for kind in chain]
        for chain in config.processors
    ]
    fields["algorithms"] = [
        {"function": type(algorithm).__name__, "num_rows": rows}
        for algorithm, rows in config.algorithms
    ]
    return json.loads(json.dumps(fields))


def _restore_config(saved: dict[str, Any]) -> EngineConfig:
    fields: dict[str, Any] = dict(saved["config"])
    names = [*(kind.argument for kind in policies.KINDS), "retention"]
    own = {name: fields[name] for name in names if isinstance(fields[name], dict)}
    if own or fields["algorithms"] or fields["processors"]:
        shown = "".join(f"{name} {policy}, " for name, policy in own.items())
        raise ValueError(
            "config: expected the config of the saved engine, because it has functions "
            f"({shown}algorithms {fields['algorithms']}, processors "
            f"{fields['processors']}), got None"
        )
    for name, kind in _PARTS.items():
        if fields[name] is not None:
            fields[name] = kind(**fields[name])
    for kind in policies.KINDS:
        fields[kind.parameters] = tuple(fields[kind.parameters])
    fields["algorithms"], fields["processors"] = (), ()
    for name in ("seen_layers", "group_windows"):
        fields[name] = tuple(fields[name])
    return EngineConfig(**fields)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"folder: expected a folder that snapshots.save wrote, got {folder}, which "
            "has no config.json"
        )
    saved = json.loads(file.read_text())
    if (number := saved.get("format")) != FORMAT:
        raise ValueError(
            f"folder: expected a snapshot of format {FORMAT}, got format {number!r}, "
            "which another version of jpaged wrote; load it with that version, and run "
            "its requests to their end there"
        )
    unknown = set(saved["config"]) ^ {f.name for f in dataclasses.fields(EngineConfig)}
    if unknown:
        raise ValueError(
            "folder: expected a snapshot of this version of jpaged, got one whose "
            f"config differs in these fields: {sorted(unknown)}"
        )
    return saved


__all__ = ["FORMAT", "load", "save"]
