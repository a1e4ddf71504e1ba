"""Admission: who of those that wait gets a row, in the policy's order.

Letters: R places of the request table, S rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged import policies
from jpaged.arithmetic import cdiv
from jpaged.kv import block_manager
from jpaged.policies import SchedulerParams
from jpaged.scheduler.queue import (
    BEFORE_ALL,
    EMPTY,
    NO_REQUEST,
    RUNNING,
    SWAPPED,
    WAITING,
    Hits,
    Queue,
    is_new_request,
    mapped_tokens,
    num_open_rows,
    row_values,
    spare_blocks,
    take_rows,
)


def can_admit(queue: Queue, rows: jax.Array) -> jax.Array:
    """bool[]: some sequence waits, there is a row for it, and nobody is swapped."""
    is_open = jnp.any(queue.status == WAITING) & jnp.any(rows == NO_REQUEST)
    return is_open & ~jnp.any(queue.status == SWAPPED)


def admit(
    queue,
    rows,
    blocks,
    num_tokens,
    num_admitted,
    *,
    hits,
    needed,
    policy,
    scheduler_params,
):
    """Gives waiting requests rows, in order, up to the first that does not fit."""
    table_size = queue.status.shape[0]
    hits = _worth_taking(queue, hits)
    first, fits, tokens = _candidates(
        queue, rows, blocks, num_tokens, hits, needed, policy, scheduler_params
    )
    admitted = jnp.cumprod(fits.astype(jnp.int32)).astype(jnp.bool_)

    takes, turn = take_rows(rows, jnp.sum(admitted))
    target = jnp.where(admitted, first, table_size)
    # What a request's own sequences share is nothing that others had computed.
    is_new = is_new_request(queue, first)
    cached = jnp.where(is_new, hits.lens[first] + mapped_tokens(queue, first, hits), 0)
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
    seq_indices = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    is_less = hits.lens < mapped_tokens(queue, seq_indices)
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


def _candidates(
    queue,
    rows,
    blocks,
    num_tokens,
    hits,
    needed,
    policy,
    scheduler_params: SchedulerParams,
):
    """The first waiting sequences, whether each fits behind those before it, and the
    tokens that it would compute in this step: i32[S], bool[S], i32[S].
    """
    num_rows = rows.shape[0]
    seq_index = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
    is_waiting = queue.status == WAITING
    scores = _scores(queue, hits, policy, scheduler_params.parameters)
    keys = (
        jnp.where(is_waiting, 0, 1),
        jnp.where(queue.priorities == BEFORE_ALL, 0, 1),
        scores,
        queue.arrivals,
        seq_index,
    )
    first = lax.sort(keys, num_keys=5)[-1][:num_rows]  # in order
    valid = is_waiting[first]

    size = blocks.block_size
    num_known = jnp.where(queue.has_ended, 0, queue.num_tokens)
    mapped = mapped_tokens(queue, first, hits)
    # A cached block that nobody uses counts as free, and is taken like one.
    column = jnp.arange(hits.block_tables.shape[1], dtype=jnp.int32)
    is_hit = column[None, :] < (hits.lens[first] // size)[:, None]
    is_used = blocks.ref_counts[hits.block_tables[first]] > 0
    num_used = jnp.sum(is_hit & is_used, axis=1, dtype=jnp.int32)
    needs = cdiv(num_known[first], size) - mapped // size - num_used
    needs = jnp.where(valid, jnp.maximum(needs, 0), 0)
    # Who waits for a source computes nothing yet, and lockstep rows not their last.
    tokens = num_known[first] - queue.is_lockstep[first].astype(jnp.int32)
    tokens = jnp.minimum(tokens - hits.lens[first], scheduler_params.max_prompt_chunk)
    tokens = jnp.where(valid & (mapped == 0), jnp.maximum(tokens, 0), 0)
    left = scheduler_params.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(tokens) - tokens

    free = spare_blocks(queue, rows, blocks, needed, scheduler_params)
    has_row = jnp.arange(num_rows) < num_open_rows(queue, rows, scheduler_params)
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
