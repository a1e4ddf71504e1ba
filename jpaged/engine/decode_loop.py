"""Decode loop: consecutive decode steps without the scheduler.

Pipeline: scheduled step -> [decode_loop] -> unsettled state.

Most steps admit no request, preempt none, copy no block and end no sequence: every
running row decodes one token, and some rows take a free block. `next_step` recognises
this and schedules such a step with little work; the result is that of `begin_step`. So
a program for a number of rows runs decode steps in a loop until something else happens.

Shape symbols: S batch rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.engine.bookkeeping import ScheduledStep, Unsettled
from jpaged.engine.state import EngineState
from jpaged.kv import block_manager, prefix_cache
from jpaged.scheduler import RUNNING, SWAPPED, WAITING


def next_step(
    state: EngineState,
    scheduled: ScheduledStep,
    unsettled: Unsettled,
    may_continue: jax.Array,
    config: EngineConfig,
) -> tuple[EngineState, ScheduledStep, jax.Array]:
    """Schedule the next step if every running row just decodes one token.

    Args:
      state: the state from `finish_step`.
      scheduled: the step before, as scheduled.
      unsettled: what that step has left.
      may_continue: bool[], False: schedule nothing.
      config: the engine's config, without speculation.

    Returns:
      The state, the step, and bool[]: whether it is scheduled. Otherwise nothing
      changes, and `settle` and `begin_step` have to run.
    """
    blocks, batch = state.blocks, scheduled.batch
    kept = None
    if state.prefix_cache is not None:
        kept = prefix_cache.is_cached(state.prefix_cache)
    decodes = ~scheduler.idle_rows(state.requests.queue, state.rows)
    is_plain = may_continue & unsettled.is_settled
    is_plain &= _keeps_rows(state, scheduled, decodes, config)
    appended, fits = block_manager.append_one(blocks, decodes, kept)
    is_plain &= fits
    blocks = jax.tree.map(
        lambda new, old: jnp.where(is_plain, new, old), appended, blocks
    )
    entries, gained = scheduled.entries, is_plain.astype(jnp.int32)
    batch = dataclasses.replace(batch, starts=batch.starts + gained * batch.num_tokens)
    entries = dataclasses.replace(entries, positions=entries.positions + gained)
    none = block_manager.no_copies(blocks)
    plan = dataclasses.replace(
        scheduled.plan,
        num_preempted=jnp.zeros_like(scheduled.plan.num_preempted),
        num_admitted=jnp.zeros_like(scheduled.plan.num_admitted),
        swaps=None if state.host is None else scheduler.Swaps.none(state.rows),
    )
    swapped = scheduled.swapped
    if swapped is not None:
        swapped = swapped.none()
    scheduled = dataclasses.replace(
        scheduled,
        plan=plan,
        batch=batch,
        entries=entries,
        appended=none,
        swapped=swapped,
    )
    return dataclasses.replace(state, blocks=blocks), scheduled, is_plain


def _keeps_rows(
    state: EngineState,
    scheduled: ScheduledStep,
    decodes: jax.Array,
    config: EngineConfig,
) -> jax.Array:
    """bool[]: the rows of the step before, and no others, decode one token each."""
    queue, rows, batch = state.requests.queue, state.rows, scheduled.batch
    limits = config.scheduler_params
    settings = state.scheduler_params.limited_to(limits)
    left = scheduler.row_values(queue.num_tokens, rows) - state.blocks.context_lens
    waits = (queue.status == WAITING) | (queue.status == SWAPPED)
    num_running = jnp.sum(scheduler.row_values(queue.status, rows) == RUNNING)
    has_open_row = jnp.any(rows == scheduler.NO_REQUEST)
    has_open_row &= num_running < settings.max_num_seqs
    num_decodes = jnp.sum(decodes, dtype=jnp.int32)
    was_in_step = batch.num_tokens > 0
    keeps = jnp.all(~decodes | (left == 1))
    keeps &= jnp.all(~was_in_step | ((batch.num_tokens == 1) & batch.has_logits))
    keeps &= jnp.sum(was_in_step) == num_decodes
    keeps &= (num_decodes > 0) & (num_decodes <= settings.max_num_batched_tokens)
    return keeps & ~(jnp.any(waits) & has_open_row)
