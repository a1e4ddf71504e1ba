"""Engine: its whole state is a pytree, a step is EngineState -> EngineState.

Place on the road: it is the road. `schedule`, `append`, the decoder, the sampler and
the bookkeeping follow each other in `step`; `run` is a `lax.while_loop` of steps, one
device call in which requests of any lengths come, wait, run and end.

    state = init(model, config)
    state, places = submit(state, prompts, params)
    state = run(model, state)
    results = collect(state)

On a mesh with `data` of more than one, the state holds as many replicas, each with its
own requests and pages: `submit` and `pin` take one of them, `step` and `run` run all at
once, `collect` gives the results of all. A place of replica r is numbered
r * max_num_requests + its place in that replica's table.

Source: Kwon et al. 2023, sections 4 and 5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged import parallel, scheduler
from jpaged.config import EngineConfig
from jpaged.engine import (
    algorithms,
    iteration,
    limits,
    replicas,
    request_table,
    submission,
)
from jpaged.engine.iteration import SampledStep as SampledStep
from jpaged.engine.iteration import ScheduledStep as ScheduledStep
from jpaged.engine.iteration import begin_step as begin_step
from jpaged.engine.iteration import end_step as end_step
from jpaged.engine.limits import Params
from jpaged.engine.limits import check_request as check_request
from jpaged.engine.request_table import RequestTable
from jpaged.engine.speculation import DraftedModel as DraftedModel
from jpaged.engine.state import Counters as Counters
from jpaged.engine.state import EngineState as EngineState
from jpaged.engine.state import Model
from jpaged.engine.state import init as init
from jpaged.engine.submission import FINISH_REASONS as FINISH_REASONS
from jpaged.engine.submission import Result
from jpaged.kv import block_manager, prefix_cache
from jpaged.scheduler import FINISHED, NO_REQUEST, RETAINED, RUNNING, SWAPPED


def step(model: Model, state: EngineState) -> EngineState:
    """The state after one iteration: schedule, append, decode, commit.

    Jit it with `state` donated, and the pages are updated in place.
    """

    def once(model: Model, state: EngineState) -> EngineState:
        memory = iteration.working_memory(model, state)
        return iteration.iterate(model, state, memory, state.config)[0]

    return replicas.advance(once, model, state)


def has_work(state: EngineState) -> jax.Array:
    """bool[]: some sequence waits or runs, and the engine has not stalled."""
    status = state.requests.queue.status
    is_any = jnp.any(iteration.is_live(status), axis=-1)
    return jnp.any(is_any & ~state.counters.is_stalled)  # of any replica


@functools.partial(
    jax.jit,
    donate_argnames="state",
    static_argnames=("max_num_seqs", "max_num_batched_tokens"),
)
def run(
    model: Model,
    state: EngineState,
    max_steps: int | jax.Array | None = None,
    *,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
) -> EngineState:
    """The state after steps until all sequences have ended, or `max_steps` steps.

    One device call; donates `state`. Each of several replicas runs until its own have
    ended, and at most so many steps. `max_steps` is traced: changing it compiles
    nothing. `max_num_seqs` and `max_num_batched_tokens` replace the config's by lower
    limits, at least the rows that run already: a program for fewer sizes, compiled in
    less time.
    """
    config = dataclasses.replace(
        state.config,
        max_num_seqs=max_num_seqs or state.config.max_num_seqs,
        max_num_batched_tokens=(
            max_num_batched_tokens or state.config.max_num_batched_tokens
        ),
    )
    most = jnp.iinfo(jnp.int32).max if max_steps is None else max_steps
    return replicas.advance(
        functools.partial(_run, config), model, state, jnp.asarray(most, jnp.int32)
    )


def _run(
    config: EngineConfig, model: Model, state: EngineState, max_steps: jax.Array
) -> EngineState:
    first = state.counters.num_steps

    def goes_on(carry) -> jax.Array:
        state, _ = carry
        return has_work(state) & (state.counters.num_steps - first < max_steps)

    def advance(carry):
        return iteration.iterate(model, *carry, config)

    carry = (state, iteration.working_memory(model, state))
    state, _ = lax.while_loop(goes_on, advance, carry)
    return state


def submit(
    state: EngineState,
    prompts: Sequence[Sequence[int]],
    params: Params | Sequence[Params],
    *,
    seed: int = 0,
    arrivals: Sequence[int] | None = None,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    replica: int = 0,
) -> tuple[EngineState, list[list[int]]]:
    """The state with the requests waiting, and the places of each one's sequences.

    A prompt that begins as a pinned prefix does (see `pin`) maps its blocks. Donates
    `state`. Host code: it checks every request before anything changes.

    Args:
      state: the engine.
      prompts: token ids.
      params: one for all, or one for each prompt.
      seed: requests without a seed of their own draw with one that is made of this
        and their arrival number.
      arrivals: of each prompt its number; None counts on.
      vocab_size: where given, token ids are checked against it. Algorithms that hold
        sequences besides their rows need it.
      eos_token_ids: end a sequence unless its `ignore_eos`.
      replica: the one that gets the requests, where the mesh has several.

    Raises:
      ValueError: a request that could never run, more sequences than empty places, or
        no such replica.
    """
    config = state.config
    prompts = [list(map(int, prompt)) for prompt in prompts]
    if isinstance(params, Params):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(
            f"params: expected one, or one for each of {len(prompts)} prompts, "
            f"got {len(params)}"
        )
    if arrivals is None:
        first = submission.next_arrival(state.requests)
        arrivals = range(first, first + len(prompts))
    if len(arrivals) != len(prompts):
        raise ValueError(
            f"arrivals: expected None, or one for each of {len(prompts)} prompts, "
            f"got {len(arrivals)}"
        )
    table = host_table(state, replica)
    num_pinned = limits.num_pinned_blocks(table, config.block_size)
    for prompt, param in zip(prompts, params, strict=True):
        check_request(
            config,
            prompt,
            param,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            num_blocks=config.num_blocks - num_pinned,
        )
    automata, loads = submission.place_automata(table, config, params)
    new, seq_indices = submission.encode(
        table,
        config,
        prompts,
        params,
        automata,
        seed=seed,
        arrivals=arrivals,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
    )
    for load in loads:
        state = _load_automaton(state, replica, *load)
    if new is not None:
        state = _insert(state, replica, new)
    first = _first_seq_index(state, replica)
    return state, [[first + seq_index for seq_index in mine] for mine in seq_indices]


def host_table(state: EngineState, replica: int = 0) -> RequestTable:
    """A replica's request table, as far as submissions read it.

    Raises:
      ValueError: there is no such replica.
    """
    number = parallel.num_replicas(state.mesh)
    if not 0 <= replica < number:
        raise ValueError(f"replica: expected from 0 to {number - 1}, got {replica}")
    table = state.requests
    read = dict(
        queue=table.queue,
        params=table.params,
        digests=table.digests,
        tokens=table.tokens,
    )
    return dataclasses.replace(table, **replicas.part(read, state.mesh, replica))


def _first_seq_index(state: EngineState, replica: int) -> int:
    """The number of a replica's first place among those of all replicas."""
    return replica * state.config.max_num_requests


@functools.partial(jax.jit, donate_argnums=0)
def _load_automaton(state: EngineState, replica, *load) -> EngineState:
    def put(state: EngineState, index, one, digest) -> EngineState:
        table = request_table.put_automaton(state.requests, index, one, digest)
        return dataclasses.replace(state, requests=table)

    return replicas.one(put, state, replica, *load)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: EngineState, replica, new: request_table.Submission) -> EngineState:
    def insert(state: EngineState, new: request_table.Submission) -> EngineState:
        return dataclasses.replace(
            state,
            requests=request_table.insert(state.requests, new),
            states=algorithms.insert_states(state.states, new),
        )

    return replicas.one(insert, state, replica, new)


def pin(
    state: EngineState,
    tokens: Sequence[int],
    *,
    vocab_size: int | None = None,
    replica: int = 0,
) -> tuple[EngineState, int]:
    """The state in which a prefix will be computed once and kept, and its place.

    Requests that are submitted afterwards and begin like it map its blocks, the last
    one copy-on-write, until `unpin`. Donates `state`; host code. Where the mesh has
    several replicas, only `replica` keeps it.

    Raises:
      ValueError: too many prefixes, so long that requests already submitted could
        never run beside it, or no such replica.

    Source: paper section 4.4, shared prefix.
    """
    tokens = list(map(int, tokens))
    config, table = state.config, host_table(state, replica)
    limits.check_prefix(
        table,
        config,
        tokens,
        num_pinned_blocks=limits.num_pinned_blocks(table, config.block_size),
        vocab_size=vocab_size,
    )
    new, seq_index = submission.encode_prefix(table, config, tokens)
    return _insert(state, replica, new), _first_seq_index(state, replica) + seq_index


def unpin(state: EngineState, seq_indices: Sequence[int]) -> EngineState:
    """The state without the pinned prefixes at `seq_indices`; donates `state`.

    Who maps their blocks keeps them.

    Raises:
      ValueError: there is no pinned prefix at a place.
    """
    is_prefix = np.array(state.requests.params.is_prefix)
    is_prefix &= np.asarray(state.requests.queue.status) != scheduler.EMPTY
    mask = np.zeros(is_prefix.shape, np.bool_)
    for seq_index in seq_indices:
        if not 0 <= seq_index < mask.size or not is_prefix.flat[seq_index]:
            raise ValueError(f"places: expected a pinned prefix's, got {seq_index}")
        mask.flat[seq_index] = True
    return release(end(state, mask, np.int32(request_table.ABORT)), mask)


def reset_prefix_cache(state: EngineState) -> EngineState:
    """The state that knows of no block what it holds; rows keep theirs.

    After a change of the model's weights what was computed before must not be found.
    """
    if state.prefix_cache is None:
        return state
    config = state.config
    cache = replicas.made(
        lambda: prefix_cache.init_prefix_cache(config.num_blocks, config.block_size),
        state.mesh,
    )
    return dataclasses.replace(state, prefix_cache=cache)


def collect(state: EngineState) -> list[Result]:
    """The finished outputs, by arrival and number. Host code; changes nothing."""
    found = []
    for replica in range(parallel.num_replicas(state.mesh)):
        results = submission.results(replicas.part(state.requests, state.mesh, replica))
        first = _first_seq_index(state, replica)
        found += [one._replace(seq_index=first + one.seq_index) for one in results]
    return sorted(found, key=lambda result: (result.arrival, result.sample))


def violations(state: EngineState) -> list[str]:
    """What is wrong with the state between steps, a sentence each; empty if sound.

    Host side: rows and places, block tables and the prefix cache, counted anew.
    """
    number = parallel.num_replicas(state.mesh)
    if number == 1:
        return _violations(state)
    host = state.host
    if host is not None:
        host = dataclasses.replace(host, cache=None, draft_cache=None)
    # Pages are in no device's memory whole, and nothing of them is looked at.
    state = dataclasses.replace(state, cache=None, draft_cache=None, host=host)
    return [
        f"replica {replica}: {one}"
        for replica in range(number)
        for one in _violations(replicas.part(state, state.mesh, replica))
    ]


def _violations(state: EngineState) -> list[str]:
    queue = jax.device_get(state.requests.queue)
    rows, lens = np.asarray(state.rows), np.asarray(state.blocks.context_lens)
    found = block_manager.violations(state.blocks)
    for row, (seq_index, length) in enumerate(np.stack([rows, lens], axis=1).tolist()):
        if seq_index == NO_REQUEST:
            if length:
                found.append(f"row {row}: is empty and holds {length} tokens")
            continue
        if queue.status[seq_index] not in (RUNNING, RETAINED):
            found.append(
                f"row {row}: place {seq_index} has status {queue.status[seq_index]}"
            )
        if length > queue.num_tokens[seq_index]:
            found.append(
                f"row {row}: holds {length} tokens, place {seq_index} knows "
                f"{queue.num_tokens[seq_index]}"
            )
    for seq_index in np.flatnonzero(queue.status == RUNNING).tolist():
        if (times := int((rows == seq_index).sum())) != 1:
            found.append(f"place {seq_index}: runs in {times} rows")
    if state.prefix_cache is not None:
        tokens = state.requests.tokens[np.maximum(rows, 0)]
        found += prefix_cache.violations(state.prefix_cache, state.blocks, tokens)
    return found + _host_violations(state)


def _host_violations(state: EngineState) -> list[str]:
    status, rows = np.asarray(state.requests.queue.status), np.asarray(state.rows)
    if state.host is None:
        away = np.flatnonzero(status == SWAPPED).tolist()
        return [
            f"place {seq_index}: is swapped, and there is no host" for seq_index in away
        ]
    found = [f"host: {one}" for one in block_manager.violations(state.host.blocks)]
    known = np.asarray(state.requests.queue.num_tokens)
    for seq_index, length in enumerate(
        np.asarray(state.host.blocks.context_lens).tolist()
    ):
        if length and status[seq_index] != SWAPPED:
            found.append(
                f"place {seq_index}: has blocks on the host, is {status[seq_index]}"
            )
        if length > known[seq_index]:
            found.append(
                f"place {seq_index}: holds {length} tokens on the host, knows "
                f"{known[seq_index]}"
            )
        if status[seq_index] == SWAPPED and seq_index in rows:
            found.append(f"place {seq_index}: is swapped and has a row")
    return found


@functools.partial(jax.jit, donate_argnames="state")
def end(state: EngineState, seq_indices: jax.Array, reason: jax.Array) -> EngineState:
    """The state in which the marked live sequences have ended.

    `seq_indices` is bool[R], or of D replicas bool[D, R]; `reason` is an index of
    FINISH_REASONS. Their blocks are free again. Of a request of an algorithm, mark all
    sequences or none.
    """
    return replicas.each(_end, state, seq_indices, replicas.stacked(reason, state.mesh))


def _end(state: EngineState, seq_indices: jax.Array, reason: jax.Array) -> EngineState:
    table = state.requests
    status = table.queue.status
    ends = seq_indices & (iteration.is_live(status) | (status == RETAINED))
    queue = dataclasses.replace(table.queue, status=jnp.where(ends, FINISHED, status))
    table = dataclasses.replace(
        table,
        queue=queue,
        finish_reasons=jnp.where(ends, reason, table.finish_reasons),
    )
    own = jnp.arange(state.rows.shape[0], dtype=jnp.int32)
    blocks = iteration.move(queue, own, state.rows, state.blocks)
    rows, blocks = iteration.release_finished(queue, state.rows, blocks)
    host = state.host
    if host is not None:
        host_blocks = block_manager.free(host.blocks, ends)
        host = dataclasses.replace(host, blocks=host_blocks)
    return dataclasses.replace(
        state, requests=table, rows=rows, blocks=blocks, host=host
    )


@functools.partial(jax.jit, donate_argnames="state")
def release(state: EngineState, seq_indices: jax.Array) -> EngineState:
    """The state in which the marked finished sequences' places are empty.

    `seq_indices` is bool[R], or of D replicas bool[D, R].
    """
    return replicas.each(_release, state, seq_indices)


def _release(state: EngineState, seq_indices: jax.Array) -> EngineState:
    queue = state.requests.queue
    gone = seq_indices & (queue.status == FINISHED)
    # Whoever takes a place next is a stranger to the sequences that name it.
    own = jnp.arange(gone.shape[0], dtype=jnp.int32)
    is_stranger = gone[queue.sources]
    queue = dataclasses.replace(
        queue,
        status=jnp.where(gone, scheduler.EMPTY, queue.status),
        leaders=jnp.where(gone[queue.leaders], own, queue.leaders),
        sources=jnp.where(is_stranger, own, queue.sources),
        shared_lens=jnp.where(is_stranger, 0, queue.shared_lens),
    )
    table = dataclasses.replace(state.requests, queue=queue)
    return dataclasses.replace(state, requests=table)
