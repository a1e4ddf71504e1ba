"""Request table: what the engine knows of each sequence, as arrays.

Place on the road: user's requests -> [request_table] -> scheduler, decoding.

A request takes a place for each of its sequences: its samples, or the rows of its
decoding algorithm and behind them the sequences that the algorithm holds. They share
the arrival and name the first of them as their leader; `sampling.sample` numbers them.
Letters: R places, L tokens of the longest sequence, E stop ids, C most likely tokens
kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.compat import ordered
from jpaged.config import EngineConfig
from jpaged.decoding import constraints
from jpaged.decoding.constraints import Automata, AutomataSizes
from jpaged.decoding.rule_arrays import LogitsRules
from jpaged.decoding.sample import SamplingRows
from jpaged.kv import block_manager
from jpaged.kv.block_manager import BlockState
from jpaged.scheduler import Queue

# Why a sequence ended.
NOT_FINISHED, STOP, LENGTH, ABORT, DEAD_END = range(5)
NEVER = -1
NO_ALGORITHM = -1
NO_OUTPUT = -1  # and all numbers below 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceParams:
    """What a request asked for, a row for each of its sequences; never changes."""

    token_limits: jax.Array  # i32[R], tokens at which the sequence ends
    stop_ids: jax.Array  # i32[R, E], padded with -1
    algorithms: jax.Array  # i32[R], index in the config's, or NO_ALGORITHM: sampling
    outputs: jax.Array  # i32[R], which of the request's outputs it is, or below 0
    is_prefix: jax.Array  # bool[R], is computed and then held, for others to map
    keeps_prompt_logprobs: (
        jax.Array
    )  # bool[R], its prompt's log-probabilities are kept too
    sampling: SamplingRows  # of arrays [R]
    rules: LogitsRules | None  # of arrays [R]; None where the config has no room
    automata: jax.Array  # i32[R], of the pool, what the text must be; UNCONSTRAINED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestTable:
    """All sequences, waiting, running and finished, until they are released."""

    queue: Queue  # what the scheduler sees of them
    params: SequenceParams
    automata: Automata  # the pool that `params.automata` points into, A of them
    digests: jax.Array  # u32[A, 4], which automata the pool holds
    automaton_states: jax.Array  # i32[R], of each sequence after its last token
    tokens: jax.Array  # i32[R, L], the prompt and what was generated
    logprobs: jax.Array  # f32[R, L], raw, of generated and of rated prompt tokens
    ranks: jax.Array  # i32[R, L], 1: the most likely token; [R, 0] without top_*
    top_ids: jax.Array  # i32[R, L, C]
    top_logprobs: jax.Array  # f32[R, L, C]
    finish_reasons: jax.Array  # i32[R]
    first_steps: jax.Array  # i32[R], step that gave the first token, or NEVER
    last_steps: jax.Array  # i32[R], step that gave the last token, or NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Submission:
    """New sequences on their way into the table, B of them; padding has place R."""

    seq_indices: jax.Array  # i32[B]
    queue: dict[str, jax.Array]  # columns of Queue [B]; others are as in an empty one
    tokens: jax.Array  # i32[B, L]
    params: SequenceParams  # of arrays [B]
    states: Any  # of the config's algorithms, see `groups`; arrays [B, ...]


def init_table(config: EngineConfig) -> RequestTable:
    """A table of empty places."""
    seq_indices, length = config.max_num_requests, config.max_model_len
    kept = config.num_logprobs
    sizes = AutomataSizes() if config.automata is None else config.automata

    def full(*shape: int, value: int | float = 0, dtype=jnp.int32) -> jax.Array:
        return jnp.full((seq_indices, *shape), value, dtype)

    return RequestTable(
        queue=scheduler.init_queue(seq_indices),
        params=SequenceParams(
            token_limits=full(),
            stop_ids=full(config.max_num_stop_ids, value=-1),
            algorithms=full(value=NO_ALGORITHM),
            outputs=full(value=NO_OUTPUT),
            is_prefix=full(dtype=jnp.bool_),
            keeps_prompt_logprobs=full(dtype=jnp.bool_),
            sampling=SamplingRows.greedy(seq_indices),
            rules=(
                None
                if config.rules is None
                else LogitsRules.none(seq_indices, config.rules)
            ),
            automata=full(value=constraints.UNCONSTRAINED),
        ),
        automata=jax.tree.map(jnp.asarray, constraints.pool([], sizes)),
        digests=jnp.zeros((sizes.num_automata, 4), jnp.uint32),
        automaton_states=full(),
        tokens=full(length),
        logprobs=full(length, dtype=jnp.float32),
        ranks=full(length if kept else 0),
        top_ids=full(length, kept),
        top_logprobs=full(length, kept, dtype=jnp.float32),
        finish_reasons=full(),
        first_steps=full(value=NEVER),
        last_steps=full(value=NEVER),
    )


def put_automaton(
    table: RequestTable, index: jax.Array, one: Automata, digest: jax.Array
) -> RequestTable:
    """The table whose pool holds at `index` the only automaton of the pool `one`."""
    return dataclasses.replace(
        table,
        automata=jax.tree.map(lambda a, b: a.at[index].set(b[0]), table.automata, one),
        digests=table.digests.at[index].set(digest),
    )


def insert(table: RequestTable, new: Submission) -> RequestTable:
    """The table with the new sequences at their places."""

    def put(column: jax.Array, values: jax.Array | int) -> jax.Array:
        return column.at[new.seq_indices].set(values, mode="drop")

    fresh = {"has_ended": False, "num_preemptions": 0, "num_cached": 0} | new.queue
    columns = {name: put(getattr(table.queue, name), v) for name, v in fresh.items()}
    return dataclasses.replace(
        table,
        queue=dataclasses.replace(table.queue, **columns),
        params=jax.tree.map(put, table.params, new.params),
        automaton_states=put(table.automaton_states, 0),
        tokens=put(table.tokens, new.tokens),
        finish_reasons=put(table.finish_reasons, NOT_FINISHED),
        first_steps=put(table.first_steps, NEVER),
        last_steps=put(table.last_steps, NEVER),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What decoding gave the sequences of a step, S of them; padding has place R."""

    seq_indices: jax.Array  # i32[S], the sequence that gets the token
    tokens: jax.Array  # i32[S]
    logprobs: jax.Array  # f32[S]
    ranks: jax.Array  # i32[S], meaningful where top tokens are kept
    top_ids: jax.Array  # i32[S, C]
    top_logprobs: jax.Array  # f32[S, C]
    is_dead_end: jax.Array  # bool[S], no token is allowed: the sequence ends without

    @classmethod
    def zeros(cls, seq_indices: jax.Array, num_logprobs: int) -> NewTokens:
        """Token 0 for each place."""
        (size,) = seq_indices.shape
        return cls(
            seq_indices=seq_indices,
            tokens=jnp.zeros((size,), jnp.int32),
            logprobs=jnp.zeros((size,), jnp.float32),
            ranks=jnp.zeros((size,), jnp.int32),
            top_ids=jnp.zeros((size, num_logprobs), jnp.int32),
            top_logprobs=jnp.zeros((size, num_logprobs), jnp.float32),
            is_dead_end=jnp.zeros((size,), jnp.bool_),
        )


def extend(
    table: RequestTable, new: NewTokens, step: jax.Array
) -> tuple[RequestTable, jax.Array]:
    """The table with the new tokens, and which of the sequences they end, bool[S].

    A sequence ends at one of its stop ids, at its limit of tokens, or where no token is
    allowed. A sampled one has finished then; that of an algorithm waits for its
    request's others.
    """
    table_size, _ = table.tokens.shape
    valid = new.seq_indices < table_size
    safe = jnp.where(valid, new.seq_indices, 0)
    position = table.queue.num_tokens[safe]
    is_stop = jnp.any(table.params.stop_ids[safe] == new.tokens[:, None], axis=1)
    is_full = position + 1 >= table.params.token_limits[safe]
    ended = valid & (is_stop | is_full | new.is_dead_end)
    reason = jnp.where(is_stop, STOP, LENGTH)
    reason = jnp.where(new.is_dead_end, DEAD_END, reason)
    at_end = jnp.where(ended, new.seq_indices, table_size)
    is_alone = table.params.algorithms[safe] == NO_ALGORITHM
    at_finish = jnp.where(ended & is_alone, new.seq_indices, table_size)
    valid &= ~new.is_dead_end
    seq_indices = jnp.where(valid, new.seq_indices, table_size)
    # `share_again` reads all tokens, in a loop.
    seq_indices = ordered(seq_indices, table.queue.sources)
    is_first = position == table.queue.prompt_lens[safe]
    at_first = jnp.where(valid & is_first, seq_indices, table_size)

    def put(column: jax.Array, values: jax.Array) -> jax.Array:
        return column.at[seq_indices, position].set(values, mode="drop")

    queue = dataclasses.replace(
        table.queue,
        status=table.queue.status.at[at_finish].set(scheduler.FINISHED, mode="drop"),
        has_ended=table.queue.has_ended.at[at_end].set(True, mode="drop"),
        num_tokens=table.queue.num_tokens.at[seq_indices].add(1, mode="drop"),
    )
    states = advance(table, safe, new.tokens)
    table = dataclasses.replace(
        table,
        queue=queue,
        automaton_states=table.automaton_states.at[seq_indices].set(
            states, mode="drop"
        ),
        tokens=put(table.tokens, new.tokens),
        logprobs=put(table.logprobs, new.logprobs),
        finish_reasons=table.finish_reasons.at[at_end].set(reason, mode="drop"),
        first_steps=table.first_steps.at[at_first].set(step, mode="drop"),
        last_steps=table.last_steps.at[seq_indices].set(step, mode="drop"),
    )
    if new.top_ids.shape[1]:
        table = dataclasses.replace(
            table,
            ranks=put(table.ranks, new.ranks),
            top_ids=put(table.top_ids, new.top_ids),
            top_logprobs=put(table.top_logprobs, new.top_logprobs),
        )
    return table, ended


def inherit(
    table: RequestTable, seq_indices: jax.Array, parents: jax.Array
) -> RequestTable:
    """Return the table whose sequences `seq_indices` continue those at `parents`.

    i32[Q] each; all move at once. Places of R are padding.
    """

    def move(column: jax.Array) -> jax.Array:
        return column.at[seq_indices].set(column[parents], mode="drop")

    queue = dataclasses.replace(
        table.queue,
        num_tokens=move(table.queue.num_tokens),
        has_ended=move(table.queue.has_ended),
    )
    return dataclasses.replace(
        table,
        queue=queue,
        automaton_states=move(table.automaton_states),
        tokens=move(table.tokens),
        logprobs=move(table.logprobs),
        ranks=move(table.ranks),
        top_ids=move(table.top_ids),
        top_logprobs=move(table.top_logprobs),
        finish_reasons=move(table.finish_reasons),
        first_steps=move(table.first_steps),
        last_steps=move(table.last_steps),
    )


def advance(
    table: RequestTable, seq_indices: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Automaton states of the sequences `seq_indices` after one token, i32[S]."""
    return constraints.next_states(
        table.automata,
        table.params.automata[seq_indices],
        table.automaton_states[seq_indices],
        tokens,
    )


def constrain(
    table: RequestTable,
    seq_indices: jax.Array,
    states: jax.Array,
    valid: jax.Array,
    logits: jax.Array,
) -> jax.Array:
    """`logits` f32[S, V] with -inf where structured output does not allow a token.

    Args:
      table: has the automata.
      places: i32[S], the sequences.
      states: i32[S], of their automata.
      valid: bool[S]; other rows stay as they are.
      logits: of the sequences' next tokens.
    """
    if not table.digests.shape[0]:
        return logits
    index = jnp.where(
        valid, table.params.automata[seq_indices], constraints.UNCONSTRAINED
    )
    return jax.lax.cond(
        jnp.any(index != constraints.UNCONSTRAINED),
        lambda logits: constraints.mask(logits, table.automata, index, states),
        lambda logits: logits,
        logits,
    )


def share_again(table: RequestTable, seq_indices: jax.Array) -> RequestTable:
    """Return the table in which each sequence of `seq_indices` maps shared blocks.

    For sequences that lost their blocks: each one's source becomes the sequence of its
    request, among those at lower places, with which it has most tokens in common. So
    nobody waits for a sequence that waits for it. The first of a request keeps the
    source that it had. Compares tokens, a sequence with all in turn; `seq_indices` is
    i32[S], R where there is none.
    """
    table_size, _ = table.tokens.shape
    seq_indices = jnp.sort(seq_indices)
    valid = seq_indices < table_size
    safe = jnp.where(valid, seq_indices, 0)
    tokens, lens = table.tokens[safe], table.queue.num_tokens[safe]
    leaders = jnp.where(valid, table.queue.leaders[safe], table_size)
    can_give = valid & ~table.queue.has_ended[safe]
    index = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)

    def compare(j: jax.Array, carry):
        sources, shared = carry
        # At least one token is left to compute, for its logits.
        most = jnp.minimum(lens, lens[j]) - 1
        common = _num_common(tokens, tokens[j][None, :], most)
        fits = valid & can_give[j] & (leaders == leaders[j]) & (index > j)
        is_better = fits & (common > shared)
        sources = jnp.where(is_better, seq_indices[j], sources)
        return sources, jnp.where(is_better, common, shared)

    first = (
        jnp.full_like(seq_indices, scheduler.NO_REQUEST),
        jnp.zeros_like(seq_indices),
    )
    num_lost = jnp.sum(valid, dtype=jnp.int32)  # sorted, they come first
    sources, shared = jax.lax.fori_loop(0, num_lost, compare, first)
    found = jnp.where(shared > 0, seq_indices, table_size)
    is_first = valid & ~jnp.any(
        (leaders[None, :] == leaders[:, None]) & (index[None, :] < index[:, None]),
        axis=1,
    )
    # Without a common beginning, the old source is none either.
    alone = jnp.where(valid & ~is_first & (shared == 0), seq_indices, table_size)
    queue = table.queue
    new_sources = queue.sources.at[found].set(sources, mode="drop")
    new_lens = queue.shared_lens.at[found].set(shared, mode="drop")
    queue = dataclasses.replace(
        queue,
        sources=new_sources,
        shared_lens=new_lens.at[alone].set(0, mode="drop"),
    )
    return dataclasses.replace(table, queue=queue)


def _num_common(tokens: jax.Array, others: jax.Array, most: jax.Array) -> jax.Array:
    """Tokens up to the first difference, at most `most` i32[S] (below L), i32[S]."""
    is_other = tokens != others
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    is_other |= column[None, :] >= most[:, None]
    return jnp.argmax(is_other, axis=1).astype(jnp.int32)


def share_new(
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    is_new: jax.Array,
) -> tuple[RequestTable, BlockState, jax.Array]:
    """Lets new rows wait for what other rows are just computing.

    A row whose next whole block has the same tokens, behind the same blocks, as that of
    a row before it takes that one as its source, and the tokens that they have in
    common. Compares the tokens. Returns also which rows wait now, bool[S]: they hold no
    blocks and compute nothing until they join their source (`scheduler`).

    Args:
      table, rows, blocks: after admission.
      is_new: bool[S], rows that have just been admitted.
    """
    size, num_rows = blocks.block_size, rows.shape[0]
    queue, seq_indices = table.queue, jnp.maximum(rows, 0)
    index = jnp.arange(num_rows, dtype=jnp.int32)
    known = queue.num_tokens[seq_indices]
    start = blocks.context_lens  # of a new row: what the prefix cache had
    takes = is_new & ~table.params.keeps_prompt_logprobs[seq_indices]
    takes &= queue.sources[seq_indices] == seq_indices
    takes &= start + size < known
    # The tokens of a lockstep row after its prompt may yet be another's.
    fixed = (
        jnp.where(queue.is_lockstep[seq_indices], queue.prompt_lens[seq_indices], known)
        - 1
    )
    gives = (rows != scheduler.NO_REQUEST) & (
        queue.status[seq_indices] == scheduler.RUNNING
    )
    gives &= ~queue.has_ended[seq_indices]

    is_before = scheduler.rows_before(queue, rows)
    fits = takes[:, None] & gives[None, :] & is_before
    fits &= fixed[None, :] >= (start + size)[:, None]
    last = jnp.maximum(start // size - 1, 0)
    tables = blocks.block_tables
    same_path = tables[:, last].T == tables[index, last][:, None]
    same_path &= blocks.context_lens[None, :] >= start[:, None]
    fits &= same_path | (start == 0)[:, None]
    column = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    mine = table.tokens.at[seq_indices[:, None], column].get(mode="clip")
    others = table.tokens.at[seq_indices[None, :, None], column[:, None, :]].get(
        mode="clip"
    )
    fits &= jnp.all(others == mine[:, None, :], axis=2)

    # The first of those before it, which itself may wait for another.
    joins = jnp.any(fits, axis=1)
    ranks = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    order = jnp.where(fits, ranks[None, :], num_rows)
    source = jnp.argmin(order, axis=1).astype(jnp.int32)
    most = jnp.minimum(known - 1, fixed[source])
    shared = _num_common(
        table.tokens[seq_indices], table.tokens[seq_indices[source]], most
    )
    at = jnp.where(joins, rows, queue.status.shape[0])
    counts = scheduler.is_new_request(queue, seq_indices)
    gained = jnp.where(counts, shared - start, 0)
    queue = dataclasses.replace(
        queue,
        sources=queue.sources.at[at].set(seq_indices[source], mode="drop"),
        shared_lens=queue.shared_lens.at[at].set(shared, mode="drop"),
        num_cached=queue.num_cached.at[at].add(gained, mode="drop"),
    )
    table = dataclasses.replace(table, queue=queue)
    return table, block_manager.free(blocks, joins), joins
