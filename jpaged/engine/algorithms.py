"""Algorithms: requests whose sequences decode together.

Pipeline: logits -> [algorithms] -> request table, and parents for one fork.

A decoding algorithm is written for one request. This module runs it for every request
whose batch rows have logits in the step. It stores the algorithm's state and carries
out its decisions: histories move as `parents` say, tokens are appended, sequences and
requests end. The engine then forks the blocks.

Shape symbols: R sequences of the request table, S batch rows, N rows of logits, G
requests that are batched, W rows and Q sequences of one request, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import scheduler
from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding.base import NO_TOKEN, Decision, has_context
from jpaged.decoding.sample import token_logprobs, top_logprobs
from jpaged.engine import request_table
from jpaged.engine.algorithm_checks import check_examples as check_examples
from jpaged.engine.algorithm_checks import num_sequences as num_sequences
from jpaged.engine.algorithm_inputs import DraftLogits as DraftLogits
from jpaged.engine.algorithm_inputs import GroupInputs, group_context, group_inputs
from jpaged.engine.algorithm_inputs import Logits as Logits
from jpaged.engine.algorithm_states import Parametrised, States
from jpaged.engine.algorithm_states import config_algorithms as config_algorithms
from jpaged.engine.algorithm_states import has_needs as has_needs
from jpaged.engine.algorithm_states import init_states as init_states
from jpaged.engine.algorithm_states import initial_state as initial_state
from jpaged.engine.algorithm_states import insert_states as insert_states
from jpaged.engine.algorithm_states import with_needs as with_needs
from jpaged.engine.request_table import RequestTable, SampledTokens
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import FINISHED, RETAINED, RUNNING

_ROWS = 8  # rows that decode at a time, if a request has fewer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What changes while groups of requests decode one after the other."""

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

    Requests of one algorithm are batched: as many at a time as have `_ROWS` rows.

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
    for kind, (algorithm, num_rows) in enumerate(config_algorithms(config)):
        if not has_needs(config, algorithm):
            continue  # none of its requests runs in this program
        size = max(1, min(_ROWS, rows.shape[0]) // num_rows)
        leaders, count = _leaders(table, logits.seq_indices, kind, size)

        def body(
            i: jax.Array,
            carry: _Carry,
            kind: int = kind,
            leaders: jax.Array = leaders,
            size: int = size,
        ) -> _Carry:
            mine = lax.dynamic_slice_in_dim(leaders, i * size, size)
            return _step_group(carry, mine, rows, logits, step, kind, config)

        def run(
            carry: _Carry,
            count: jax.Array = count,
            body: Any = body,
            size: int = size,
        ) -> _Carry:
            return lax.fori_loop(0, cdiv(count, size), body, carry)

        carry = when(count > 0, run, carry)
    return carry.table, carry.states, carry.parents, carry.num_tokens


def _leaders(
    table: RequestTable, seq_indices: jax.Array, kind: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Leaders of this algorithm's requests with logits, packed, and how many.

    They are padded with R so that slices of `size` never move.
    """
    table_size = table.queue.status.shape[0]
    safe = jnp.minimum(seq_indices, table_size - 1)
    is_mine = (seq_indices < table_size) & (table.params.algorithms[safe] == kind)
    leaders = jnp.where(is_mine, table.queue.leaders[safe], table_size)
    has_logits = jnp.zeros((table_size,), jnp.bool_).at[leaders].set(True, mode="drop")
    most = seq_indices.shape[0] + size - 1
    (found,) = jnp.nonzero(has_logits, size=most, fill_value=table_size)
    return found.astype(jnp.int32), jnp.sum(has_logits, dtype=jnp.int32)


def _members(table: RequestTable, leaders: jax.Array, count: int) -> jax.Array:
    """Indices i32[G, Q] of the requests' sequences by their number; R: not used."""
    table_size = table.queue.status.shape[0]
    status = table.queue.status
    is_live = (status == RUNNING) | (status == RETAINED)
    is_mine = (table.queue.leaders[None, :] == leaders[:, None]) & is_live[None, :]
    at = jnp.where(is_mine, table.params.sampling.sample[None, :], count)
    members = jnp.full((leaders.shape[0], count), table_size, jnp.int32)
    group = jnp.arange(leaders.shape[0], dtype=jnp.int32)[:, None]
    own = jnp.arange(table_size, dtype=jnp.int32)
    own = jnp.broadcast_to(own, at.shape)
    return members.at[group, at].set(own, mode="drop")


def _step_group(
    carry: _Carry,
    leaders: jax.Array,
    rows: jax.Array,
    logits: Logits,
    step: jax.Array,
    kind: int,
    config: EngineConfig,
) -> _Carry:
    """Run the algorithm's step for some requests, and carry out its decisions.

    `leaders` i32[G]: R is padding.
    """
    table, table_size = carry.table, config.max_num_requests
    algorithm, num_rows = config_algorithms(config)[kind]
    vocab_size = logits.values.shape[1]
    members = _members(table, leaders, num_sequences(algorithm, num_rows, vocab_size))
    safe = jnp.minimum(leaders, table_size - 1)
    state = jax.tree.map(lambda column: column[safe], carry.states[kind])
    parameters: dict[str, jax.Array] = {}
    if isinstance(state, Parametrised):
        state, parameters = state
    inputs = group_inputs(table, members[:, :num_rows], logits, config)
    context: tuple[Any, ...] = ()
    if has_context(algorithm):
        context = (group_context(algorithm, parameters, table, inputs, logits, config),)
    state, decision = jax.vmap(algorithm.step)(
        inputs.keys, inputs.scores, state, *context
    )
    if getattr(algorithm, "keeps_rows", False):
        own = jnp.arange(members.shape[1], dtype=jnp.int32)[None, :]
        parents = jnp.broadcast_to(own, members.shape)
        decision = dataclasses.replace(decision, parents=parents)
    # Beam search, which is the engine's own, makes no faulty decision.
    is_own = kind == 0 and config.max_beam_width > 0
    is_faulty = None
    if not is_own or config.processors:
        is_faulty = _is_faulty(table, members, decision, inputs)
    decision = _valid(decision, is_faulty)
    table, gets_token = _apply(table, members, decision, inputs, step, config)
    if is_faulty is not None:
        table = _end_faulty(table, carry.table, members, is_faulty, num_rows)
    table, has_ended = _finish(table, members, num_rows)

    row_of = _row_of(rows, table_size)
    parents = jnp.take_along_axis(members, decision.parents[:, :num_rows], axis=1)
    own_rows = row_of[members[:, :num_rows]]
    if parameters:
        state = Parametrised(state, parameters)
    states = list(carry.states)
    states[kind] = jax.tree.map(
        lambda column, value: column.at[leaders].set(value, mode="drop"),
        states[kind],
        state,
    )
    return _Carry(
        table=table,
        states=tuple(states),
        parents=carry.parents.at[own_rows].set(
            jnp.where(has_ended, NO_BLOCK, row_of[parents]), mode="drop"
        ),
        num_tokens=carry.num_tokens
        + jnp.sum(gets_token[:, :num_rows], dtype=jnp.int32),
    )


def _is_faulty(
    table: RequestTable,
    members: jax.Array,
    decision: Decision,
    inputs: GroupInputs,
) -> jax.Array:
    """bool[G]: requests that cannot continue.

    Their decision has a token or a parent that does not exist, or their logits
    processors have returned NaN. Tokens of sequences that have ended are not checked.
    """
    table_size, count = table.queue.status.shape[0], members.shape[1]
    vocab_size = inputs.raw.shape[-1]
    is_known = members < table_size
    parents = jnp.clip(decision.parents, 0, count - 1)
    is_wrong = (decision.parents != parents) & is_known
    above = jnp.take_along_axis(members, parents, axis=1)
    is_open = is_known & (above < table_size)
    is_open &= ~table.queue.has_ended[jnp.where(above < table_size, above, 0)]
    is_token = (decision.tokens >= NO_TOKEN) & (decision.tokens < vocab_size)
    is_wrong |= is_open & ~is_token
    found = jnp.any(is_wrong, axis=1)
    if inputs.processed is not None:
        is_nan = inputs.processed.is_faulty.reshape(inputs.known.shape)
        is_row = is_known[:, : is_nan.shape[1]]
        is_row &= ~table.queue.has_ended[inputs.known]
        found |= jnp.any(is_nan & is_row, axis=1)
    return found


def _valid(decision: Decision, is_faulty: jax.Array | None) -> Decision:
    """Return decisions [G, Q] in which a faulty one ends all its sequences."""
    tokens, parents, finished = decision.tokens, decision.parents, decision.finished
    if is_faulty is not None:
        own = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        tokens = jnp.where(is_faulty[:, None], NO_TOKEN, tokens)
        parents = jnp.where(is_faulty[:, None], own, parents)
    return dataclasses.replace(
        decision,
        tokens=tokens,
        parents=jnp.clip(parents, 0, tokens.shape[1] - 1),
        finished=finished | (tokens < 0),
    )


def _end_faulty(
    table: RequestTable,
    before: RequestTable,
    members: jax.Array,
    is_faulty: jax.Array,
    num_rows: int,
) -> RequestTable:
    """Set the finish reason of the sequences that a faulty decision has ended.

    Rows that had ended before keep their reason.
    """
    table_size = table.queue.status.shape[0]
    is_retained = jnp.arange(members.shape[1], dtype=jnp.int32)[None, :] >= num_rows
    had_reason = before.finish_reasons.at[members].get(
        mode="fill", fill_value=request_table.STOP
    )
    is_first = is_retained | (had_reason == request_table.NOT_FINISHED)
    at = jnp.where(is_faulty[:, None] & is_first, members, table_size)
    reasons = table.finish_reasons.at[at].set(request_table.ERROR, mode="drop")
    return dataclasses.replace(table, finish_reasons=reasons)


def _finish(
    table: RequestTable, members: jax.Array, num_rows: int
) -> tuple[RequestTable, jax.Array]:
    """Finish requests of which all rows have ended; also return which rows, bool[G, W].

    If no token was allowed, the algorithm may not have filled all the sequences that it
    retains. These get a finish reason too.
    """
    table_size = table.queue.status.shape[0]
    seq_indices = members[:, :num_rows]
    is_used = seq_indices < table_size
    has_ended = ~is_used | table.queue.has_ended[jnp.where(is_used, seq_indices, 0)]
    is_over = jnp.all(has_ended, axis=1, keepdims=True)
    at = jnp.where(is_over, members, table_size)
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


def _apply(
    table: RequestTable,
    members: jax.Array,
    decision: Decision,
    inputs: GroupInputs,
    step: jax.Array,
    config: EngineConfig,
) -> tuple[RequestTable, jax.Array]:
    """Apply decisions; also return which sequences got a token, bool[G, Q]."""
    table_size, shape = table.queue.status.shape[0], members.shape
    parents = jnp.take_along_axis(members, decision.parents, axis=1)
    sources = _source_rows(decision, inputs).reshape(-1)
    decision = jax.tree.map(lambda array: array.reshape(-1), decision)
    members, parents = members.reshape(-1), parents.reshape(-1)
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
    is_open = is_known & ~had_ended
    gets_token = is_open & (decision.tokens >= 0)
    at = jnp.where(gets_token, seq_indices, table_size)
    new = _new_tokens(at, decision, sources, inputs, config)
    table, ended = request_table.extend(table, new, step)
    # The reason of sequences that the algorithm itself ends is STOP. A copy without a
    # token ends at the limit if a token of the same step would.
    position = table.queue.num_tokens[jnp.where(is_known, seq_indices, 0)]
    limit = table.params.token_limits[jnp.where(is_known, seq_indices, 0)]
    is_full = (decision.tokens < 0) & (position + 1 >= limit)
    by_itself = jnp.where(decision.finished & ~ended & is_open, seq_indices, table_size)
    reason = jnp.where(is_full, request_table.LENGTH, request_table.STOP)
    reasons = table.finish_reasons.at[by_itself].set(reason, mode="drop")
    at_end = jnp.where(decision.finished, members, table_size)
    queue = dataclasses.replace(
        table.queue,
        has_ended=table.queue.has_ended.at[at_end].set(True, mode="drop"),
    )
    table = dataclasses.replace(table, queue=queue, finish_reasons=reasons)
    return table, gets_token.reshape(shape)


def _source_rows(decision: Decision, inputs: GroupInputs) -> jax.Array:
    """Rows i32[G, Q] of all rows [G * W] whose logits the tokens come from."""
    num_groups, num_rows = inputs.known.shape
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    return group * num_rows + jnp.minimum(decision.parents, num_rows - 1)


def _new_tokens(
    at: jax.Array,
    decision: Decision,
    sources: jax.Array,
    inputs: GroupInputs,
    config: EngineConfig,
) -> SampledTokens:
    """The tokens of a decision, with what the request table keeps of each."""
    new = SampledTokens.zeros(at, config.num_logprobs)
    new = dataclasses.replace(new, tokens=decision.tokens, logprobs=decision.logprobs)
    tokens = jnp.maximum(decision.tokens, 0)
    if config.num_logprobs:
        raw = inputs.raw.reshape(-1, inputs.raw.shape[-1])
        values, ids = top_logprobs(raw, config.num_logprobs)
        _, ranks = token_logprobs(raw[sources], tokens)
        new = dataclasses.replace(
            new, top_logprobs=values[sources], top_ids=ids[sources], ranks=ranks
        )
    if inputs.processed is not None:
        states = inputs.processed.of_rows(sources).next_states(tokens)
        new = dataclasses.replace(new, processor_states=states)
    return new
