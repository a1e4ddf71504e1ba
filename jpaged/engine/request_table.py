"""Request table: everything the engine knows about each sequence, as arrays.

Pipeline: user's requests -> [request_table] -> scheduler, decoding.

A request occupies one row of the table (a sequence index) for each of its sequences:
one for each sample, or one for each row of its decoding algorithm, followed by the
sequences that the algorithm retains. All sequences of a request have the same arrival
number, and their leader is the request's first sequence. `params.sampling.sample` is
the number of a sequence in its request, from 0.

Shape symbols: R sequences of the table, L tokens of the longest sequence, E stop ids,
C most likely tokens that are kept for each position, W words of a mask over the
vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpaged import scheduler
from jpaged.compat import ordered
from jpaged.config import EngineConfig
from jpaged.decoding import constraints
from jpaged.decoding.constraints import Automata, AutomataSizes
from jpaged.decoding.processors import Row
from jpaged.decoding.rule_arrays import LogitsRules
from jpaged.decoding.sample import SamplingRows
from jpaged.engine import processing
from jpaged.engine.processing import ChainStates, Processing, ProcessorRows
from jpaged.indexing import last_positions, put, take
from jpaged.scheduler import Queue

# Why a sequence ended, and the names that results have for it.
NOT_FINISHED, STOP, LENGTH, ABORT, DEAD_END, ERROR = range(6)
FINISH_REASONS = (None, "stop", "length", "abort", "dead_end", "error")
NEVER = -1
NO_INDEX = -1  # of a sequence
NO_ALGORITHM = -1
NO_OUTPUT = -1  # like every number below 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceParams:
    """Parameters of each sequence, set at submission and never changed."""

    token_limits: jax.Array  # i32[R], number of tokens at which the sequence ends
    stop_ids: jax.Array  # i32[R, E], padded with -1
    algorithms: jax.Array  # i32[R], index in the config's; NO_ALGORITHM: sampling
    outputs: jax.Array  # i32[R], number of the request's output; below 0: no output
    is_prefix: jax.Array  # bool[R], a pinned prefix, which other sequences map
    keeps_prompt_logprobs: jax.Array  # bool[R], also keeps its prompt's logprobs
    sampling: SamplingRows  # arrays of shape [R]
    rules: LogitsRules | None  # arrays of shape [R, ...]; None if the config has none
    automata: jax.Array  # i32[R], index in the table's pool, or UNCONSTRAINED
    processors: ProcessorRows | None  # None if the config has none
    retention: jax.Array | None = None  # f32[R, C], of the config's method, if any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestTable:
    """All sequences that are waiting, running, or finished and not yet released.

    A program that does not use a feature gets None for its arrays (`features`).
    """

    queue: Queue  # the columns that the scheduler reads
    params: SequenceParams
    automata: Automata  # the pool of A automata that `params.automata` points into
    digests: jax.Array  # u32[A, 4], which automata are in the pool
    automaton_states: jax.Array  # i32[R], state after the sequence's last token
    processor_states: ChainStates | None  # [R, ...], after the sequence's last token
    tokens: jax.Array  # i32[R, L], prompt and generated tokens
    logprobs: jax.Array  # f32[R, L], raw; of prompt tokens only if they are kept
    ranks: jax.Array  # i32[R, L], 1: the most likely token; [R, 0] if C is 0
    top_ids: jax.Array | None  # i32[R, L, C]
    top_logprobs: jax.Array  # f32[R, L, C]
    masks: jax.Array  # u32[R, L, W], tokens that could be sampled (`bit_masks`)
    finish_reasons: jax.Array  # i32[R]
    first_steps: jax.Array  # i32[R], step of the first generated token, or NEVER
    last_steps: jax.Array  # i32[R], step of the last generated token, or NEVER
    is_stale: jax.Array  # bool[R], may have keys and values of older weights
    # i32[R], tokens that retention has dropped of the sequence; None without a method
    num_dropped: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Submission:
    """B new sequences to insert into the table; index R marks padding."""

    seq_indices: jax.Array  # i32[B]
    queue: dict[str, Any]  # columns of Queue [B]; missing ones get defaults
    tokens: jax.Array  # i32[B, L]
    params: SequenceParams  # arrays of shape [B, ...]
    states: Any  # states of the config's algorithms (`algorithms`), [B, ...]
    processor_states: ChainStates | None = None  # [B, ...]


def init_table(config: EngineConfig) -> RequestTable:
    """Create a table in which every sequence index is empty."""
    table_size, length = config.max_num_requests, config.max_model_len
    kept = config.num_logprobs
    sizes = AutomataSizes() if config.automata is None else config.automata
    rules = None
    if config.rules is not None:
        rules = LogitsRules.none(table_size, config.rules)
    own_processors, processor_states = processing.init_rows(config)

    def full(
        *shape: int, value: int | float = 0, dtype: DTypeLike = jnp.int32
    ) -> jax.Array:
        return jnp.full((table_size, *shape), value, dtype)

    return RequestTable(
        queue=scheduler.init_queue(table_size, config.has_attributes),
        params=SequenceParams(
            token_limits=full(),
            stop_ids=full(config.max_num_stop_ids, value=-1),
            algorithms=full(value=NO_ALGORITHM),
            outputs=full(value=NO_OUTPUT),
            is_prefix=full(dtype=jnp.bool_),
            keeps_prompt_logprobs=full(dtype=jnp.bool_),
            sampling=SamplingRows.greedy(table_size),
            rules=rules,
            automata=full(value=constraints.UNCONSTRAINED),
            processors=own_processors,
            retention=None
            if config.retention is None
            else full(len(config.retention.names), dtype=jnp.float32),
        ),
        automata=jax.tree.map(jnp.asarray, constraints.pool([], sizes)),
        digests=jnp.zeros((sizes.num_automata, 4), jnp.uint32),
        automaton_states=full(),
        processor_states=processor_states,
        tokens=full(length),
        logprobs=full(length, dtype=jnp.float32),
        ranks=full(length if kept else 0),
        top_ids=full(length, kept),
        top_logprobs=full(length, kept, dtype=jnp.float32),
        masks=full(length, config.num_mask_words, dtype=jnp.uint32),
        finish_reasons=full(),
        first_steps=full(value=NEVER),
        last_steps=full(value=NEVER),
        is_stale=full(dtype=jnp.bool_),
        num_dropped=None if config.retention is None else full(),
    )


def put_automaton(
    table: RequestTable, index: jax.Array, one: Automata, digest: jax.Array
) -> RequestTable:
    """Write the only automaton of the pool `one` into the table's pool at `index`."""
    return dataclasses.replace(
        table,
        automata=jax.tree.map(lambda a, b: a.at[index].set(b[0]), table.automata, one),
        digests=table.digests.at[index].set(digest),
    )


def insert_sequences(table: RequestTable, new: Submission) -> RequestTable:
    """Insert new sequences at their sequence indices."""

    entry = last_positions(new.seq_indices, table.tokens.shape[0])

    def write(column: jax.Array, values: Any) -> jax.Array:
        if column.ndim > 1:
            return put(column, new.seq_indices, values)
        is_scalar = jnp.ndim(values) == 0
        values = values if is_scalar else take(jnp.asarray(values), entry)
        return jnp.where(entry >= 0, values, column).astype(column.dtype)

    defaults = {"has_ended": False, "num_preemptions": 0, "num_cached": 0}
    given = defaults | new.queue
    attributes = new.queue.get("attributes")
    if attributes is not None:
        known = scheduler.known_user_tokens(table.queue, attributes.users)
        given["attributes"] = dataclasses.replace(attributes, user_tokens=known)
    columns = {
        name: jax.tree.map(write, getattr(table.queue, name), values)
        for name, values in given.items()
    }
    return dataclasses.replace(
        table,
        queue=dataclasses.replace(table.queue, **columns),
        params=jax.tree.map(write, table.params, new.params),
        automaton_states=write(table.automaton_states, 0),
        processor_states=jax.tree.map(
            write, table.processor_states, new.processor_states
        ),
        tokens=write(table.tokens, new.tokens),
        finish_reasons=write(table.finish_reasons, NOT_FINISHED),
        first_steps=write(table.first_steps, NEVER),
        last_steps=write(table.last_steps, NEVER),
        is_stale=write(table.is_stale, False),
        num_dropped=jax.tree.map(lambda column: write(column, 0), table.num_dropped),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """Tokens that decoding generated in a step, S of them; index R marks padding."""

    seq_indices: jax.Array  # i32[S], the sequence that gets the token
    tokens: jax.Array  # i32[S]
    logprobs: jax.Array  # f32[S]
    ranks: jax.Array  # i32[S], meaningful if C is above 0
    top_ids: jax.Array  # i32[S, C]
    top_logprobs: jax.Array  # f32[S, C]
    masks: jax.Array  # u32[S, W]
    is_dead_end: jax.Array  # bool[S], no token is allowed: the sequence ends without
    processor_states: ChainStates = ()  # [S, ...], after the token; (): no change
    # bool[S], dead ends because a processor returned NaN; None without processors
    is_faulty: jax.Array | None = None

    @classmethod
    def zeros(
        cls, seq_indices: jax.Array, num_logprobs: int, num_mask_words: int = 0
    ) -> SampledTokens:
        """Token 0 for each of `seq_indices`, i32[S]."""
        (size,) = seq_indices.shape
        return cls(
            seq_indices=seq_indices,
            tokens=jnp.zeros((size,), jnp.int32),
            logprobs=jnp.zeros((size,), jnp.float32),
            ranks=jnp.zeros((size,), jnp.int32),
            top_ids=jnp.zeros((size, num_logprobs), jnp.int32),
            top_logprobs=jnp.zeros((size, num_logprobs), jnp.float32),
            masks=jnp.zeros((size, num_mask_words), jnp.uint32),
            is_dead_end=jnp.zeros((size,), jnp.bool_),
        )


def extend(
    table: RequestTable, new: SampledTokens, step: jax.Array
) -> tuple[RequestTable, jax.Array]:
    """Append the new tokens to their sequences.

    A sequence ends at one of its stop ids, at its token limit, or if no token is
    allowed. A sampled sequence is then finished. A sequence of an algorithm stays in
    the table until all sequences of its request have ended.

    Args:
      table: the request table.
      new: at most one token for each sequence.
      step: i32[], number of the step.

    Returns:
      The table, and bool[S]: which of `new.seq_indices` have ended.
    """
    table_size, _ = table.tokens.shape
    queue, params = table.queue, table.params
    valid = new.seq_indices < table_size
    safe = jnp.where(valid, new.seq_indices, 0)
    position = take(queue.num_tokens, safe)
    is_stop = jnp.any(take(params.stop_ids, safe) == new.tokens[:, None], axis=1)
    is_full = position + 1 >= take(params.token_limits, safe)
    ended = valid & (is_stop | is_full | new.is_dead_end)
    reason = jnp.where(is_stop, STOP, LENGTH)
    reason = jnp.where(new.is_dead_end, DEAD_END, reason)
    if new.is_faulty is not None:
        reason = jnp.where(new.is_faulty, ERROR, reason)
    valid &= ~new.is_dead_end
    # `sharing.reassign_sources` reads all tokens in a loop.
    seq_indices = ordered(jnp.where(valid, new.seq_indices, NO_INDEX), queue.sources)

    # Columns are selected instead of written: on CPUs, a write at indices is a loop.
    entry = last_positions(new.seq_indices, table_size)
    has_entry = entry >= 0
    gains = has_entry & take(valid, entry)
    ends = has_entry & take(ended, entry)
    is_first = gains & (queue.num_tokens == queue.prompt_lens)
    is_finished = ends & (params.algorithms == NO_ALGORITHM)

    def write(column: Any, values: jax.Array) -> jax.Array:
        return put(column, (seq_indices, position), values)

    table = dataclasses.replace(
        table,
        queue=dataclasses.replace(
            queue,
            status=jnp.where(is_finished, scheduler.FINISHED, queue.status),
            has_ended=queue.has_ended | ends,
            num_tokens=queue.num_tokens + gains.astype(jnp.int32),
        ),
        tokens=write(table.tokens, new.tokens),
        logprobs=write(table.logprobs, new.logprobs),
        finish_reasons=jnp.where(ends, take(reason, entry), table.finish_reasons),
        first_steps=jnp.where(is_first, step, table.first_steps),
        last_steps=jnp.where(gains, step, table.last_steps),
    )
    if table.automata is not None:
        states = next_automaton_states(table, safe, new.tokens)
        states = jnp.where(gains, take(states, entry), table.automaton_states)
        table = dataclasses.replace(table, automaton_states=states)
    if new.top_ids.shape[1]:
        table = dataclasses.replace(
            table,
            ranks=write(table.ranks, new.ranks),
            top_ids=write(table.top_ids, new.top_ids),
            top_logprobs=write(table.top_logprobs, new.top_logprobs),
        )
    if new.masks.shape[1]:
        table = dataclasses.replace(table, masks=write(table.masks, new.masks))
    if new.processor_states:
        table = put_processor_states(table, seq_indices, new.processor_states)
    return table, ended


def put_processor_states(
    table: RequestTable, seq_indices: jax.Array, states: ChainStates
) -> RequestTable:
    """Write the states [S, ...] of processors at `seq_indices` i32[S]."""

    def write(column: jax.Array, values: jax.Array) -> jax.Array:
        return put(column, seq_indices, values)

    return dataclasses.replace(
        table, processor_states=jax.tree.map(write, table.processor_states, states)
    )


def inherit(
    table: RequestTable, seq_indices: jax.Array, parents: jax.Array
) -> RequestTable:
    """Copy the histories of `parents` to `seq_indices`, all at once.

    Args:
      table: the request table.
      seq_indices: i32[Q], sequences that continue their parents; R is padding.
      parents: i32[Q], sequence indices.
    """

    def move(column: Any) -> Any:
        if column is None:
            return None
        return put(column, seq_indices, take(column, parents))

    queue = dataclasses.replace(
        table.queue,
        num_tokens=move(table.queue.num_tokens),
        has_ended=move(table.queue.has_ended),
    )
    return dataclasses.replace(
        table,
        queue=queue,
        automaton_states=move(table.automaton_states),
        processor_states=jax.tree.map(move, table.processor_states),
        tokens=move(table.tokens),
        logprobs=move(table.logprobs),
        ranks=move(table.ranks),
        top_ids=move(table.top_ids),
        top_logprobs=move(table.top_logprobs),
        finish_reasons=move(table.finish_reasons),
        first_steps=move(table.first_steps),
        last_steps=move(table.last_steps),
    )


def next_automaton_states(
    table: RequestTable, seq_indices: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Automaton states i32[S] of `seq_indices` i32[S] after `tokens` i32[S]."""
    states = take(table.automaton_states, seq_indices)
    if table.automata is None:
        return states
    return constraints.next_states(
        table.automata,
        take(table.params.automata, seq_indices),
        states,
        tokens,
    )


def constrain(
    table: RequestTable,
    seq_indices: jax.Array,
    states: jax.Array,
    valid: jax.Array,
    logits: jax.Array,
) -> jax.Array:
    """Set logits of tokens that structured output does not allow to -inf.

    Args:
      table: the request table, with the automata.
      seq_indices: i32[S], the sequences.
      states: i32[S], states of their automata.
      valid: bool[S]; other rows stay unchanged.
      logits: f32[S, V], for the sequences' next tokens.
    """
    if table.automata is None or not table.digests.shape[0]:
        return logits
    index = jnp.where(
        valid, take(table.params.automata, seq_indices), constraints.UNCONSTRAINED
    )
    return jax.lax.cond(
        jnp.any(index != constraints.UNCONSTRAINED),
        lambda logits: constraints.mask(logits, table.automata, index, states),
        lambda logits: logits,
        logits,
    )


def process(
    table: RequestTable,
    seq_indices: jax.Array,
    valid: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
    *,
    num_tokens: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    states: ChainStates,
) -> Processing:
    """Apply the logits processors of sequences to the logits of their next tokens.

    Args:
      table: the request table, of a config with processors.
      seq_indices: i32[S], the sequences.
      valid: bool[S]; other rows stay unchanged.
      logits: f32[S, V].
      config: the engine's config.
      num_tokens: i32[S], tokens before the next one.
      keys: key[S], of the next token.
      temperature: f32[S], see `processing.process`.
      states: of the sequences' processors, [S, ...].
    """
    mine = jax.tree.map(lambda x: x[seq_indices], table.params.processors)
    chains = jnp.where(valid, mine.chains, processing.NO_CHAIN)
    rows = Row(
        tokens=table.tokens[seq_indices],
        prompt_len=table.queue.prompt_lens[seq_indices],
        num_tokens=num_tokens,
        key=keys,
    )
    mine = dataclasses.replace(mine, chains=chains)
    return processing.process(config, mine, states, rows, logits, temperature)
