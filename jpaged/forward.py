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
from jax import lax

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

_SAMPLED_ROWS = 8  # rows that the sampler takes at a time


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
    shape = (batch.rows.shape[0], model.config.hidden_size)
    hidden = jnp.zeros(shape, model.config.dtype)
    return switch_in_place(index, branches, (cache, hidden))


def next_logits(
    model: Decoder,
    batch: Batch,
    hidden: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
) -> jax.Array:
    """`logits` f32[S, V] with its first rows those of the batch's sampled rows.

    The other rows keep what they held: `logits` is working memory, allocated once.
    """
    order = _pack(batch.is_sampled)

    def run(size, logits):
        return logits.at[:size].set(model.logits(hidden[order[:size]]))

    num_sampled = jnp.sum(batch.is_sampled)
    index = jnp.where(num_sampled == 0, -1, _bucket(config.row_buckets, num_sampled))
    branches = [functools.partial(run, size) for size in config.row_buckets]
    return switch_in_place(index, branches, logits)


def sample_tokens(
    table: RequestTable, batch: Batch, logits: jax.Array, config: EngineConfig
) -> NewTokens:
    """A new token for each row whose known tokens are all computed.

    The sampler is compiled for one row and for a few, and walks the rows so: it is
    small work but a large program.
    """
    order = _pack(batch.is_sampled)
    num_sampled = jnp.sum(batch.is_sampled)
    (num_rows,) = order.shape
    kept = config.num_logprobs
    places = jnp.where(batch.is_sampled, batch.places, config.max_num_requests)[order]
    new = NewTokens(
        places=places,
        tokens=jnp.zeros((num_rows,), jnp.int32),
        logprobs=jnp.zeros((num_rows,), jnp.float32),
        ranks=jnp.zeros((num_rows,), jnp.int32),
        top_ids=jnp.zeros((num_rows, kept), jnp.int32),
        top_logprobs=jnp.zeros((num_rows, kept), jnp.float32),
    )

    def run(size, new):
        def chunk(index, new):
            # The last chunk slides back to fit, and samples some rows a second time.
            start = jnp.minimum(index * size, num_rows - size)
            at = lax.dynamic_slice(places, (start,), (size,))
            valid = at < config.max_num_requests
            at = jnp.where(valid, at, 0)
            scores = lax.dynamic_slice(logits, (start, 0), (size, logits.shape[1]))
            rows = _sampling_rows(table, at, valid)
            tokens, logprobs = sample(scores, rows, table.queue.num_tokens[at])
            found = {"tokens": tokens, "logprobs": logprobs}
            if kept:
                found["top_logprobs"], found["top_ids"] = top_logprobs(scores, kept)
                _, found["ranks"] = token_logprobs(scores, tokens)
            put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
            found = {
                name: put(getattr(new, name), value, start)
                for name, value in found.items()
            }
            return dataclasses.replace(new, **found)

        return lax.fori_loop(0, -(-num_sampled // size), chunk, new)

    sizes = sorted({config.row_buckets[0], min(_SAMPLED_ROWS, config.max_num_seqs)})
    branches = [functools.partial(run, size) for size in sizes]
    index = jnp.where(num_sampled <= sizes[0], 0, len(sizes) - 1)
    index = jnp.where(num_sampled == 0, -1, index)
    return switch_in_place(index, branches, new)


def _trunk(
    model: Decoder, cache: KVCache, inputs: StepInputs, implementation: str | None
) -> tuple[KVCache, jax.Array]:
    """The cache with the tokens' keys and values, and their hidden states [T, E]."""

    def attend(layer, q, k, v, cache):
        k_pages, v_pages = attention.write_kv(
            cache.k_pages, cache.v_pages, k, v, inputs.slot_mapping, layer=layer
        )
        attended = attention.paged_attention(
            q,
            k_pages,
            v_pages,
            inputs.block_tables,
            inputs.context_lens,
            query_start_loc=inputs.query_start_loc,
            layer=layer,
            **model.attention_options(layer),
        )
        return attended, KVCache(k_pages, v_pages)

    hidden, cache = model.trunk_loop(inputs.tokens, inputs.positions, attend, cache)
    return cache, hidden


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
    """Sampling parameters of the sequences; greedy, the cheapest, where not `valid`."""
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
