"""Retaining: rows drop the blocks that the config's retention method does not keep.

Pipeline: blocks between two steps, `retention` -> [retaining] -> scheduler.

Before each step, rows that have reached a decision point drop blocks. First, rows that
wait for a source map its blocks, so that they get the prompt as it was computed. A row
that has dropped a block is no source for others, and publishes no block in the prefix
cache. A preempted sequence that is recomputed stops at the same decision points, and
drops blocks again as before.

Shape symbols: S batch rows, R sequences of the request table.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import retention, scheduler
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine.batch import Reads, StepBatch
from jpaged.engine.request_table import RequestTable
from jpaged.engine.state import Counters, EngineState
from jpaged.indexing import put, take
from jpaged.kv.block_manager import BlockState
from jpaged.kv.drops import computed_lens, drop_blocks
from jpaged.retention import Retention
from jpaged.scheduler import Queue, UntilDecision


def prepare(
    state: EngineState, config: EngineConfig
) -> tuple[EngineState, UntilDecision]:
    """Drop the blocks that are due; also return which tokens the step may compute.

    Args:
      state: between two steps.
      config: the engine's config, with a retention method.
    """
    table, rows, blocks = state.requests, state.rows, state.blocks
    was_empty = blocks.context_lens == 0
    queue = _without_unfit_sources(table.queue, rows, blocks, config)
    blocks, _ = scheduler.map_sources(queue, rows, blocks)
    blocks = _undecided(blocks, was_empty, ~_maps_own_request(queue, rows))
    before = blocks
    blocks = drop_due(table, rows, config, blocks)
    counters = count_dropped(state.counters, before, blocks)
    queue = _without_unfit_sources(queue, rows, blocks, config)
    state = dataclasses.replace(
        state,
        requests=dataclasses.replace(table, queue=queue),
        blocks=blocks,
        counters=counters,
    )
    method, values = config.retention, table.params.retention
    assert method is not None
    assert values is not None
    computed = computed_lens(blocks)
    safe = jnp.maximum(rows, 0)
    prompt_lens = take(queue.prompt_lens, safe)
    point = retention.next_decision(method, take(values, safe), prompt_lens, computed)
    every_prompt = queue.prompt_lens
    return state, UntilDecision(
        rows=point - computed,
        waiting=retention.next_decision(
            method, values, every_prompt, jnp.zeros_like(every_prompt)
        ),
        mappable=retention.mappable_tokens(method, values, every_prompt),
        exact=every_prompt if method.only_reads else None,
    )


def drop_due(
    table: RequestTable, rows: jax.Array, config: EngineConfig, blocks: BlockState
) -> BlockState:
    """Return the blocks after the decisions of rows that have reached one.

    Args:
      table: the request table.
      rows: i32[S], sequence index of each row.
      config: the engine's config.
      blocks: the block state; returned as it is without a retention method.
    """
    method, values, drops = config.retention, table.params.retention, blocks.drops
    if method is None or values is None or drops is None or method.only_reads:
        return blocks
    safe, computed = jnp.maximum(rows, 0), computed_lens(blocks)
    mine, prompt_lens = take(values, safe), take(table.queue.prompt_lens, safe)
    is_due = retention.is_decision(method, mine, prompt_lens, computed)
    is_due &= ~scheduler.idle_rows(table.queue, rows) & (drops.decided != computed)

    def decide(blocks: BlockState) -> BlockState:
        drops, sampling = blocks.drops, table.params.sampling
        assert drops is not None
        seeds = (take(sampling.seed, safe), take(sampling.sample, safe))
        keeps = retention.blocks_to_keep(
            method,
            mine,
            num_tokens=blocks.context_lens,
            num_dropped=drops.dropped,
            prompt_lens=prompt_lens,
            seeds=jnp.stack([seed.astype(jnp.uint32) for seed in seeds], axis=1),
            statistic=drops.statistic,
            width=blocks.block_tables.shape[1],
            block_size=blocks.block_size,
        )
        blocks = drop_blocks(blocks, keeps | ~is_due[:, None])
        after = blocks.drops
        assert after is not None
        decided = jnp.where(is_due, computed, after.decided)
        statistic = after.statistic
        if method.statistic != "attention" and statistic is not None:
            statistic = jnp.where(is_due[:, None], 0.0, statistic)
        after = dataclasses.replace(after, decided=decided, statistic=statistic)
        return dataclasses.replace(blocks, drops=after)

    return when(jnp.any(is_due), decide, blocks)


def count_dropped(
    counters: Counters, before: BlockState, after: BlockState
) -> Counters:
    """Count the tokens that rows have dropped between two block states.

    Args:
      counters: the engine's counters.
      before: block state before the drops.
      after: block state with the same rows after the drops.
    """
    total = counters.num_dropped_tokens
    if total is None or after is before:
        return counters
    assert before.drops is not None
    assert after.drops is not None
    gained = jnp.sum(after.drops.dropped - before.drops.dropped)
    return dataclasses.replace(counters, num_dropped_tokens=total + gained)


def note_dropped(
    table: RequestTable, rows: jax.Array, blocks: BlockState
) -> RequestTable:
    """Write the tokens that rows have dropped into the request table.

    Args:
      table: the request table.
      rows: i32[S], sequence index of each row.
      blocks: before the rows of finished sequences are emptied.
    """
    column, drops = table.num_dropped, blocks.drops
    if column is None or drops is None:
        return table
    return dataclasses.replace(table, num_dropped=put(column, rows, drops.dropped))


def observe(
    batch: StepBatch, table: RequestTable, blocks: BlockState, config: EngineConfig
) -> StepBatch:
    """Return the batch with the queries that count for the method's statistic.

    Args:
      batch: the rows of a step, with its tokens.
      table: the request table.
      blocks: the block state.
      config: the engine's config.
    """
    method, drops = config.retention, blocks.drops
    values = table.params.retention
    if method is None or drops is None or values is None:
        return batch
    if method.only_reads:
        return dataclasses.replace(batch, reads=_reads(batch, table, values, method))
    if drops.observed is None:
        return batch
    first = retention.first_observed(
        method,
        take(values, batch.seq_indices),
        take(table.queue.prompt_lens, batch.seq_indices),
        batch.starts,
    )
    # Queries that a source has observed do not count again.
    observed = jnp.maximum(first, take(drops.observed, batch.rows))
    return dataclasses.replace(batch, observed=observed)


def _reads(
    batch: StepBatch, table: RequestTable, values: jax.Array, method: Retention
) -> Reads:
    """Return which rows compute a generated token, and read fewer blocks for it."""
    mine = take(values, batch.seq_indices)
    prompt_lens = take(table.queue.prompt_lens, batch.seq_indices)
    is_on = mine[:, method.names.index("every")] > 0
    is_generated = (batch.starts >= prompt_lens) & (batch.num_tokens == 1)
    return Reads(is_on & is_generated, mine, prompt_lens)


def _maps_own_request(queue: Queue, rows: jax.Array) -> jax.Array:
    """Return whether the source of each row belongs to its request, bool[S]."""
    safe = jnp.maximum(rows, 0)
    source = take(queue.sources, safe)
    return take(queue.leaders, source) == take(queue.leaders, safe)


def _undecided(
    blocks: BlockState, is_new: jax.Array, is_other: jax.Array
) -> BlockState:
    """Return the blocks without what new rows must not have from their sources.

    Args:
      blocks: after new rows have mapped their sources' blocks.
      is_new: bool[S], rows that were empty before: their decisions are to come.
      is_other: bool[S], the source is another request, whose queries do not count.
    """
    drops = blocks.drops
    assert drops is not None
    decided = jnp.where(is_new, 0, drops.decided)
    drops = dataclasses.replace(drops, decided=decided)
    if drops.statistic is not None and drops.observed is not None:
        is_other &= is_new
        drops = dataclasses.replace(
            drops,
            statistic=jnp.where(is_other[:, None], 0.0, drops.statistic),
            observed=jnp.where(is_other, 0, drops.observed),
        )
    return dataclasses.replace(blocks, drops=drops)


def _without_unfit_sources(
    queue: Queue, rows: jax.Array, blocks: BlockState, config: EngineConfig
) -> Queue:
    """Return the queue in which sequences have no source that cannot serve them.

    A source that has dropped blocks cannot; nor can one whose statistic includes
    queries behind the tokens that it shares.
    """
    assert blocks.drops is not None
    size = queue.status.shape[0]
    at = jnp.where(rows == scheduler.NO_REQUEST, size, rows)
    dropped, computed = (
        jnp.zeros((size,), jnp.int32).at[at].set(column, mode="drop")
        for column in (blocks.drops.dropped, computed_lens(blocks))
    )
    own = jnp.arange(size, dtype=jnp.int32)
    loses = take(dropped, queue.sources) > 0
    method = config.retention
    if method is not None and method.reads_attention:
        is_own = take(queue.leaders, queue.sources) == queue.leaders
        loses |= is_own & (take(computed, queue.sources) > queue.shared_lens + 1)
    loses &= queue.sources != own
    return dataclasses.replace(
        queue,
        sources=jnp.where(loses, own, queue.sources),
        shared_lens=jnp.where(loses, 0, queue.shared_lens),
    )
