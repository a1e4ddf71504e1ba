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
from jpaged.indexing import take
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
    is_new_request,
    mapped_tokens,
    num_open_rows,
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
    table_size = queue.status.shape[0]
    hits = _drop_shorter_hits(queue, hits)
    scores = _scores(queue, hits, policy, scheduler_params.parameters, clock)
    candidates = _find_candidates(
        queue, rows, blocks, num_tokens, hits, needed, scores, scheduler_params, until
    )
    first = candidates.seq_indices
    is_admitted = jnp.cumprod(candidates.fits.astype(jnp.int32)).astype(jnp.bool_)

    is_filled, number = first_empty_rows(rows, jnp.sum(is_admitted))
    target = jnp.where(is_admitted, first, table_size)
    # Only the first sequence of a new request counts as cached: what the sequences of
    # a request share among themselves is computed by the request itself.
    is_new = is_new_request(queue, first)
    cached = jnp.where(
        is_new, take(hits.lens, first) + mapped_tokens(queue, first, hits), 0
    )
    queue = dataclasses.replace(
        queue,
        status=queue.status.at[target].set(RUNNING, mode="drop"),
        num_cached=queue.num_cached.at[target].add(cached, mode="drop"),
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
        num_admitted + jnp.sum(is_admitted, dtype=jnp.int32),
    )


def _drop_shorter_hits(queue: Queue, hits: Hits) -> Hits:
    """Return the hits without those that are shorter than what the source offers."""
    seq_indices = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    is_shorter = hits.lens < mapped_tokens(queue, seq_indices)
    return dataclasses.replace(hits, lens=jnp.where(is_shorter, 0, hits.lens))


def _scores(
    queue: Queue,
    hits: Hits,
    policy: str | Policy,
    parameters: jax.Array,
    clock: jax.Array | None,
) -> jax.Array:
    """Return the policy's score of each sequence's request, [R]."""
    if policy == policies.ADMISSION.default:
        return jnp.zeros_like(queue.arrivals)
    view = requests_view(queue, parameters, hits.lens, clock)
    scores = policies.find(policies.ADMISSION, policy)(view)
    return take(scores, queue.leaders)


class _Candidates(NamedTuple):
    """The first waiting sequences in the policy's order."""

    seq_indices: jax.Array  # i32[S]
    fits: jax.Array  # bool[S], whether it fits together with those before it
    num_tokens: jax.Array  # i32[S], tokens that it would compute in this step


def _find_candidates(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    hits: Hits,
    needed: jax.Array,
    scores: jax.Array,
    scheduler_params: SchedulerParams,
    until: UntilDecision | None,
) -> _Candidates:
    num_rows = rows.shape[0]
    seq_index = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    is_waiting = queue.status == WAITING
    keys = (
        jnp.where(is_waiting, 0, 1),
        jnp.where(queue.priorities == BEFORE_ALL, 0, 1),
        scores,
        queue.arrivals,
        seq_index,
    )
    first = lax.sort(keys, num_keys=5)[-1][:num_rows]
    is_valid = take(is_waiting, first)

    num_known = jnp.where(queue.has_ended, 0, queue.num_tokens)
    mapped = mapped_tokens(queue, first, hits)
    demand = _block_demand(
        blocks,
        hits,
        first,
        take(num_known, first),
        mapped,
        scheduler_params.max_prompt_chunk,
    )
    demand = jnp.where(is_valid, jnp.maximum(demand, 0), 0)
    # A sequence that waits for its source computes nothing yet, and a lockstep sequence
    # does not compute its last token yet.
    tokens = take(num_known, first) - take(queue.is_lockstep, first).astype(jnp.int32)
    tokens = jnp.minimum(
        tokens - take(hits.lens, first), scheduler_params.max_prompt_chunk
    )
    if until is not None:
        left = take(until.waiting, first) - take(hits.lens, first)
        tokens = jnp.minimum(tokens, left)
    tokens = jnp.where(is_valid & (mapped == 0), jnp.maximum(tokens, 0), 0)
    budget = scheduler_params.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(tokens) - tokens

    free = spare_blocks(queue, rows, blocks, needed, scheduler_params)
    has_row = jnp.arange(num_rows) < num_open_rows(queue, rows, scheduler_params)
    fits = is_valid & (jnp.cumsum(demand) <= free) & has_row
    fits = _whole_requests(queue, rows, first, is_valid, fits, before < budget)
    return _Candidates(first, fits, jnp.clip(budget - before, 0, tokens))


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
    (num_blocks,) = blocks.ref_counts.shape
    number = jnp.arange(first.size, dtype=jnp.int32)[:, None]
    first_user = jnp.full(num_blocks, first.size, jnp.int32)
    first_user = first_user.at[jnp.where(is_hit, tables, num_blocks)].min(
        jnp.broadcast_to(number, tables.shape), mode="drop"
    )
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
    is_waiting = queue.status == WAITING
    request_size = jnp.zeros_like(queue.leaders)
    request_size = request_size.at[queue.leaders].add(is_waiting.astype(jnp.int32))
    is_complete = jnp.sum(is_same, axis=1) == request_size[take(queue.leaders, first)]
    fits &= has_budget[jnp.argmax(is_same, axis=1)]
    fits_whole = is_complete & jnp.all(fits[None, :] | ~is_same, axis=1)
    is_other = row_values(queue.leaders, rows, NO_REQUEST) != leaders[0]
    is_running = row_values(queue.status, rows, EMPTY) == RUNNING
    is_alone = ~jnp.any(is_other & is_running)
    fits_alone = is_alone & (leaders == leaders[0]) & ~take(queue.is_lockstep, first)
    return fits & (fits_whole | fits_alone)
