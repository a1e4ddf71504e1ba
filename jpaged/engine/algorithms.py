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
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import scheduler
from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding import beam
from jpaged.decoding.base import (
    Context,
    Decision,
    DecodingAlgorithm,
    has_context,
    parameters_of,
)
from jpaged.decoding.sample import token_keys, token_logprobs, top_logprobs
from jpaged.engine import request_table
from jpaged.engine.processing import Processing
from jpaged.engine.request_table import RequestTable, SampledTokens
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import FINISHED, RETAINED, RUNNING

# For each algorithm the states of all requests, [R, ...]: a request's state is stored
# at the sequence index of its leader.
States = tuple[Any, ...]
_LENGTH = 16  # tokens of sequences in checks
_ROWS = 8  # rows that decode at a time, if a request has fewer


class DraftLogits(NamedTuple):
    """Logits of the draft model, which has other rows than the step."""

    values: jax.Array  # f32[N, V]
    seq_indices: jax.Array  # i32[N], the sequence of each row; R: none


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
    context = ()
    if has_context(algorithm):
        context = (_abstract_context(algorithm, num_rows, vocab_size),)
    after, decision = jax.eval_shape(algorithm.step, keys, logits, before, *context)
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


def _abstract_context(algorithm: Any, num_rows: int, vocab_size: int) -> Context:
    """The shapes of a context."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    number, needs = array(num_rows), algorithm.needs
    layers = array(len(algorithm.layers), num_rows, vocab_size, dtype=jnp.float32)
    hidden = array(num_rows, algorithm.hidden_size, dtype=jnp.float32)
    return Context(
        parameters={
            name: array(*shape, dtype=dtype) for name, shape, dtype in algorithm.specs
        },
        prompt_lens=number,
        num_tokens=number,
        limits=number,
        tokens=array(num_rows, _LENGTH) if "history" in needs else None,
        hidden=hidden if "hidden" in needs else None,
        layers=layers if "layers" in needs else None,
        draft=(
            array(num_rows, vocab_size, dtype=jnp.float32) if "draft" in needs else None
        ),
    )


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


def with_needs(config: EngineConfig) -> EngineConfig:
    """Return the config with what its algorithms need of the decoder."""
    needs = [one for one, _ in config.algorithms if hasattr(one, "needs")]
    hidden = any("hidden" in one.needs for one in needs)
    layers = sorted({layer for one in needs for layer in one.layers})
    return dataclasses.replace(
        config,
        seen_hidden=hidden,
        seen_layers=tuple(layers),
        seen_draft=any("draft" in one.needs for one in needs),
    )


def has_needs(config: EngineConfig, algorithm: Any) -> bool:
    """Whether a program of this config computes what an algorithm needs."""
    needs = getattr(algorithm, "needs", ())
    layers = getattr(algorithm, "layers", ())
    return (
        (config.seen_hidden or "hidden" not in needs)
        and (config.seen_draft or "draft" not in needs)
        and set(layers) <= set(config.seen_layers)
    )


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


class Parametrised(NamedTuple):
    """The state of an algorithm with parameters."""

    state: Any
    parameters: dict[str, Any]


def initial_state(
    algorithm: Any, num_rows: int, parameters: Mapping[str, Any] | None = None
) -> Any:
    """Return what the engine keeps of a new request's algorithm.

    Args:
      algorithm: the algorithm.
      num_rows: rows of the request.
      parameters: the request's values of some of the algorithm's parameters.
    """
    state = _as_arrays(algorithm.init(num_rows))
    if not getattr(algorithm, "specs", ()):
        return state
    return Parametrised(state, parameters_of(algorithm, parameters))


def init_states(config: EngineConfig) -> States:
    """Create the algorithms' states without any request."""

    def empty(algorithm: DecodingAlgorithm, num_rows: int) -> Any:
        one = jax.eval_shape(lambda: initial_state(algorithm, num_rows))
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
    """The logits of a step, with their sequences and what else algorithms need."""

    values: jax.Array  # f32[N, V]
    seq_indices: jax.Array  # i32[N], the sequence of each row; R: none
    hidden: jax.Array | None = None  # [N, E]
    layers: tuple[jax.Array, ...] = ()  # f32[N, V] each, of the config's `seen_layers`
    draft: DraftLogits | None = None


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
    inputs = _inputs(table, members[:, :num_rows], logits, config)
    context: tuple[Any, ...] = ()
    if has_context(algorithm):
        context = (_context(algorithm, parameters, table, inputs, logits, config),)
    state, decision = jax.vmap(algorithm.step)(
        inputs.keys, inputs.scores, state, *context
    )
    if getattr(algorithm, "keeps_rows", False):
        own = jnp.arange(members.shape[1], dtype=jnp.int32)[None, :]
        parents = jnp.broadcast_to(own, members.shape)
        decision = dataclasses.replace(decision, parents=parents)
    decision = dataclasses.replace(
        decision,
        parents=jnp.clip(decision.parents, 0, members.shape[1] - 1),
        finished=decision.finished | (decision.tokens < 0),
    )
    table, gets_token = _apply(table, members, decision, inputs, step, config)
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


class _Inputs(NamedTuple):
    """What the step of G requests gets, and what their decisions need."""

    keys: jax.Array  # key[G, W]
    scores: jax.Array  # f32[G, W, V], log-probabilities after rules and processors
    raw: jax.Array  # f32[G, W, V], the model's
    entries: jax.Array  # i32[G, W], row of the step's logits
    known: jax.Array  # i32[G, W], sequence index, 0 for unused rows
    processed: Processing | None


def _inputs(
    table: RequestTable, seq_indices: jax.Array, logits: Logits, config: EngineConfig
) -> _Inputs:
    """Keys and log-probabilities of the rows `seq_indices` i32[G, W].

    A row without logits in this step gets those of another row. With processed
    log-probabilities, the probabilities of the tokens that are allowed sum to 1.
    """
    table_size, (num_groups, num_rows) = table.queue.status.shape[0], seq_indices.shape
    index = _rows_of(logits.seq_indices, table_size)[seq_indices]
    raw = logits.values[index.reshape(-1)]
    raw = raw - jax.nn.logsumexp(raw, axis=1, keepdims=True)
    is_used = seq_indices < table_size
    known = jnp.where(is_used, seq_indices, 0)
    flat, flat_used = known.reshape(-1), is_used.reshape(-1)
    states = table.automaton_states[flat]
    values = request_table.constrain(table, flat, states, flat_used, raw)

    number = jnp.tile(jnp.arange(num_rows, dtype=jnp.int32), num_groups)
    seeds = jnp.repeat(table.params.sampling.seed[known[:, 0]], num_rows)
    # All running rows have the same length. Rows that have ended get new keys too,
    # because they may continue another row.
    lengths = jnp.max(
        jnp.where(is_used, table.queue.num_tokens[known], 0), axis=1, keepdims=True
    )
    lengths = jnp.broadcast_to(lengths, seq_indices.shape).reshape(-1)
    keys, processed = token_keys(seeds, number, lengths), None
    if config.processors and table.params.processors is not None:
        # Log-probabilities have no temperature.
        processed = request_table.process(
            table,
            flat,
            flat_used,
            values,
            config,
            num_tokens=table.queue.num_tokens[flat],
            keys=keys,
            temperature=jnp.zeros(flat.shape, jnp.float32),
            states=jax.tree.map(lambda x: x[flat], table.processor_states),
        )
        values = processed.logits
    if config.logprobs_mode == "processed" and values is not raw:
        total = jax.nn.logsumexp(values, axis=1, keepdims=True)
        values = jnp.where(total == -jnp.inf, values, values - total)

    def grouped(array: jax.Array) -> jax.Array:
        return array.reshape(num_groups, num_rows, *array.shape[1:])

    return _Inputs(
        grouped(keys), grouped(values), grouped(raw), index, known, processed
    )


def _context(
    algorithm: Any,
    parameters: dict[str, jax.Array],
    table: RequestTable,
    inputs: _Inputs,
    logits: Logits,
    config: EngineConfig,
) -> Context:
    """What the algorithm needs beside the logits, with the axes [G, W]."""
    vocab_size, needs = logits.values.shape[1], algorithm.needs
    num_tokens = table.queue.num_tokens[inputs.known]
    tokens = hidden = layers = draft = None
    if "history" in needs:
        tokens = table.tokens[inputs.known]
        index = jnp.arange(tokens.shape[-1], dtype=jnp.int32)[None, None, :]
        tokens = jnp.where(index < num_tokens[..., None], tokens, vocab_size)
    if "hidden" in needs:
        assert logits.hidden is not None
        hidden = logits.hidden[inputs.entries]
    if "layers" in needs:
        known = dict(zip(config.seen_layers, logits.layers, strict=True))
        layers = jnp.stack(
            [known[layer][inputs.entries] for layer in algorithm.layers], axis=1
        )
    if "draft" in needs and logits.draft is not None:
        values, seq_indices = logits.draft
        at = _rows_of(seq_indices, table.queue.status.shape[0])[inputs.known]
        draft = jax.nn.log_softmax(values[at], axis=-1)
    return Context(
        parameters=parameters,
        prompt_lens=table.queue.prompt_lens[inputs.known],
        num_tokens=num_tokens,
        limits=table.params.token_limits[inputs.known],
        tokens=tokens,
        hidden=hidden,
        layers=layers,
        draft=draft,
    )


def _rows_of(seq_indices: jax.Array, table_size: int) -> jax.Array:
    """The row i32[R + 1] of each sequence among `seq_indices`; 0 if it has none."""
    order = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)
    return jnp.zeros((table_size + 1,), jnp.int32).at[seq_indices].set(order)


def _apply(
    table: RequestTable,
    members: jax.Array,
    decision: Decision,
    inputs: _Inputs,
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


def _source_rows(decision: Decision, inputs: _Inputs) -> jax.Array:
    """Rows i32[G, Q] of all rows [G * W] whose logits the tokens come from."""
    num_groups, num_rows = inputs.known.shape
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    return group * num_rows + jnp.minimum(decision.parents, num_rows - 1)


def _new_tokens(
    at: jax.Array,
    decision: Decision,
    sources: jax.Array,
    inputs: _Inputs,
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
