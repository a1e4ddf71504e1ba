"""Host functions of the engine: submit requests, pin prefixes, collect results.

Pipeline: params -> [submit] -> state -> run -> [collect] -> results. All of this runs
on the host, between calls of `step` and `run`. `end` and `release` are pure functions
of the state and can be called under jit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import parallel, policies, scheduler
from jpaged.compat import quick_jit
from jpaged.engine import (
    algorithms,
    bookkeeping,
    limits,
    replicas,
    request_table,
    results,
    submission,
)
from jpaged.engine.limits import Params
from jpaged.engine.request_table import RequestTable
from jpaged.engine.results import Result
from jpaged.engine.state import EngineState
from jpaged.engine.submission import LoadAutomaton
from jpaged.kv import block_manager, prefix_cache
from jpaged.scheduler import FINISHED, RETAINED


def submit(
    state: EngineState,
    prompts: Sequence[Sequence[int]],
    params: Params | Sequence[Params],
    *,
    seed: int = 0,
    arrivals: Sequence[int] | None = None,
    submitted_ms: Sequence[int] | None = None,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    replica: int = 0,
) -> tuple[EngineState, list[list[int]]]:
    """Submit requests: their sequences wait until a step admits them.

    A prompt that shares a prefix with a pinned prefix (see `pin`) maps its blocks.
    Every request is checked before anything changes. Donates `state`.

    Args:
      state: the engine's state.
      prompts: token ids of each request.
      params: one for all prompts, or one for each.
      seed: a request without a seed of its own uses one that is derived from this seed
        and its arrival number.
      arrivals: the number of each request; None: the next numbers.
      submitted_ms: when each request was submitted, on the engine's clock
        (`set_clock`); None: now.
      vocab_size: if given, token ids are checked against it. Algorithms that retain
        sequences need it.
      eos_token_ids: tokens that end a sequence unless its `ignore_eos` is set.
      replica: the replica that gets the requests.

    Returns:
      The state, and the indices of each request's sequences.

    Raises:
      ValueError: a request could never run, there are more sequences than free
        sequence indices, or there is no such replica.
    """
    config = state.config
    prompts = [list(map(int, prompt)) for prompt in prompts]
    if isinstance(params, Params):
        params = [params] * len(prompts)
    _check_length("params", "one", params, prompts)
    if arrivals is None:
        first = submission.next_arrival(state.requests)
        arrivals = range(first, first + len(prompts))
    _check_length("arrivals", "None", arrivals, prompts)
    if submitted_ms is None:
        now = 0 if state.clock is None else int(np.asarray(state.clock).flat[0])
        submitted_ms = [now] * len(prompts)
    _check_length("submitted_ms", "None", submitted_ms, prompts)
    table = host_table(state, replica)
    num_pinned = limits.num_pinned_blocks(table, config)
    for prompt, param in zip(prompts, params, strict=True):
        limits.check_request(
            config,
            prompt,
            param,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            num_blocks=config.num_blocks - num_pinned,
        )
    automata, loads = submission.place_automata(table, config, params)
    new, seq_indices = submission.encode_requests(
        table,
        config,
        prompts,
        params,
        automata,
        seed=seed,
        arrivals=arrivals,
        submitted_ms=submitted_ms,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
    )
    state = _insert(state, replica, loads, new)
    first = _first_seq_index(state, replica)
    return state, [[first + seq_index for seq_index in mine] for mine in seq_indices]


def set_clock(state: EngineState, milliseconds: int) -> EngineState:
    """Set the time that policies see, in ms since any moment; it wraps as int32.

    It stays the same until the next call: `run` does not advance it.
    """
    if state.clock is None:
        return state
    return dataclasses.replace(
        state,
        clock=replicas.filled_like(state.clock, np.int64(milliseconds)),
    )


def _check_length(
    name: str, alternative: str, values: Sequence[object], prompts: Sequence[object]
) -> None:
    if len(values) != len(prompts):
        raise ValueError(
            f"{name}: expected {alternative}, or one for each of {len(prompts)} "
            f"prompts, got {len(values)}"
        )


def host_table(state: EngineState, replica: int = 0) -> RequestTable:
    """Return a replica's request table, with the columns that submissions read.

    Raises:
      ValueError: there is no such replica.
    """
    number = parallel.num_replicas(state.mesh)
    if not 0 <= replica < number:
        raise ValueError(f"replica: expected from 0 to {number - 1}, got {replica}")
    table = state.requests
    columns = dict(
        queue=table.queue,
        params=table.params,
        digests=table.digests,
        tokens=table.tokens,
    )
    mine = replicas.select_replica(columns, state.mesh, replica)
    return dataclasses.replace(table, **mine)


def _first_seq_index(state: EngineState, replica: int) -> int:
    """The number of a replica's sequence index 0 among those of all replicas."""
    return replica * state.config.max_num_requests


def _insert(
    state: EngineState,
    replica: int,
    loads: Sequence[LoadAutomaton],
    new: request_table.Submission | None,
) -> EngineState:
    """Load automata into the replica's table, then insert its new sequences."""
    for load in loads:
        state = _load_automaton(state, replica, *load)
    return state if new is None else _insert_sequences(state, replica, new)


@functools.partial(quick_jit, donate_argnums=0)
def _load_automaton(
    state: EngineState, replica: jax.Array | int, *load: Any
) -> EngineState:
    def put(state: EngineState, *load: Any) -> EngineState:
        table = request_table.put_automaton(state.requests, *load)
        return dataclasses.replace(state, requests=table)

    return replicas.update_one(put, state, replica, *load)


@functools.partial(quick_jit, donate_argnums=0)
def _insert_sequences(
    state: EngineState, replica: jax.Array | int, new: request_table.Submission
) -> EngineState:
    def insert(state: EngineState, new: request_table.Submission) -> EngineState:
        return dataclasses.replace(
            state,
            requests=request_table.insert_sequences(state.requests, new),
            states=algorithms.insert_states(state.states, new),
        )

    return replicas.update_one(insert, state, replica, new)


def pin(
    state: EngineState,
    tokens: Sequence[int],
    *,
    vocab_size: int | None = None,
    replica: int = 0,
) -> tuple[EngineState, int]:
    """Pin a prefix: it is computed once, and its blocks are kept until `unpin`.

    Requests that are submitted later and share a prefix with it map its blocks, the
    last one copy-on-write. Donates `state`.

    Args:
      state: the engine's state.
      tokens: token ids of the prefix.
      vocab_size: if given, token ids are checked against it.
      replica: the replica that keeps the prefix.

    Returns:
      The state, and the prefix's sequence index.

    Raises:
      ValueError: there are too many prefixes, the prefix is so long that a submitted
        request could never run beside it, or there is no such replica.

    Source: paper section 4.4, shared prefix.
    """
    tokens = list(map(int, tokens))
    config, table = state.config, host_table(state, replica)
    limits.check_prefix(
        table,
        config,
        tokens,
        num_pinned_blocks=limits.num_pinned_blocks(table, config),
        vocab_size=vocab_size,
    )
    new, seq_index = submission.encode_prefix(table, config, tokens)
    state = _insert(state, replica, [], new)
    return state, _first_seq_index(state, replica) + seq_index


def unpin(state: EngineState, seq_indices: Sequence[int]) -> EngineState:
    """Remove the pinned prefixes `seq_indices`. Donates `state`.

    Sequences that map their blocks keep them.

    Raises:
      ValueError: an index is not that of a pinned prefix.
    """
    is_prefix = np.array(state.requests.params.is_prefix)
    is_prefix &= np.asarray(state.requests.queue.status) != scheduler.EMPTY
    mask = np.zeros(is_prefix.shape, np.bool_)
    for seq_index in seq_indices:
        if not 0 <= seq_index < mask.size or not is_prefix.flat[seq_index]:
            raise ValueError(
                f"seq_indices: expected indices of pinned prefixes, got {seq_index}"
            )
        mask.flat[seq_index] = True
    return release(end(state, mask, np.int32(request_table.ABORT)), mask)


def reset_prefix_cache(state: EngineState) -> EngineState:
    """Empty the prefix cache; rows keep their blocks.

    After the model's weights have changed, cached keys and values must not be used.
    """
    if state.prefix_cache is None:
        return state
    config = state.config
    cache = replicas.init_on_mesh(
        lambda: prefix_cache.init_prefix_cache(
            config.num_blocks,
            config.block_size,
            config.uses(policies.EVICTION),
            config.group_windows,
        ),
        state.mesh,
    )
    return dataclasses.replace(state, prefix_cache=cache)


def collect(state: EngineState) -> list[Result]:
    """Return the finished outputs, sorted by arrival and number; changes nothing."""
    found = []
    for replica in range(parallel.num_replicas(state.mesh)):
        table = replicas.select_replica(state.requests, state.mesh, replica)
        first = _first_seq_index(state, replica)
        found += [
            one._replace(seq_index=first + one.seq_index)
            for one in results.results(table)
        ]
    return sorted(found, key=lambda result: (result.arrival, result.sample))


@functools.partial(quick_jit, donate_argnames="state")
def end(
    state: EngineState,
    seq_indices: jax.Array | np.ndarray,
    reason: jax.Array | np.int32,
) -> EngineState:
    """End sequences, and free their blocks.

    Args:
      state: the engine's state; donated.
      seq_indices: bool[R], or bool[D, R] with D replicas: which sequences to end. Those
        that have finished stay as they are. Of a request of an algorithm, mark all
        sequences or none.
      reason: i32[], an index of FINISH_REASONS.
    """
    return replicas.update_each(
        _end, state, seq_indices, replicas.broadcast_to_replicas(reason, state.mesh)
    )


def _end(state: EngineState, seq_indices: jax.Array, reason: jax.Array) -> EngineState:
    table = state.requests
    status = table.queue.status
    ends = seq_indices & (bookkeeping.is_unfinished(status) | (status == RETAINED))
    queue = dataclasses.replace(table.queue, status=jnp.where(ends, FINISHED, status))
    table = dataclasses.replace(
        table,
        queue=queue,
        finish_reasons=jnp.where(ends, reason, table.finish_reasons),
    )
    own = jnp.arange(state.rows.shape[0], dtype=jnp.int32)
    blocks = bookkeeping.fork_rows(queue, own, state.rows, state.blocks)
    rows, blocks = bookkeeping.release_finished(queue, state.rows, blocks)
    host = state.host
    if host is not None:
        host_blocks = block_manager.free(host.blocks, ends)
        host = dataclasses.replace(host, blocks=host_blocks)
    return dataclasses.replace(
        state, requests=table, rows=rows, blocks=blocks, host=host
    )


@functools.partial(quick_jit, donate_argnames="state")
def release(state: EngineState, seq_indices: jax.Array | np.ndarray) -> EngineState:
    """Release finished sequences: their sequence indices are free for new ones.

    Args:
      state: the engine's state; donated.
      seq_indices: bool[R], or bool[D, R] with D replicas: which sequences to release.
        Those that have not finished stay as they are.
    """
    return replicas.update_each(_release, state, seq_indices)


def _release(state: EngineState, seq_indices: jax.Array) -> EngineState:
    queue = state.requests.queue
    is_released = seq_indices & (queue.status == FINISHED)
    # The next sequence at this index is unrelated to those that refer to it.
    own = jnp.arange(is_released.shape[0], dtype=jnp.int32)
    has_lost_source = is_released[queue.sources]
    queue = dataclasses.replace(
        queue,
        status=jnp.where(is_released, scheduler.EMPTY, queue.status),
        leaders=jnp.where(is_released[queue.leaders], own, queue.leaders),
        sources=jnp.where(has_lost_source, own, queue.sources),
        shared_lens=jnp.where(has_lost_source, 0, queue.shared_lens),
    )
    table = dataclasses.replace(state.requests, queue=queue)
    return dataclasses.replace(state, requests=table)
