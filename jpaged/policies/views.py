"""Views: what policies see, as arrays.

Pipeline: request table, batch rows, prefix cache -> [views] -> policies.

Shape symbols: R sequences of the request table, S batch rows, N blocks, P parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_DEADLINE = int(jnp.iinfo(jnp.int32).max)
NO_USER = -1
YIELD = float("inf")  # score with which a preemption policy gives back a row


class Requests(NamedTuple):
    """Input of admission and preemption policies: a column for each sequence.

    Scores of sequences that the decision is not about are ignored. For a request with
    several sequences, the score of the first one is used. `LLM` also passes the
    requests that wait on the host until the table has space, one element for each,
    followed by padding.

    Times are milliseconds from now, so `now` is 0 on this axis.
    """

    arrivals: jax.Array  # i32[R], rank of arrival
    priorities: jax.Array  # i32[R], the request's priority; smaller is admitted first
    prompt_lens: jax.Array  # i32[R], tokens
    num_tokens: jax.Array  # i32[R], prompt and generated tokens
    cached_lens: jax.Array  # i32[R], tokens of waiting ones in the prefix cache
    num_preemptions: jax.Array  # i32[R]
    leaders: jax.Array  # i32[R], first sequence of the request, its group
    is_waiting: jax.Array  # bool[R], swapped ones included
    is_running: jax.Array  # bool[R]
    max_tokens: jax.Array  # i32[R], most tokens that the sequence may generate
    ages: jax.Array  # i32[R], ms since submission
    times_left: jax.Array  # i32[R], ms until the deadline, NO_DEADLINE without one
    users: jax.Array  # i32[R], number of the request's user, NO_USER without one
    user_tokens: jax.Array  # i32[R], tokens that the user got beyond the least served
    parameters: jax.Array  # f32[P], of the policy

    @property
    def num_generated(self) -> jax.Array:
        """Generated tokens, i32[R]."""
        return self.num_tokens - self.prompt_lens

    @property
    def tokens_left(self) -> jax.Array:
        """Most tokens that each sequence still generates, i32[R]."""
        return self.max_tokens - self.num_generated


class Rows(NamedTuple):
    """Input of budget policies: one column for each batch row."""

    remaining: jax.Array  # i32[S], most tokens of the row in this step; 0: none
    is_decode: jax.Array  # bool[S], its only token is the one that it decodes next
    ranks: jax.Array  # i32[S], 0 keeps its memory longest
    budget: jax.Array  # i32[], most tokens of all rows together
    requests: Requests  # [S] each, of the rows' sequences
    parameters: jax.Array  # f32[P], of the policy


class CachedBlocks(NamedTuple):
    """Input of eviction policies: one column for each block.

    Scores of blocks that are not cached, or in use, are ignored.
    """

    last_used: jax.Array  # i32[N], step in which a sequence last used it
    inserted: jax.Array  # i32[N], step in which it was cached
    num_uses: jax.Array  # i32[N], sequences that have used it
    depths: jax.Array  # i32[N], blocks before it in its prefix
    floors: jax.Array  # f32[N], largest score evicted before its last use
    now: jax.Array  # i32[], step
    block_size: int  # tokens per block
    parameters: jax.Array  # f32[P], of the policy


Policy = Callable[[Requests], jax.Array]  # scores of [R]
BudgetPolicy = Callable[[Rows], jax.Array]  # tokens of each row, [S]
EvictionPolicy = Callable[[CachedBlocks], jax.Array]  # scores of [N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SchedulerParams:
    """The scheduler's settings that are not shapes, as arrays: `vmap` sweeps them.

    `EngineConfig.scheduler_params` is the only source of their initial values.
    """

    parameters: jax.Array  # f32[P], of the admission policy
    num_watermark_blocks: jax.Array  # i32[], blocks that admission leaves free
    max_num_seqs: jax.Array  # i32[], sequences that run at the same time
    max_num_batched_tokens: jax.Array  # i32[], tokens of one step
    max_prompt_chunk: jax.Array  # i32[], tokens of one prompt in one step
    # f32[P] each, of the other policies; None for the default policy, which has none
    preemption: jax.Array | None = None
    eviction: jax.Array | None = None
    budget: jax.Array | None = None

    def limited_to(self, limits: SchedulerParams) -> SchedulerParams:
        """Return these settings with at most the limits' rows, tokens and chunks."""
        names = ("max_num_seqs", "max_num_batched_tokens", "max_prompt_chunk")
        return dataclasses.replace(
            self,
            **{
                name: jnp.minimum(getattr(self, name), getattr(limits, name))
                for name in names
            },
        )
