"""Preemption: which rows lose their blocks, and which are swapped in again.

Pipeline: queue -> [preemption] -> step.

The docstring of `jpaged.scheduler` explains why every run ends.

Shape symbols: R sequences of the request table, S batch rows.

Source: paper section 4.5.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import policies
from jpaged.arithmetic import cdiv, floor_div
from jpaged.indexing import take
from jpaged.kv import block_manager, cache_groups, swap
from jpaged.kv.block_manager import BlockState
from jpaged.policies import YIELD, Policy, SchedulerParams
from jpaged.scheduler.queue import (
    BEFORE_ALL,
    EMPTY,
    NO_REQUEST,
    RETAINED,
    RUNNING,
    SWAPPED,
    WAITING,
    Queue,
    first_empty_rows,
    has_lasting_source,
    in_rows,
    mapped_tokens,
    num_open_rows,
    own_indices,
    ranks,
    requests_view,
    row_values,
    same_request,
    spare_blocks,
    sum_before,
)


class Swaps(NamedTuple):
    """Sequences whose blocks move, i32[S] by row, NO_REQUEST where none.

    In one step, rows are swapped out or swapped in, never both.
    """

    out: jax.Array  # from the row to the host pool
    into: jax.Array  # from the host pool to the row

    @classmethod
    def none(cls, rows: jax.Array) -> Swaps:
        """Return no swaps."""
        return cls(*(jnp.full_like(rows, NO_REQUEST) for _ in range(2)))


def preempt(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    num_preempted: jax.Array,
    swaps: Swaps | None,
    *,
    needed: jax.Array,
    host: BlockState | None,
    scores: jax.Array | None = None,
) -> tuple[Queue, jax.Array, BlockState, jax.Array, jax.Array, Swaps | None]:
    """Preempt the fewest last requests so that the other rows' tokens fit.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      blocks: the blocks of the rows.
      num_tokens: i32[S], tokens of each row in this step.
      num_preempted: i32[], rows preempted so far in this step.
      swaps: the swaps of this step; None without a host pool.
      needed: i32[S], blocks that each row needs in this step.
      host: the host pool, or None.
      scores: f32[S], from `memory_scores`.

    Returns:
      The first six arguments after the preemption.
    """
    rank = ranks(queue, rows, scores)
    is_preempted = _select_preempted(queue, rows, blocks, needed, rank)
    is_swapped = None
    if host is not None and swaps is not None:
        is_same = same_request(queue, rows)
        is_swapped = swap.fits_on_host(blocks, host, is_preempted, rank, is_same)
        swaps = swaps._replace(out=jnp.where(is_swapped, rows, NO_REQUEST))
    carry = (queue, rows, blocks, num_tokens, num_preempted)
    return *_release_rows(*carry, is_preempted, is_swapped), swaps


def memory_scores(
    queue: Queue,
    rows: jax.Array,
    policy: str | Policy,
    parameters: jax.Array | None,
    clock: jax.Array | None,
) -> jax.Array | None:
    """Return the preemption policy's score of each row's request, f32[S].

    The request that comes first by priority and arrival among those that run has the
    smallest score, whatever the policy says: it is never preempted, so every run ends.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      policy: the preemption policy; the default has no scores.
      parameters: f32[P], of the policy; None for the default.
      clock: i32[], ms; None if no policy reads it.
    """
    if parameters is None:
        return None
    view = requests_view(queue, parameters, clock=clock)
    scores = policies.find(policies.PREEMPTION, policy)(view).astype(jnp.float32)
    # A score that is not a number is preempted before all others, but does not yield.
    scores = jnp.where(jnp.isnan(scores), jnp.finfo(jnp.float32).max, scores)
    scores = row_values(take(scores, queue.leaders), rows)
    is_running = row_values(queue.status, rows, EMPTY) == RUNNING
    rank = ranks(queue, rows)
    first = jnp.min(jnp.where(is_running, rank, rows.shape[0]))
    is_first = jnp.any(same_request(queue, rows) & (rank == first)[None, :], axis=1)
    is_pinned = row_values(queue.priorities, rows) == BEFORE_ALL
    return jnp.where(is_first | is_pinned, -jnp.inf, scores)


def yield_rows(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    num_preempted: jax.Array,
    *,
    scores: jax.Array,
) -> tuple[Queue, jax.Array, BlockState, jax.Array, jax.Array]:
    """Preempt the last requests whose score is `YIELD`, for those that wait.

    At least as many sequences as wait give back their rows, if so many yield. They are
    recomputed, not swapped: no request is admitted while one is swapped.

    Args:
      queue, rows, blocks, num_tokens, num_preempted: as for `preempt`.
      scores: f32[S], from `memory_scores`.

    Returns:
      The first five arguments after the preemption.
    """
    yields = (scores == YIELD) & (row_values(queue.status, rows, EMPTY) == RUNNING)
    rank = ranks(queue, rows, scores)
    is_later = (rank[None, :] > rank[:, None]) & ~same_request(queue, rows)
    num_later = jnp.sum(is_later & yields[None, :], axis=1)
    yields &= num_later < jnp.sum(queue.status == WAITING)
    carry = (queue, rows, blocks, num_tokens, num_preempted)
    return _release_rows(*carry, yields)


def _release_rows(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    num_preempted: jax.Array,
    is_preempted: jax.Array,
    is_swapped: jax.Array | None = None,
) -> tuple[Queue, jax.Array, BlockState, jax.Array, jax.Array]:
    """Preempt rows, bool[S]; swapped ones keep their blocks for the copy."""
    is_mine = in_rows(queue, rows, is_preempted)
    status = jnp.where(is_mine, WAITING, queue.status)
    if is_swapped is not None:
        status = jnp.where(in_rows(queue, rows, is_swapped), SWAPPED, status)
    # A source in another request is not available when the sequence is admitted again.
    loses_source = is_mine & ~has_lasting_source(queue)
    queue = dataclasses.replace(
        queue,
        status=status,
        sources=jnp.where(loses_source, own_indices(queue), queue.sources),
        num_preemptions=queue.num_preemptions + is_mine.astype(jnp.int32),
    )
    is_freed = is_preempted if is_swapped is None else is_preempted & ~is_swapped
    return (
        queue,
        jnp.where(is_preempted, NO_REQUEST, rows),
        block_manager.free(blocks, is_freed),
        jnp.where(is_preempted, 0, num_tokens),
        num_preempted + jnp.sum(is_preempted, dtype=jnp.int32),
    )


def _select_preempted(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    needed: jax.Array,
    rank: jax.Array,
) -> jax.Array:
    """Return the rows to preempt, bool[S].

    If the rows up to rank i stay, they need sum(needed[:i]) blocks, and the rows after
    them release theirs. With growing i the demand grows and the supply shrinks. So if
    the last row of a request can stay, all of its rows can.
    """
    exclusive = block_manager.exclusive_blocks(blocks, rank)
    released = jnp.sum(exclusive) - sum_before(rank, exclusive) - exclusive
    available = block_manager.num_free_blocks(blocks) + released
    stays = sum_before(rank, needed) + needed <= available
    # The first request always fits alone, or, of samples, its first sequence: copies
    # that it needed because others share its blocks are no longer needed then.
    status = row_values(queue.status, rows, EMPTY)
    first = jnp.min(jnp.where(status == RUNNING, rank, rows.shape[0]))
    is_same = same_request(queue, rows)
    is_first = jnp.any(is_same & (rank == first)[None, :], axis=1)
    is_lockstep = row_values(queue.is_lockstep, rows, False)
    stays_alone = is_first & (stays | is_lockstep | (rank == first))
    stays = jnp.all(stays[None, :] | ~is_same, axis=1)
    stays |= stays_alone | (status == RETAINED)
    return ~stays & (rows != NO_REQUEST)


def swap_in_request(
    queue: Queue,
    rows: jax.Array,
    swaps: Swaps,
    blocks: BlockState,
    needed: jax.Array,
    host: BlockState,
    scheduler_params: SchedulerParams,
) -> tuple[Queue, jax.Array, Swaps]:
    """Swap in the first swapped request, if its tokens and sequences fit.

    All of its swapped sequences are swapped in. Exception: if no other request runs, as
    many of its samples as fit. They compute nothing in this step. Only one request is
    swapped in per step, because its demand of blocks is then exact, so that a request
    alone always fits.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      swaps: the swaps of this step.
      blocks: the blocks of the rows.
      needed: i32[S], blocks that each row needs in this step.
      host: the host pool.
      scheduler_params: limits.

    Returns:
      The first three arguments after the swap.
    """
    is_swapped = queue.status == SWAPPED
    keys = (jnp.where(is_swapped, 0, 1), queue.priorities, queue.arrivals)
    first = lax.sort((*keys, own_indices(queue)), num_keys=3)[-1][: rows.size]
    leader = take(queue.leaders, first[0])
    is_mine = is_swapped & (queue.leaders == leader)
    is_valid = take(is_mine, first)

    demand = _swap_in_demand(
        queue, host, first, is_valid, scheduler_params.max_prompt_chunk
    )
    number = jnp.arange(rows.size, dtype=jnp.int32)
    fits = is_valid & (number < num_open_rows(queue, rows, scheduler_params))
    fits &= jnp.cumsum(demand) <= spare_blocks(
        queue, rows, blocks, needed, scheduler_params
    )

    is_running = row_values(queue.status, rows, EMPTY) == RUNNING
    is_other = row_values(queue.leaders, rows, NO_REQUEST) != leader
    is_alone = ~jnp.any(is_running & is_other) & ~take(queue.is_lockstep, leader)
    is_whole = jnp.sum(fits) == jnp.sum(is_mine)
    count = jnp.where(is_whole | is_alone, jnp.sum(fits, dtype=jnp.int32), 0)
    is_first = in_rows(queue, first, number < count)
    queue = dataclasses.replace(
        queue, status=jnp.where(is_first, RUNNING, queue.status)
    )
    is_filled, number = first_empty_rows(rows, count)
    into = jnp.where(is_filled, take(first, number), NO_REQUEST)
    rows = jnp.where(is_filled, into, rows)
    return queue, rows, swaps._replace(into=into)


def _swap_in_demand(
    queue: Queue,
    host: BlockState,
    first: jax.Array,
    is_valid: jax.Array,
    chunk: jax.Array,
) -> jax.Array:
    """Return the blocks of the sequences `first` and of their next tokens, i32[S]."""
    size = host.block_size
    to_map = floor_div(take(mapped_tokens(queue), first), size)
    if host.windows == (None,):
        stored = cdiv(take(host.context_lens, first), size)
    else:
        stored = cache_groups.num_stored_blocks(host)[:, first]
        to_map = jnp.broadcast_to(to_map[None, :], stored.shape)
    stored = jnp.where(stored == 0, to_map, stored)
    known = take(jnp.where(queue.has_ended, 0, queue.num_tokens), first)
    if host.drops is not None:
        known = known - take(host.drops.dropped, first)
    demand = swap.swap_in_demand(host, jnp.where(is_valid, first, NO_REQUEST))
    more = cache_groups.num_blocks_to_grow(host, known, stored, chunk)
    return demand + jnp.where(is_valid, jnp.maximum(more, 0), 0)
