"""Bookkeeping: the parts of a step before the decoder and after decoding.

Pipeline: scheduler, block manager -> [begin_step] -> decoder -> decoding ->
[end_step] -> next step. Neither part reads or writes pages, so the simulator runs both
with a cost model instead of the decoder.

Shape symbols: S batch rows, R sequences of the request table.

Source: Kwon et al. 2023, sections 4 and 5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine import events, forward, sharing, speculation
from jpaged.engine import state as engine_state
from jpaged.engine.algorithms import States
from jpaged.engine.events import Timeline
from jpaged.engine.forward import StepBatch
from jpaged.engine.request_table import RequestTable
from jpaged.engine.state import Counters, EngineState
from jpaged.kv import block_manager, prefix_cache, swap
from jpaged.kv.block_manager import NO_BLOCK, Append, BlockState
from jpaged.kv.prefix_cache import PrefixCache
from jpaged.kv.swap import Swapped
from jpaged.scheduler import (
    FINISHED,
    NO_REQUEST,
    RETAINED,
    RUNNING,
    SWAPPED,
    WAITING,
    Hits,
    Queue,
    StepPlan,
    Swaps,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """A step up to the decoder: which rows run, and where their tokens are stored."""

    table: RequestTable
    rows: jax.Array  # i32[S], sequence index of each row
    blocks: BlockState  # with the step's tokens appended
    plan: StepPlan  # without drafts
    num_drafts: jax.Array  # i32[S]
    appended: Append  # the copies to do before writing
    batch: StepBatch
    prefix_cache: PrefixCache | None
    host_blocks: BlockState | None
    swapped: Swapped | None  # the copies to do before those of `appended`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledStep:
    """A step after decoding."""

    table: RequestTable  # with the new tokens
    states: States
    parents: jax.Array  # i32[S], the row that each row continues, NO_BLOCK: none
    num_new: jax.Array  # i32[], tokens generated for running sequences
    num_accepted: jax.Array  # i32[], drafts among them
    is_settled: jax.Array  # bool[], no sequence has ended and no row has a parent


# ---- before the decoder


def begin_step(state: EngineState, config: EngineConfig) -> ScheduledStep:
    """Schedule a step and append its tokens: everything before the decoder.

    Lengths and tables decide it. Tokens are read only to find common prefixes: in the
    prefix cache, of new rows, after a preemption, and for prompt lookup.

    Args:
      state: the engine's state.
      config: the state's config, or one with lower limits.
    """
    hits = sharing.look_up(state.prefix_cache, state.requests, state.rows, config)
    table, rows, blocks, plan = _schedule(state, config, hits)
    cache, blocks, host_blocks, swapped = _swap_blocks(state, blocks, plan.swaps)
    table, blocks, plan = _share(state, config, table, rows, blocks, plan)
    starts, num_drafts = blocks.context_lens, jnp.zeros_like(rows)
    if config.speculation is not None:
        table, num_drafts = speculation.count_drafts(
            table, rows, blocks, plan.num_tokens, config
        )
    cache, blocks, appended = sharing.append_tokens(
        cache, blocks, plan.num_tokens + num_drafts
    )
    # The scheduler promises that this succeeds. If it does not, the step computes
    # nothing: the engine stalls, and writes no wrong token.
    num_tokens = jnp.where(appended.ok, plan.num_tokens, 0)
    num_drafts = jnp.where(appended.ok, num_drafts, 0)
    plan = dataclasses.replace(plan, num_tokens=num_tokens)
    batch = forward.make_batch(
        table, rows, starts, num_tokens + num_drafts, num_drafts, config
    )
    return ScheduledStep(
        table=table,
        rows=rows,
        blocks=blocks,
        plan=plan,
        num_drafts=num_drafts,
        appended=appended,
        batch=batch,
        prefix_cache=cache,
        host_blocks=host_blocks,
        swapped=swapped,
    )


def _schedule(
    state: EngineState, config: EngineConfig, hits: Hits | None
) -> tuple[RequestTable, jax.Array, BlockState, StepPlan]:
    """Run the scheduler; return the table, rows, blocks and plan after it."""
    queue, rows, blocks, plan = scheduler.schedule(
        state.requests.queue,
        state.rows,
        state.blocks,
        config,
        hits,
        None if state.host is None else state.host.blocks,
        state.scheduler_params,
    )
    return dataclasses.replace(state.requests, queue=queue), rows, blocks, plan


def _swap_blocks(
    state: EngineState, blocks: BlockState, swaps: Swaps | None
) -> tuple[PrefixCache | None, BlockState, BlockState | None, Swapped | None]:
    """Move the blocks of swapped sequences between the pools.

    Returns the prefix cache, which evicts blocks for sequences that are swapped in, the
    blocks of both pools, and the copies to do.
    """
    cache = state.prefix_cache
    host_blocks = None if state.host is None else state.host.blocks
    if swaps is None or host_blocks is None:
        return cache, blocks, host_blocks, None
    kept = None
    if cache is not None:
        cache = when(
            jnp.any(swaps.into != NO_REQUEST),
            lambda cache: prefix_cache.evict(
                cache,
                blocks.ref_counts,
                jnp.sum(swap.swap_in_demand(host_blocks, swaps.into)),
            ),
            cache,
        )
        kept = prefix_cache.is_cached(cache)
    return cache, *swap.swap_blocks(blocks, host_blocks, *swaps, kept)


def _share(
    state: EngineState,
    config: EngineConfig,
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    plan: StepPlan,
) -> tuple[RequestTable, BlockState, StepPlan]:
    """Choose sources for sequences that have lost their blocks, and for new rows."""
    is_other = rows != state.rows
    lost = jnp.where(is_other, state.rows, NO_REQUEST)
    if plan.swaps is not None:  # swapped sequences keep their blocks
        lost = jnp.where(plan.swaps.out == NO_REQUEST, lost, NO_REQUEST)
    lost = jnp.where(lost == NO_REQUEST, config.max_num_requests, lost)
    table = when(
        plan.num_preempted > 0,
        lambda table: sharing.reassign_sources(table, lost),
        table,
    )
    if not config.enable_prefix_caching:
        return table, blocks, plan

    def join(
        carry: tuple[RequestTable, BlockState, StepPlan],
    ) -> tuple[RequestTable, BlockState, StepPlan]:
        table, blocks, plan = carry
        is_new = is_other & (rows != NO_REQUEST)
        table, blocks, waits = sharing.join_running_rows(table, rows, blocks, is_new)
        num_tokens = jnp.where(waits, 0, plan.num_tokens)
        return table, blocks, dataclasses.replace(plan, num_tokens=num_tokens)

    return when(plan.num_admitted > 0, join, (table, blocks, plan))


# ---- after decoding


def end_step(
    state: EngineState,
    scheduled: ScheduledStep,
    sampled: SampledStep,
    cache: KVCache | None = None,
    draft_cache: KVCache | None = None,
) -> EngineState:
    """Update the state after decoding: counters, forks, cached and released blocks.

    Args:
      state: the state before the step.
      scheduled: the step, as scheduled.
      sampled: the step's new tokens.
      cache: the pages after the step.
      draft_cache: the draft model's pages after the step.
    """
    num_tokens = jnp.sum(scheduled.plan.num_tokens + scheduled.num_drafts)
    counters = _count(state, scheduled, sampled, num_tokens)
    timeline = _record(state, scheduled, sampled, num_tokens)
    host = state.host
    if host is not None and scheduled.host_blocks is not None:
        host = dataclasses.replace(host, blocks=scheduled.host_blocks)
    table, blocks = sampled.table, _roll_back(state.config, scheduled, sampled)
    if state.config.max_num_prefixes:
        table = _retain_prefixes(table, scheduled.rows, blocks)
    blocks = when(
        ~sampled.is_settled,
        lambda blocks: fork_rows(table.queue, sampled.parents, scheduled.rows, blocks),
        blocks,
    )
    known_blocks = scheduled.prefix_cache
    if known_blocks is not None:
        known_blocks, blocks = _insert_blocks(
            known_blocks, table, scheduled.rows, blocks, state.counters.num_steps
        )
    rows, blocks = when(
        ~sampled.is_settled,
        lambda carry: release_finished(table.queue, *carry),
        (scheduled.rows, blocks),
    )
    return EngineState(
        requests=table,
        states=sampled.states,
        rows=rows,
        blocks=blocks,
        prefix_cache=known_blocks,
        cache=cache,
        draft_cache=draft_cache,
        host=host,
        counters=counters,
        timeline=timeline,
        scheduler_params=state.scheduler_params,
        config=state.config,
        mesh=state.mesh,
    )


def _count(
    state: EngineState,
    scheduled: ScheduledStep,
    sampled: SampledStep,
    num_tokens: jax.Array,
) -> Counters:
    """Return the counters after the step."""
    plan, copies = scheduled.plan, scheduled.appended.copy_dst != NO_BLOCK
    is_stalled = num_tokens + plan.num_preempted + plan.num_admitted == 0
    num_swap_outs, num_swapped_blocks = jnp.int32(0), jnp.int32(0)
    swapped = scheduled.swapped
    if plan.swaps is not None and swapped is not None:
        num_swap_outs, num_swap_ins = (
            jnp.sum(seq_indices != NO_REQUEST, dtype=jnp.int32)
            for seq_indices in plan.swaps
        )
        num_swapped_blocks = swapped.out.num_blocks
        is_stalled = (is_stalled & (num_swap_ins == 0)) | ~swapped.ok
    return engine_state.count(
        state.counters,
        scheduled.blocks,
        is_stalled=is_stalled,
        num_tokens=num_tokens,
        num_generated=sampled.num_new,
        **engine_state.admitted_tokens(state.requests.queue, sampled.table.queue),
        num_preemptions=plan.num_preempted,
        num_swap_outs=num_swap_outs,
        num_swapped_blocks=num_swapped_blocks,
        num_block_copies=jnp.sum(copies, dtype=jnp.int32),
        num_drafts=jnp.sum(scheduled.num_drafts),
        num_accepted=sampled.num_accepted,
    )


def _record(
    state: EngineState,
    scheduled: ScheduledStep,
    sampled: SampledStep,
    num_tokens: jax.Array,
) -> Timeline:
    """Append the step to the timeline."""
    return events.record(
        state.timeline,
        state.counters.num_steps,
        state.requests,
        scheduled.table,
        sampled.table,
        scheduled.blocks,
        num_tokens=num_tokens,
        num_generated=sampled.num_new,
    )


def _roll_back(
    config: EngineConfig, scheduled: ScheduledStep, sampled: SampledStep
) -> BlockState:
    """Return the blocks without rejected drafts."""
    if config.speculation is None:
        return scheduled.blocks
    return when(
        jnp.any(scheduled.num_drafts > 0),
        lambda blocks: speculation.roll_back(
            sampled.table, scheduled.rows, blocks, scheduled.num_drafts
        ),
        scheduled.blocks,
    )


def _retain_prefixes(
    table: RequestTable, rows: jax.Array, blocks: BlockState
) -> RequestTable:
    """Set pinned prefixes that are now computed to RETAINED."""
    is_prefix = scheduler.row_values(table.params.is_prefix, rows, False)
    known = scheduler.row_values(table.queue.num_tokens, rows)
    is_done = is_prefix & (blocks.context_lens == known)
    at = jnp.where(is_done, rows, table.queue.status.shape[0])
    status = table.queue.status.at[at].set(RETAINED, mode="drop")
    queue = dataclasses.replace(table.queue, status=status)
    return dataclasses.replace(table, queue=queue)


def fork_rows(
    queue: Queue, parents: jax.Array, rows: jax.Array, blocks: BlockState
) -> BlockState:
    """Fork the blocks so that each row continues its parent.

    A row that waits for a source which has just finished maps the source's blocks here,
    before they are released.

    Args:
      queue: after decoding.
      parents: i32[S], the row that each row continues, NO_BLOCK: none.
      rows: i32[S], sequence index of each row.
      blocks: the block state.
    """
    has_finished = scheduler.row_values(queue.status, rows) == FINISHED
    sources = scheduler.row_values(queue.sources, rows, NO_REQUEST)
    shared = scheduler.row_values(queue.shared_lens, rows)
    is_source = (rows[None, :] == sources[:, None]) & has_finished[None, :]
    source_row = jnp.argmax(is_source, axis=1).astype(jnp.int32)
    inherits = jnp.any(is_source, axis=1) & (blocks.context_lens == 0) & ~has_finished
    inherits &= (shared > 0) & (blocks.context_lens[source_row] >= shared)
    blocks = block_manager.fork(blocks, jnp.where(inherits, source_row, parents))
    return block_manager.truncate(
        blocks, jnp.where(inherits, shared, blocks.context_lens)
    )


def _insert_blocks(
    cache: PrefixCache,
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    clock: jax.Array,
) -> tuple[PrefixCache, BlockState]:
    """Insert all full blocks into the prefix cache, and mark those in use as recent."""
    seq_indices = jnp.maximum(rows, 0)
    cache, blocks = prefix_cache.insert(cache, blocks, table.tokens, clock, seq_indices)
    return prefix_cache.touch(cache, blocks.ref_counts, clock), blocks


def release_finished(
    queue: Queue, rows: jax.Array, blocks: BlockState
) -> tuple[jax.Array, BlockState]:
    """Empty the rows of finished sequences, and free their blocks."""
    has_finished = scheduler.row_values(queue.status, rows) == FINISHED
    blocks = block_manager.free(blocks, has_finished)
    return jnp.where(has_finished, NO_REQUEST, rows), blocks


def is_unfinished(status: jax.Array) -> jax.Array:
    """Which sequences wait, run or are swapped; bool, shape of `status`."""
    return (status == WAITING) | (status == RUNNING) | (status == SWAPPED)
