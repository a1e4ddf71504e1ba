"""Scheduler: who runs in this step, and with how many tokens.

Place on the road: request table -> [scheduler] -> block manager.

A pure function of lengths, tables and the queue: it never sees a token, so the engine
and the simulator run the same one. Iteration-level scheduling with chunked prompts
(paper section 4.3): running rows decode one token each, what is left of the step's
budget goes to prompts, and requests are admitted while their prompts fit into the free
blocks. When blocks run out the latest rows give theirs back and are computed again
later, from their prompt and what they had generated (paper section 4.5).

Progress: rows and waiting requests have one total order that does not change (policy,
arrival, place). Memory is given in that order, so the first unfinished request is never
preempted and gets at least a token in each step; `submit` refuses a request that does
not fit into the whole pool alone. So every run ends.

Letters: R places of the request table, S rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import block_manager
from jpaged.block_manager import BlockState
from jpaged.compat import when
from jpaged.config import EngineConfig

# Status of a place in the request table.
EMPTY, WAITING, RUNNING, FINISHED = range(4)
NO_REQUEST = -1
_LAST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """What the scheduler knows of each sequence."""

    status: jax.Array  # i32[R]
    arrivals: jax.Array  # i32[R], rank of arrival; samples of one request share it
    priorities: jax.Array  # i32[R], smaller is sooner; all 0 under "fcfs"
    prompt_lens: jax.Array  # i32[R]
    num_tokens: jax.Array  # i32[R], known tokens: the prompt and what was generated
    leaders: jax.Array  # i32[R], the place of the request's first sample
    num_preemptions: jax.Array  # i32[R]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step does."""

    num_tokens: jax.Array  # i32[S], tokens of each row; 0: not in this step
    num_preempted: jax.Array  # i32[], rows that gave their blocks back


def init_queue(num_places: int) -> Queue:
    """An empty queue."""

    def column() -> jax.Array:
        return jnp.zeros((num_places,), jnp.int32)

    leaders = jnp.arange(num_places, dtype=jnp.int32)
    return Queue(
        status=column(),
        arrivals=column(),
        priorities=column(),
        prompt_lens=column(),
        num_tokens=column(),
        leaders=leaders,
        num_preemptions=column(),
    )


def schedule(
    queue: Queue, rows: jax.Array, blocks: BlockState, config: EngineConfig
) -> tuple[Queue, jax.Array, BlockState, Plan]:
    """The queue, rows and blocks after admission and preemption, and the step's plan.

    Args:
      queue: the request table's scheduling side.
      rows: i32[S], the place in the request table that each row runs, or NO_REQUEST.
      blocks: block manager's state; its rows are `rows`.
      config: sizes and policy.

    `block_manager.append(blocks, plan.num_tokens)` then always succeeds.
    """
    blocks, wanted = _join_leaders(queue, rows, blocks)
    num_tokens = _share_budget(queue, rows, wanted, config)
    needed = block_manager.blocks_needed(blocks, num_tokens)
    is_short = jnp.sum(needed) > block_manager.num_free_blocks(blocks)
    carry = (queue, rows, blocks, num_tokens, jnp.int32(0))
    carry = when(is_short, lambda carry: _preempt(*carry, needed=needed), carry)
    queue, rows, blocks, num_tokens, num_preempted = carry

    # Nothing is admitted in a step that had to take blocks back.
    is_open = jnp.any(queue.status == WAITING) & jnp.any(rows == NO_REQUEST)
    is_open &= ~is_short & (jnp.sum(num_tokens) < config.max_num_batched_tokens)
    carry = when(
        is_open,
        lambda carry: _admit(*carry, needed=needed, config=config),
        (queue, rows, blocks, num_tokens),
    )
    queue, rows, blocks, num_tokens = carry
    return queue, rows, blocks, Plan(num_tokens, num_preempted)


def row_values(values: jax.Array, rows: jax.Array, fill: int = 0) -> jax.Array:
    """`values` [R] of the requests that the rows run; `fill` for empty rows."""
    return jnp.where(rows == NO_REQUEST, fill, values[jnp.maximum(rows, 0)])


def _join_leaders(
    queue: Queue, rows: jax.Array, blocks: BlockState
) -> tuple[BlockState, jax.Array]:
    """The blocks, and the tokens that each row has yet to compute, i32[S].

    A further sample of a request waits until the first one, its leader, has computed
    their prompt, and then maps the leader's blocks, the prompt's last token excepted:
    computing that again gives the logits to sample from. Copy-on-write follows from
    the reference counts (paper section 4.4, parallel sampling).
    """
    wanted = row_values(queue.num_tokens, rows) - blocks.context_lens
    leaders = row_values(queue.leaders, rows, NO_REQUEST)
    is_new = (leaders != rows) & (blocks.context_lens == 0)

    def join(carry):
        blocks, wanted = carry
        is_leader = (rows[None, :] == leaders[:, None]) & is_new[:, None]
        leader_row = jnp.argmax(is_leader, axis=1).astype(jnp.int32)
        shared = row_values(queue.prompt_lens, rows) - 1
        has_leader = jnp.any(is_leader, axis=1) & (shared > 0)
        joins = has_leader & (blocks.context_lens[leader_row] >= shared)
        own = jnp.arange(rows.shape[0], dtype=jnp.int32)
        blocks = block_manager.fork(blocks, jnp.where(joins, leader_row, own))
        blocks = block_manager.truncate(
            blocks, jnp.where(joins, shared, blocks.context_lens)
        )
        wanted = jnp.where(joins, wanted - shared, wanted)
        return blocks, jnp.where(has_leader & ~joins, 0, wanted)

    return when(jnp.any(is_new), join, (blocks, wanted))


def _shared_tokens(queue: Queue, places: jax.Array) -> jax.Array:
    """Tokens that the requests at `places` will map from their leaders."""
    leaders = queue.leaders[places]
    status = queue.status[leaders]
    is_shared = (leaders != places) & ((status == WAITING) | (status == RUNNING))
    return jnp.where(is_shared, queue.prompt_lens[places] - 1, 0)


def _ranks(queue: Queue, rows: jax.Array) -> jax.Array:
    """Rank of each row by priority, arrival and place, i32[S]; empty rows behind.

    Counts the rows before each: for this few rows cheaper than a sort, to run and to
    compile.
    """
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    keys = (
        row_values(queue.priorities, rows, _LAST),
        row_values(queue.arrivals, rows, _LAST),
        jnp.where(rows == NO_REQUEST, _LAST, rows),
        index,
    )
    is_before = jnp.zeros((rows.shape[0],) * 2, jnp.bool_)
    for key in reversed(keys):
        mine, other = key[:, None], key[None, :]
        is_before = (other < mine) | ((other == mine) & is_before)
    return jnp.sum(is_before, axis=1, dtype=jnp.int32)


def _sum_before(ranks: jax.Array, values: jax.Array) -> jax.Array:
    """Sum of the values [S] of the rows with a smaller rank, i32[S]."""
    is_before = ranks[None, :] < ranks[:, None]
    return jnp.sum(jnp.where(is_before, values[None, :], 0), axis=1)


def _share_budget(queue, rows, wanted, config) -> jax.Array:
    """Tokens of each row, i32[S]: one for a decode, and the rest to prompts in turn."""
    decodes = (wanted == 1).astype(jnp.int32)
    num_decodes = jnp.sum(decodes)

    def chunks(num_tokens: jax.Array) -> jax.Array:
        left = jnp.where(wanted > 1, wanted, 0)
        before = _sum_before(_ranks(queue, rows), left)
        budget = config.max_num_batched_tokens - num_decodes
        return num_tokens + jnp.clip(budget - before, 0, left)

    return when(jnp.any(wanted > 1), chunks, decodes)


def _preempt(queue, rows, blocks, num_tokens, num_preempted, *, needed):
    """Drops the fewest last rows that leave the others room for their tokens.

    If the rows up to rank i stay, they need sum(needed[:i]) blocks, and what the rows
    behind hold comes back: the first side grows with i and the second shrinks.
    """
    rank = _ranks(queue, rows)
    held = block_manager.exclusive_blocks(blocks, rank)
    returned = jnp.sum(held) - _sum_before(rank, held) - held
    available = block_manager.num_free_blocks(blocks) + returned
    # The first row always fits alone; what it was told to copy, it shares no longer.
    stays = (_sum_before(rank, needed) + needed <= available) | (rank == 0)
    dropped = ~stays & (rows != NO_REQUEST)

    place = jnp.where(dropped, rows, queue.status.shape[0])
    queue = dataclasses.replace(
        queue,
        status=queue.status.at[place].set(WAITING, mode="drop"),
        num_preemptions=queue.num_preemptions.at[place].add(1, mode="drop"),
    )
    return (
        queue,
        jnp.where(dropped, NO_REQUEST, rows),
        block_manager.free(blocks, dropped),
        jnp.where(dropped, 0, num_tokens),
        num_preempted + jnp.sum(dropped, dtype=jnp.int32),
    )


def _admit(queue, rows, blocks, num_tokens, *, needed, config):
    """Gives waiting requests rows, in order, up to the first that does not fit."""
    num_rows = rows.shape[0]
    num_places = queue.status.shape[0]
    place = jnp.arange(num_places, dtype=jnp.int32)
    is_waiting = queue.status == WAITING
    keys = (
        jnp.where(is_waiting, 0, 1),
        queue.priorities,
        queue.arrivals,
        place,
    )
    first = lax.sort(keys, num_keys=4)[-1][:num_rows]  # candidates, in order
    valid = is_waiting[first]

    shared = _shared_tokens(queue, first)
    size = config.block_size
    # What the running rows' known tokens will take is as good as taken.
    held = -(-blocks.context_lens // size)
    to_map = row_values(_shared_tokens(queue, place), rows) // size
    expected = -(-row_values(queue.num_tokens, rows) // size)
    expected -= jnp.maximum(held, to_map)
    # A copy of a shared block is needed by a row that does not grow.
    expected = jnp.maximum(expected, needed)
    free = block_manager.num_free_blocks(blocks) - jnp.sum(expected)
    free -= jnp.where(jnp.any(rows != NO_REQUEST), config.num_watermark_blocks, 0)
    needs = -(-queue.num_tokens[first] // size) - shared // size
    # A sample that waits for its leader computes nothing yet.
    tokens = jnp.where(shared > 0, 0, queue.num_tokens[first])
    left = config.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(tokens) - tokens
    fits = valid & (jnp.cumsum(needs) <= free) & (before < left)
    num_running = jnp.sum(rows != NO_REQUEST)
    fits &= jnp.arange(num_rows) < config.max_num_seqs - num_running
    admitted = jnp.cumprod(fits.astype(jnp.int32)).astype(jnp.bool_)

    # The k-th admitted request takes the k-th empty row.
    is_free = rows == NO_REQUEST
    turn = jnp.cumsum(is_free) - 1
    takes = is_free & (turn < jnp.sum(admitted))
    turn = jnp.where(takes, turn, 0)
    chunk = jnp.clip(left - before, 0, tokens)
    target = jnp.where(admitted, first, num_places)
    queue = dataclasses.replace(
        queue, status=queue.status.at[target].set(RUNNING, mode="drop")
    )
    return (
        queue,
        jnp.where(takes, first[turn], rows),
        blocks,
        jnp.where(takes, chunk[turn], num_tokens),
    )
