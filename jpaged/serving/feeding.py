"""Feeding: requests get a replica and enter its request table; each fails alone.

Pipeline: batcher -> [feeding] -> engine host. Host only.

Requests are checked when they are submitted. What still fails while a request is
encoded is a bug, and must not end the requests of other callers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jpaged.config import EngineConfig
from jpaged.engine.limits import Params
from jpaged.serving import routing
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.request_state import RequestState

_TABLE_FULL = (
    "the request table is too small for the sequences of this request, even if it is "
    "the only one; release pinned prefixes, or increase max_num_requests"
)
Grow = Callable[[EngineConfig, Sequence[Params]], EngineConfig]


class Entered(NamedTuple):
    """A request that is in the request table."""

    request: RequestState
    seq_indices: list[int]  # of all its sequences
    output_indices: list[int]  # of those that are its outputs


class Failed(NamedTuple):
    """A request that could not be encoded."""

    request: RequestState
    error: Exception


def place(
    host: EngineHost,
    grow: Grow,
    request: RequestState,
    groups: Sequence[list[RequestState]],
    cached_lens: np.ndarray | None,
    loads: np.ndarray,
    *,
    is_alone: bool,
) -> bool:
    """Append a request to the group of a replica; return False if it has to wait.

    Args:
      host: the engine.
      grow: maps a config and some parameters to the config with their features.
      request: the request.
      groups: per replica, the requests that it gets before this one.
      cached_lens: i32[D], cached tokens of its prompt; None if there is one replica.
      loads: i64[D], tokens of each replica; updated.
      is_alone: whether no other request is or comes into the request table.

    Raises:
      ValueError: the engine can never run the request.
      RuntimeError: the request table is too small for it.
    """
    # It needs a new request table, which it gets when the present one is empty.
    config = host.config
    if grow(config, [request.params]) != config:
        return False
    if (refusal := host.refusal(request)) is not None:
        raise ValueError(refusal)
    has_capacity = [
        host.has_capacity([*group, request], replica)
        for replica, group in enumerate(groups)
    ]
    replica = routing.choose_replica(
        np.zeros_like(loads) if cached_lens is None else cached_lens,
        loads,
        np.array(has_capacity),
        margin=routing.LOAD_MARGIN * config.num_blocks * config.block_size,
    )
    if replica is None:
        if is_alone:
            raise RuntimeError(_TABLE_FULL)
        return False
    groups[replica].append(request)
    loads[replica] += len(request.prompt_token_ids) * request.table_size
    return True


def submit_groups(
    host: EngineHost, groups: Sequence[Sequence[RequestState]]
) -> tuple[list[Entered], list[Failed]]:
    """Put requests into the request tables.

    If a group raises an exception, its requests are submitted one by one.

    Args:
      host: the engine.
      groups: per replica, the requests that it gets.

    Raises:
      Exception: the engine's state was lost.
    """
    entered: list[Entered] = []
    failed: list[Failed] = []
    for replica, group in enumerate(groups):
        if not group:
            continue
        try:
            entered += _submit(host, replica, group)
        except Exception:
            if host.runner.is_lost:
                raise
            for request in group:
                try:
                    entered += _submit(host, replica, [request])
                except Exception as error:
                    if host.runner.is_lost:
                        raise
                    failed.append(Failed(request, error))
    return entered, failed


def _submit(
    host: EngineHost, replica: int, requests: Sequence[RequestState]
) -> list[Entered]:
    groups: list[Sequence[RequestState]] = [[] for _ in range(host.num_replicas)]
    groups[replica] = requests
    found = host.submit(groups)[replica]
    return [
        Entered(request, *indices)
        for request, indices in zip(requests, found, strict=True)
    ]


def grow_for(
    grow: Grow, config: EngineConfig, requests: Sequence[RequestState]
) -> tuple[EngineConfig, list[Failed]]:
    """Return the config with the features of all requests, without those that fail."""
    try:
        return grow(config, [request.params for request in requests]), []
    except Exception:
        failed: list[Failed] = []
        fine: list[RequestState] = []
        for request in requests:
            try:
                grow(config, [request.params])
                fine.append(request)
            except Exception as error:
                failed.append(Failed(request, error))
        if not failed:
            raise
        return grow(config, [request.params for request in fine]), failed
