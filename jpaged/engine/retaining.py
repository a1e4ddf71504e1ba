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
from jpaged.engine.request_table import RequestTable
from jpaged.engine.state import EngineState
from jpaged.indexing import take
from jpaged.kv.block_manager import BlockState
from jpaged.kv.drops import computed_lens, drop_blocks
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
    blocks, _ = scheduler.map_sources(table.queue, rows, blocks)
    blocks = _undecided(blocks, was_empty)
    blocks = drop_due(table, rows, config, blocks)
    queue = _without_dropped_sources(table.queue, rows, blocks)
    state = dataclasses.replace(
        state, requests=dataclasses.replace(table, queue=queue), blocks=blocks
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
    if method is None or values is None or drops is None:
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
        if method.statistic == "recent_attention" and statistic is not None:
            statistic = jnp.where(is_due[:, None], 0.0, statistic)
        after = dataclasses.replace(after, decided=decided, statistic=statistic)
        return dataclasses.replace(blocks, drops=after)

    return when(jnp.any(is_due), decide, blocks)


def _undecided(blocks: BlockState, is_new: jax.Array) -> BlockState:
    """Return the blocks without the decisions of the rows that new rows have mapped."""
    drops = blocks.drops
    assert drops is not None
    decided = jnp.where(is_new, 0, drops.decided)
    return dataclasses.replace(
        blocks, drops=dataclasses.replace(drops, decided=decided)
    )


def _without_dropped_sources(
    queue: Queue, rows: jax.Array, blocks: BlockState
) -> Queue:
    """Return the queue in which no sequence has a source that has dropped blocks."""
    assert blocks.drops is not None
    size = queue.status.shape[0]
    has_dropped = (blocks.drops.dropped > 0) & (rows != scheduler.NO_REQUEST)
    at = jnp.where(has_dropped, rows, size)
    is_dropped = jnp.zeros((size,), jnp.bool_).at[at].set(True, mode="drop")
    own = jnp.arange(size, dtype=jnp.int32)
    loses = take(is_dropped, queue.sources) & (queue.sources != own)
    return dataclasses.replace(
        queue,
        sources=jnp.where(loses, own, queue.sources),
        shared_lens=jnp.where(loses, 0, queue.shared_lens),
    )
