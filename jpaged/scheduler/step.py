"""Step: the plan of one; the queue, rows and blocks after it, and everyone's tokens.

Letters: R places of the request table, S rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from jpaged.kv.block_manager import BlockState
from jpaged.policies import SchedulerParams
from jpaged.scheduler.admission import admit, can_admit
from jpaged.scheduler.preemption import Swaps, bring_back, preempt
from jpaged.scheduler.queue import (
    NO_REQUEST,
    SWAPPED,
    Hits,
    Queue,
    idle_rows,
    ranks,
    row_values,
    same_request,
    sum_before,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step does."""

    num_tokens: jax.Array  # i32[S], tokens of each row; 0: not in this step
    num_preempted: jax.Array  # i32[], rows that gave their blocks back
    num_admitted: jax.Array  # i32[], sequences that got a row
    swaps: Swaps | None = None  # None without a host's pool


def schedule(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    config: EngineConfig,
    hits: Hits | None = None,
    host: BlockState | None = None,
    scheduler_params: SchedulerParams | None = None,
) -> tuple[Queue, jax.Array, BlockState, Plan]:
    """The queue, rows and blocks after admission and preemption, and the step's plan.

    Args:
      queue: the request table's scheduling side.
      rows: i32[S], the place in the request table that each row runs, or NO_REQUEST.
      blocks: block manager's state; its rows are `rows`.
      config: sizes and policy.
      hits: what is cached of the waiting sequences; None is nothing.
      host: what swapped sequences hold, its rows are places; None: nobody is swapped.
      knobs: the scheduler's numbers, within the config's sizes; None takes its own.

    After the plan's swaps `block_manager.append(blocks, plan.num_tokens)` always
    succeeds. Rows that are swapped out still hold their blocks, and are empty.
    """
    scheduler_params = _within(
        config.scheduler_params if scheduler_params is None else scheduler_params,
        config,
    )
    blocks, wanted = _join_sources(queue, rows, blocks)
    wanted = _keep_step(queue, rows, blocks, wanted)
    num_tokens = _share_budget(queue, rows, wanted, scheduler_params)
    needed = block_manager.blocks_needed(blocks, num_tokens)
    is_short = jnp.sum(needed) > block_manager.num_free_blocks(blocks)
    swaps = None if host is None else Swaps.none(rows)
    carry = (queue, rows, blocks, num_tokens, jnp.int32(0), swaps)
    carry = when(
        is_short, lambda carry: preempt(*carry, needed=needed, host=host), carry
    )
    queue, rows, blocks, num_tokens, num_preempted, swaps = carry

    # Nothing is admitted in a step that had to take blocks back, or while somebody is
    # swapped.
    is_open = can_admit(queue, rows) & ~is_short
    is_open &= jnp.sum(num_tokens) < scheduler_params.max_num_batched_tokens
    if host is not None:
        queue, rows, swaps = when(
            jnp.any(queue.status == SWAPPED) & ~is_short & jnp.any(rows == NO_REQUEST),
            lambda carry: bring_back(*carry, blocks, needed, host, scheduler_params),
            (queue, rows, swaps),
        )
    if hits is None:
        hits = Hits.none(queue.status.shape[0], config.max_blocks_per_seq)
    carry = when(
        is_open,
        lambda carry: admit(
            *carry,
            hits=hits,
            needed=needed,
            policy=config.policy,
            scheduler_params=scheduler_params,
        ),
        (queue, rows, blocks, num_tokens, jnp.int32(0)),
    )
    queue, rows, blocks, num_tokens, num_admitted = carry
    return queue, rows, blocks, Plan(num_tokens, num_preempted, num_admitted, swaps)


def _within(scheduler_params: SchedulerParams, config: EngineConfig) -> SchedulerParams:
    """The knobs, no larger than a program for `config` serves."""
    return dataclasses.replace(
        scheduler_params,
        max_num_seqs=jnp.minimum(scheduler_params.max_num_seqs, config.max_num_seqs),
        max_num_batched_tokens=jnp.minimum(
            scheduler_params.max_num_batched_tokens, config.max_num_batched_tokens
        ),
        max_prompt_chunk=jnp.minimum(
            scheduler_params.max_prompt_chunk, config.largest_chunk
        ),
    )


def _join_sources(
    queue: Queue, rows: jax.Array, blocks: BlockState
) -> tuple[BlockState, jax.Array]:
    """The blocks, and the tokens that each row has yet to compute, i32[S].

    A new row waits until its source (the request's first sample, a pinned prefix) has
    computed what they share, and then maps those blocks. At least one token is left to
    compute: its logits are what follows. Copy-on-write follows from the reference
    counts (paper section 4.4).
    """
    is_idle = idle_rows(queue, rows)
    wanted = row_values(queue.num_tokens, rows) - blocks.context_lens
    wanted = jnp.where(is_idle, 0, wanted)
    sources = row_values(queue.sources, rows, NO_REQUEST)
    shared = row_values(queue.shared_lens, rows)
    is_new = (sources != rows) & (blocks.context_lens == 0) & (shared > 0) & ~is_idle

    def join(carry):
        blocks, wanted = carry
        is_source = (rows[None, :] == sources[:, None]) & is_new[:, None]
        source_row = jnp.argmax(is_source, axis=1).astype(jnp.int32)
        has_source = jnp.any(is_source, axis=1)
        own = jnp.arange(rows.shape[0], dtype=jnp.int32)

        def can_join(blocks: BlockState) -> jax.Array:
            is_ready = blocks.context_lens[source_row] >= shared
            return has_source & (blocks.context_lens == 0) & is_ready

        def map_blocks(blocks: BlockState) -> BlockState:
            joins = can_join(blocks)
            blocks = block_manager.fork(blocks, jnp.where(joins, source_row, own))
            return block_manager.truncate(
                blocks, jnp.where(joins, shared, blocks.context_lens)
            )

        # Again for those whose source has just joined: a lockstep leader that maps all
        # but its last token computes nothing until the others have joined it.
        blocks = lax.while_loop(lambda b: jnp.any(can_join(b)), map_blocks, blocks)
        joined = has_source & (blocks.context_lens > 0)
        wanted = jnp.where(joined, wanted - shared, wanted)
        return blocks, jnp.where(has_source & ~joined, 0, wanted)

    return when(jnp.any(is_new), join, (blocks, wanted))


def _keep_step(queue, rows, blocks, wanted) -> jax.Array:
    """`wanted` without the last token of lockstep rows that some other is not up to."""
    is_lockstep = row_values(queue.is_lockstep, rows, False) & ~idle_rows(queue, rows)

    def withhold(wanted: jax.Array) -> jax.Array:
        left = row_values(queue.num_tokens, rows) - blocks.context_lens
        is_behind = is_lockstep & (left > 1)
        has_other_behind = jnp.any(
            same_request(queue, rows) & is_behind[None, :], axis=1
        )
        return jnp.where(is_lockstep & has_other_behind, wanted - 1, wanted)

    waits = when(jnp.any(is_lockstep), withhold, wanted)
    return jnp.maximum(waits, 0)


def _share_budget(queue, rows, wanted, scheduler_params: SchedulerParams) -> jax.Array:
    """Tokens of each row, i32[S]: one for a decode, and the rest to prompts in turn."""
    decodes = (wanted == 1).astype(jnp.int32)
    num_decodes = jnp.sum(decodes)

    def chunks(num_tokens: jax.Array) -> jax.Array:
        left = jnp.where(
            wanted > 1, jnp.minimum(wanted, scheduler_params.max_prompt_chunk), 0
        )
        before = sum_before(ranks(queue, rows), left)
        budget = scheduler_params.max_num_batched_tokens - num_decodes
        return num_tokens + jnp.clip(budget - before, 0, left)

    return when(jnp.any(wanted > 1), chunks, decodes)
