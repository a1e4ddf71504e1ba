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

from jpaged import policies, scheduler
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine import (
    batch,
    events,
    request_table,
    retaining,
    sharing,
    speculation,
)
from jpaged.engine import state as engine_state
from jpaged.engine.algorithms import States
from jpaged.engine.batch import Entries, StepBatch
from jpaged.engine.request_table import NEVER, RequestTable
from jpaged.engine.state import Counters, EngineState
from jpaged.indexing import put, take
from jpaged.kv import block_manager, cache_groups, prefix_cache, swap
from jpaged.kv.block_manager import NO_BLOCK, Append, BlockState
from jpaged.kv.drops import computed_lens, intact_rows, references_of
from jpaged.kv.prefix_cache import Eviction, PrefixCache
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
    UntilDecision,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """The work of a step, scheduled; the state has the blocks for its tokens."""

    is_live: jax.Array  # bool[], False: the engine has no work, and nothing changes
    plan: StepPlan  # without drafts
    num_drafts: jax.Array  # i32[S]
    appended: Append  # the copies to do before writing
    batch: StepBatch
    entries: Entries
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unsettled:
    """What decoding leaves for `settle`, which must run before the next schedule."""

    is_settled: jax.Array  # bool[], no sequence has ended and no row has a parent
    has_ended: jax.Array  # bool[], a sequence has ended
    parents: jax.Array  # i32[S], the row that each row continues, NO_BLOCK: none
    num_drafts: jax.Array  # i32[S], drafts of each row in the last step
    has_first: jax.Array  # bool[R], sequences with a first token since `settle`
    has_finished: jax.Array  # bool[R], sequences that finished since `settle`

    @classmethod
    def none(cls, config: EngineConfig) -> Unsettled:
        """Return what there is to settle after no step."""
        rows = jnp.arange(config.num_rows, dtype=jnp.int32)
        none = jnp.zeros((config.max_num_requests,), jnp.bool_)
        return cls(
            is_settled=jnp.bool_(True),
            has_ended=jnp.bool_(False),
            parents=rows,
            num_drafts=jnp.zeros_like(rows),
            has_first=none,
            has_finished=none,
        )


# ---- before the decoder


def begin_step(
    state: EngineState, config: EngineConfig
) -> tuple[EngineState, ScheduledStep]:
    """Schedule a step and append its tokens: everything before the decoder.

    Lengths and tables decide it. Tokens are read only to find common prefixes: in the
    prefix cache, of new rows, after a preemption, and for prompt lookup.

    Args:
      state: the engine's state.
      config: the state's config, or one with lower limits.
    """
    until = None
    if config.retention is not None:
        state, until = retaining.prepare(state, config)
    hits = sharing.look_up(
        state.prefix_cache, state.requests, state.rows, config, until
    )
    table, rows, blocks, plan = _schedule(state, config, hits, until)
    state = _count_uses(state, blocks, config)
    cache, blocks, host_blocks, swapped = _swap_blocks(state, blocks, plan.swaps)
    table, blocks, plan = _share(state, config, table, rows, blocks, plan, until)
    starts, num_drafts = computed_lens(blocks), jnp.zeros_like(rows)
    if config.speculation is not None:
        table, num_drafts = speculation.count_drafts(
            table, rows, blocks, plan.num_tokens, config
        )
    cache, blocks, appended = sharing.append_tokens(
        cache, blocks, plan.num_tokens + num_drafts, _eviction(state)
    )
    # The scheduler promises that this succeeds. If it does not, the step computes
    # nothing: the engine stalls, and writes no wrong token.
    num_tokens = jnp.where(appended.ok, plan.num_tokens, 0)
    num_drafts = jnp.where(appended.ok, num_drafts, 0)
    rows_of_step = batch.make_batch(
        table,
        rows,
        starts,
        num_tokens + num_drafts,
        num_drafts,
        config,
        None if blocks.drops is None else blocks.drops.dropped,
    )
    rows_of_step = retaining.observe(rows_of_step, table, blocks, config)
    scheduled = ScheduledStep(
        is_live=has_unfinished(state),
        plan=dataclasses.replace(plan, num_tokens=num_tokens),
        num_drafts=num_drafts,
        appended=appended,
        batch=rows_of_step,
        entries=batch.make_entries(table, rows_of_step, config),
        swapped=swapped,
    )
    host = state.host
    if host is not None and host_blocks is not None:
        host = dataclasses.replace(host, blocks=host_blocks)
    step = state.counters.num_steps
    timeline = events.record_scheduling(
        state.timeline, step, state.requests.queue, table.queue
    )
    state = dataclasses.replace(
        state,
        requests=table,
        rows=rows,
        blocks=blocks,
        prefix_cache=cache,
        host=host,
        counters=engine_state.count_admitted(
            state.counters, state.requests.queue, table.queue
        ),
        timeline=timeline,
    )
    return state, scheduled


def idle_step(config: EngineConfig) -> ScheduledStep:
    """Return a step without work, for the shapes of steps."""
    rows = jnp.full((config.num_rows,), NO_REQUEST, jnp.int32)
    zeros = jnp.zeros_like(rows)
    blocks = engine_state.init_blocks(config)
    swaps, swapped = None, None
    if config.swaps:
        none = swap.Copies.none(blocks, engine_state.init_host_blocks(config))
        swaps, swapped = Swaps.none(rows), Swapped(none, none, jnp.bool_(True))
    table = request_table.init_table(config)
    dropped = None if config.retention is None else zeros
    rows_of_step = batch.make_batch(table, rows, zeros, zeros, zeros, config, dropped)
    rows_of_step = retaining.observe(rows_of_step, table, blocks, config)
    return ScheduledStep(
        is_live=jnp.bool_(False),
        plan=StepPlan(zeros, jnp.int32(0), jnp.int32(0), swaps),
        num_drafts=zeros,
        appended=block_manager.no_copies(blocks),
        batch=rows_of_step,
        entries=batch.make_entries(table, rows_of_step, config),
        swapped=swapped,
    )


def has_unfinished(state: EngineState) -> jax.Array:
    """bool[]: some sequence is unfinished, and the engine has not stalled."""
    is_any = jnp.any(is_unfinished(state.requests.queue.status))
    return is_any & ~state.counters.is_stalled


def _schedule(
    state: EngineState,
    config: EngineConfig,
    hits: Hits | None,
    until: UntilDecision | None,
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
        state.clock,
        until,
    )
    return dataclasses.replace(state.requests, queue=queue), rows, blocks, plan


def _eviction(state: EngineState) -> Eviction | None:
    """Return the eviction policy with its parameters; None is the default."""
    parameters = state.scheduler_params.eviction
    if parameters is None:
        return None
    policy = policies.find(policies.EVICTION, state.config.eviction_policy)
    return Eviction(policy, parameters, state.counters.num_steps)


def _count_uses(
    state: EngineState, blocks: BlockState, config: EngineConfig
) -> EngineState:
    """Count the cached blocks that sequences begin to use, for an eviction policy."""
    cache = state.prefix_cache
    if cache is None or not config.uses(policies.EVICTION):
        return state
    cache = prefix_cache.count_uses(cache, state.blocks.ref_counts, blocks.ref_counts)
    return dataclasses.replace(state, prefix_cache=cache)


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
                _eviction(state),
            ),
            cache,
        )
        cache = sharing.without_orphans(cache, blocks)
        kept = prefix_cache.is_cached(cache)
    return cache, *swap.swap_blocks(blocks, host_blocks, *swaps, kept)


def _share(
    state: EngineState,
    config: EngineConfig,
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    plan: StepPlan,
    until: UntilDecision | None,
) -> tuple[RequestTable, BlockState, StepPlan]:
    """Choose sources for sequences that have lost their blocks, and for new rows."""
    is_other = rows != state.rows
    lost = jnp.where(is_other, state.rows, NO_REQUEST)
    if plan.swaps is not None:  # swapped sequences keep their blocks
        lost = jnp.where(plan.swaps.out == NO_REQUEST, lost, NO_REQUEST)
    lost = jnp.where(lost == NO_REQUEST, config.max_num_requests, lost)
    table = when(
        plan.num_preempted > 0,
        lambda table: (
            sharing.reassign_sources(table, lost)
            if until is None
            else sharing.without_sources(table, lost)
        ),
        table,
    )
    if not config.enable_prefix_caching:
        return table, blocks, plan

    def join(
        carry: tuple[RequestTable, BlockState, StepPlan],
    ) -> tuple[RequestTable, BlockState, StepPlan]:
        table, blocks, plan = carry
        is_new = is_other & (rows != NO_REQUEST)
        table, blocks, waits = sharing.join_running_rows(
            table, rows, blocks, is_new, until
        )
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
      state: the state from `begin_step`.
      scheduled: the step, as scheduled.
      sampled: the step's new tokens.
      cache: the pages after the step.
      draft_cache: the draft model's pages after the step.
    """
    state = dataclasses.replace(state, cache=cache, draft_cache=draft_cache)
    state, unsettled = finish_step(state, scheduled, sampled)
    return settle(state, unsettled)


def finish_step(
    state: EngineState, scheduled: ScheduledStep, sampled: SampledStep
) -> tuple[EngineState, Unsettled]:
    """Count a step and keep its tokens; `settle` does the rest of `end_step`.

    Args:
      state: the state from `begin_step`.
      scheduled: the step, as scheduled.
      sampled: the step's new tokens.
    """
    before, after = state.requests, sampled.table
    num_tokens = jnp.sum(scheduled.plan.num_tokens + scheduled.num_drafts)
    has_finished = before.queue.status != FINISHED
    has_finished &= after.queue.status == FINISHED
    has_ended = has_finished | (before.queue.has_ended != after.queue.has_ended)
    unsettled = Unsettled(
        is_settled=sampled.is_settled,
        has_ended=jnp.any(has_ended),
        parents=sampled.parents,
        num_drafts=scheduled.num_drafts,
        has_first=(before.first_steps == NEVER) & (after.first_steps != NEVER),
        has_finished=has_finished,
    )
    queue = scheduler.count_user_tokens(
        after.queue, state.rows, scheduled.plan.num_tokens
    )
    found = events.occupancy(state.blocks)
    state = dataclasses.replace(
        state,
        requests=dataclasses.replace(after, queue=queue),
        states=sampled.states,
        counters=_count(state, scheduled, sampled, num_tokens, found),
        timeline=events.record_step(
            state.timeline,
            jnp.where(scheduled.is_live, state.counters.num_steps, -1),
            before.queue,
            found,
            num_tokens=num_tokens,
            num_generated=sampled.num_new,
        ),
    )
    return state, unsettled


def settle(state: EngineState, unsettled: Unsettled) -> EngineState:
    """Fork, cache and release blocks after one or several steps.

    Steps that only decode, and in which no sequence ends, may follow each other without
    it (`decode_loop`).

    Args:
      state: the state from `finish_step`.
      unsettled: what the steps have left.
    """
    table, rows = state.requests, state.rows
    blocks = _roll_back(state, unsettled.num_drafts)
    if state.config.max_num_prefixes:
        table = _retain_prefixes(table, rows, blocks)
    table = retaining.note_dropped(table, rows, blocks)
    blocks = when(
        ~unsettled.is_settled,
        lambda blocks: fork_rows(table.queue, unsettled.parents, rows, blocks),
        blocks,
    )
    known_blocks = state.prefix_cache
    last_step = state.counters.num_steps - 1
    if known_blocks is not None:
        known_blocks, blocks = _insert_blocks(
            known_blocks, table, rows, blocks, last_step, state.config
        )
    rows, blocks = when(
        ~unsettled.is_settled,
        lambda carry: release_finished(table.queue, *carry),
        (rows, blocks),
    )
    timeline = events.record_decoding(
        state.timeline,
        last_step,
        table.first_steps,
        unsettled.has_first,
        unsettled.has_finished,
    )
    return dataclasses.replace(
        state,
        requests=table,
        rows=rows,
        blocks=blocks,
        prefix_cache=known_blocks,
        timeline=timeline,
    )


def _count(
    state: EngineState,
    scheduled: ScheduledStep,
    sampled: SampledStep,
    num_tokens: jax.Array,
    found: events.Occupancy,
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
        state.blocks,
        found,
        is_live=scheduled.is_live,
        is_stalled=is_stalled,
        num_tokens=num_tokens,
        num_generated=sampled.num_new,
        num_preemptions=plan.num_preempted,
        num_swap_outs=num_swap_outs,
        num_swapped_blocks=num_swapped_blocks,
        num_block_copies=jnp.sum(copies, dtype=jnp.int32),
        num_drafts=jnp.sum(scheduled.num_drafts),
        num_accepted=sampled.num_accepted,
    )


def _roll_back(state: EngineState, num_drafts: jax.Array) -> BlockState:
    """Return the blocks without rejected drafts."""
    if state.config.speculation is None:
        return state.blocks
    return when(
        jnp.any(num_drafts > 0),
        lambda blocks: speculation.roll_back(
            state.requests, state.rows, blocks, num_drafts
        ),
        state.blocks,
    )


def _retain_prefixes(
    table: RequestTable, rows: jax.Array, blocks: BlockState
) -> RequestTable:
    """Set pinned prefixes that are now computed to RETAINED."""
    is_prefix = scheduler.row_values(table.params.is_prefix, rows, False)
    known = scheduler.row_values(table.queue.num_tokens, rows)
    is_done = is_prefix & (blocks.context_lens == known)
    at = jnp.where(is_done, rows, table.queue.status.shape[0])
    status = put(table.queue.status, at, RETAINED)
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
    inherits &= (shared > 0) & (take(blocks.context_lens, source_row) >= shared)
    if (intact := intact_rows(blocks)) is not None:
        inherits &= take(intact, source_row)
    if cache_groups.has_windows(blocks.windows):
        inherits &= cache_groups.has_windows_at(blocks, source_row, shared)
    own = jnp.arange(rows.size, dtype=jnp.int32)
    lens = jnp.where(inherits, shared, 0)
    blocks = block_manager.adopt_from(blocks, source_row, lens)
    return block_manager.fork(blocks, jnp.where(inherits, own, parents))


def _insert_blocks(
    cache: PrefixCache,
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    clock: jax.Array,
    config: EngineConfig,
) -> tuple[PrefixCache, BlockState]:
    """Insert all full blocks into the prefix cache, and mark those in use as recent.

    Blocks of stale sequences are not inserted: other weights have computed them. Nor
    are those of rows that have dropped blocks: later tokens have not seen their prefix.
    """
    seq_indices, lens = jnp.maximum(rows, 0), blocks.context_lens
    is_excluded = scheduler.row_values(table.is_stale, rows, False)
    hidden = None
    if (intact := intact_rows(blocks)) is not None:
        # They may use a node without its ancestors, and then must not refresh it.
        is_excluded |= ~intact
        hidden = references_of(blocks, ~intact)
        blocks = dataclasses.replace(blocks, ref_counts=blocks.ref_counts - hidden)
    final = jnp.where(is_excluded, 0, lens)
    if config.retention is not None and config.retention.only_reads:
        # Generated tokens have not read all blocks before them.
        final = jnp.minimum(final, take(table.queue.prompt_lens, seq_indices))
    fresh = dataclasses.replace(blocks, context_lens=final)
    cache, fresh = prefix_cache.insert(cache, fresh, table.tokens, clock, seq_indices)
    blocks = dataclasses.replace(fresh, context_lens=lens)
    cache = prefix_cache.touch(cache, blocks.ref_counts, clock)
    if hidden is not None:
        blocks = dataclasses.replace(blocks, ref_counts=blocks.ref_counts + hidden)
    return cache, blocks


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
