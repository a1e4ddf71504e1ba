"""Admission: which waiting sequences get a row, in the policy's order.

Pipeline: queue -> [admission] -> step.

Shape symbols: R sequences of the request table, S batch rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import policies
from jpaged.arithmetic import floor_div, remainder
from jpaged.indexing import least, take
from jpaged.kv import block_manager, cache_groups
from jpaged.kv.block_manager import NO_BLOCK, BlockState
from jpaged.policies import Policy, SchedulerParams
from jpaged.scheduler.queue import (
    BEFORE_ALL,
    EMPTY,
    NO_REQUEST,
    RUNNING,
    SWAPPED,
    WAITING,
    Hits,
    Queue,
    UntilDecision,
    first_empty_rows,
    in_rows,
    is_new_request,
    mapped_tokens,
    num_open_rows,
    own_indices,
    requests_view,
    row_values,
    spare_blocks,
)


def can_admit(queue: Queue, rows: jax.Array) -> jax.Array:
    """Return whether a sequence waits, a row is empty and none is swapped, bool[]."""
    is_open = jnp.any(queue.status == WAITING) & jnp.any(rows == NO_REQUEST)
    return is_open & ~jnp.any(queue.status == SWAPPED)


def admit(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    num_admitted: jax.Array,
    *,
    hits: Hits,
    needed: jax.Array,
    policy: str | Policy,
    scheduler_params: SchedulerParams,
    clock: jax.Array | None = None,
    until: UntilDecision | None = None,
) -> tuple[Queue, jax.Array, BlockState, jax.Array, jax.Array]:
    """Give rows to waiting requests, in order, up to the first that does not fit.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      blocks: the blocks of the rows.
      num_tokens: i32[S], tokens of the running rows in this step.
      num_admitted: i32[], sequences admitted so far in this step.
      hits: the cached prefixes.
      needed: i32[S], blocks that the running rows need in this step.
      policy: decides the order.
      scheduler_params: limits.
      clock: i32[], ms; None if no policy reads it.
      until: tokens that retention lets sequences compute; None: no limit.

    Returns:
      The first five arguments after the admission.
    """
    mapped = mapped_tokens(queue)
    # A sequence maps the cached prefix, or what its source offers, whichever is longer.
    hits = dataclasses.replace(hits, lens=jnp.where(hits.lens < mapped, 0, hits.lens))
    mapped = jnp.where(hits.lens > 0, 0, mapped)
    scores = _scores(queue, hits, policy, scheduler_params.parameters, clock)
    candidates = _find_candidates(
        queue,
        rows,
        blocks,
        num_tokens,
        hits,
        mapped,
        needed,
        scores,
        scheduler_params,
        until,
    )
    first, num_fitting = candidates.seq_indices, candidates.num_fitting

    is_filled, number = first_empty_rows(rows, num_fitting)
    is_admitted = in_rows(queue, first, candidates.number < num_fitting)
    # Only the first sequence of a new request counts as cached: what the sequences of
    # a request share among themselves is computed by the request itself.
    cached = jnp.where(is_admitted & is_new_request(queue), hits.lens + mapped, 0)
    queue = dataclasses.replace(
        queue,
        status=jnp.where(is_admitted, RUNNING, queue.status),
        num_cached=queue.num_cached + cached,
    )
    rows = jnp.where(is_filled, take(first, number), rows)
    blocks = block_manager.adopt(
        blocks,
        take(hits.block_tables, rows),
        jnp.where(is_filled, take(hits.lens, rows), 0),
    )
    return (
        queue,
        rows,
        blocks,
        jnp.where(is_filled, take(candidates.num_tokens, number), num_tokens),
        num_admitted + num_fitting,
    )


def _scores(
    queue: Queue,
    hits: Hits,
    policy: str | Policy,
    parameters: jax.Array,
    clock: jax.Array | None,
) -> jax.Array | None:
    """Return the policy's score of each sequence's request, [R]; None: all equal."""
    if policy == policies.ADMISSION.default:
        return None
    view = requests_view(queue, parameters, hits.lens, clock)
    scores = policies.find(policies.ADMISSION, policy)(view)
    return take(scores, queue.leaders)


class _Candidates(NamedTuple):
    """The first waiting sequences in the policy's order."""

    seq_indices: jax.Array  # i32[S]
    number: jax.Array  # i32[S], from 0
    num_fitting: jax.Array  # i32[], the first ones, which fit together
    num_tokens: jax.Array  # i32[S], tokens that it would compute in this step


def _find_candidates(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    hits: Hits,
    mapped: jax.Array,
    needed: jax.Array,
    scores: jax.Array | None,
    scheduler_params: SchedulerParams,
    until: UntilDecision | None,
) -> _Candidates:
    is_waiting = queue.status == WAITING
    rank = jnp.where(queue.priorities == BEFORE_ALL, 0, 1)
    keys = (jnp.where(is_waiting, rank, 2), queue.arrivals, own_indices(queue))
    if scores is not None:
        keys = (keys[0], scores, *keys[1:])
    first = lax.sort(keys, num_keys=len(keys) - 1)[-1][: rows.size]
    is_valid = take(is_waiting, first)

    num_known = jnp.where(queue.has_ended, 0, queue.num_tokens)
    demand = _block_demand(
        blocks,
        hits,
        first,
        take(num_known, first),
        take(mapped, first),
        scheduler_params.max_prompt_chunk,
    )
    demand = jnp.where(is_valid, jnp.maximum(demand, 0), 0)
    # A sequence that waits for its source computes nothing yet, and a lockstep sequence
    # does not compute its last token yet.
    tokens = num_known - queue.is_lockstep.astype(jnp.int32)
    if until is not None:
        tokens = jnp.minimum(tokens, until.waiting)
    tokens = jnp.minimum(tokens - hits.lens, scheduler_params.max_prompt_chunk)
    tokens = take(jnp.where(is_waiting & (mapped == 0), tokens, 0), first)
    tokens = jnp.maximum(tokens, 0)
    budget = scheduler_params.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(tokens) - tokens

    free = spare_blocks(queue, rows, blocks, needed, scheduler_params)
    number = jnp.arange(rows.size, dtype=jnp.int32)
    has_row = number < num_open_rows(queue, rows, scheduler_params)
    fits = is_valid & (jnp.cumsum(demand) <= free) & has_row
    fits = _whole_requests(queue, rows, first, is_valid, fits, before < budget)
    num_fitting = jnp.min(jnp.where(fits, rows.size, number))
    tokens = jnp.clip(budget - before, 0, tokens)
    return _Candidates(first, number, num_fitting, tokens)


def _block_demand(
    blocks: BlockState,
    hits: Hits,
    first: jax.Array,
    num_known: jax.Array,
    mapped: jax.Array,
    chunk: jax.Array,
) -> jax.Array:
    """Return the free blocks that each candidate would use, i32[S].

    A cached block that no row uses counts as free, and mapping it uses it up. It counts
    for the first candidate that maps it.
    """
    size = blocks.block_size
    column = jnp.arange(hits.block_tables.shape[1], dtype=jnp.int32)
    if (num_groups := len(blocks.windows)) > 1:
        column = remainder(column, column.size // num_groups)
    tables = take(hits.block_tables, first)
    is_hit = column[None, :] < floor_div(take(hits.lens, first), size)[:, None]
    if cache_groups.has_windows(blocks.windows):
        is_hit &= tables != NO_BLOCK
    number = jnp.arange(first.size, dtype=jnp.int32)[:, None]
    first_user = jnp.full(blocks.ref_counts.shape, first.size, jnp.int32)
    first_user = least(first_user, jnp.where(is_hit, tables, NO_BLOCK), number)
    is_used = take(blocks.ref_counts, tables) > 0
    is_used |= take(first_user, tables) < number
    num_used = jnp.sum(is_hit & is_used, axis=1, dtype=jnp.int32)
    mapped = floor_div(mapped, size)
    return cache_groups.num_blocks_to_grow(blocks, num_known, mapped, chunk) - num_used


def _whole_requests(
    queue: Queue,
    rows: jax.Array,
    first: jax.Array,
    is_valid: jax.Array,
    fits: jax.Array,
    has_budget: jax.Array,
) -> jax.Array:
    """Return which candidates fit as whole requests, bool[S].

    All sequences of a request fit, or none. For the token budget, the request's first
    sequence decides. Exception: if no other request runs, as many samples of the first
    request as fit are admitted.
    """
    leaders = jnp.where(is_valid, take(queue.leaders, first), NO_REQUEST)
    is_same = leaders[:, None] == leaders[None, :]
    waiting = jnp.where(queue.status == WAITING, queue.leaders, NO_REQUEST)
    request_size = jnp.sum(waiting[None, :] == leaders[:, None], axis=1)
    is_complete = jnp.sum(is_same, axis=1) == request_size
    fits &= has_budget[jnp.argmax(is_same, axis=1)]
    fits_whole = is_complete & jnp.all(fits[None, :] | ~is_same, axis=1)
    is_other = row_values(queue.leaders, rows, NO_REQUEST) != leaders[0]
    is_running = row_values(queue.status, rows, EMPTY) == RUNNING
    is_alone = ~jnp.any(is_other & is_running)
    fits_alone = is_alone & (leaders == leaders[0]) & ~take(queue.is_lockstep, first)
    return fits & (fits_whole | fits_alone)
