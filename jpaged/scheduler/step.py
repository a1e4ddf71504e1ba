"""Step: the plan of one step, with the queue, rows and blocks after it.

Pipeline: queue, admission, preemption -> [step] -> block_manager.append.

Shape symbols: R sequences of the request table, S batch rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.indexing import take
from jpaged.kv import block_manager, cache_groups
from jpaged.kv.block_manager import BlockState
from jpaged.kv.drops import computed_lens, intact_rows
from jpaged.policies import SchedulerParams
from jpaged.scheduler.admission import admit, can_admit
from jpaged.scheduler.preemption import (
    Swaps,
    memory_scores,
    preempt,
    swap_in_request,
    yield_rows,
)
from jpaged.scheduler.queue import (
    NO_REQUEST,
    SWAPPED,
    WAITING,
    Hits,
    Queue,
    UntilDecision,
    idle_rows,
    release_windows,
    row_values,
    same_request,
)
from jpaged.scheduler.token_budget import split_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Work of one step."""

    num_tokens: jax.Array  # i32[S], tokens of each row; 0: not in this step
    num_preempted: jax.Array  # i32[], rows that lost their blocks
    num_admitted: jax.Array  # i32[], sequences that got a row
    swaps: Swaps | None = None  # None without a host pool


def schedule(
    queue: Queue,
    rows: jax.Array,
    blocks: BlockState,
    config: EngineConfig,
    hits: Hits | None = None,
    host: BlockState | None = None,
    scheduler_params: SchedulerParams | None = None,
    clock: jax.Array | None = None,
    until: UntilDecision | None = None,
) -> tuple[Queue, jax.Array, BlockState, StepPlan]:
    """Preempt, swap in and admit, and plan the tokens of one step.

    Args:
      queue: the scheduler's part of the request table.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      blocks: the block manager's state, with the same rows.
      config: sizes and policies.
      hits: the cached prefixes of waiting sequences; None means none.
      host: the host pool, whose rows are sequence indices; None: without swapping.
      scheduler_params: settings; `config.scheduler_params` are the upper limits, and
        the default.
      clock: i32[], ms; None if no policy reads it.
      until: tokens that retention lets sequences compute; None: no limit.

    Returns:
      The queue, rows and blocks after preemption and admission, and the plan. After the
      plan's swaps, `block_manager.append(blocks, plan.num_tokens)` always succeeds.
      Rows that are swapped out are empty in `rows` and keep their blocks in `blocks`.
    """
    settings = limits = jax.tree.map(jnp.asarray, config.scheduler_params)
    if scheduler_params is not None:
        settings = scheduler_params.limited_to(limits)
    scores = memory_scores(
        queue, rows, config.preemption_policy, settings.preemption, clock
    )
    blocks, remaining = _map_sources(queue, rows, blocks)
    # Only now: rows that have just mapped their source's blocks share the window.
    blocks = release_windows(queue, rows, blocks)
    remaining = _hold_lockstep(queue, rows, blocks, remaining)
    if until is not None:
        remaining = jnp.minimum(remaining, until.rows)
    num_tokens = split_tokens(
        queue, rows, remaining, settings, scores, config.budget_policy, clock
    )
    needed = block_manager.blocks_needed(blocks, num_tokens)
    is_short = jnp.sum(needed) > block_manager.num_free_blocks(blocks)
    swaps = None if host is None else Swaps.none(rows)
    carry = (queue, rows, blocks, num_tokens, jnp.int32(0), swaps)
    carry = when(
        is_short,
        lambda carry: preempt(*carry, needed=needed, host=host, scores=scores),
        carry,
    )
    queue, rows, blocks, num_tokens, num_preempted, swaps = carry

    is_swapped = jnp.any(queue.status == SWAPPED)
    # Nothing is admitted in a step that preempts, or while a request is swapped out.
    is_open = can_admit(queue, rows) & ~is_short
    is_open &= jnp.sum(num_tokens) < settings.max_num_batched_tokens
    if host is not None and swaps is not None:
        queue, rows, swaps = when(
            is_swapped & ~is_short & jnp.any(rows == NO_REQUEST),
            lambda carry: swap_in_request(*carry, blocks, needed, host, settings),
            (queue, rows, swaps),
        )
    carry = (queue, rows, blocks, num_tokens, jnp.int32(0))
    carry = _admit_waiting(carry, is_open, config, hits, needed, settings, clock, until)
    queue, rows, blocks, num_tokens, num_admitted = carry
    if scores is not None:
        may_yield = ~is_short & (num_admitted == 0) & jnp.any(queue.status == WAITING)
        may_yield &= ~is_swapped
        queue, rows, blocks, num_tokens, num_preempted = when(
            may_yield,
            lambda carry: yield_rows(*carry, scores=scores),
            (queue, rows, blocks, num_tokens, num_preempted),
        )
    plan = StepPlan(num_tokens, num_preempted, num_admitted, swaps)
    return queue, rows, blocks, plan


def _admit_waiting(
    carry: tuple,
    is_open: jax.Array,
    config: EngineConfig,
    hits: Hits | None,
    needed: jax.Array,
    settings: SchedulerParams,
    clock: jax.Array | None,
    until: UntilDecision | None,
) -> tuple:
    """Admit waiting requests if admission is open; `carry` is as for `admit`."""
    if hits is None:
        hits = Hits.none(carry[0].status.shape[0], carry[2].block_tables.shape[1])
    return when(
        is_open,
        lambda carry: admit(
            *carry,
            hits=hits,
            needed=needed,
            policy=config.policy,
            scheduler_params=settings,
            clock=clock,
            until=until,
        ),
        carry,
    )


def _map_sources(
    queue: Queue, rows: jax.Array, blocks: BlockState
) -> tuple[BlockState, jax.Array]:
    """Let new rows map their sources' blocks; also return each row's tokens to compute.

    A new row waits until its source (the request's first sample, or a pinned prefix)
    has computed the tokens that they share, and then maps those blocks. At least one
    token is left to compute, because its logits give the next token. Copy-on-write
    follows from the reference counts (paper section 4.4).

    Returns:
      The blocks, and i32[S], the tokens that each row still has to compute.
    """
    is_idle = idle_rows(queue, rows)
    remaining = row_values(queue.num_tokens, rows) - computed_lens(blocks)
    remaining = jnp.where(is_idle, 0, remaining)
    sources = row_values(queue.sources, rows, NO_REQUEST)
    shared = row_values(queue.shared_lens, rows)
    is_new = (sources != rows) & (blocks.context_lens == 0) & (shared > 0) & ~is_idle

    def map_all(carry: tuple) -> tuple:
        blocks, remaining = carry
        is_source = (rows[None, :] == sources[:, None]) & is_new[:, None]
        source_row = jnp.argmax(is_source, axis=1).astype(jnp.int32)
        has_source = jnp.any(is_source, axis=1)
        if (intact := intact_rows(blocks)) is not None:
            has_source &= take(intact, source_row)
        if cache_groups.has_windows(blocks.windows):
            # A source that has released what the row would see is of no use.
            has_source &= cache_groups.has_windows_at(blocks, source_row, shared)

        def can_map(blocks: BlockState) -> jax.Array:
            is_ready = take(blocks.context_lens, source_row) >= shared
            return has_source & (blocks.context_lens == 0) & is_ready

        def map_blocks(blocks: BlockState) -> BlockState:
            lens = jnp.where(can_map(blocks), shared, 0)
            return block_manager.adopt_from(blocks, source_row, lens)

        # Repeated for rows whose source has just mapped its own source's blocks: a
        # lockstep leader that maps all but its last token computes nothing before the
        # other rows have mapped its blocks.
        blocks = lax.while_loop(lambda b: jnp.any(can_map(b)), map_blocks, blocks)
        has_mapped = has_source & (blocks.context_lens > 0)
        remaining = jnp.where(has_mapped, remaining - shared, remaining)
        return blocks, jnp.where(has_source & ~has_mapped, 0, remaining)

    return when(jnp.any(is_new), map_all, (blocks, remaining))


def _hold_lockstep(
    queue: Queue, rows: jax.Array, blocks: BlockState, remaining: jax.Array
) -> jax.Array:
    """Return `remaining` without the last tokens of waiting lockstep rows, i32[S].

    A row waits while another row of its request has more than its last token left.
    """
    is_lockstep = row_values(queue.is_lockstep, rows, False) & ~idle_rows(queue, rows)

    def hold(remaining: jax.Array) -> jax.Array:
        left = row_values(queue.num_tokens, rows) - computed_lens(blocks)
        is_behind = is_lockstep & (left > 1)
        has_other_behind = jnp.any(
            same_request(queue, rows) & is_behind[None, :], axis=1
        )
        return jnp.where(is_lockstep & has_other_behind, remaining - 1, remaining)

    return jnp.maximum(when(jnp.any(is_lockstep), hold, remaining), 0)
