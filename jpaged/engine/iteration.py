"""Iteration: one step of the engine, from the schedule to the new tokens.

Pipeline: scheduler, block manager, decoder, decoding -> [iteration] -> engine.

Source: Kwon et al. 2023, sections 4 and 5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.attention import kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine import (
    algorithms,
    forward,
    request_table,
    sampling,
    speculation,
)
from jpaged.engine.algorithms import DraftLogits, Logits
from jpaged.engine.bookkeeping import SampledStep as SampledStep
from jpaged.engine.bookkeeping import ScheduledStep as ScheduledStep
from jpaged.engine.bookkeeping import begin_step as begin_step
from jpaged.engine.bookkeeping import end_step as end_step
from jpaged.engine.speculation import DraftedModel
from jpaged.engine.state import EngineState, Model
from jpaged.kv.block_manager import NO_BLOCK


class WorkingMemory(NamedTuple):
    """Arrays that a step writes before it reads them; allocated once for a run."""

    hidden: Any  # [T, E], with those of layers if algorithms need them
    logits: Any  # f32[N, V], or `sampling.SeenLogits`
    draft_hidden: jax.Array | None = None  # [T, E] of the draft model
    draft_logits: jax.Array | None = None  # f32[N, V], if algorithms need them


def working_memory(model: Model, state: EngineState) -> WorkingMemory:
    """Allocate working memory for the largest step of the state's config."""
    config = state.config

    size = config.max_num_batched_tokens
    draft_hidden = draft_logits = None
    if isinstance(model, DraftedModel):
        draft_hidden = sampling.init_hidden(config, model.draft.config, size)
        if config.seen_draft:
            draft_logits = sampling.init_logits(config, model.draft.config)
    return WorkingMemory(
        sampling.init_hidden(config, model.config, size),
        sampling.init_logits(config, model.config),
        draft_hidden,
        draft_logits,
    )


def iterate(
    model: Model, state: EngineState, memory: WorkingMemory, config: EngineConfig
) -> tuple[EngineState, WorkingMemory]:
    """Run one step.

    Args:
      model: the decoder, or a target with its draft model.
      state: the engine's state, with pages.
      memory: from `working_memory`, or from the step before.
      config: the state's config, or one with lower limits.

    Returns:
      The state after the step, and the working memory.
    """
    target = model.target if isinstance(model, DraftedModel) else model
    state, scheduled = begin_step(state, config)
    state = _move_all_pages(state, scheduled, config)
    state, memory, draft = _draft(model, state, scheduled, memory, config)
    assert state.cache is not None, "a state created without a model has no pages"
    cache, hidden, blocks = forward.hidden_states(
        target,
        state.cache,
        state.requests,
        state.blocks,
        scheduled.batch,
        memory.hidden,
        config,
    )
    logits = sampling.next_logits(
        target, scheduled.entries, hidden, memory.logits, config
    )
    table = sampling.write_prompt_logprobs(
        target, state.requests, scheduled.batch, forward.last_hidden(hidden), config
    )
    state = dataclasses.replace(state, requests=table, blocks=blocks)
    sampled = decode(state, scheduled, logits, config, draft=draft)
    state = end_step(state, scheduled, sampled, cache, state.draft_cache)
    return state, memory._replace(hidden=hidden, logits=logits)


def swap_pages(
    cache: KVCache, host_cache: KVCache | None, scheduled: ScheduledStep
) -> tuple[KVCache, KVCache | None]:
    """Copy the pages of swapped blocks between the device and the host.

    Args:
      cache: a model's pages.
      host_cache: its pages in the host pool, if there is one.
      scheduled: the step, as scheduled.
    """
    swapped = scheduled.swapped
    if host_cache is None or swapped is None:
        return cache, host_cache
    out, into = swapped.out, swapped.into
    host_cache = kv_cache.swap_out_pages(cache, host_cache, out.src, out.dst)
    return kv_cache.swap_in_pages(cache, host_cache, into.src, into.dst), host_cache


def copy_pages(
    cache: KVCache, scheduled: ScheduledStep, config: EngineConfig
) -> KVCache:
    """Do the copy-on-write copies, which must come before the step's writes.

    Args:
      cache: a model's pages, after `swap_pages`.
      scheduled: the step, as scheduled.
      config: the engine's config.
    """
    src, dst = scheduled.appended.copy_src, scheduled.appended.copy_dst
    return when(
        jnp.any(dst != NO_BLOCK),
        lambda cache: kv_cache.copy_blocks(cache, src, dst, config.attention),
        cache,
    )


def _move_all_pages(
    state: EngineState, scheduled: ScheduledStep, config: EngineConfig
) -> EngineState:
    """Swap and copy the pages of the model and of the draft model."""
    host = state.host

    def move(
        cache: KVCache | None, host_cache: KVCache | None
    ) -> tuple[KVCache | None, KVCache | None]:
        if cache is None:
            return cache, host_cache
        cache, host_cache = swap_pages(cache, host_cache, scheduled)
        return copy_pages(cache, scheduled, config), host_cache

    cache, own = move(state.cache, None if host is None else host.cache)
    draft_cache, own_draft = move(
        state.draft_cache, None if host is None else host.draft_cache
    )
    if host is not None:
        host = dataclasses.replace(host, cache=own, draft_cache=own_draft)
    return dataclasses.replace(state, cache=cache, draft_cache=draft_cache, host=host)


def _draft(
    model: Model,
    state: EngineState,
    scheduled: ScheduledStep,
    memory: WorkingMemory,
    config: EngineConfig,
) -> tuple[EngineState, WorkingMemory, DraftLogits | None]:
    """Write the draft model's drafts into the request table, if there is one.

    Also returns its logits for rows of algorithms, if they need them.
    """
    if not isinstance(model, DraftedModel) or memory.draft_hidden is None:
        return state, memory, None
    assert state.draft_cache is not None
    table, cache, hidden, logits, found = speculation.draft(
        model.draft,
        state.draft_cache,
        state.requests,
        state.blocks,
        scheduled.batch,
        memory.draft_hidden,
        memory.logits,
        config,
        memory.draft_logits,
    )
    memory = memory._replace(logits=logits, draft_hidden=hidden)
    if found is not None:
        memory = memory._replace(draft_logits=found.values)
    return dataclasses.replace(state, requests=table, draft_cache=cache), memory, found


def decode(
    state: EngineState,
    scheduled: ScheduledStep,
    logits: Any,
    config: EngineConfig,
    size: int | None = None,
    draft: DraftLogits | None = None,
) -> SampledStep:
    """Generate tokens for all rows with logits, by sampling or by their algorithms.

    Args:
      state: the state from `begin_step`.
      scheduled: the step, as scheduled.
      logits: f32[N, V], of the step's entries.
      config: the engine's config.
      size: the step has at most this number of entries; None: N.
      draft: the draft model's logits for rows of algorithms, if they need them.
    """
    number, entries = state.counters.num_steps, scheduled.entries
    hidden, layers = None, ()
    if isinstance(logits, sampling.SeenLogits):
        logits, hidden, layers = logits
    new = sampling.sample_tokens(state.requests, entries, logits, config, size)
    if config.speculation is None:
        table, ended = request_table.extend(state.requests, new, number)
        has_ended, num_new = jnp.any(ended), entries.num_sampled
        num_accepted = jnp.zeros_like(num_new)
    else:
        table, has_ended, num_new = speculation.accept(
            state.requests, new, entries, number, config.num_drafts
        )
        num_rows = jnp.sum(
            (new.seq_indices < config.max_num_requests) & (entries.offsets == 0)
        )
        # Each row gains one token that is no draft, unless no token is allowed.
        num_accepted = jnp.maximum(num_new - num_rows, 0)
    table, states, parents, num_grouped = algorithms.step_algorithms(
        table,
        state.states,
        state.rows,
        Logits(logits, entries.seq_indices, hidden, layers, draft),
        number,
        config,
    )
    return SampledStep(
        table=table,
        states=states,
        parents=parents,
        num_new=num_new + num_grouped,
        num_accepted=num_accepted,
        is_settled=~has_ended & (entries.num_grouped == 0),
    )
