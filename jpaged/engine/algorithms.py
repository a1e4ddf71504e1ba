"""Algorithms: requests whose sequences decode together.

Pipeline: logits -> [algorithms] -> request table, and parents for one fork.

A decoding algorithm is written for one request. This module runs it for every request
whose batch rows have logits in the step. It stores the algorithm's state and carries
out its decisions: histories move as `parents` say, tokens are appended, sequences and
requests end. The engine then forks the blocks.

Shape symbols: R sequences of the request table, S batch rows, W rows and Q sequences of
one request, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import scheduler
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding import beam
from jpaged.decoding.base import Decision, DecodingAlgorithm
from jpaged.decoding.sample import token_keys
from jpaged.engine import request_table
from jpaged.engine.request_table import RequestTable, SampledTokens
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import FINISHED, RETAINED, RUNNING

# For each algorithm the states of all requests, [R, ...]: a request's state is stored
# at the sequence index of its leader.
States = tuple[Any, ...]


@functools.lru_cache(maxsize=256)
def num_sequences(algorithm: DecodingAlgorithm, num_rows: int, vocab_size: int) -> int:
    """Return Q: a request's rows, and the sequences that the algorithm retains.

    Args:
      algorithm: the decoding algorithm.
      num_rows: W, rows of a request.
      vocab_size: V of the model.

    Raises:
      ValueError: the results of the algorithm's `step` have wrong shapes or dtypes.
    """
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
    logits = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.float32)
    before = jax.eval_shape(lambda: _as_arrays(algorithm.init(num_rows)))
    after, decision = jax.eval_shape(algorithm.step, keys, logits, before)
    _check_state(before, after)
    if not isinstance(decision, Decision):
        raise ValueError(
            f"algorithm.step: expected a Decision as second result, got {decision!r}"
        )
    shape = jnp.shape(decision.tokens)
    count = shape[0] if len(shape) == 1 else 0  # 0 raises below
    dtypes = {"tokens": "int32", "parents": "int32", "logprobs": "float32"}
    for name, dtype in (dtypes | {"finished": "bool"}).items():
        got = getattr(decision, name)
        if got.shape != (count,) or got.dtype != dtype or count < num_rows:
            raise ValueError(
                f"algorithm.step: expected Decision.{name} of {dtype} with one shape "
                f"[Q], Q at least {num_rows} (its rows), got {got.dtype} of {got.shape}"
            )
    return count


def _check_state(before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            "algorithm.step: expected a state of the structure that init returns, "
            f"{jax.tree.structure(before)}, got {jax.tree.structure(after)}"
        )
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"algorithm.step: expected a state like the one that init returns, "
                f"{old.dtype} of {old.shape}, got {new.dtype} of {new.shape}"
            )


def _as_arrays(state: Any) -> Any:
    return jax.tree.map(jnp.asarray, state)


def config_algorithms(
    config: EngineConfig,
) -> tuple[tuple[DecodingAlgorithm, int], ...]:
    """Return the algorithms of the config, each with its rows; beam search is first."""
    if not config.max_beam_width:
        return config.algorithms
    beams = _beam_search(config.max_num_stop_ids)
    return ((beams, config.max_beam_width), *config.algorithms)


@functools.cache
def _beam_search(num_stop_ids: int) -> DecodingAlgorithm:
    """Beam search for all requests: its parameters come with each request."""

    def init(num_rows: int) -> beam.BeamState:
        return beam.beam_state(
            num_rows,
            width=num_rows,
            max_tokens=1,
            length_penalty=1.0,
            early_stopping=False,
            stop_ids=(),
            num_stop_ids=num_stop_ids,
        )

    return DecodingAlgorithm(init, beam.step)


def init_states(config: EngineConfig) -> States:
    """Create the algorithms' states without any request."""

    def empty(algorithm: DecodingAlgorithm, num_rows: int) -> Any:
        one = jax.eval_shape(lambda: _as_arrays(algorithm.init(num_rows)))
        size = config.max_num_requests
        return jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), one)

    return tuple(empty(*pair) for pair in config_algorithms(config))


def insert_states(states: States, new: request_table.Submission) -> States:
    """Insert the states of new requests, at their leaders' sequence indices."""

    def put(kind: int, column: jax.Array, values: jax.Array) -> jax.Array:
        is_mine = (new.params.algorithms == kind) & (new.params.sampling.sample == 0)
        seq_indices = jnp.where(is_mine, new.seq_indices, column.shape[0])
        return column.at[seq_indices].set(values, mode="drop")

    return tuple(
        jax.tree.map(functools.partial(put, kind), old, fresh)
        for kind, (old, fresh) in enumerate(zip(states, new.states, strict=True))
    )


class Logits(NamedTuple):
    """The logits of a step, with their sequences."""

    values: jax.Array  # f32[S, V]
    seq_indices: jax.Array  # i32[S], the sequence of each row; R: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What changes while the requests decode one after the other."""

    table: RequestTable
    states: States
    parents: jax.Array  # i32[S], of the batch rows
    num_tokens: jax.Array  # i32[], generated for rows


def step_algorithms(
    table: RequestTable,
    states: States,
    rows: jax.Array,
    logits: Logits,
    step: jax.Array,
    config: EngineConfig,
) -> tuple[RequestTable, States, jax.Array, jax.Array]:
    """Run the step of each request's algorithm, and carry out its decision.

    Args:
      table: the request table.
      states: the algorithms' states.
      rows: i32[S], sequence index of each batch row.
      logits: the logits of the step.
      step: i32[], number of the step.
      config: the engine's config.

    Returns:
      The table; the states; i32[S], the parent of each row (the row that it continues,
      NO_BLOCK if it has ended); and i32[], the number of tokens generated for rows.
    """
    own = jnp.arange(rows.shape[0], dtype=jnp.int32)
    carry = _Carry(table, states, own, jnp.int32(0))
    for kind in range(len(config_algorithms(config))):
        leaders, count = _leaders(table, logits.seq_indices, kind)

        def body(
            i: jax.Array, carry: _Carry, kind: int = kind, leaders: jax.Array = leaders
        ) -> _Carry:
            return _step_one(carry, leaders[i], rows, logits, step, kind, config)

        def run(carry: _Carry, count: jax.Array = count, body: Any = body) -> _Carry:
            return lax.fori_loop(0, count, body, carry)

        carry = when(count > 0, run, carry)
    return carry.table, carry.states, carry.parents, carry.num_tokens


def _leaders(
    table: RequestTable, seq_indices: jax.Array, kind: int
) -> tuple[jax.Array, jax.Array]:
    """Leaders i32[S] of this algorithm's requests with logits, packed, and how many."""
    table_size = table.queue.status.shape[0]
    safe = jnp.minimum(seq_indices, table_size - 1)
    is_mine = (seq_indices < table_size) & (table.params.algorithms[safe] == kind)
    leaders = jnp.where(is_mine, table.queue.leaders[safe], table_size)
    has_logits = jnp.zeros((table_size,), jnp.bool_).at[leaders].set(True, mode="drop")
    (found,) = jnp.nonzero(has_logits, size=seq_indices.shape[0], fill_value=table_size)
    return found.astype(jnp.int32), jnp.sum(has_logits, dtype=jnp.int32)


def _members(table: RequestTable, leader: jax.Array, count: int) -> jax.Array:
    """Indices i32[Q] of a request's sequences by their number; R: not used."""
    table_size = table.queue.status.shape[0]
    status = table.queue.status
    is_mine = (table.queue.leaders == leader) & (
        (status == RUNNING) | (status == RETAINED)
    )
    at = jnp.where(is_mine, table.params.sampling.sample, count)
    members = jnp.full((count,), table_size, jnp.int32)
    return members.at[at].set(jnp.arange(table_size, dtype=jnp.int32), mode="drop")


def _step_one(
    carry: _Carry,
    leader: jax.Array,
    rows: jax.Array,
    logits: Logits,
    step: jax.Array,
    kind: int,
    config: EngineConfig,
) -> _Carry:
    """Run the algorithm's step for one request, and carry out its decision."""
    table, table_size = carry.table, config.max_num_requests
    algorithm, num_rows = config_algorithms(config)[kind]
    vocab_size = logits.values.shape[1]
    members = _members(table, leader, num_sequences(algorithm, num_rows, vocab_size))
    state = jax.tree.map(lambda column: column[leader], carry.states[kind])
    is_processed = config.logprobs_mode == "processed"
    keys, scores = _inputs(table, members[:num_rows], logits, is_processed)
    state, decision = algorithm.step(keys, scores, state)
    decision = dataclasses.replace(
        decision, parents=jnp.clip(decision.parents, 0, len(members) - 1)
    )
    table, gets_token = _apply(table, members, decision, step, config.num_logprobs)
    table, has_ended = _finish(table, members, num_rows)

    row_of = _row_of(rows, table_size)
    sources = row_of[members[decision.parents[:num_rows]]]
    own_rows = row_of[members[:num_rows]]
    states = list(carry.states)
    states[kind] = jax.tree.map(
        lambda column, value: column.at[leader].set(value), states[kind], state
    )
    return _Carry(
        table=table,
        states=tuple(states),
        parents=carry.parents.at[own_rows].set(
            jnp.where(has_ended, NO_BLOCK, sources), mode="drop"
        ),
        num_tokens=carry.num_tokens + jnp.sum(gets_token[:num_rows], dtype=jnp.int32),
    )


def _finish(
    table: RequestTable, members: jax.Array, num_rows: int
) -> tuple[RequestTable, jax.Array]:
    """Finish the request if all its rows have ended; also return which have, bool[W].

    If no token was allowed, the algorithm may not have filled all the sequences that it
    retains. These get a finish reason too.
    """
    table_size = table.queue.status.shape[0]
    seq_indices = members[:num_rows]
    is_used = seq_indices < table_size
    has_ended = ~is_used | table.queue.has_ended[jnp.where(is_used, seq_indices, 0)]
    at = jnp.where(jnp.all(has_ended), members, table_size)
    status = table.queue.status.at[at].set(FINISHED, mode="drop")
    queue = dataclasses.replace(table.queue, status=status)
    reasons = table.finish_reasons
    reason = reasons.at[at].get(mode="fill", fill_value=request_table.STOP)
    at = jnp.where(reason == request_table.NOT_FINISHED, at, table_size)
    reasons = reasons.at[at].set(request_table.DEAD_END, mode="drop")
    table = dataclasses.replace(table, queue=queue, finish_reasons=reasons)
    return table, has_ended


def _row_of(rows: jax.Array, table_size: int) -> jax.Array:
    """The batch row of each sequence, i32[R + 1]; S if it has none."""
    (num_rows,) = rows.shape
    seq_indices = jnp.where(rows == scheduler.NO_REQUEST, table_size, rows)
    row_of = jnp.full((table_size + 1,), num_rows, jnp.int32)
    row_of = row_of.at[seq_indices].set(jnp.arange(num_rows, dtype=jnp.int32))
    return row_of.at[table_size].set(num_rows)


def _inputs(
    table: RequestTable, seq_indices: jax.Array, logits: Logits, is_processed: bool
) -> tuple[jax.Array, jax.Array]:
    """Keys [W] and log-probabilities f32[W, V] of a request's rows.

    A row without logits in this step gets those of another row. With `is_processed`,
    the probabilities of the tokens that a constraint allows sum to 1.
    """
    table_size = table.queue.status.shape[0]
    order = jnp.arange(logits.seq_indices.shape[0], dtype=jnp.int32)
    index = jnp.zeros((table_size + 1,), jnp.int32).at[logits.seq_indices].set(order)
    values = logits.values[index[seq_indices]]
    values = values - jax.nn.logsumexp(values, axis=1, keepdims=True)
    is_used = seq_indices < table_size
    known = jnp.where(is_used, seq_indices, 0)
    states = table.automaton_states[known]
    values = request_table.constrain(table, known, states, is_used, values)
    if is_processed and table.automata is not None:
        total = jax.nn.logsumexp(values, axis=1, keepdims=True)
        values = jnp.where(total == -jnp.inf, values, values - total)

    leader = seq_indices[0]
    number = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)
    seeds = jnp.full(number.shape, table.params.sampling.seed[leader])
    # All running rows have the same length. Rows that have ended get new keys too,
    # because they may continue another row.
    length = jnp.max(jnp.where(is_used, table.queue.num_tokens[known], 0))
    return token_keys(seeds, number, jnp.full(number.shape, length)), values


def _apply(
    table: RequestTable,
    members: jax.Array,
    decision: Decision,
    step: jax.Array,
    num_logprobs: int,
) -> tuple[RequestTable, jax.Array]:
    """Apply a decision; also return which sequences got a token, bool[Q]."""
    table_size = table.queue.status.shape[0]
    parents = members[decision.parents]
    is_known = (members < table_size) & (parents < table_size)
    seq_indices = jnp.where(is_known, members, table_size)
    parents = jnp.where(is_known, parents, 0)
    had_ended = table.queue.has_ended[parents]
    is_moved = jnp.any(is_known & (seq_indices != parents))
    table = when(
        is_moved,
        lambda table: request_table.inherit(table, seq_indices, parents),
        table,
    )
    gets_token = is_known & ~had_ended
    new = SampledTokens.zeros(
        jnp.where(gets_token, seq_indices, table_size), num_logprobs
    )
    new = dataclasses.replace(new, tokens=decision.tokens, logprobs=decision.logprobs)
    table, ended = request_table.extend(table, new, step)
    # The reason of sequences that the algorithm itself ends is STOP.
    by_itself = jnp.where(
        decision.finished & ~ended & gets_token, seq_indices, table_size
    )
    reasons = table.finish_reasons.at[by_itself].set(request_table.STOP, mode="drop")
    at_end = jnp.where(decision.finished, members, table_size)
    queue = dataclasses.replace(
        table.queue,
        has_ended=table.queue.has_ended.at[at_end].set(True, mode="drop"),
    )
    return dataclasses.replace(table, queue=queue, finish_reasons=reasons), gets_token
