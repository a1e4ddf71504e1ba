"""Queue: the scheduler's state of each sequence, and the fixed order of sequences.

Pipeline: request table -> [queue] -> admission, preemption.

Shape symbols: R sequences of the request table, S batch rows, M blocks per row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv, floor_div
from jpaged.indexing import take
from jpaged.kv import block_manager
from jpaged.kv.block_manager import BlockState
from jpaged.policies import SchedulerParams

# Status of a sequence in the request table. RETAINED takes part in no step and keeps
# what it has: a pinned prefix its row and blocks, a finished beam of a running search
# its tokens. SWAPPED waits too, and its blocks are in the host pool.
EMPTY, WAITING, RUNNING, FINISHED, RETAINED, SWAPPED = range(6)
NO_REQUEST = -1
BEFORE_ALL = jnp.iinfo(jnp.int32).min  # priority of pinned prefixes
_LAST = jnp.iinfo(jnp.int32).max


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


def init_queue(table_size: int) -> Queue:
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
    )


def is_new_request(queue: Queue, seq_indices: jax.Array) -> jax.Array:
    """Return whether each is the first sequence of a request never preempted so far."""
    return (take(queue.leaders, seq_indices) == seq_indices) & (
        take(queue.num_preemptions, seq_indices) == 0
    )


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


def mapped_tokens(
    queue: Queue, seq_indices: jax.Array, hits: Hits | None = None
) -> jax.Array:
    """Return the tokens that sequences will map from their sources, i32 per sequence.

    0 for sequences with `hits`, because they map the cached prefix instead.
    """
    sources = take(queue.sources, seq_indices)
    status = take(queue.status, sources)
    # All sequences of a request are admitted together, and pinned prefixes before all.
    is_admitted_before = take(queue.arrivals, sources) == take(
        queue.arrivals, seq_indices
    )
    is_admitted_before |= take(queue.priorities, sources) == BEFORE_ALL
    is_away = (status == WAITING) | (status == SWAPPED)
    is_live = (status == RUNNING) | (status == RETAINED)
    is_live |= is_away & is_admitted_before
    maps = (sources != seq_indices) & is_live
    if hits is not None:
        maps &= take(hits.lens, seq_indices) == 0
    return jnp.where(maps, take(queue.shared_lens, seq_indices), 0)


def rows_before(queue: Queue, rows: jax.Array) -> jax.Array:
    """Return whether row j comes before row i in the fixed order, bool[S, S].

    The order is priority, arrival, sequence index. RETAINED rows come first, because
    their blocks are never taken; empty rows come last.
    """
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    is_empty = rows == NO_REQUEST
    is_retained = row_values(queue.status, rows, EMPTY) == RETAINED
    keys = (
        jnp.where(is_empty, 2, jnp.where(is_retained, 0, 1)),
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


def ranks(queue: Queue, rows: jax.Array) -> jax.Array:
    """Return the rank of each row in the fixed order, i32[S].

    It counts the rows before each row. For so few rows this runs and compiles faster
    than a sort.
    """
    return jnp.sum(rows_before(queue, rows), axis=1, dtype=jnp.int32)


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
    number = jnp.cumsum(is_empty) - 1
    is_first = is_empty & (number < count)
    return is_first, jnp.where(is_first, number, 0)


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
    num_used = cdiv(blocks.context_lens, size)
    seq_index = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    to_map = floor_div(row_values(mapped_tokens(queue, seq_index), rows), size)
    expected = cdiv(row_values(queue.num_tokens, rows), size)
    expected = jnp.where(
        idle_rows(queue, rows), 0, expected - jnp.maximum(num_used, to_map)
    )
    # A row that does not grow may still need a block, for a copy of a shared block.
    expected = jnp.maximum(expected, needed)
    free = block_manager.num_free_blocks(blocks) - jnp.sum(expected)
    is_any = jnp.any(row_values(queue.status, rows, EMPTY) == RUNNING)
    return free - jnp.where(is_any, scheduler_params.num_watermark_blocks, 0)
