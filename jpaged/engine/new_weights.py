"""New weights: what happens to running sequences when the model's weights change.

Pipeline: engine state -> [new_weights] -> engine state.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.engine import bookkeeping, replicas, sharing
from jpaged.engine.state import EngineState
from jpaged.indexing import put
from jpaged.kv import block_manager
from jpaged.scheduler import RUNNING, SWAPPED, WAITING


def mark_stale(state: EngineState) -> EngineState:
    """Note that the blocks of all running sequences are of older weights.

    These sequences go on with what they have. No other sequence maps their blocks.
    Donates `state`. Empty the prefix cache too.
    """
    return _change_weights(state, False)


def recompute(state: EngineState) -> EngineState:
    """Take the blocks of all running sequences, which compute their tokens again.

    After the model's weights have changed, each next token is the new model's. This is
    a preemption of all requests, also of swapped ones. Donates `state`. Empty the
    prefix cache and unpin its prefixes before.
    """
    return _change_weights(state, True)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _change_weights(state: EngineState, is_recomputed: bool) -> EngineState:
    return replicas.update_each(_recompute if is_recomputed else _mark_stale, state)


def _mark_stale(state: EngineState) -> EngineState:
    table = state.requests
    queue = table.queue
    # A sequence that waits for one of its request maps that sequence's blocks.
    has_blocks = (queue.status == RUNNING) | (queue.status == SWAPPED)
    at = jnp.where(has_blocks, queue.leaders, queue.status.shape[0])
    is_stale = put(jnp.zeros_like(table.is_stale), at, True)
    is_stale = is_stale[queue.leaders] & bookkeeping.is_unfinished(queue.status)
    table = dataclasses.replace(table, is_stale=table.is_stale | is_stale)
    return dataclasses.replace(state, requests=table)


def _recompute(state: EngineState) -> EngineState:
    table, rows = state.requests, state.rows
    queue = table.queue
    has_blocks = (queue.status == RUNNING) | (queue.status == SWAPPED)
    index = jnp.arange(has_blocks.shape[0], dtype=jnp.int32)
    # Only a source in the same request is available when a sequence is admitted again.
    is_kept = queue.arrivals[queue.sources] == queue.arrivals
    queue = dataclasses.replace(
        queue,
        status=jnp.where(has_blocks, WAITING, queue.status),
        sources=jnp.where(has_blocks & ~is_kept, index, queue.sources),
        num_preemptions=queue.num_preemptions + has_blocks.astype(jnp.int32),
    )
    table = dataclasses.replace(table, queue=queue)
    table = sharing.reassign_sources(
        table, jnp.where(has_blocks, index, has_blocks.shape[0])
    )
    table = dataclasses.replace(table, is_stale=jnp.zeros_like(table.is_stale))
    is_taken = scheduler.row_values(has_blocks, rows, False)
    host, counters = state.host, state.counters
    if host is not None:
        host = dataclasses.replace(
            host, blocks=block_manager.free(host.blocks, has_blocks)
        )
    return dataclasses.replace(
        state,
        requests=table,
        rows=jnp.where(is_taken, scheduler.NO_REQUEST, rows),
        blocks=block_manager.free(state.blocks, is_taken),
        host=host,
        counters=dataclasses.replace(
            counters,
            num_preemptions=counters.num_preemptions
            + jnp.sum(has_blocks, dtype=jnp.int32),
        ),
    )
