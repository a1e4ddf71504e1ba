"""Decode loop: consecutive decode steps without the scheduler.

Pipeline: scheduled step -> [decode_loop] -> unsettled state.

Most steps admit no request, preempt none and end no sequence: every running row decodes
one token, and some rows take a free block. `next_step` recognises this and schedules
such a step with little work; the result is that of `begin_step`. So a program for a
number of rows runs decode steps in a loop until something else happens.

Beams and other rows of algorithms also continue each other. In a program for them, the
loop forks their blocks, and a step copies the shared blocks that it writes.

Shape symbols: S batch rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jpaged import policies, scheduler
from jpaged.config import EngineConfig
from jpaged.engine import algorithms, retaining, sharing
from jpaged.engine.bookkeeping import ScheduledStep, Unsettled
from jpaged.engine.state import EngineState
from jpaged.indexing import take
from jpaged.kv import block_manager, prefix_cache
from jpaged.kv.block_manager import NO_BLOCK, Append, BlockState
from jpaged.kv.drops import computed_lens
from jpaged.kv.prefix_cache import PrefixCache
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
    queue = state.requests.queue
    decodes = ~scheduler.idle_rows(queue, state.rows)
    retain = functools.partial(retaining.drop_due, state.requests, state.rows, config)
    if algorithms.config_algorithms(config):
        is_plain = ~unsettled.has_ended
        whole = block_manager.fork(state.blocks, unsettled.parents)
        before = retain(whole)
        counters = retaining.count_dropped(state.counters, whole, before)
        before = scheduler.release_windows(queue, state.rows, before)
        after, appended, fits = _append_copying(state.prefix_cache, before, decodes)
    else:
        is_plain, before = unsettled.is_settled, retain(state.blocks)
        counters = retaining.count_dropped(state.counters, state.blocks, before)
        before = scheduler.release_windows(queue, state.rows, before)
        after, fits = block_manager.append_one(
            before, decodes, _kept(state.prefix_cache)
        )
        appended = block_manager.no_copies(before)
    is_plain &= may_continue & fits
    is_plain &= _keeps_rows(state, scheduled, before, decodes, config)
    blocks = jax.tree.map(
        lambda new, old: jnp.where(is_plain, new, old), after, state.blocks
    )
    if config.retention is not None:
        counters = jax.tree.map(
            lambda new, old: new if new is old else jnp.where(is_plain, new, old),
            counters,
            state.counters,
        )
    batch, entries = scheduled.batch, scheduled.entries
    gained = is_plain.astype(jnp.int32)
    batch = dataclasses.replace(batch, starts=batch.starts + gained * batch.num_tokens)
    if blocks.drops is not None:
        dropped = take(blocks.drops.dropped, batch.rows)
        batch = dataclasses.replace(batch, dropped=dropped)
        batch = retaining.observe(batch, state.requests, blocks, config)
    entries = dataclasses.replace(entries, positions=entries.positions + gained)
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
        appended=appended,
        swapped=swapped,
    )
    state = dataclasses.replace(state, blocks=blocks, counters=counters)
    return state, scheduled, is_plain


def _kept(cache: PrefixCache | None) -> jax.Array | None:
    return None if cache is None else prefix_cache.is_cached(cache)


def _append_copying(
    cache: PrefixCache | None, blocks: BlockState, decodes: jax.Array
) -> tuple[BlockState, Append, jax.Array]:
    """Append a token to rows that may share blocks.

    Returns the blocks; the copies; and bool[], False: the prefix cache must evict or
    forget blocks before.
    """
    kept, num_tokens = _kept(cache), decodes.astype(jnp.int32)
    after, appended = block_manager.append(blocks, num_tokens, kept)
    ok = appended.ok
    if kept is not None:
        written = sharing.overwritten_nodes(blocks, num_tokens, appended, kept)
        ok &= jnp.all(written == NO_BLOCK)
    return after, appended, ok


def _keeps_rows(
    state: EngineState,
    scheduled: ScheduledStep,
    blocks: BlockState,
    decodes: jax.Array,
    config: EngineConfig,
) -> jax.Array:
    """bool[]: the rows of the step before, and no others, decode one token each."""
    queue, rows, batch = state.requests.queue, state.rows, scheduled.batch
    limits = config.scheduler_params
    settings = state.scheduler_params.limited_to(limits)
    left = scheduler.row_values(queue.num_tokens, rows) - computed_lens(blocks)
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
    if config.uses(policies.PREEMPTION):  # a running row may yield to a waiting one
        return keeps & ~jnp.any(waits)
    return keeps & ~(jnp.any(waits) & has_open_row)
