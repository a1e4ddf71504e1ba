"""Timeline: what happened in the last steps, kept on the device in two rings.

Place on the road: engine -> [timeline] -> serving. One ring has an entry for each thing
that happened to a sequence, the other a row for each step. A whole slice of steps is
one device call, so the host cannot look in between; it reads the rings behind each.

Letters: E entries of the ring of events, K of that of steps, R places, S rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine.request_table import NEVER, RequestTable
from jpaged.kv import block_manager
from jpaged.kv.block_manager import BlockState

# What can happen to a sequence in a step, in the order in which it does: the first
# three before the decoder, the others behind it.
EVENTS = ("preempted", "swapped", "scheduled", "first_token", "finished")
NUM_BEFORE_DECODER = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Timeline:
    """The last events and steps; the newest overwrite the oldest."""

    events: jax.Array  # i32[E, 3]: step, index in EVENTS, place
    num_events: jax.Array  # i32[], of all times: those beyond E are lost
    steps: jax.Array  # i32[K, C], of StepRow; step n is in row n % K


class StepRow(NamedTuple):
    """A step's figures, each i32[]."""

    step: jax.Array
    num_used_blocks: jax.Array
    num_token_states: jax.Array  # tokens whose keys and values the pool holds
    num_saved_blocks: jax.Array  # that would be needed besides, without sharing
    num_waiting: jax.Array  # sequences, when the step was planned
    num_running: jax.Array
    num_tokens: jax.Array  # that the decoder computed
    num_generated: jax.Array  # that decoding gave


def init(config: EngineConfig) -> Timeline:
    """A timeline on which nothing happened yet."""
    return Timeline(
        events=jnp.full((config.num_recorded_events, 3), -1, jnp.int32),
        num_events=jnp.int32(0),
        steps=jnp.full(
            (config.num_recorded_steps, len(StepRow._fields)), -1, jnp.int32
        ),
    )


def occupancy(blocks: BlockState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks in use, tokens that they hold, and blocks saved by sharing; i32[] each."""
    (num_blocks,) = blocks.ref_counts.shape
    used = num_blocks - block_manager.num_free_blocks(blocks)
    unshared = jnp.sum(cdiv(blocks.context_lens, blocks.block_size))
    saved = unshared - used
    # Tokens in shared blocks count once, so shared blocks are not over-full.
    held = jnp.sum(blocks.context_lens) - saved * blocks.block_size
    return used, held, saved


def record(
    timeline: Timeline,
    step: jax.Array,
    before: RequestTable,
    planned: RequestTable,
    after: RequestTable,
    blocks: BlockState,
    *,
    num_tokens: jax.Array,
    num_generated: jax.Array,
) -> Timeline:
    """The timeline with one more step.

    Args:
      timeline: before it.
      step: i32[], its number.
      before, planned, after: the table when the step began, when it was scheduled, and
        when its tokens were in.
      blocks: with the step's tokens.
      num_tokens, num_generated: as in StepRow.
    """
    if timeline.events.shape[0]:
        happened = _happened(before, planned, after)
        timeline = when(
            jnp.any(happened),
            lambda timeline: _put_events(timeline, step, happened),
            timeline,
        )
    (num_rows, _) = timeline.steps.shape
    if num_rows == 0:
        return timeline
    status = planned.queue.status
    used, held, saved = occupancy(blocks)
    row = StepRow(
        step=step,
        num_used_blocks=used,
        num_token_states=held,
        num_saved_blocks=saved,
        num_waiting=jnp.sum(
            (status == scheduler.WAITING) | (status == scheduler.SWAPPED),
            dtype=jnp.int32,
        ),
        num_running=jnp.sum(status == scheduler.RUNNING, dtype=jnp.int32),
        num_tokens=num_tokens,
        num_generated=num_generated,
    )
    return dataclasses.replace(
        timeline, steps=timeline.steps.at[step % num_rows].set(jnp.stack(row))
    )


def _happened(
    before: RequestTable, planned: RequestTable, after: RequestTable
) -> jax.Array:
    """Which of EVENTS happened to each place in a step, bool[len(EVENTS), R]."""
    was, is_now = before.queue, planned.queue
    running, finished = scheduler.RUNNING, scheduler.FINISHED
    loses_row = is_now.num_preemptions > was.num_preemptions
    is_swapped = is_now.status == scheduler.SWAPPED
    happened = {
        "preempted": loses_row & ~is_swapped,
        "swapped": loses_row & is_swapped,
        "scheduled": (was.status != running) & (is_now.status == running),
        "first_token": (before.first_steps == NEVER) & (after.first_steps != NEVER),
        "finished": (was.status != finished) & (after.queue.status == finished),
    }
    return jnp.stack([happened[name] for name in EVENTS])


def _put_events(timeline: Timeline, step: jax.Array, happened: jax.Array) -> Timeline:
    size, _ = timeline.events.shape
    kinds, seq_indices = (index.reshape(-1) for index in jnp.indices(happened.shape))
    happened = happened.reshape(-1)
    turn = jnp.cumsum(happened, dtype=jnp.int32)
    total = turn[-1]
    # Of more than the ring has entries, only the last: no entry is written twice.
    is_kept = happened & (turn > total - size)
    at = jnp.where(is_kept, (timeline.num_events + turn - 1) % size, size)
    entries = jnp.stack([jnp.full_like(seq_indices, step), kinds, seq_indices], axis=1)
    return dataclasses.replace(
        timeline,
        events=timeline.events.at[at].set(entries.astype(jnp.int32), mode="drop"),
        num_events=timeline.num_events + total,
    )


def in_order(timeline: Timeline, num_steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both rings with the newest entry last; `num_steps` is i32[], of all times.

    Entries that were never written are -1, and come first.
    """
    return (
        jnp.roll(timeline.events, -timeline.num_events, axis=0),
        jnp.roll(timeline.steps, -num_steps, axis=0),
    )
