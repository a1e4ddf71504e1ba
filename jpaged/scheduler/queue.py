"""Queue: the scheduler's state of each sequence, and the fixed order of sequences.

Pipeline: request table -> [queue] -> admission, preemption.

Shape symbols: R sequences of the request table, S batch rows, M blocks per row.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.arithmetic import floor_div
from jpaged.indexing import take
from jpaged.kv import block_manager, cache_groups
from jpaged.kv.block_manager import BlockState
from jpaged.policies import NO_DEADLINE, NO_USER, Requests, SchedulerParams

# Status of a sequence in the request table. RETAINED takes part in no step and keeps
# what it has: a pinned prefix its row and blocks, a finished beam of a running search
# its tokens. SWAPPED waits too, and its blocks are in the host pool.
EMPTY, WAITING, RUNNING, FINISHED, RETAINED, SWAPPED = range(6)
NO_REQUEST = -1
BEFORE_ALL = jnp.iinfo(jnp.int32).min  # priority of pinned prefixes
_LAST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attributes:
    """Columns of the queue that exist only if a policy reads one of them."""

    max_tokens: jax.Array  # i32[R], most tokens that the sequence may generate
    submitted: jax.Array  # i32[R], ms on the engine's clock
    deadlines: jax.Array  # i32[R], ms from submission, or NO_DEADLINE
    users: jax.Array  # i32[R], number of the user, or NO_USER
    user_tokens: jax.Array  # i32[R], see `policies.Requests`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """The scheduler's state of each sequence."""

    status: jax.Array  # i32[R]
    arrivals: jax.Array  # i32[R], rank of arrival; sequences of one request share it
    priorities: jax.Array  # i32[R], smaller keeps its memory longer
    prompt_lens: jax.Array  # i32[R]
    num_tokens: jax.Array  # i32[R], known tokens: the prompt and generated tokens
    leaders: jax.Array  # i32[R], sequence index of the request's first sequence
    sources: jax.Array  # i32[R], sequence whose blocks it first maps; itself: none
    shared_lens: jax.Array  # i32[R], tokens that it maps from its source
    is_lockstep: jax.Array  # bool[R], decodes only together with its request's others
    has_ended: jax.Array  # bool[R], takes no part while its lockstep request continues
    num_preemptions: jax.Array  # i32[R]
    num_cached: jax.Array  # i32[R], prompt tokens that were mapped, not computed
    attributes: Attributes | None = None  # None: no policy reads them


class UntilDecision(NamedTuple):
    """Tokens that sequences may compute before retention decides on their blocks."""

    rows: jax.Array  # i32[S], of the running rows, from the tokens they have computed
    waiting: jax.Array  # i32[R], of waiting sequences, from their first token
    mappable: jax.Array  # i32[R], tokens that they may map instead of computing them
    exact: jax.Array | None = None  # i32[R], tokens that others may map; None: all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hits:
    """Cached prefix of each waiting sequence."""

    block_tables: jax.Array  # i32[R, M]
    lens: jax.Array  # i32[R], tokens in them, whole blocks; less than the known tokens

    @classmethod
    def none(cls, table_size: int, max_blocks_per_seq: int) -> Hits:
        """Return an empty prefix for every sequence."""
        return cls(
            jnp.full((table_size, max_blocks_per_seq), block_manager.NO_BLOCK),
            jnp.zeros((table_size,), jnp.int32),
        )


def init_queue(table_size: int, has_attributes: bool = False) -> Queue:
    """Return an empty queue for a request table of `table_size` sequences."""

    def column(dtype: type = jnp.int32) -> jax.Array:
        return jnp.zeros((table_size,), dtype)

    def own_index() -> jax.Array:
        return jnp.arange(table_size, dtype=jnp.int32)

    return Queue(
        status=column(),
        arrivals=column(),
        priorities=column(),
        prompt_lens=column(),
        num_tokens=column(),
        leaders=own_index(),
        sources=own_index(),
        shared_lens=column(),
        is_lockstep=column(jnp.bool_),
        has_ended=column(jnp.bool_),
        num_preemptions=column(),
        num_cached=column(),
        attributes=Attributes(
            max_tokens=column(),
            submitted=column(),
            deadlines=jnp.full((table_size,), NO_DEADLINE, jnp.int32),
            users=jnp.full((table_size,), NO_USER, jnp.int32),
            user_tokens=column(),
        )
        if has_attributes
        else None,
    )


def requests_view(
    queue: Queue,
    parameters: jax.Array,
    cached_lens: jax.Array | None = None,
    clock: jax.Array | None = None,
) -> Requests:
    """Return the queue as policies see it.

    Args:
      queue: the sequences.
      parameters: f32[P], of the policy.
      cached_lens: i32[R], cached tokens of waiting sequences; None: 0.
      clock: i32[], ms; None if no policy reads it.
    """
    none = jnp.zeros_like(queue.arrivals)
    attributes = queue.attributes
    if attributes is None:
        attributes = Attributes(*[none] * 5)
    # Wraps around where the clock does, after 24 days.
    ages = none if clock is None else clock - attributes.submitted
    times_left = jnp.where(
        attributes.deadlines == NO_DEADLINE, NO_DEADLINE, attributes.deadlines - ages
    )
    return Requests(
        arrivals=queue.arrivals,
        priorities=queue.priorities,
        prompt_lens=queue.prompt_lens,
        num_tokens=queue.num_tokens,
        cached_lens=none if cached_lens is None else cached_lens,
        num_preemptions=queue.num_preemptions,
        leaders=queue.leaders,
        is_waiting=(queue.status == WAITING) | (queue.status == SWAPPED),
        is_running=queue.status == RUNNING,
        max_tokens=attributes.max_tokens,
        ages=ages,
        times_left=times_left,
        users=attributes.users,
        user_tokens=attributes.user_tokens,
        parameters=parameters,
    )


def count_user_tokens(queue: Queue, rows: jax.Array, num_tokens: jax.Array) -> Queue:
    """Add the rows' tokens of a step to those of their users.

    The least served user with a waiting or running request is at 0, so a user who
    comes back after a while has no advantage over the others.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row.
      num_tokens: i32[S], tokens of each row in the step.
    """
    attributes = queue.attributes
    if attributes is None:
        return queue
    users = row_values(attributes.users, rows)
    is_mine = attributes.users[:, None] == users[None, :]
    is_mine &= (rows != NO_REQUEST)[None, :]
    gained = jnp.sum(jnp.where(is_mine, num_tokens[None, :], 0), axis=1)
    total = attributes.user_tokens + gained.astype(jnp.int32)
    is_live = (queue.status == WAITING) | (queue.status == RUNNING)
    is_live |= queue.status == SWAPPED
    least = jnp.min(jnp.where(is_live, total, _LAST))
    total = jnp.maximum(total - jnp.where(jnp.any(is_live), least, 0), 0)
    attributes = dataclasses.replace(attributes, user_tokens=total)
    return dataclasses.replace(queue, attributes=attributes)


def known_user_tokens(queue: Queue, users: jax.Array) -> jax.Array:
    """Return the tokens of users with a sequence in the table, otherwise 0; i32[B].

    Args:
      queue: the sequences; finished ones stay until their entry is used again.
      users: i32[B], numbers of users.
    """
    attributes = queue.attributes
    assert attributes is not None
    is_mine = attributes.users[None, :] == users[:, None]
    return jnp.max(jnp.where(is_mine, attributes.user_tokens[None, :], 0), axis=1)


def own_indices(queue: Queue) -> jax.Array:
    """Return the index of each sequence, i32[R]."""
    return jnp.arange(queue.status.size, dtype=jnp.int32)


def is_new_request(queue: Queue) -> jax.Array:
    """Return the leaders that have never been preempted, bool[R]."""
    return (queue.leaders == own_indices(queue)) & (queue.num_preemptions == 0)


def in_rows(queue: Queue, rows: jax.Array, is_marked: jax.Array) -> jax.Array:
    """Return which sequences have a marked row, bool[R].

    Args:
      queue: the queue.
      rows: i32[S], sequence index of each row.
      is_marked: bool[S].
    """
    is_own = rows[None, :] == own_indices(queue)[:, None]
    return jnp.any(is_own & is_marked[None, :], axis=1)


def row_values(values: jax.Array, rows: jax.Array, fill: int | bool = 0) -> jax.Array:
    """Return `values`, [R], of the sequences in `rows`, [S]; `fill` for empty rows."""
    return jnp.where(rows == NO_REQUEST, fill, take(values, rows))


def idle_rows(queue: Queue, rows: jax.Array) -> jax.Array:
    """Return the rows that take no part in the step, bool[S].

    Idle rows are empty, RETAINED, or have ended before their request.
    """
    status = row_values(queue.status, rows, EMPTY)
    return (status != RUNNING) | row_values(queue.has_ended, rows, False)


def same_request(queue: Queue, rows: jax.Array) -> jax.Array:
    """Return whether two rows run the same request, bool[S, S]; False if empty."""
    leaders = row_values(queue.leaders, rows, NO_REQUEST)
    is_same = leaders[:, None] == leaders[None, :]
    return is_same & (leaders != NO_REQUEST)[:, None]


def has_lasting_source(queue: Queue) -> jax.Array:
    """Return the sequences whose source is always admitted before them, bool[R].

    All sequences of a request are admitted together, and pinned prefixes before all.
    """
    is_same = take(queue.arrivals, queue.sources) == queue.arrivals
    return is_same | (take(queue.priorities, queue.sources) == BEFORE_ALL)


def mapped_tokens(queue: Queue) -> jax.Array:
    """Return the tokens that sequences will map from their sources, i32[R]."""
    status = take(queue.status, queue.sources)
    is_away = (status == WAITING) | (status == SWAPPED)
    is_live = (status == RUNNING) | (status == RETAINED)
    is_live |= is_away & has_lasting_source(queue)
    maps = (queue.sources != own_indices(queue)) & is_live
    return jnp.where(maps, queue.shared_lens, 0)


def rows_before(
    queue: Queue, rows: jax.Array, scores: jax.Array | None = None
) -> jax.Array:
    """Return whether row j comes before row i in the fixed order, bool[S, S].

    The order is priority, arrival, sequence index. RETAINED rows come first, because
    their blocks are never taken; empty rows come last. With `scores`, f32[S] and equal
    for the rows of a request, they come before priority and arrival.
    """
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    is_empty = rows == NO_REQUEST
    is_retained = row_values(queue.status, rows, EMPTY) == RETAINED
    keys = [
        jnp.where(is_empty, 2, jnp.where(is_retained, 0, 1)),
        row_values(queue.priorities, rows, _LAST),
        row_values(queue.arrivals, rows, _LAST),
    ]
    if scores is not None:
        keys.insert(1, scores)
    last = jnp.where(is_empty, index, rows)  # empty rows are compared with each other
    is_before = last[None, :] < last[:, None]
    for key in reversed(keys):
        mine, other = key[:, None], key[None, :]
        is_before = (other < mine) | ((other == mine) & is_before)
    return is_before


def ranks(queue: Queue, rows: jax.Array, scores: jax.Array | None = None) -> jax.Array:
    """Return the rank of each row in the order of `rows_before`, i32[S].

    It counts the rows before each row. For so few rows this runs and compiles faster
    than a sort.
    """
    return jnp.sum(rows_before(queue, rows, scores), axis=1, dtype=jnp.int32)


def sum_before(ranks: jax.Array, values: jax.Array) -> jax.Array:
    """Return the sum of `values`, [S], over the rows with a smaller rank, i32[S]."""
    is_before = ranks[None, :] < ranks[:, None]
    return jnp.sum(jnp.where(is_before, values[None, :], 0), axis=1)


def num_open_rows(
    queue: Queue, rows: jax.Array, scheduler_params: SchedulerParams
) -> jax.Array:
    """Return the number of sequences that can get a row, i32[]."""
    num_running = jnp.sum(row_values(queue.status, rows, EMPTY) == RUNNING)
    return jnp.minimum(
        scheduler_params.max_num_seqs - num_running, jnp.sum(rows == NO_REQUEST)
    )


def first_empty_rows(rows: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first `count` empty rows, and their numbers among the empty rows.

    Returns:
      bool[S], whether the row is one of them; i32[S], its number from 0, and 0 for
      other rows.
    """
    is_empty = rows == NO_REQUEST
    number = jnp.cumsum(is_empty, dtype=jnp.int32) - 1
    is_first = is_empty & (number < count)
    return is_first, jnp.where(is_first, number, 0)


def release_windows(queue: Queue, rows: jax.Array, blocks: BlockState) -> BlockState:
    """Release the blocks in front of the rows' windows, except those of pins.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      blocks: the blocks of the rows.
    """
    if not cache_groups.has_windows(blocks.windows):
        return blocks
    is_pinned = row_values(queue.priorities, rows) == BEFORE_ALL
    return cache_groups.release_front(blocks, is_pinned)


def spare_blocks(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    needed: jax.Array,
    scheduler_params: SchedulerParams,
) -> jax.Array:
    """Return the blocks that new requests may use, i32[].

    These are the free blocks without the watermark and without the blocks that the
    running rows still need for their known tokens. `needed`, i32[S], are the blocks
    that the rows need in this step.
    """
    size = blocks.block_size
    to_map = floor_div(row_values(mapped_tokens(queue), rows), size)
    known = row_values(queue.num_tokens, rows)
    if blocks.drops is not None:
        known = known - blocks.drops.dropped
    expected = cache_groups.num_blocks_to_grow(
        blocks,
        known,
        cache_groups.at_least(cache_groups.num_stored_blocks(blocks), to_map),
        scheduler_params.max_prompt_chunk,
    )
    expected = jnp.where(idle_rows(queue, rows), 0, expected)
    # A row that does not grow may still need a block, for a copy of a shared block.
    expected = jnp.maximum(expected, needed)
    free = block_manager.num_free_blocks(blocks) - jnp.sum(expected)
    is_any = jnp.any(row_values(queue.status, rows, EMPTY) == RUNNING)
    return free - jnp.where(is_any, scheduler_params.num_watermark_blocks, 0)
