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
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.attention import api as attention
from jpaged.attention import backends, invariant, kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import switch_in_place
from jpaged.config import EngineConfig
from jpaged.engine.batch import StepBatch, bucket, token_rows
from jpaged.engine.request_table import RequestTable
from jpaged.kv import block_manager, shared_prefix
from jpaged.kv.block_manager import BlockState
from jpaged.models import layer_kernels
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import StepInputs


def hidden_states(
    model: Decoder,
    cache: KVCache,
    table: RequestTable,
    blocks: BlockState,
    batch: StepBatch,
    hidden: Any,
    config: EngineConfig,
) -> tuple[KVCache, Any]:
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
        is_decode: bool, size: int, carry: tuple[KVCache, Any]
    ) -> tuple[KVCache, Any]:
        cache, hidden = carry
        inputs = step_inputs(table.tokens, blocks, batch, size, is_decode)
        cache, states = run_trunk(model, cache, inputs, config, is_alone=False)
        return cache, jax.tree.map(lambda x, new: x.at[:size].set(new), hidden, states)

    branches = [functools.partial(run, True, size) for size in row_buckets]
    branches += [functools.partial(run, False, size) for size in token_buckets]
    return switch_in_place(index, branches, (cache, hidden))


def run_trunk(
    model: Decoder,
    cache: KVCache,
    inputs: StepInputs,
    config: EngineConfig,
    is_alone: bool = True,
) -> tuple[KVCache, Any]:
    """Return the cache with the tokens' keys and values, and hidden states [T, E].

    If algorithms need layers, hidden states are a pair, see `Decoder.trunk_loop`.

    Args:
      model: the decoder.
      cache: the pages.
      inputs: the tokens.
      config: the engine's config.
      is_alone: the program has no other sizes, so its layers may be unrolled.
    """
    implementation = config.attention
    if config.cascade:
        inputs = _with_shared_prefixes(inputs, config.block_size)

    def attend(
        layer: Any, q: jax.Array, k: jax.Array, v: Any, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        slots = inputs.slot_mapping
        cache = kv_cache.write_tokens(cache, k, v, slots, layer, implementation)
        options: dict[str, Any] = dict(
            model.attention_options(layer), implementation=implementation
        )
        if config.batch_invariant:
            assert cache.v_pages is not None, "models with latent pages are refused"
            attended: Any = invariant.paged_attention(
                q,
                cache.k_pages,
                cache.v_pages,
                inputs.block_tables,
                inputs.context_lens,
                query_start_loc=inputs.query_start_loc,
                layer=layer,
                **options,
            )
            return attended, cache
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
            **options,
        )
        return attended, cache

    with layer_kernels.serving(implementation, config.batch_invariant):
        hidden, cache = model.trunk_loop(
            inputs.tokens,
            inputs.positions,
            attend,
            cache,
            is_unrolled=is_alone and backends.unrolls_layers(implementation),
            taps=config.seen_layers,
            length=config.max_model_len,
        )
    return cache, hidden


def last_hidden(hidden: Any) -> jax.Array:
    """Return the hidden states [T, E] after the last layer, of `run_trunk`."""
    return hidden[0] if isinstance(hidden, tuple) else hidden


def _with_shared_prefixes(inputs: StepInputs, block_size: int) -> StepInputs:
    """Find the rows that share prefixes, once for all layers."""
    found = shared_prefix.find_shared_prefix(
        inputs.block_tables, inputs.context_lens, block_size
    )
    return dataclasses.replace(inputs, shared_prefix=found)


def step_inputs(
    tokens: jax.Array,
    blocks: BlockState,
    batch: StepBatch,
    size: int,
    is_decode: bool,
) -> StepInputs:
    """Build the decoder's inputs for a step of at most `size` tokens.

    Args:
      tokens: i32[R, L], the tokens of all sequences.
      blocks: with the step's tokens appended.
      batch: the step's rows.
      size: number of tokens; of rows if `is_decode`.
      is_decode: every row has one token.
    """
    if is_decode:
        return _decode_inputs(tokens, blocks, batch, size)
    return _ragged_inputs(tokens, blocks, batch, size)


def _decode_inputs(
    tokens: jax.Array, blocks: BlockState, batch: StepBatch, size: int
) -> StepInputs:
    """Build the inputs of `size` rows with one token each."""
    rows, positions = batch.rows[:size], batch.starts[:size]
    is_live = batch.num_tokens[:size] > 0
    return StepInputs(
        tokens=jnp.where(is_live, tokens[batch.seq_indices[:size], positions], 0),
        positions=jnp.where(is_live, positions, 0),
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, rows, -1), positions
        ),
        block_tables=blocks.block_tables[rows],
        context_lens=jnp.where(is_live, positions + 1, 0),
        query_start_loc=None,
    )


def _ragged_inputs(
    tokens: jax.Array, blocks: BlockState, batch: StepBatch, size: int
) -> StepInputs:
    """Build the inputs of `size` tokens of all rows."""
    row, positions, is_live = token_rows(batch, size)
    ends = jnp.cumsum(batch.num_tokens)
    query_start_loc = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    is_row_live = batch.num_tokens > 0
    return StepInputs(
        tokens=jnp.where(is_live, tokens[batch.seq_indices[row], positions], 0),
        positions=positions,
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, batch.rows[row], -1), positions
        ),
        block_tables=blocks.block_tables[batch.rows],
        context_lens=jnp.where(is_row_live, batch.starts + batch.num_tokens, 0),
        query_start_loc=query_start_loc,
    )
