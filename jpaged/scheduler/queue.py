"""Queue: what the scheduler knows of each sequence, and the order they stand in.

Letters: R places of the request table, S rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.kv import block_manager
from jpaged.policies import SchedulerParams

# Status of a place in the request table. HELD takes no part, and keeps what it has:
# a pinned prefix its row and blocks, a finished beam of a running search its tokens.
# SWAPPED waits as well, and has its blocks in the host's memory.
EMPTY, WAITING, RUNNING, FINISHED, RETAINED, SWAPPED = range(6)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hits:
    """What the prefix cache has of each waiting sequence."""

    block_tables: jax.Array  # i32[R, M]
    lens: jax.Array  # i32[R], tokens in them, whole blocks; less than the known tokens

    @classmethod
    def none(cls, table_size: int, max_blocks_per_seq: int) -> Hits:
        """Nothing for anybody."""
        return cls(
            jnp.full((table_size, max_blocks_per_seq), block_manager.NO_BLOCK),
            jnp.zeros((table_size,), jnp.int32),
        )


def init_queue(table_size: int) -> Queue:
    """An empty queue."""

    def column(dtype: type = jnp.int32) -> jax.Array:
        return jnp.zeros((table_size,), dtype)

    def own() -> jax.Array:
        return jnp.arange(table_size, dtype=jnp.int32)

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


def is_new_request(queue: Queue, seq_indices: jax.Array) -> jax.Array:
    """Whether at `seq_indices` are first sequences of requests never preempted yet."""
    return (queue.leaders[seq_indices] == seq_indices) & (
        queue.num_preemptions[seq_indices] == 0
    )


def row_values(values: jax.Array, rows: jax.Array, fill: int | bool = 0) -> jax.Array:
    """`values` [R] of the requests that the rows run; `fill` for empty rows."""
    return jnp.where(rows == NO_REQUEST, fill, values[jnp.maximum(rows, 0)])


def idle_rows(queue: Queue, rows: jax.Array) -> jax.Array:
    """Rows that take no part: empty, held, or ended before their request; bool[S]."""
    status = row_values(queue.status, rows, EMPTY)
    return (status != RUNNING) | row_values(queue.has_ended, rows, False)


def same_request(queue: Queue, rows: jax.Array) -> jax.Array:
    """Whether two rows run sequences of one request, bool[S, S]; empty rows are not."""
    leaders = row_values(queue.leaders, rows, NO_REQUEST)
    is_same = leaders[:, None] == leaders[None, :]
    return is_same & (leaders != NO_REQUEST)[:, None]


def mapped_tokens(
    queue: Queue, seq_indices: jax.Array, hits: Hits | None = None
) -> jax.Array:
    """Tokens that the sequences at `seq_indices` will map from their sources.

    None for those that have `hits`, which they take instead.
    """
    sources = queue.sources[seq_indices]
    status = queue.status[sources]
    # Of one request all are admitted together, and pinned prefixes first of all.
    comes = queue.arrivals[sources] == queue.arrivals[seq_indices]
    comes |= queue.priorities[sources] == BEFORE_ALL
    is_away = (status == WAITING) | (status == SWAPPED)
    is_live = (status == RUNNING) | (status == RETAINED) | (is_away & comes)
    maps = (sources != seq_indices) & is_live
    if hits is not None:
        maps &= hits.lens[seq_indices] == 0
    return jnp.where(maps, queue.shared_lens[seq_indices], 0)


def rows_before(queue: Queue, rows: jax.Array) -> jax.Array:
    """Whether row j comes before row i by priority, arrival and place, bool[S, S].

    Held rows come before all, since nobody takes their blocks; empty rows behind.
    """
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    is_empty = rows == NO_REQUEST
    is_held = row_values(queue.status, rows, EMPTY) == RETAINED
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


def ranks(queue: Queue, rows: jax.Array) -> jax.Array:
    """Rank of each row in that order, i32[S].

    Counts the rows before each: for this few rows cheaper than a sort, to run and to
    compile.
    """
    return jnp.sum(rows_before(queue, rows), axis=1, dtype=jnp.int32)


def sum_before(ranks: jax.Array, values: jax.Array) -> jax.Array:
    """Sum of the values [S] of the rows with a smaller rank, i32[S]."""
    is_before = ranks[None, :] < ranks[:, None]
    return jnp.sum(jnp.where(is_before, values[None, :], 0), axis=1)


def num_open_rows(
    queue: Queue, rows: jax.Array, scheduler_params: SchedulerParams
) -> jax.Array:
    """Sequences that may get a row, i32[]."""
    num_running = jnp.sum(row_values(queue.status, rows, EMPTY) == RUNNING)
    return jnp.minimum(
        scheduler_params.max_num_seqs - num_running, jnp.sum(rows == NO_REQUEST)
    )


def take_rows(rows: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows are the first `count` empty ones, bool[S], and their turns, i32[S].

    The turn counts from 0, and is 0 for other rows.
    """
    is_free = rows == NO_REQUEST
    turn = jnp.cumsum(is_free) - 1
    takes = is_free & (turn < count)
    return takes, jnp.where(takes, turn, 0)


def spare_blocks(queue, rows, blocks, needed, scheduler_params) -> jax.Array:
    """Blocks that new requests may take, i32[]."""
    # What the running rows' known tokens will take is as good as taken.
    size = blocks.block_size
    held = cdiv(blocks.context_lens, size)
    seq_index = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    to_map = row_values(mapped_tokens(queue, seq_index), rows) // size
    expected = cdiv(row_values(queue.num_tokens, rows), size)
    expected = jnp.where(
        idle_rows(queue, rows), 0, expected - jnp.maximum(held, to_map)
    )
    # A copy of a shared block is needed by a row that does not grow.
    expected = jnp.maximum(expected, needed)
    free = block_manager.num_free_blocks(blocks) - jnp.sum(expected)
    is_any = jnp.any(row_values(queue.status, rows, EMPTY) == RUNNING)
    return free - jnp.where(is_any, scheduler_params.num_watermark_blocks, 0)
