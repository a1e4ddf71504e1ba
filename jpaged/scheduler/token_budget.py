"""Token budget: how many tokens each running row computes in a step.

Pipeline: queue -> [token_budget] -> step.

Shape symbols: R sequences of the request table, S batch rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged import policies
from jpaged.compat import when
from jpaged.indexing import take
from jpaged.policies import BudgetPolicy, Rows, SchedulerParams
from jpaged.scheduler.queue import (
    Queue,
    ranks,
    requests_view,
    row_values,
    same_request,
    sum_before,
)


def split_tokens(
    queue: Queue,
    rows: jax.Array,
    remaining: jax.Array,
    settings: SchedulerParams,
    scores: jax.Array | None,
    policy: str | BudgetPolicy,
    clock: jax.Array | None,
) -> jax.Array:
    """Return each row's tokens, i32[S]. If every row only decodes, all of them do.

    Args:
      queue: the sequences.
      rows: i32[S], the sequence index of each row, or NO_REQUEST.
      remaining: i32[S], tokens that each row still has to compute.
      settings: limits, and the parameters of a budget policy; None: the default.
      scores: f32[S], from `preemption.memory_scores`.
      policy: the budget policy.
      clock: i32[], ms; None if no policy reads it.
    """
    decodes = (remaining == 1).astype(jnp.int32)

    def split(decodes: jax.Array) -> jax.Array:
        rank = ranks(queue, rows, scores)
        most = jnp.minimum(remaining, settings.max_prompt_chunk)
        if settings.budget is None:
            return _decodes_first(decodes, most, rank, settings)
        is_decode = decodes == 1
        return _by_policy(queue, rows, most, is_decode, rank, settings, policy, clock)

    return when(jnp.any(remaining > 1), split, decodes)


def _decodes_first(
    decodes: jax.Array, most: jax.Array, rank: jax.Array, settings: SchedulerParams
) -> jax.Array:
    """One token per decode, and the rest to prompts by rank."""
    chunk = jnp.where(decodes == 0, most, 0)
    budget = settings.max_num_batched_tokens - jnp.sum(decodes)
    return decodes + jnp.clip(budget - sum_before(rank, chunk), 0, chunk)


def _by_policy(
    queue: Queue,
    rows: jax.Array,
    most: jax.Array,
    is_decode: jax.Array,
    rank: jax.Array,
    settings: SchedulerParams,
    policy: str | BudgetPolicy,
    clock: jax.Array | None,
) -> jax.Array:
    """As the policy splits the budget.

    The first row that has work gets at least one token in each step, so every run ends.
    """
    budget, parameters = settings.max_num_batched_tokens, settings.budget
    assert parameters is not None
    safe = jnp.maximum(rows, 0)
    requests = requests_view(queue, parameters[:0], clock=clock)
    columns = (take(column, safe) for column in requests[:-1])
    requests = requests._make([*columns, requests.parameters])
    view = Rows(most, is_decode, rank, budget, requests, parameters)
    wanted = policies.find(policies.BUDGET, policy)(view)
    wanted = jnp.clip(wanted.astype(jnp.int32), 0, most)

    # Rows of a lockstep request decode together.
    together = row_values(queue.is_lockstep, rows, False) & is_decode
    together = same_request(queue, rows) & together[:, None] & together[None, :]
    first = jnp.min(jnp.where(most > 0, rank, rows.shape[0]))
    is_first = rank == first
    is_first |= jnp.any(together & is_first[None, :], axis=1)
    wanted = jnp.where(is_first, jnp.maximum(wanted, 1), wanted)
    tokens = jnp.clip(budget - sum_before(rank, wanted), 0, wanted)
    waits = jnp.any(together & (tokens == 0)[None, :], axis=1)
    return jnp.where(waits, 0, tokens)
