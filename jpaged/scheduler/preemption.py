"""Preemption: who gives its blocks back, and who comes back (paper section 4.5).

Why every run ends, the package's docstring says.

Letters: R places of the request table, S rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.kv import block_manager, swap
from jpaged.policies import SchedulerParams
from jpaged.scheduler.queue import (
    BEFORE_ALL,
    EMPTY,
    NO_REQUEST,
    RETAINED,
    RUNNING,
    SWAPPED,
    WAITING,
    mapped_tokens,
    num_open_rows,
    ranks,
    row_values,
    same_request,
    spare_blocks,
    sum_before,
    take_rows,
)


class Swaps(NamedTuple):
    """Places whose blocks move, i32[S] by row, NO_REQUEST where none; one is empty."""

    out: jax.Array  # from the row to the host's memory
    into: jax.Array  # from there to the row

    @classmethod
    def none(cls, rows: jax.Array) -> Swaps:
        """Nobody's."""
        return cls(*(jnp.full_like(rows, NO_REQUEST) for _ in range(2)))


def preempt(queue, rows, blocks, num_tokens, num_preempted, swaps, *, needed, host):
    """Drops the fewest last requests that leave the others room for their tokens.

    If the rows up to rank i stay, they need sum(needed[:i]) blocks, and what the rows
    behind hold comes back: the first side grows with i and the second shrinks. So if
    a request's last row can stay, all its rows can.
    """
    rank = ranks(queue, rows)
    held = block_manager.exclusive_blocks(blocks, rank)
    returned = jnp.sum(held) - sum_before(rank, held) - held
    available = block_manager.num_free_blocks(blocks) + returned
    stays = sum_before(rank, needed) + needed <= available
    # The first request always fits alone, or the first sample of it; what it was told
    # to copy for the sake of others, it shares no longer.
    status = row_values(queue.status, rows, EMPTY)
    first = jnp.min(jnp.where(status == RUNNING, rank, rows.shape[0]))
    is_same = same_request(queue, rows)
    is_first = jnp.any(is_same & (rank == first)[None, :], axis=1)
    is_lockstep = row_values(queue.is_lockstep, rows, False)
    stays_alone = is_first & (stays | is_lockstep | (rank == first))
    stays = jnp.all(stays[None, :] | ~is_same, axis=1)
    stays |= stays_alone | (status == RETAINED)
    dropped = ~stays & (rows != NO_REQUEST)

    leaves = jnp.zeros_like(dropped)
    if host is not None:
        leaves = swap.leaving(blocks, host, dropped, rank, is_same)
        swaps = swaps._replace(out=jnp.where(leaves, rows, NO_REQUEST))
    seq_index = jnp.where(dropped, rows, queue.status.shape[0])
    # Whom it waited for among others' sequences is not there when it comes back.
    source = row_values(queue.sources, rows)
    is_own = queue.arrivals[source] == row_values(queue.arrivals, rows)
    is_own |= queue.priorities[source] == BEFORE_ALL
    alone = jnp.where(dropped & ~is_own, rows, queue.status.shape[0])
    status = jnp.where(leaves, SWAPPED, WAITING)
    queue = dataclasses.replace(
        queue,
        status=queue.status.at[seq_index].set(status, mode="drop"),
        sources=queue.sources.at[alone].set(rows, mode="drop"),
        num_preemptions=queue.num_preemptions.at[seq_index].add(1, mode="drop"),
    )
    return (
        queue,
        jnp.where(dropped, NO_REQUEST, rows),
        block_manager.free(blocks, dropped & ~leaves),
        jnp.where(dropped, 0, num_tokens),
        num_preempted + jnp.sum(dropped, dtype=jnp.int32),
        swaps,
    )


def bring_back(
    queue, rows, swaps, blocks, needed, host, scheduler_params: SchedulerParams
):
    """Gives the first swapped request rows and room for its tokens, if there are.

    All its swapped sequences, or of samples that have the engine for themselves as many
    as there is room for. They compute nothing in this step. One request at a time: how
    many blocks it takes is then exact, so that it always fits alone.
    """
    num_rows, table_size = rows.shape[0], queue.status.shape[0]
    is_away = queue.status == SWAPPED
    seq_index = jnp.arange(table_size, dtype=jnp.int32)
    keys = (jnp.where(is_away, 0, 1), queue.priorities, queue.arrivals, seq_index)
    first = lax.sort(keys, num_keys=4)[-1][:num_rows]  # in order
    leader = queue.leaders[first[0]]
    is_mine = is_away & (queue.leaders == leader)
    valid = is_mine[first]

    size = blocks.block_size
    held = cdiv(host.context_lens[first], size)
    mapped = jnp.where(held == 0, mapped_tokens(queue, first) // size, held)
    known = jnp.where(queue.has_ended, 0, queue.num_tokens)[first]
    needs = swap.demand(host, jnp.where(valid, first, NO_REQUEST))
    needs += jnp.where(valid, jnp.maximum(cdiv(known, size) - mapped, 0), 0)
    turn = jnp.arange(num_rows, dtype=jnp.int32)
    fits = valid & (turn < num_open_rows(queue, rows, scheduler_params))
    fits &= jnp.cumsum(needs) <= spare_blocks(
        queue, rows, blocks, needed, scheduler_params
    )

    is_running = row_values(queue.status, rows, EMPTY) == RUNNING
    is_other = row_values(queue.leaders, rows, NO_REQUEST) != leader
    is_alone = ~jnp.any(is_running & is_other) & ~queue.is_lockstep[leader]
    is_whole = jnp.sum(fits) == jnp.sum(is_mine)
    num_back = jnp.where(is_whole | is_alone, jnp.sum(fits, dtype=jnp.int32), 0)
    target = jnp.where(turn < num_back, first, table_size)
    queue = dataclasses.replace(
        queue, status=queue.status.at[target].set(RUNNING, mode="drop")
    )
    takes, turn = take_rows(rows, num_back)
    into = jnp.where(takes, first[turn], NO_REQUEST)
    rows = jnp.where(takes, into, rows)
    return queue, rows, swaps._replace(into=into)
