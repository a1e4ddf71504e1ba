"""Batch: the rows of a step, packed, and the rows of logits that it needs.

Pipeline: scheduled step -> [batch] -> forward, sampling.

Shape symbols: S batch rows, N rows of logits, R sequences of the request table, T
tokens of the step.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.config import EngineConfig
from jpaged.engine.request_table import NO_ALGORITHM, RequestTable
from jpaged.indexing import take


class Reads(NamedTuple):
    """Which rows read only the blocks that retention selects, with its parameters."""

    selects: jax.Array  # bool[S], the row's token is a generated one
    values: jax.Array  # f32[S, C]
    prompt_lens: jax.Array  # i32[S]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """The rows of a step; rows with tokens come first."""

    rows: jax.Array  # i32[S], batch row of the block manager
    seq_indices: jax.Array  # i32[S], the row's sequence in the request table
    starts: jax.Array  # i32[S], position of the row's first token of the step
    num_tokens: jax.Array  # i32[S], 0 for rows that take no part
    num_drafts: jax.Array  # i32[S], drafts at the end of these tokens
    has_logits: jax.Array  # bool[S], the step completes the row's known tokens
    # i32[S], tokens that the row has dropped: position p is stored at p - dropped.
    dropped: jax.Array | None = None  # None without retention
    # i32[S], position of the first query that counts for retention's statistic.
    observed: jax.Array | None = None  # None without a statistic
    reads: Reads | None = None  # None if rows read all their blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """The rows of logits: first the sampled ones, then those of algorithms."""

    seq_indices: jax.Array  # i32[N], the sequence; R behind the last entry
    positions: jax.Array  # i32[N], position of the token that the logits predict
    tokens: jax.Array  # i32[N], index of the step's token that the logits come from
    offsets: jax.Array  # i32[N], drafts between the last known token and that one
    num_sampled: jax.Array  # i32[]
    num_grouped: jax.Array  # i32[], rows of algorithms


def make_batch(
    table: RequestTable,
    rows: jax.Array,
    starts: jax.Array,
    num_tokens: jax.Array,
    num_drafts: jax.Array,
    config: EngineConfig,
    dropped: jax.Array | None = None,
) -> StepBatch:
    """Pack the rows that take part in the step to the front.

    Args:
      table: the request table.
      rows: i32[S], sequence index of each row.
      starts: i32[S], tokens that each row had computed before the step.
      num_tokens: i32[S], tokens of each row in the step, drafts included.
      num_drafts: i32[S], see `speculation`.
      config: the engine's sizes.
      dropped: i32[S], tokens that each row has dropped; None without retention.
    """
    # There are more rows than max_num_seqs if prefixes can be pinned, but never more
    # than max_num_seqs have tokens in one step.
    packed = pack(num_tokens > 0)[: config.max_num_seqs]
    seq_indices = jnp.maximum(take(rows, packed), 0)
    starts, num_tokens = take(starts, packed), take(num_tokens, packed)
    num_drafts = take(num_drafts, packed)
    has_logits = starts + num_tokens - num_drafts == take(
        table.queue.num_tokens, seq_indices
    )
    has_logits &= (num_tokens > 0) & ~take(table.params.is_prefix, seq_indices)
    if dropped is not None:
        dropped = take(dropped, packed)
    return StepBatch(
        packed, seq_indices, starts, num_tokens, num_drafts, has_logits, dropped
    )


def make_entries(
    table: RequestTable, batch: StepBatch, config: EngineConfig
) -> Entries:
    """List the rows of logits of a step.

    There is an entry for each batch row whose known tokens are all computed, followed
    by one for each of the row's drafts.
    """
    is_grouped = take(table.params.algorithms, batch.seq_indices) != NO_ALGORITHM
    is_sampled = batch.has_logits & ~is_grouped
    counts = jnp.where(batch.has_logits, 1 + batch.num_drafts, 0)
    order = argsort(jnp.where(is_sampled, 0, jnp.where(batch.has_logits, 1, 2)))
    ends = jnp.cumsum(take(counts, order))
    index = jnp.arange(config.max_num_logits, dtype=jnp.int32)
    row = segment_of(ends, index)
    has_logits = index < ends[-1]
    row = jnp.where(has_logits, row, 0)
    offsets = jnp.where(has_logits, index - take(ends - take(counts, order), row), 0)
    row = take(order, row)
    ahead = offsets - take(batch.num_drafts, row)
    last = jnp.cumsum(batch.num_tokens) - 1
    return Entries(
        seq_indices=jnp.where(
            has_logits, take(batch.seq_indices, row), config.max_num_requests
        ),
        positions=take(batch.starts + batch.num_tokens, row) + ahead,
        tokens=jnp.maximum(take(last, row) + ahead, 0),
        offsets=offsets,
        num_sampled=jnp.sum(jnp.where(is_sampled, counts, 0)),
        num_grouped=jnp.sum(jnp.where(is_grouped, counts, 0)),
    )


def token_rows(batch: StepBatch, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Locate the first `size` tokens of the step.

    Returns:
      i32[T], the token's row of the batch; i32[T], its position in its sequence; and
      bool[T], whether there is such a token.
    """
    ends = jnp.cumsum(batch.num_tokens)
    token = jnp.arange(size, dtype=jnp.int32)
    row = segment_of(ends, token)
    is_live = token < ends[-1]
    row = jnp.where(is_live, row, 0)
    positions = take(batch.starts, row) + token - take(ends - batch.num_tokens, row)
    return row, jnp.where(is_live, positions, 0), is_live


def pack(mask: jax.Array) -> jax.Array:
    """Return i32[S]: indices of the true entries of `mask`, then of the others."""
    return argsort(~mask)


def argsort(keys: jax.Array) -> jax.Array:
    """Return the indices i32[S] that sort `keys`, [S]; the sort is stable.

    `jnp.argsort` is a larger program.
    """
    return lax.sort((keys, jnp.arange(keys.size, dtype=jnp.int32)), num_keys=1)[1]


def bucket(buckets: tuple[int, ...], number: jax.Array) -> jax.Array:
    """Return the index of the first bucket that is at least `number`, i32[]."""
    return jnp.sum(jnp.asarray(buckets, jnp.int32) < number, dtype=jnp.int32)


def segment_of(ends: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return the first segment whose end is above each number, i32 per number.

    Comparing with all ends is a smaller program than a binary search.
    """
    return jnp.sum(ends[None, :] <= numbers[:, None], axis=1, dtype=jnp.int32)
