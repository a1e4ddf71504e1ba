"""Forward: the decoder, at the size of the step's live rows and tokens.

Pipeline: scheduled step -> StepInputs -> [forward] -> hidden states -> sampling.

Shapes are static, and the load of a step is not. The decoder is therefore compiled for
a few numbers of rows (decode steps) and of tokens (steps with prompt chunks); each step
uses the smallest that is large enough. `docs/decisions/branches.md` explains how one
program chooses without copying the pages.

Shape symbols: S batch rows, T tokens of the step, E hidden size, R sequences of the
request table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.attention import api as attention
from jpaged.attention import backends, kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import switch_in_place
from jpaged.config import EngineConfig
from jpaged.engine.request_table import RequestTable
from jpaged.kv import block_manager, shared_prefix
from jpaged.kv.block_manager import BlockState
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import StepInputs


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


def make_batch(
    table: RequestTable,
    rows: jax.Array,
    starts: jax.Array,
    num_tokens: jax.Array,
    num_drafts: jax.Array,
    config: EngineConfig,
) -> StepBatch:
    """Pack the rows that take part in the step to the front.

    Args:
      table: the request table.
      rows: i32[S], sequence index of each row.
      starts: i32[S], tokens that each row had before the step.
      num_tokens: i32[S], tokens of each row in the step, drafts included.
      num_drafts: i32[S], see `speculation`.
      config: the engine's sizes.
    """
    # There are more rows than max_num_seqs if prefixes can be pinned, but never more
    # than max_num_seqs have tokens in one step.
    packed = pack(num_tokens > 0)[: config.max_num_seqs]
    seq_indices = jnp.maximum(rows[packed], 0)
    starts, num_tokens = starts[packed], num_tokens[packed]
    num_drafts = num_drafts[packed]
    has_logits = starts + num_tokens - num_drafts == table.queue.num_tokens[seq_indices]
    has_logits &= (num_tokens > 0) & ~table.params.is_prefix[seq_indices]
    return StepBatch(packed, seq_indices, starts, num_tokens, num_drafts, has_logits)


def hidden_states(
    model: Decoder,
    cache: KVCache,
    table: RequestTable,
    blocks: BlockState,
    batch: StepBatch,
    hidden: jax.Array,
    config: EngineConfig,
) -> tuple[KVCache, jax.Array]:
    """Compute the hidden states of the step's tokens, and write their keys and values.

    Args:
      model: the decoder.
      cache: the pages.
      table: the request table.
      blocks: with the step's tokens appended.
      batch: the step's rows.
      hidden: [T, E], working memory, allocated once for a run.
      config: the engine's sizes.

    Returns:
      The cache, and `hidden` with the states of the step's tokens in front, row after
      row; the rest is unchanged.
    """
    num_rows = jnp.sum(batch.num_tokens > 0)
    num_tokens = jnp.sum(batch.num_tokens)
    row_buckets, token_buckets = config.row_buckets, config.token_buckets
    is_decode = num_tokens == num_rows
    index = jnp.where(
        is_decode,
        bucket(row_buckets, num_rows),
        len(row_buckets) + bucket(token_buckets, num_tokens),
    )
    index = jnp.where(num_tokens == 0, -1, index)

    def run(
        inputs_of: Callable[..., StepInputs],
        size: int,
        carry: tuple[KVCache, jax.Array],
    ) -> tuple[KVCache, jax.Array]:
        cache, hidden = carry
        inputs = inputs_of(table, blocks, batch, size)
        if config.cascade:
            inputs = _with_shared_prefixes(inputs, config.block_size)
        cache, states = _trunk(model, cache, inputs, config.attention)
        return cache, hidden.at[:size].set(states)

    branches = [functools.partial(run, _decode_inputs, size) for size in row_buckets]
    branches += [functools.partial(run, _ragged_inputs, size) for size in token_buckets]
    return switch_in_place(index, branches, (cache, hidden))


def _trunk(
    model: Decoder, cache: KVCache, inputs: StepInputs, implementation: str | None
) -> tuple[KVCache, jax.Array]:
    """Return the cache with the tokens' keys and values, and hidden states [T, E]."""

    def attend(
        layer: Any, q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        slots = inputs.slot_mapping
        cache = kv_cache.write_tokens(cache, k, v, slots, layer, implementation)
        options: dict[str, Any] = dict(
            model.attention_options(layer), implementation=implementation
        )
        attended: Any = attention.paged_attention(
            q,
            cache.k_pages,
            cache.v_pages,
            inputs.block_tables,
            inputs.context_lens,
            query_start_loc=inputs.query_start_loc,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            layer=layer,
            shared_prefix=inputs.shared_prefix,
            **options,
        )
        return attended, cache

    hidden, cache = model.trunk_loop(
        inputs.tokens,
        inputs.positions,
        attend,
        cache,
        is_unrolled=backends.unrolls_layers(implementation),
    )
    return cache, hidden


def _with_shared_prefixes(inputs: StepInputs, block_size: int) -> StepInputs:
    """Find the rows that share prefixes, once for all layers."""
    found = shared_prefix.find_shared_prefix(
        inputs.block_tables, inputs.context_lens, block_size
    )
    return dataclasses.replace(inputs, shared_prefix=found)


def _decode_inputs(
    table: RequestTable, blocks: BlockState, batch: StepBatch, size: int
) -> StepInputs:
    """Build the inputs of `size` rows with one token each."""
    rows, positions = batch.rows[:size], batch.starts[:size]
    is_live = batch.num_tokens[:size] > 0
    return StepInputs(
        tokens=jnp.where(is_live, table.tokens[batch.seq_indices[:size], positions], 0),
        positions=jnp.where(is_live, positions, 0),
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, rows, -1), positions
        ),
        block_tables=blocks.block_tables[rows],
        context_lens=jnp.where(is_live, positions + 1, 0),
        query_start_loc=None,
    )


def token_rows(batch: StepBatch, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Locate the first `size` tokens of the step.

    Returns:
      i32[T], the token's row of the batch; i32[T], its position in its sequence; and
      bool[T], whether there is such a token.
    """
    ends = jnp.cumsum(batch.num_tokens)
    token = jnp.arange(size, dtype=jnp.int32)
    row = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)
    is_live = token < ends[-1]
    row = jnp.where(is_live, row, 0)
    positions = batch.starts[row] + token - (ends - batch.num_tokens)[row]
    return row, jnp.where(is_live, positions, 0), is_live


def _ragged_inputs(
    table: RequestTable, blocks: BlockState, batch: StepBatch, size: int
) -> StepInputs:
    """Build the inputs of `size` tokens of all rows."""
    row, positions, is_live = token_rows(batch, size)
    ends = jnp.cumsum(batch.num_tokens)
    query_start_loc = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    is_row_live = batch.num_tokens > 0
    return StepInputs(
        tokens=jnp.where(is_live, table.tokens[batch.seq_indices[row], positions], 0),
        positions=positions,
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, batch.rows[row], -1), positions
        ),
        block_tables=blocks.block_tables[batch.rows],
        context_lens=jnp.where(is_row_live, batch.starts + batch.num_tokens, 0),
        query_start_loc=query_start_loc,
    )


def pack(mask: jax.Array) -> jax.Array:
    """Return i32[S]: indices of the true entries of `mask`, then of the others."""
    num_rows = mask.shape[0]
    num_marked = jnp.sum(mask, dtype=jnp.int32)
    marked = jnp.cumsum(mask, dtype=jnp.int32) - 1
    others = num_marked + jnp.cumsum(~mask, dtype=jnp.int32) - 1
    index = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.zeros_like(index).at[jnp.where(mask, marked, others)].set(index)


def bucket(buckets: tuple[int, ...], number: jax.Array) -> jax.Array:
    """Return the index of the first bucket that is at least `number`, i32[]."""
    return jnp.sum(jnp.asarray(buckets, jnp.int32) < number, dtype=jnp.int32)
