"""Scheduler: who runs in this step, and with how many tokens.

Place on the road: request table -> [scheduler] -> block manager.

A pure function of lengths, tables and the queue: it never sees a token, so the engine
and the simulator run the same one. Iteration-level scheduling with chunked prompts
(paper section 4.3): running rows decode one token each, what is left of the step's
budget goes to prompts, and requests are admitted while their prompts fit into the free
blocks. When blocks run out the latest requests give theirs back (paper section 4.5).
They are computed again later, from their prompt and what they had generated; or, with a
host's pool that has room, they are swapped: their blocks go there (`swap`), and nothing
is admitted until all of them are back.

A request's sequences (samples, beams) are admitted together and preempted together.
Those of a lockstep request, such as beams, also decode together: none computes its last
known token before all of them can. Samples need not: where a request has more of them
than fit even when nothing else runs, as many as fit run at a time.

Who is admitted first, the policy says (`policies`); who keeps memory, an order that
never changes: priority, arrival, and place for the sequences of a request.

Progress: memory and tokens are given to the running sequences in that order, so the
first of them, and in a lockstep request all of the first one's, is never preempted and
gets at least a token in each step. One that waits for a source waits for a row before
it. Where nothing runs, the policy's first request is admitted, for `submit` refuses
what does not fit into the whole pool alone. The first request in the fixed order that
is ever admitted so ends, then the next: every run ends. Swapped ones come back in the
fixed order, a request in a step, and never in a step that takes blocks back. Where
nothing else runs the first of them fits: its sequences share among themselves what they
shared before, and what they shared with others `submit` counted as their own. Who waits
for a source that is swapped computes for itself.

Letters: R places of the request table, S rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import block_manager, policies, swap
from jpaged.block_manager import BlockState
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.policies import Knobs

# Status of a place in the request table. HELD takes no part, and keeps what it has:
# a pinned prefix its row and blocks, a finished beam of a running search its tokens.
# SWAPPED waits as well, and has its blocks in the host's memory.
EMPTY, WAITING, RUNNING, FINISHED, HELD, SWAPPED = range(6)
NO_REQUEST = -1
BEFORE_ALL = jnp.iinfo(jnp.int32).min  # priority of pinned prefixes
_LAST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """What the scheduler knows of each sequence."""

    status: jax.Array  # i32[R]
    arrivals: jax.Array  # i32[R], rank of arrival; sequences of one request share it
    priorities: jax.Array  # i32[R], smaller keeps its memory longer
    prompt_lens: jax.Array  # i32[R]
    num_tokens: jax.Array  # i32[R], known tokens: the prompt and what was generated
    leaders: jax.Array  # i32[R], the place of the request's first sequence
    sources: jax.Array  # i32[R], whose blocks it maps when it starts; itself: nobody's
    shared_lens: jax.Array  # i32[R], tokens that it maps of its source's
    is_lockstep: jax.Array  # bool[R], decodes only together with its request's others
    has_ended: jax.Array  # bool[R], takes no part while its lockstep request goes on
    num_preemptions: jax.Array  # i32[R]
    num_cached: jax.Array  # i32[R], prompt tokens that were not computed but mapped


class Swaps(NamedTuple):
    """Places whose blocks move, i32[S] by row, NO_REQUEST where none; one is empty."""

    out: jax.Array  # from the row to the host's memory
    into: jax.Array  # from there to the row

    @classmethod
    def none(cls, rows: jax.Array) -> Swaps:
        """Nobody's."""
        return cls(*(jnp.full_like(rows, NO_REQUEST) for _ in range(2)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step does."""

    num_tokens: jax.Array  # i32[S], tokens of each row; 0: not in this step
    num_preempted: jax.Array  # i32[], rows that gave their blocks back
    num_admitted: jax.Array  # i32[], sequences that got a row
    swaps: Swaps | None = None  # None without a host's pool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hits:
    """What the prefix cache has of each waiting sequence."""

    block_tables: jax.Array  # i32[R, M]
    lens: jax.Array  # i32[R], tokens in them, whole blocks; less than the known tokens

    @classmethod
    def none(cls, num_places: int, max_blocks_per_seq: int) -> Hits:
        """Nothing for anybody."""
        return cls(
            jnp.full((num_places, max_blocks_per_seq), block_manager.NO_BLOCK),
            jnp.zeros((num_places,), jnp.int32),
        )


def init_queue(num_places: int) -> Queue:
    """An empty queue."""

    def column(dtype: type = jnp.int32) -> jax.Array:
        return jnp.zeros((num_places,), dtype)

    def own() -> jax.Array:
        return jnp.arange(num_places, dtype=jnp.int32)

    return Queue(
        status=column(),
        arrivals=column(),
        priorities=column(),
        prompt_lens=column(),
        num_tokens=column(),
        leaders=own(),
        sources=own(),
        shared_lens=column(),
        is_lockstep=column(jnp.bool_),
        has_ended=column(jnp.bool_),
        num_preemptions=column(),
        num_cached=column(),
    )


def can_admit(queue: Queue, rows: jax.Array) -> jax.Array:
    """bool[]: some sequence waits, there is a row for it, and nobody is swapped."""
    is_open = jnp.any(queue.status == WAITING) & jnp.any(rows == NO_REQUEST)
    return is_open & ~jnp.any(queue.status == SWAPPED)


def schedule(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    config: EngineConfig,
    hits: Hits | None = None,
    host: BlockState | None = None,
    knobs: Knobs | None = None,
) -> tuple[Queue, jax.Array, BlockState, Plan]:
    """The queue, rows and blocks after admission and preemption, and the step's plan.

    Args:
      queue: the request table's scheduling side.
      rows: i32[S], the place in the request table that each row runs, or NO_REQUEST.
      blocks: block manager's state; its rows are `rows`.
      config: sizes and policy.
      hits: what is cached of the waiting sequences; None is nothing.
      host: what swapped sequences hold, its rows are places; None: nobody is swapped.
      knobs: the scheduler's numbers, within the config's sizes; None takes its own.

    After the plan's swaps `block_manager.append(blocks, plan.num_tokens)` always
    succeeds. Rows that are swapped out still hold their blocks, and are empty.
    """
    knobs = _within(config.knobs if knobs is None else knobs, config)
    blocks, wanted = _join_sources(queue, rows, blocks)
    wanted = _keep_step(queue, rows, blocks, wanted)
    num_tokens = _share_budget(queue, rows, wanted, knobs)
    needed = block_manager.blocks_needed(blocks, num_tokens)
    is_short = jnp.sum(needed) > block_manager.num_free_blocks(blocks)
    swaps = None if host is None else Swaps.none(rows)
    carry = (queue, rows, blocks, num_tokens, jnp.int32(0), swaps)
    carry = when(
        is_short, lambda carry: _preempt(*carry, needed=needed, host=host), carry
    )
    queue, rows, blocks, num_tokens, num_preempted, swaps = carry

    # Nothing is admitted in a step that had to take blocks back, or while somebody is
    # swapped.
    is_open = can_admit(queue, rows) & ~is_short
    is_open &= jnp.sum(num_tokens) < knobs.max_num_batched_tokens
    if host is not None:
        queue, rows, swaps = when(
            jnp.any(queue.status == SWAPPED) & ~is_short & jnp.any(rows == NO_REQUEST),
            lambda carry: _bring_back(*carry, blocks, needed, host, knobs),
            (queue, rows, swaps),
        )
    if hits is None:
        hits = Hits.none(queue.status.shape[0], config.max_blocks_per_seq)
    carry = when(
        is_open,
        lambda carry: _admit(
            *carry, hits=hits, needed=needed, policy=config.policy, knobs=knobs
        ),
        (queue, rows, blocks, num_tokens, jnp.int32(0)),
    )
    queue, rows, blocks, num_tokens, num_admitted = carry
    return queue, rows, blocks, Plan(num_tokens, num_preempted, num_admitted, swaps)


def _within(knobs: Knobs, config: EngineConfig) -> Knobs:
    """The knobs, no larger than a program for `config` serves."""
    return dataclasses.replace(
        knobs,
        max_num_seqs=jnp.minimum(knobs.max_num_seqs, config.max_num_seqs),
        max_num_batched_tokens=jnp.minimum(
            knobs.max_num_batched_tokens, config.max_num_batched_tokens
        ),
        max_prompt_chunk=jnp.minimum(knobs.max_prompt_chunk, config.largest_chunk),
    )


def is_new_request(queue: Queue, places: jax.Array) -> jax.Array:
    """Whether at `places` are first sequences of requests never preempted yet."""
    return (queue.leaders[places] == places) & (queue.num_preemptions[places] == 0)


def row_values(values: jax.Array, rows: jax.Array, fill: int | bool = 0) -> jax.Array:
    """`values` [R] of the requests that the rows run; `fill` for empty rows."""
    return jnp.where(rows == NO_REQUEST, fill, values[jnp.maximum(rows, 0)])


def _is_idle(queue: Queue, rows: jax.Array) -> jax.Array:
    """Rows that take no part: empty, held, or ended before their request; bool[S]."""
    status = row_values(queue.status, rows, EMPTY)
    return (status != RUNNING) | row_values(queue.has_ended, rows, False)


def _is_same(queue: Queue, rows: jax.Array) -> jax.Array:
    """Whether two rows run sequences of one request, bool[S, S]; empty rows are not."""
    leaders = row_values(queue.leaders, rows, NO_REQUEST)
    is_same = leaders[:, None] == leaders[None, :]
    return is_same & (leaders != NO_REQUEST)[:, None]


def _join_sources(
    queue: Queue, rows: jax.Array, blocks: BlockState
) -> tuple[BlockState, jax.Array]:
    """The blocks, and the tokens that each row has yet to compute, i32[S].

    A new row waits until its source (the request's first sample, a pinned prefix) has
    computed what they share, and then maps those blocks. At least one token is left to
    compute: its logits are what follows. Copy-on-write follows from the reference
    counts (paper section 4.4).
    """
    is_idle = _is_idle(queue, rows)
    wanted = row_values(queue.num_tokens, rows) - blocks.context_lens
    wanted = jnp.where(is_idle, 0, wanted)
    sources = row_values(queue.sources, rows, NO_REQUEST)
    shared = row_values(queue.shared_lens, rows)
    is_new = (sources != rows) & (blocks.context_lens == 0) & (shared > 0) & ~is_idle

    def join(carry):
        blocks, wanted = carry
        is_source = (rows[None, :] == sources[:, None]) & is_new[:, None]
        source_row = jnp.argmax(is_source, axis=1).astype(jnp.int32)
        has_source = jnp.any(is_source, axis=1)
        own = jnp.arange(rows.shape[0], dtype=jnp.int32)

        def can_join(blocks: BlockState) -> jax.Array:
            is_ready = blocks.context_lens[source_row] >= shared
            return has_source & (blocks.context_lens == 0) & is_ready

        def map_blocks(blocks: BlockState) -> BlockState:
            joins = can_join(blocks)
            blocks = block_manager.fork(blocks, jnp.where(joins, source_row, own))
            return block_manager.truncate(
                blocks, jnp.where(joins, shared, blocks.context_lens)
            )

        # Again for those whose source has just joined: a lockstep leader that maps all
        # but its last token computes nothing until the others have joined it.
        blocks = lax.while_loop(lambda b: jnp.any(can_join(b)), map_blocks, blocks)
        joined = has_source & (blocks.context_lens > 0)
        wanted = jnp.where(joined, wanted - shared, wanted)
        return blocks, jnp.where(has_source & ~joined, 0, wanted)

    return when(jnp.any(is_new), join, (blocks, wanted))


def _keep_step(queue, rows, blocks, wanted) -> jax.Array:
    """`wanted` without the last token of lockstep rows that some other is not up to."""
    is_lockstep = row_values(queue.is_lockstep, rows, False) & ~_is_idle(queue, rows)

    def withhold(wanted: jax.Array) -> jax.Array:
        left = row_values(queue.num_tokens, rows) - blocks.context_lens
        is_behind = is_lockstep & (left > 1)
        has_other_behind = jnp.any(_is_same(queue, rows) & is_behind[None, :], axis=1)
        return jnp.where(is_lockstep & has_other_behind, wanted - 1, wanted)

    waits = when(jnp.any(is_lockstep), withhold, wanted)
    return jnp.maximum(waits, 0)


def _mapped_tokens(
    queue: Queue, places: jax.Array, hits: Hits | None = None
) -> jax.Array:
    """Tokens that the sequences at `places` will map from their sources.

    None for those that have `hits`, which they take instead.
    """
    sources = queue.sources[places]
    status = queue.status[sources]
    # Of one request all are admitted together, and pinned prefixes first of all.
    comes = queue.arrivals[sources] == queue.arrivals[places]
    comes |= queue.priorities[sources] == BEFORE_ALL
    is_away = (status == WAITING) | (status == SWAPPED)
    is_live = (status == RUNNING) | (status == HELD) | (is_away & comes)
    maps = (sources != places) & is_live
    if hits is not None:
        maps &= hits.lens[places] == 0
    return jnp.where(maps, queue.shared_lens[places], 0)


def rows_before(queue: Queue, rows: jax.Array) -> jax.Array:
    """Whether row j comes before row i by priority, arrival and place, bool[S, S].

    Held rows come before all, since nobody takes their blocks; empty rows behind.
    """
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    is_empty = rows == NO_REQUEST
    is_held = row_values(queue.status, rows, EMPTY) == HELD
    keys = (
        jnp.where(is_empty, 2, jnp.where(is_held, 0, 1)),
        row_values(queue.priorities, rows, _LAST),
        row_values(queue.arrivals, rows, _LAST),
        jnp.where(is_empty, _LAST, rows),
        index,
    )
    is_before = jnp.zeros((rows.shape[0],) * 2, jnp.bool_)
    for key in reversed(keys):
        mine, other = key[:, None], key[None, :]
        is_before = (other < mine) | ((other == mine) & is_before)
    return is_before


def _ranks(queue: Queue, rows: jax.Array) -> jax.Array:
    """Rank of each row in that order, i32[S].

    Counts the rows before each: for this few rows cheaper than a sort, to run and to
    compile.
    """
    return jnp.sum(rows_before(queue, rows), axis=1, dtype=jnp.int32)


def _sum_before(ranks: jax.Array, values: jax.Array) -> jax.Array:
    """Sum of the values [S] of the rows with a smaller rank, i32[S]."""
    is_before = ranks[None, :] < ranks[:, None]
    return jnp.sum(jnp.where(is_before, values[None, :], 0), axis=1)


def _share_budget(queue, rows, wanted, knobs: Knobs) -> jax.Array:
    """Tokens of each row, i32[S]: one for a decode, and the rest to prompts in turn."""
    decodes = (wanted == 1).astype(jnp.int32)
    num_decodes = jnp.sum(decodes)

    def chunks(num_tokens: jax.Array) -> jax.Array:
        left = jnp.where(wanted > 1, jnp.minimum(wanted, knobs.max_prompt_chunk), 0)
        before = _sum_before(_ranks(queue, rows), left)
        budget = knobs.max_num_batched_tokens - num_decodes
        return num_tokens + jnp.clip(budget - before, 0, left)

    return when(jnp.any(wanted > 1), chunks, decodes)


def _preempt(queue, rows, blocks, num_tokens, num_preempted, swaps, *, needed, host):
    """Drops the fewest last requests that leave the others room for their tokens.

    If the rows up to rank i stay, they need sum(needed[:i]) blocks, and what the rows
    behind hold comes back: the first side grows with i and the second shrinks. So if
    a request's last row can stay, all its rows can.
    """
    rank = _ranks(queue, rows)
    held = block_manager.exclusive_blocks(blocks, rank)
    returned = jnp.sum(held) - _sum_before(rank, held) - held
    available = block_manager.num_free_blocks(blocks) + returned
    stays = _sum_before(rank, needed) + needed <= available
    # The first request always fits alone, or the first sample of it; what it was told
    # to copy for the sake of others, it shares no longer.
    status = row_values(queue.status, rows, EMPTY)
    first = jnp.min(jnp.where(status == RUNNING, rank, rows.shape[0]))
    is_same = _is_same(queue, rows)
    is_first = jnp.any(is_same & (rank == first)[None, :], axis=1)
    is_lockstep = row_values(queue.is_lockstep, rows, False)
    stays_alone = is_first & (stays | is_lockstep | (rank == first))
    stays = jnp.all(stays[None, :] | ~is_same, axis=1)
    stays |= stays_alone | (status == HELD)
    dropped = ~stays & (rows != NO_REQUEST)

    leaves = jnp.zeros_like(dropped)
    if host is not None:
        leaves = swap.leaving(blocks, host, dropped, rank, is_same)
        swaps = swaps._replace(out=jnp.where(leaves, rows, NO_REQUEST))
    place = jnp.where(dropped, rows, queue.status.shape[0])
    # Whom it waited for among others' sequences is not there when it comes back.
    source = row_values(queue.sources, rows)
    is_own = queue.arrivals[source] == row_values(queue.arrivals, rows)
    is_own |= queue.priorities[source] == BEFORE_ALL
    alone = jnp.where(dropped & ~is_own, rows, queue.status.shape[0])
    status = jnp.where(leaves, SWAPPED, WAITING)
    queue = dataclasses.replace(
        queue,
        status=queue.status.at[place].set(status, mode="drop"),
        sources=queue.sources.at[alone].set(rows, mode="drop"),
        num_preemptions=queue.num_preemptions.at[place].add(1, mode="drop"),
    )
    return (
        queue,
        jnp.where(dropped, NO_REQUEST, rows),
        block_manager.free(blocks, dropped & ~leaves),
        jnp.where(dropped, 0, num_tokens),
        num_preempted + jnp.sum(dropped, dtype=jnp.int32),
        swaps,
    )


def _bring_back(queue, rows, swaps, blocks, needed, host, knobs: Knobs):
    """Gives the first swapped request rows and room for its tokens, if there are.

    All its swapped sequences, or of samples that have the engine for themselves as many
    as there is room for. They compute nothing in this step. One request at a time: how
    many blocks it takes is then exact, so that it always fits alone.
    """
    num_rows, num_places = rows.shape[0], queue.status.shape[0]
    is_away = queue.status == SWAPPED
    place = jnp.arange(num_places, dtype=jnp.int32)
    keys = (jnp.where(is_away, 0, 1), queue.priorities, queue.arrivals, place)
    first = lax.sort(keys, num_keys=4)[-1][:num_rows]  # in order
    leader = queue.leaders[first[0]]
    is_mine = is_away & (queue.leaders == leader)
    valid = is_mine[first]

    size = blocks.block_size
    held = -(-host.context_lens[first] // size)
    mapped = jnp.where(held == 0, _mapped_tokens(queue, first) // size, held)
    known = jnp.where(queue.has_ended, 0, queue.num_tokens)[first]
    needs = swap.demand(host, jnp.where(valid, first, NO_REQUEST))
    needs += jnp.where(valid, jnp.maximum(-(-known // size) - mapped, 0), 0)
    turn = jnp.arange(num_rows, dtype=jnp.int32)
    fits = valid & (turn < _num_open_rows(queue, rows, knobs))
    fits &= jnp.cumsum(needs) <= _spare_blocks(queue, rows, blocks, needed, knobs)

    is_running = row_values(queue.status, rows, EMPTY) == RUNNING
    is_other = row_values(queue.leaders, rows, NO_REQUEST) != leader
    is_alone = ~jnp.any(is_running & is_other) & ~queue.is_lockstep[leader]
    is_whole = jnp.sum(fits) == jnp.sum(is_mine)
    num_back = jnp.where(is_whole | is_alone, jnp.sum(fits, dtype=jnp.int32), 0)
    target = jnp.where(turn < num_back, first, num_places)
    queue = dataclasses.replace(
        queue, status=queue.status.at[target].set(RUNNING, mode="drop")
    )
    takes, turn = _take_rows(rows, num_back)
    into = jnp.where(takes, first[turn], NO_REQUEST)
    rows = jnp.where(takes, into, rows)
    return queue, rows, swaps._replace(into=into)


def _num_open_rows(queue: Queue, rows: jax.Array, knobs: Knobs) -> jax.Array:
    """Sequences that may get a row, i32[]."""
    num_running = jnp.sum(row_values(queue.status, rows, EMPTY) == RUNNING)
    return jnp.minimum(knobs.max_num_seqs - num_running, jnp.sum(rows == NO_REQUEST))


def _take_rows(rows: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows are the first `count` empty ones, bool[S], and their turns, i32[S].

    The turn counts from 0, and is 0 for other rows.
    """
    is_free = rows == NO_REQUEST
    turn = jnp.cumsum(is_free) - 1
    takes = is_free & (turn < count)
    return takes, jnp.where(takes, turn, 0)


def _admit(
    queue, rows, blocks, num_tokens, num_admitted, *, hits, needed, policy, knobs
):
    """Gives waiting requests rows, in order, up to the first that does not fit."""
    num_places = queue.status.shape[0]
    hits = _worth_taking(queue, hits)
    first, fits, tokens = _candidates(
        queue, rows, blocks, num_tokens, hits, needed, policy, knobs
    )
    admitted = jnp.cumprod(fits.astype(jnp.int32)).astype(jnp.bool_)

    takes, turn = _take_rows(rows, jnp.sum(admitted))
    target = jnp.where(admitted, first, num_places)
    # What a request's own sequences share is nothing that others had computed.
    is_new = is_new_request(queue, first)
    cached = jnp.where(is_new, hits.lens[first] + _mapped_tokens(queue, first, hits), 0)
    queue = dataclasses.replace(
        queue,
        status=queue.status.at[target].set(RUNNING, mode="drop"),
        num_cached=queue.num_cached.at[target].add(cached, mode="drop"),
    )
    rows = jnp.where(takes, first[turn], rows)
    blocks = block_manager.adopt(
        blocks, hits.block_tables[rows], jnp.where(takes, hits.lens[rows], 0)
    )
    return (
        queue,
        rows,
        blocks,
        jnp.where(takes, tokens[turn], num_tokens),
        num_admitted + jnp.sum(admitted, dtype=jnp.int32),
    )


def _worth_taking(queue: Queue, hits: Hits) -> Hits:
    """The hits of the sequences that find no more at their sources."""
    places = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    is_less = hits.lens < _mapped_tokens(queue, places)
    return dataclasses.replace(hits, lens=jnp.where(is_less, 0, hits.lens))


def _scores(queue: Queue, hits: Hits, policy, parameters: jax.Array) -> jax.Array:
    """What the policy says of each place, that of its request's first sequence, [R]."""
    scores = policies.find(policy)(
        policies.Waiting(
            arrivals=queue.arrivals,
            priorities=queue.priorities,
            prompt_lens=queue.prompt_lens,
            num_tokens=queue.num_tokens,
            cached_lens=hits.lens,
            num_preemptions=queue.num_preemptions,
            parameters=parameters,
        )
    )
    return scores[queue.leaders]


def _candidates(queue, rows, blocks, num_tokens, hits, needed, policy, knobs: Knobs):
    """The first waiting sequences, whether each fits behind those before it, and the
    tokens that it would compute in this step: i32[S], bool[S], i32[S].
    """
    num_rows = rows.shape[0]
    place = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    is_waiting = queue.status == WAITING
    scores = _scores(queue, hits, policy, knobs.parameters)
    keys = (
        jnp.where(is_waiting, 0, 1),
        jnp.where(queue.priorities == BEFORE_ALL, 0, 1),
        scores,
        queue.arrivals,
        place,
    )
    first = lax.sort(keys, num_keys=5)[-1][:num_rows]  # in order
    valid = is_waiting[first]

    size = blocks.block_size
    num_known = jnp.where(queue.has_ended, 0, queue.num_tokens)
    mapped = _mapped_tokens(queue, first, hits)
    # A cached block that nobody uses counts as free, and is taken like one.
    column = jnp.arange(hits.block_tables.shape[1], dtype=jnp.int32)
    is_hit = column[None, :] < (hits.lens[first] // size)[:, None]
    is_used = blocks.ref_counts[hits.block_tables[first]] > 0
    num_used = jnp.sum(is_hit & is_used, axis=1, dtype=jnp.int32)
    needs = -(-num_known[first] // size) - mapped // size - num_used
    needs = jnp.where(valid, jnp.maximum(needs, 0), 0)
    # Who waits for a source computes nothing yet, and lockstep rows not their last.
    tokens = num_known[first] - queue.is_lockstep[first].astype(jnp.int32)
    tokens = jnp.minimum(tokens - hits.lens[first], knobs.max_prompt_chunk)
    tokens = jnp.where(valid & (mapped == 0), jnp.maximum(tokens, 0), 0)
    left = knobs.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(tokens) - tokens

    free = _spare_blocks(queue, rows, blocks, needed, knobs)
    has_row = jnp.arange(num_rows) < _num_open_rows(queue, rows, knobs)
    fits = valid & (jnp.cumsum(needs) <= free) & has_row

    # All sequences of a request, or none; for the budget, its first token counts.
    leaders = jnp.where(valid, queue.leaders[first], NO_REQUEST)
    is_same = leaders[:, None] == leaders[None, :]
    size_of = jnp.zeros_like(queue.leaders)
    size_of = size_of.at[queue.leaders].add(is_waiting.astype(jnp.int32))
    is_whole = jnp.sum(is_same, axis=1) == size_of[queue.leaders[first]]
    fits &= before[jnp.argmax(is_same, axis=1)] < left
    fits_whole = is_whole & jnp.all(fits[None, :] | ~is_same, axis=1)
    # Of samples that have the engine for themselves, as many as there is room for.
    other = row_values(queue.leaders, rows, NO_REQUEST) != leaders[0]
    has_all = ~jnp.any(other & (row_values(queue.status, rows, EMPTY) == RUNNING))
    fits_alone = has_all & (leaders == leaders[0]) & ~queue.is_lockstep[first]
    fits &= fits_whole | fits_alone
    return first, fits, jnp.clip(left - before, 0, tokens)


def _spare_blocks(queue, rows, blocks, needed, knobs) -> jax.Array:
    """Blocks that new requests may take, i32[]."""
    # What the running rows' known tokens will take is as good as taken.
    size = blocks.block_size
    held = -(-blocks.context_lens // size)
    place = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    to_map = row_values(_mapped_tokens(queue, place), rows) // size
    expected = -(-row_values(queue.num_tokens, rows) // size)
    expected = jnp.where(_is_idle(queue, rows), 0, expected - jnp.maximum(held, to_map))
    # A copy of a shared block is needed by a row that does not grow.
    expected = jnp.maximum(expected, needed)
    free = block_manager.num_free_blocks(blocks) - jnp.sum(expected)
    is_any = jnp.any(row_values(queue.status, rows, EMPTY) == RUNNING)
    return free - jnp.where(is_any, knobs.num_watermark_blocks, 0)
