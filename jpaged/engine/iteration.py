"""Iteration: one step of the engine, from the schedule to the new tokens.

Place on the road: scheduler, block manager, decoder, decoding -> [iteration] -> engine.
`begin_step` is all that comes before the decoder, and `end_step` all that comes after
decoding: between them a cost model can stand in for the decoder.

Source: Kwon et al. 2023, sections 4 and 5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.attention import kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine import (
    algorithms,
    events,
    forward,
    request_table,
    sampling,
    speculation,
)
from jpaged.engine import (
    state as engine_state,
)
from jpaged.engine.algorithms import Logits, States
from jpaged.engine.forward import Batch
from jpaged.engine.request_table import RequestTable
from jpaged.engine.speculation import DraftedModel
from jpaged.engine.state import EngineState, Model
from jpaged.kv import block_manager, prefix_cache, swap
from jpaged.kv.block_manager import NO_BLOCK, Append, BlockState
from jpaged.kv.prefix_cache import PrefixCache
from jpaged.kv.swap import Swapped
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.scheduler import (
    FINISHED,
    NO_REQUEST,
    RETAINED,
    RUNNING,
    SWAPPED,
    WAITING,
    Hits,
    Plan,
    Queue,
)


class WorkingMemory(NamedTuple):
    """What a step writes before it reads it: allocated once for a run."""

    hidden: jax.Array | None  # [T, E]
    logits: jax.Array | None  # f32[N, V]
    draft_hidden: jax.Array | None = None  # [T, E] of the small model


def working_memory(model: Model, state: EngineState) -> WorkingMemory:
    """Room for the largest step of the state's config."""
    config = state.config

    def hidden(sizes: ModelConfig) -> jax.Array:
        shape = (config.max_num_batched_tokens, sizes.hidden_size)
        return jnp.zeros(shape, sizes.dtype)

    shape = (config.max_num_logits, model.config.vocab_size)
    is_drafted = isinstance(model, DraftedModel)
    return WorkingMemory(
        hidden(model.config),
        jnp.zeros(shape, jnp.float32),
        hidden(model.draft.config) if is_drafted else None,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """A step up to the decoder: who runs, and where its tokens go."""

    table: RequestTable
    rows: jax.Array  # i32[S]
    blocks: BlockState  # with room for the step's tokens
    plan: Plan  # drafts not included
    num_drafts: jax.Array  # i32[S]
    appended: Append  # the copies to do first
    batch: Batch
    prefix_cache: PrefixCache | None
    host_blocks: BlockState | None
    swapped: Swapped | None  # the copies to do before those


def begin_step(state: EngineState, config: EngineConfig) -> ScheduledStep:
    """Schedule and append: all of a step that comes before the decoder.

    Lengths and tables decide it; tokens are looked at only after a preemption, for
    what sequences have in common.
    """
    table = state.requests
    host_blocks = None if state.host is None else state.host.blocks
    queue, rows, blocks, plan = scheduler.schedule(
        table.queue,
        state.rows,
        state.blocks,
        config,
        _look_up(state, config),
        host_blocks,
        state.scheduler_params,
    )
    table = dataclasses.replace(table, queue=queue)
    is_other = rows != state.rows
    lost = jnp.where(is_other, state.rows, NO_REQUEST)
    cache, swapped = state.prefix_cache, None
    if plan.swaps is not None:
        lost = jnp.where(plan.swaps.out == NO_REQUEST, lost, NO_REQUEST)
        cache, blocks, host_blocks, swapped = _swap_blocks(
            cache, blocks, host_blocks, plan.swaps
        )
    lost = jnp.where(lost == NO_REQUEST, config.max_num_requests, lost)
    table = when(
        plan.num_preempted > 0,
        lambda table: request_table.share_again(table, lost),
        table,
    )
    if config.enable_prefix_caching:
        table, blocks, plan = when(
            plan.num_admitted > 0,
            lambda carry: _share_new(*carry, rows, is_other),
            (table, blocks, plan),
        )
    starts, num_drafts = blocks.context_lens, jnp.zeros_like(rows)
    if config.speculation is not None:
        table, num_drafts = speculation.count_drafts(
            table, rows, blocks, plan.num_tokens, config
        )
    cache, blocks, appended = _append(cache, blocks, plan.num_tokens + num_drafts)
    # The scheduler's promise; broken, the engine stalls and writes no wrong token.
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


def _look_up(state: EngineState, config: EngineConfig) -> Hits | None:
    """What the prefix cache has of the waiting sequences, if any can be admitted."""
    if state.prefix_cache is None:
        return None
    table, queue = state.requests, state.requests.queue
    # At least one token is left to compute: its logits are what follows.
    most = jnp.where(queue.status == WAITING, queue.num_tokens - 1, 0)
    most = jnp.where(table.params.keeps_prompt_logprobs | queue.has_ended, 0, most)

    def match(hits: Hits) -> Hits:
        return Hits(*prefix_cache.match(state.prefix_cache, table.tokens, most))

    none = Hits.none(config.max_num_requests, config.max_blocks_per_seq)
    return when(scheduler.can_admit(queue, state.rows), match, none)


def _share_new(table, blocks, plan, rows, is_other) -> tuple:
    is_new = is_other & (rows != NO_REQUEST)
    table, blocks, waits = request_table.share_new(table, rows, blocks, is_new)
    num_tokens = jnp.where(waits, 0, plan.num_tokens)
    return table, blocks, dataclasses.replace(plan, num_tokens=num_tokens)


def _swap_blocks(cache: PrefixCache | None, blocks, host_blocks, swaps) -> tuple:
    """The prefix cache, which makes room, and both pools after rows went or came."""
    kept = None
    if cache is not None:
        cache = when(
            jnp.any(swaps.into != NO_REQUEST),
            lambda cache: prefix_cache.evict(
                cache, blocks.ref_counts, jnp.sum(swap.demand(host_blocks, swaps.into))
            ),
            cache,
        )
        kept = prefix_cache.is_cached(cache)
    return cache, *swap.swap_blocks(blocks, host_blocks, *swaps, kept)


def _append(cache: PrefixCache | None, blocks: BlockState, num_tokens: jax.Array):
    """The prefix cache, which makes room, the blocks with it taken, and the copies."""
    if cache is None:
        return None, *block_manager.append(blocks, num_tokens)
    needed = jnp.sum(block_manager.blocks_needed(blocks, num_tokens))
    cache = prefix_cache.evict(cache, blocks.ref_counts, needed)
    before, kept = blocks, prefix_cache.is_cached(cache)
    blocks, appended = block_manager.append(blocks, num_tokens, kept)
    # A row that was cut back may go on inside a cached block that it alone has left.
    is_writer = (num_tokens > 0) & (before.context_lens % before.block_size != 0)
    is_writer &= appended.ok & (appended.copy_dst == NO_BLOCK)
    rows = jnp.arange(is_writer.shape[0], dtype=jnp.int32)
    last = before.block_tables[rows, before.context_lens // before.block_size]
    is_writer &= kept[last]
    cache = when(
        jnp.any(is_writer),
        lambda cache: prefix_cache.forget(cache, jnp.where(is_writer, last, NO_BLOCK)),
        cache,
    )
    return cache, blocks, appended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledStep:
    """What decoding made of a step."""

    table: RequestTable  # with the new tokens
    states: States
    parents: jax.Array  # i32[S], the row that each row continues, NO_BLOCK: none
    num_new: jax.Array  # i32[], tokens that running sequences got
    num_accepted: jax.Array  # i32[], of them drafts that stood
    is_settled: jax.Array  # bool[], every row continues itself


def end_step(
    state: EngineState,
    scheduled: ScheduledStep,
    sampled: SampledStep,
    cache: KVCache | None = None,
    draft_cache: KVCache | None = None,
) -> EngineState:
    """The state after a step: rows move or leave, the counters count."""
    table, rows, blocks = sampled.table, scheduled.rows, scheduled.blocks
    plan, copies = scheduled.plan, scheduled.appended.copy_dst != NO_BLOCK
    num_tokens = jnp.sum(plan.num_tokens + scheduled.num_drafts)
    is_stalled = num_tokens + plan.num_preempted + plan.num_admitted == 0
    host, num_swap_outs, num_swapped_blocks = state.host, jnp.int32(0), jnp.int32(0)
    if host is not None and plan.swaps is not None and scheduled.swapped is not None:
        host = dataclasses.replace(host, blocks=scheduled.host_blocks)
        num_swap_outs, num_swap_ins = (
            jnp.sum(seq_indices != NO_REQUEST, dtype=jnp.int32)
            for seq_indices in plan.swaps
        )
        num_swapped_blocks = scheduled.swapped.out.num_blocks
        is_stalled = (is_stalled & (num_swap_ins == 0)) | ~scheduled.swapped.ok
    counters = engine_state.count(
        state.counters,
        blocks,
        is_stalled=is_stalled,
        num_tokens=num_tokens,
        num_generated=sampled.num_new,
        **engine_state.admitted_tokens(state.requests.queue, table.queue),
        num_preemptions=plan.num_preempted,
        num_swap_outs=num_swap_outs,
        num_swapped_blocks=num_swapped_blocks,
        num_block_copies=jnp.sum(copies, dtype=jnp.int32),
        num_drafts=jnp.sum(scheduled.num_drafts),
        num_accepted=sampled.num_accepted,
    )
    recorded = events.record(
        state.timeline,
        state.counters.num_steps,
        state.requests,
        scheduled.table,
        table,
        blocks,
        num_tokens=num_tokens,
        num_generated=sampled.num_new,
    )
    if state.config.speculation is not None:
        blocks = when(
            jnp.any(scheduled.num_drafts > 0),
            lambda blocks: speculation.roll_back(
                table, rows, blocks, scheduled.num_drafts
            ),
            blocks,
        )
    if state.config.max_num_prefixes:
        table = _hold_prefixes(table, rows, blocks)
    blocks = when(
        ~sampled.is_settled,
        lambda blocks: move(table.queue, sampled.parents, rows, blocks),
        blocks,
    )
    prefixes = scheduled.prefix_cache
    if prefixes is not None:
        prefixes, blocks = _enter(
            prefixes, table, rows, blocks, state.counters.num_steps
        )
    rows, blocks = when(
        ~sampled.is_settled,
        lambda carry: release_finished(table.queue, *carry),
        (rows, blocks),
    )
    return EngineState(
        requests=table,
        states=sampled.states,
        rows=rows,
        blocks=blocks,
        prefix_cache=prefixes,
        cache=cache,
        draft_cache=draft_cache,
        host=host,
        counters=counters,
        timeline=recorded,
        scheduler_params=state.scheduler_params,
        config=state.config,
        mesh=state.mesh,
    )


def iterate(model, state, memory, config) -> tuple[EngineState, WorkingMemory]:
    """The state after a step within the limits of `config`, and the working memory."""
    scheduled = begin_step(state, config)
    state = _swap_pages(state, scheduled.swapped)
    scheduled, draft_cache, memory = _draft(model, state, scheduled, memory, config)
    target = _target(model)
    cache, hidden = forward.hidden_states(
        target,
        _copy_blocks(state.cache, scheduled, config),
        scheduled.table,
        scheduled.blocks,
        scheduled.batch,
        memory.hidden,
        config,
    )
    entries = sampling.make_entries(scheduled.table, scheduled.batch, config)
    logits = sampling.next_logits(target, entries, hidden, memory.logits, config)
    table = sampling.rate_prompts(
        target, scheduled.table, scheduled.batch, hidden, config
    )
    scheduled = dataclasses.replace(scheduled, table=table)
    sampled = _decode(state, scheduled, entries, logits, config)
    state = end_step(state, scheduled, sampled, cache, draft_cache)
    return state, WorkingMemory(hidden, logits, memory.draft_hidden)


def _target(model: Model) -> Decoder:
    return model.target if isinstance(model, DraftedModel) else model


def _swap_pages(state: EngineState, swapped: Swapped | None) -> EngineState:
    """The state after the pages have followed the rows that left or came back."""
    host = state.host
    if host is None or swapped is None:
        return state
    out, into = swapped.out, swapped.into

    def move(cache: KVCache | None, host_cache: KVCache | None):
        if cache is None or host_cache is None:
            return None, None
        host_cache = kv_cache.swap_out_pages(cache, host_cache, out.src, out.dst)
        return kv_cache.swap_in_pages(cache, host_cache, into.src, into.dst), host_cache

    cache, host_cache = move(state.cache, host.cache)
    draft_cache, host_draft_cache = move(state.draft_cache, host.draft_cache)
    host = dataclasses.replace(host, cache=host_cache, draft_cache=host_draft_cache)
    return dataclasses.replace(state, cache=cache, draft_cache=draft_cache, host=host)


def _copy_blocks(
    cache: KVCache, scheduled: ScheduledStep, config: EngineConfig
) -> KVCache:
    """The cache after the copies that must come before this step's writes."""
    src, dst = scheduled.appended.copy_src, scheduled.appended.copy_dst
    return when(
        jnp.any(dst != NO_BLOCK),
        lambda cache: kv_cache.copy_blocks(cache, src, dst, config.attention),
        cache,
    )


def _draft(
    model, state, scheduled, memory, config
) -> tuple[ScheduledStep, KVCache | None, WorkingMemory]:
    """The step with the small model's guesses in its table, if there is one."""
    if not isinstance(model, DraftedModel):
        return scheduled, state.draft_cache, memory
    table, cache, hidden, logits = speculation.draft(
        model.draft,
        _copy_blocks(state.draft_cache, scheduled, config),
        scheduled.table,
        scheduled.blocks,
        scheduled.batch,
        memory.draft_hidden,
        memory.logits,
        config,
    )
    memory = memory._replace(logits=logits, draft_hidden=hidden)
    return dataclasses.replace(scheduled, table=table), cache, memory


def _decode(state, scheduled, entries, logits, config) -> SampledStep:
    """Tokens for all rows with logits: sampled one by one, or by their algorithms."""
    number = state.counters.num_steps
    new = sampling.sample_tokens(scheduled.table, entries, logits, config)
    if config.speculation is None:
        table, ended = request_table.extend(scheduled.table, new, number)
        has_ended, num_new = jnp.any(ended), entries.num_sampled
        num_accepted = jnp.zeros_like(num_new)
    else:
        table, has_ended, num_new = speculation.accept(
            scheduled.table, new, entries, number, config.num_drafts
        )
        num_rows = jnp.sum(
            (new.seq_indices < config.max_num_requests) & (entries.offsets == 0)
        )
        # Each row gains a token of its own, unless none was allowed.
        num_accepted = jnp.maximum(num_new - num_rows, 0)
    rated = Logits(logits, entries.seq_indices)
    table, states, parents, num_grouped = algorithms.decide(
        table, state.states, scheduled.rows, rated, number, config
    )
    return SampledStep(
        table=table,
        states=states,
        parents=parents,
        num_new=num_new + num_grouped,
        num_accepted=num_accepted,
        is_settled=~has_ended & (entries.num_grouped == 0),
    )


def _enter(cache, table, rows, blocks, clock) -> tuple[PrefixCache, BlockState]:
    """The prefix cache with all blocks that are full now, and the blocks in use."""
    seq_indices = jnp.maximum(rows, 0)
    cache, blocks = prefix_cache.insert(cache, blocks, table.tokens, clock, seq_indices)
    return prefix_cache.touch(cache, blocks.ref_counts, clock), blocks


def move(queue: Queue, parents, rows, blocks) -> BlockState:
    """The blocks after a step: rows continue their parents.

    A row that waits for a source which finishes now maps its blocks before they go.
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


def release_finished(queue: Queue, rows, blocks) -> tuple[jax.Array, BlockState]:
    """Rows and blocks without those that have finished."""
    has_finished = scheduler.row_values(queue.status, rows) == FINISHED
    blocks = block_manager.free(blocks, has_finished)
    return jnp.where(has_finished, NO_REQUEST, rows), blocks


def _hold_prefixes(table, rows, blocks) -> RequestTable:
    """The table in which prefixes that are computed now are held."""
    is_prefix = scheduler.row_values(table.params.is_prefix, rows, False)
    known = scheduler.row_values(table.queue.num_tokens, rows)
    is_done = is_prefix & (blocks.context_lens == known)
    at = jnp.where(is_done, rows, table.queue.status.shape[0])
    status = table.queue.status.at[at].set(RETAINED, mode="drop")
    queue = dataclasses.replace(table.queue, status=status)
    return dataclasses.replace(table, queue=queue)


def is_live(status: jax.Array) -> jax.Array:
    """Which sequences have not ended: they wait, run, or are swapped; as `status`."""
    return (status == WAITING) | (status == RUNNING) | (status == SWAPPED)
