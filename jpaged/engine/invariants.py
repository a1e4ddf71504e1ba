"""Invariants: conditions that every state between two steps must satisfy.

Host code, for tests and debugging.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jpaged import parallel
from jpaged.engine import replicas
from jpaged.engine.state import EngineState
from jpaged.kv import block_manager, prefix_cache
from jpaged.scheduler import NO_REQUEST, RETAINED, RUNNING, SWAPPED


def violations(state: EngineState) -> list[str]:
    """Check the invariants of a state between steps; return a sentence per violation.

    Recomputes rows, sequences, block tables and the prefix cache on the host. An empty
    list means that the state is sound.
    """
    number = parallel.num_replicas(state.mesh)
    if number == 1:
        return _violations(state)
    host = state.host
    if host is not None:
        host = dataclasses.replace(host, cache=None, draft_cache=None)
    # No device has the whole pages, and no check reads them.
    state = dataclasses.replace(state, cache=None, draft_cache=None, host=host)
    return [
        f"replica {replica}: {one}"
        for replica in range(number)
        for one in _violations(replicas.select_replica(state, state.mesh, replica))
    ]


def _violations(state: EngineState) -> list[str]:
    queue = jax.device_get(state.requests.queue)
    rows, lens = np.asarray(state.rows), np.asarray(state.blocks.context_lens)
    drops = state.blocks.drops
    dropped = np.zeros_like(lens) if drops is None else np.asarray(drops.dropped)
    found = block_manager.violations(state.blocks)
    for row, (index, length) in enumerate(np.stack([rows, lens], axis=1).tolist()):
        if index == NO_REQUEST:
            if length or dropped[row]:
                found.append(f"row {row}: is empty and has {length} tokens")
            continue
        if queue.status[index] not in (RUNNING, RETAINED):
            found.append(
                f"row {row}: sequence {index} has status {queue.status[index]}"
            )
        length += int(dropped[row])
        if length > queue.num_tokens[index]:
            found.append(
                f"row {row}: has {length} tokens, sequence {index} knows "
                f"{queue.num_tokens[index]}"
            )
    for index in np.flatnonzero(queue.status == RUNNING).tolist():
        if (count := int((rows == index).sum())) != 1:
            found.append(f"sequence {index}: runs in {count} rows")
    if state.prefix_cache is not None:
        tokens = state.requests.tokens[np.maximum(rows, 0)]
        found += prefix_cache.violations(state.prefix_cache, state.blocks, tokens)
    return found + _host_pool_violations(state)


def _host_pool_violations(state: EngineState) -> list[str]:
    status, rows = np.asarray(state.requests.queue.status), np.asarray(state.rows)
    if state.host is None:
        swapped = np.flatnonzero(status == SWAPPED).tolist()
        return [f"sequence {i}: is swapped, and there is no host pool" for i in swapped]
    blocks = state.host.blocks
    found = [f"host pool: {one}" for one in block_manager.violations(blocks)]
    known = np.asarray(state.requests.queue.num_tokens)
    for index, length in enumerate(np.asarray(blocks.context_lens).tolist()):
        if length and status[index] != SWAPPED:
            found.append(
                f"sequence {index}: has blocks in the host pool, status {status[index]}"
            )
        if length > known[index]:
            found.append(
                f"sequence {index}: has {length} tokens in the host pool, knows "
                f"{known[index]}"
            )
        if status[index] == SWAPPED and index in rows:
            found.append(f"sequence {index}: is swapped and has a row")
    return found
