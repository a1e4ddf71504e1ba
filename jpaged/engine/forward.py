"""Forward: the decoder, at the size of what is live in this step.

Place on the road: plan -> StepInputs -> [forward] -> hidden states -> next tokens.

A step's shapes are static, its load is not. So the decoder is compiled for a few
numbers of rows (decode steps) and of tokens (steps with prompt chunks); each step takes
the smallest that holds what is live. `docs/decisions/branches.md` tells how one program
chooses without copying the pages.

Letters: S rows, T tokens of the step, E hidden size, R places of the request table.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jpaged.attention import api as attention
from jpaged.attention import kv_cache
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
class Batch:
    """The rows of a step, those with tokens first."""

    rows: jax.Array  # i32[S], block manager's row
    seq_indices: jax.Array  # i32[S], its sequence in the request table
    starts: jax.Array  # i32[S], position of its first token of the step
    num_tokens: jax.Array  # i32[S], 0 behind the rows that take part
    num_drafts: jax.Array  # i32[S], of these tokens, the guesses at the end
    has_logits: jax.Array  # bool[S], all its known tokens are computed with this step


def make_batch(
    table: RequestTable,
    rows: jax.Array,
    starts: jax.Array,
    num_tokens: jax.Array,
    num_drafts: jax.Array,
    config: EngineConfig,
) -> Batch:
    """The rows that take part in the step, packed to the front.

    Args:
      table: the sequences.
      rows: i32[S], the sequence that each row runs.
      starts: i32[S], tokens that each row held before the step.
      num_tokens: i32[S], tokens of each row in the step, drafts included.
      num_drafts: i32[S], see `speculation`.
      config: sizes.
    """
    # Pinned prefixes have rows that are never more than max_num_seqs at work.
    packed = pack(num_tokens > 0)[: config.max_num_seqs]
    seq_indices = jnp.maximum(rows[packed], 0)
    starts, num_tokens = starts[packed], num_tokens[packed]
    num_drafts = num_drafts[packed]
    has_logits = starts + num_tokens - num_drafts == table.queue.num_tokens[seq_indices]
    has_logits &= (num_tokens > 0) & ~table.params.is_prefix[seq_indices]
    return Batch(packed, seq_indices, starts, num_tokens, num_drafts, has_logits)


def hidden_states(
    model: Decoder,
    cache: KVCache,
    table: RequestTable,
    blocks: BlockState,
    batch: Batch,
    hidden: jax.Array,
    config: EngineConfig,
) -> tuple[KVCache, jax.Array]:
    """The cache with the step's keys and values, and the tokens' hidden states [T, E].

    The tokens of the batch's rows stand side by side; behind them `hidden` keeps what
    it held, for it is working memory, allocated once. `blocks` already has room for the
    step's tokens.
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

    def run(inputs_of, size, carry):
        cache, hidden = carry
        inputs = inputs_of(table, blocks, batch, size)
        if config.cascade:
            inputs = _with_groups(inputs, config.block_size)
        cache, states = _trunk(model, cache, inputs, config.attention)
        return cache, hidden.at[:size].set(states)

    branches = [functools.partial(run, _decode_inputs, size) for size in row_buckets]
    branches += [functools.partial(run, _ragged_inputs, size) for size in token_buckets]
    return switch_in_place(index, branches, (cache, hidden))


def _trunk(
    model: Decoder, cache: KVCache, inputs: StepInputs, implementation: str | None
) -> tuple[KVCache, jax.Array]:
    """The cache with the tokens' keys and values, and their hidden states [T, E]."""

    def attend(layer, q, k, v, cache):
        slots = inputs.slot_mapping
        cache = kv_cache.write_tokens(cache, k, v, slots, layer, implementation)
        attended = attention.paged_attention(
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
            implementation=implementation,
            **model.attention_options(layer),
        )
        return attended, cache

    hidden, cache = model.trunk_loop(inputs.tokens, inputs.positions, attend, cache)
    return cache, hidden


def _with_groups(inputs: StepInputs, block_size: int) -> StepInputs:
    """The inputs with the rows that share beginnings, found once for all layers."""
    found = shared_prefix.find(inputs.block_tables, inputs.context_lens, block_size)
    return dataclasses.replace(inputs, shared_prefix=found)


def _decode_inputs(
    table: RequestTable, blocks: BlockState, batch: Batch, size: int
) -> StepInputs:
    """Inputs of `size` rows with a token each."""
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


def token_rows(batch: Batch, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the step's first `size` tokens: the batch's row i32[T], the position in its
    sequence i32[T], and whether there is such a token, bool[T]."""
    ends = jnp.cumsum(batch.num_tokens)
    token = jnp.arange(size, dtype=jnp.int32)
    row = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)
    is_live = token < ends[-1]
    row = jnp.where(is_live, row, 0)
    positions = batch.starts[row] + token - (ends - batch.num_tokens)[row]
    return row, jnp.where(is_live, positions, 0), is_live


def _ragged_inputs(
    table: RequestTable, blocks: BlockState, batch: Batch, size: int
) -> StepInputs:
    """Inputs of `size` tokens of all rows."""
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
    """i32[S]: the indices where `mask` holds, in order, then the others."""
    num_rows = mask.shape[0]
    num_marked = jnp.sum(mask, dtype=jnp.int32)
    marked = jnp.cumsum(mask, dtype=jnp.int32) - 1
    others = num_marked + jnp.cumsum(~mask, dtype=jnp.int32) - 1
    index = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.zeros_like(index).at[jnp.where(mask, marked, others)].set(index)


def bucket(buckets: tuple[int, ...], number: jax.Array) -> jax.Array:
    """The index of the first bucket that holds `number`."""
    return jnp.sum(jnp.asarray(buckets, jnp.int32) < number, dtype=jnp.int32)
