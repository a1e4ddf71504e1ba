"""Forward: the decoder and the sampler, at the size of what is live in this step.

Place on the road: plan -> StepInputs -> [forward] -> new tokens.

A step's shapes are static, its load is not. So the decoder is compiled for a few
numbers of rows (decode steps) and of tokens (steps with prompt chunks), and the logits
and the sampler for a few numbers of rows; each step takes the smallest that holds what
is live. `docs/decisions/branches.md` tells how one program chooses without copying the
pages.

Letters: S rows, T tokens of the step, E hidden size, R places of the request table.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jpaged import attention, block_manager
from jpaged.block_manager import BlockState
from jpaged.compat import switch_in_place
from jpaged.config import EngineConfig
from jpaged.decoding.sample import (
    SamplingRows,
    sample,
    token_logprobs,
    top_logprobs,
)
from jpaged.kv_cache import KVCache
from jpaged.models.decoder import Decoder
from jpaged.request_table import NewTokens, RequestTable
from jpaged.step_inputs import StepInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of a step, those with tokens first."""

    rows: jax.Array  # i32[S], block manager's row
    places: jax.Array  # i32[S], its sequence in the request table
    starts: jax.Array  # i32[S], position of its first token of the step
    num_tokens: jax.Array  # i32[S], 0 behind the rows that take part
    is_sampled: jax.Array  # bool[S], its last token of the step gets logits


def make_batch(
    table: RequestTable, rows: jax.Array, starts: jax.Array, num_tokens: jax.Array
) -> Batch:
    """The rows that take part in the step, packed to the front.

    Args:
      table: the sequences.
      rows: i32[S], the sequence that each row runs.
      starts: i32[S], tokens that each row held before the step.
      num_tokens: i32[S], tokens of each row in the step.
    """
    order = _pack(num_tokens > 0)
    places = jnp.maximum(rows[order], 0)
    starts, num_tokens = starts[order], num_tokens[order]
    is_sampled = starts + num_tokens == table.queue.num_tokens[places]
    return Batch(order, places, starts, num_tokens, is_sampled & (num_tokens > 0))


def hidden_states(
    model: Decoder,
    cache: KVCache,
    table: RequestTable,
    blocks: BlockState,
    batch: Batch,
    config: EngineConfig,
) -> tuple[KVCache, jax.Array]:
    """The cache with the step's keys and values, and hidden [S, E] of the last tokens.

    `blocks` already has room for the step's tokens.
    """
    num_rows = jnp.sum(batch.num_tokens > 0)
    num_tokens = jnp.sum(batch.num_tokens)
    row_buckets, token_buckets = config.row_buckets, config.token_buckets
    is_decode = num_tokens == num_rows
    index = jnp.where(
        is_decode,
        _bucket(row_buckets, num_rows),
        len(row_buckets) + _bucket(token_buckets, num_tokens),
    )
    index = jnp.where(num_tokens == 0, -1, index)

    def run(inputs_of, size, carry):
        cache, hidden = carry
        inputs, last = inputs_of(table, blocks, batch, size)
        cache, states = _trunk(model, cache, inputs, config.attention)
        return cache, hidden.at[: last.shape[0]].set(states[last])

    branches = [functools.partial(run, _decode_inputs, size) for size in row_buckets]
    branches += [functools.partial(run, _ragged_inputs, size) for size in token_buckets]
    shape = (config.max_num_seqs, model.config.hidden_size)
    hidden = jnp.zeros(shape, model.config.dtype)
    return switch_in_place(index, branches, (cache, hidden))


def sample_tokens(
    model: Decoder,
    table: RequestTable,
    batch: Batch,
    hidden: jax.Array,
    config: EngineConfig,
) -> NewTokens:
    """A new token for each row whose known tokens are all computed."""
    num_places = config.max_num_requests
    order = _pack(batch.is_sampled)
    valid = batch.is_sampled[order]
    places = jnp.where(valid, batch.places[order], num_places)
    num_rows = config.max_num_seqs
    kept = config.num_logprobs
    empty = NewTokens(
        places=places,
        tokens=jnp.zeros((num_rows,), jnp.int32),
        logprobs=jnp.zeros((num_rows,), jnp.float32),
        ranks=jnp.zeros((num_rows,), jnp.int32),
        top_ids=jnp.zeros((num_rows, kept), jnp.int32),
        top_logprobs=jnp.zeros((num_rows, kept), jnp.float32),
    )

    def run(size, new):
        at = jnp.where(valid[:size], places[:size], 0)
        logits = model.logits(hidden[order[:size]])
        rows = _sampling_rows(table, at, valid[:size])
        tokens, logprobs = sample(logits, rows, table.queue.num_tokens[at])
        new = dataclasses.replace(
            new,
            tokens=new.tokens.at[:size].set(tokens),
            logprobs=new.logprobs.at[:size].set(logprobs),
        )
        if not kept:
            return new
        _, ranks = token_logprobs(logits, tokens)
        top_values, top_ids = top_logprobs(logits, kept)
        return dataclasses.replace(
            new,
            ranks=new.ranks.at[:size].set(ranks),
            top_ids=new.top_ids.at[:size].set(top_ids),
            top_logprobs=new.top_logprobs.at[:size].set(top_values),
        )

    num_sampled = jnp.sum(batch.is_sampled)
    index = jnp.where(num_sampled == 0, -1, _bucket(config.row_buckets, num_sampled))
    branches = [functools.partial(run, size) for size in config.row_buckets]
    return switch_in_place(index, branches, empty)


def _trunk(
    model: Decoder, cache: KVCache, inputs: StepInputs, implementation: str | None
) -> tuple[KVCache, jax.Array]:
    """The cache with the tokens' keys and values, and their hidden states [T, E]."""
    k_pages, v_pages = list(cache.k_pages), list(cache.v_pages)

    def attend(layer, q, k, v):
        k_pages[layer], v_pages[layer] = attention.write_kv(
            k_pages[layer],
            v_pages[layer],
            k,
            v,
            inputs.slot_mapping,
            implementation=implementation,
        )
        return attention.paged_attention(
            q,
            k_pages[layer],
            v_pages[layer],
            inputs.block_tables,
            inputs.context_lens,
            query_start_loc=inputs.query_start_loc,
            implementation=implementation,
        )

    hidden = model.trunk(inputs.tokens, inputs.positions, attend)
    return KVCache(tuple(k_pages), tuple(v_pages)), hidden


def _decode_inputs(
    table: RequestTable, blocks: BlockState, batch: Batch, size: int
) -> tuple[StepInputs, jax.Array]:
    """Inputs of `size` rows with a token each, and the index of each row's last."""
    rows, positions = batch.rows[:size], batch.starts[:size]
    is_live = batch.num_tokens[:size] > 0
    inputs = StepInputs(
        tokens=jnp.where(is_live, table.tokens[batch.places[:size], positions], 0),
        positions=jnp.where(is_live, positions, 0),
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, rows, -1), positions
        ),
        block_tables=blocks.block_tables[rows],
        context_lens=jnp.where(is_live, positions + 1, 0),
        query_start_loc=None,
    )
    return inputs, jnp.arange(size, dtype=jnp.int32)


def _ragged_inputs(
    table: RequestTable, blocks: BlockState, batch: Batch, size: int
) -> tuple[StepInputs, jax.Array]:
    """Inputs of `size` tokens of all rows, and the index of each row's last."""
    ends = jnp.cumsum(batch.num_tokens)
    query_start_loc = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    token = jnp.arange(size, dtype=jnp.int32)
    row = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)
    is_live = token < ends[-1]
    row = jnp.where(is_live, row, 0)
    positions = batch.starts[row] + token - query_start_loc[row]
    positions = jnp.where(is_live, positions, 0)
    is_row_live = batch.num_tokens > 0
    inputs = StepInputs(
        tokens=jnp.where(is_live, table.tokens[batch.places[row], positions], 0),
        positions=positions,
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, batch.rows[row], -1), positions
        ),
        block_tables=blocks.block_tables[batch.rows],
        context_lens=jnp.where(is_row_live, batch.starts + batch.num_tokens, 0),
        query_start_loc=query_start_loc,
    )
    return inputs, jnp.maximum(ends - 1, 0)


def _sampling_rows(
    table: RequestTable, places: jax.Array, valid: jax.Array
) -> SamplingRows:
    """Sampling parameters of the sequences; greedy where not `valid`, which is cheap."""
    rows = jax.tree.map(lambda column: column[places], table.sampling)
    idle = SamplingRows.greedy(places.shape[0])
    return jax.tree.map(lambda row, none: jnp.where(valid, row, none), rows, idle)


def _pack(mask: jax.Array) -> jax.Array:
    """i32[S]: the indices where `mask` holds, in order, then the others."""
    num_rows = mask.shape[0]
    num_marked = jnp.sum(mask, dtype=jnp.int32)
    marked = jnp.cumsum(mask, dtype=jnp.int32) - 1
    others = num_marked + jnp.cumsum(~mask, dtype=jnp.int32) - 1
    index = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.zeros_like(index).at[jnp.where(mask, marked, others)].set(index)


def _bucket(buckets: tuple[int, ...], number: jax.Array) -> jax.Array:
    """The index of the first bucket that holds `number`."""
    return jnp.sum(jnp.asarray(buckets, jnp.int32) < number, dtype=jnp.int32)


