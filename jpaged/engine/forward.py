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
from jpaged.attention import backends, invariant, kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import switch_in_place
from jpaged.config import EngineConfig
from jpaged.engine import observing
from jpaged.engine.batch import StepBatch, bucket, token_rows
from jpaged.engine.request_table import RequestTable
from jpaged.indexing import take
from jpaged.kv import block_manager, cache_groups, shared_prefix
from jpaged.kv.block_manager import BlockState
from jpaged.kv.drops import Drops
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
) -> tuple[KVCache, Any, BlockState]:
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
      The cache; `hidden` with the states of the step's tokens in front, row after row,
      the rest is unchanged; and the blocks with what retention has observed.
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
        is_decode: bool, size: int, carry: tuple[KVCache, Any, Drops | None]
    ) -> tuple[KVCache, Any, Drops | None]:
        cache, hidden, drops = carry
        inputs = step_inputs(table.tokens, blocks, batch, size, is_decode)
        cache, states, seen = run_trunk(
            model, cache, inputs, config, is_alone=False, batch=batch
        )
        hidden = jax.tree.map(lambda x, new: x.at[:size].set(new), hidden, states)
        return cache, hidden, add_observed(drops, batch, seen)

    branches = [functools.partial(run, True, size) for size in row_buckets]
    branches += [functools.partial(run, False, size) for size in token_buckets]
    carry = (cache, hidden, blocks.drops)
    cache, hidden, drops = switch_in_place(index, branches, carry)
    return cache, hidden, dataclasses.replace(blocks, drops=drops)


def run_trunk(
    model: Decoder,
    cache: KVCache,
    inputs: StepInputs,
    config: EngineConfig,
    is_alone: bool = True,
    batch: StepBatch | None = None,
) -> tuple[KVCache, Any, jax.Array | None]:
    """Return the cache with the tokens' keys and values, and hidden states [T, E].

    If algorithms need layers, hidden states are a pair, see `Decoder.trunk_loop`. The
    third result is what retention has observed of each block, f32[S, M].

    Args:
      model: the decoder.
      cache: the pages.
      inputs: the tokens.
      config: the engine's config.
      is_alone: the program has no other sizes, so its layers may be unrolled.
      batch: the step's rows, for retention; None: it observes and selects nothing.
    """
    implementation = config.attention
    if config.cascade:
        inputs = _with_shared_prefixes(inputs, config.block_size)
    pages_of = _pages_of_layers(model, inputs, config)

    observed = None if batch is None else batch.observed
    observer = observing.observer(config.retention, inputs, observed)
    reads = None if batch is None else batch.reads

    def attend(
        layer: Any, q: jax.Array, k: jax.Array, v: Any, carry: Any
    ) -> tuple[jax.Array, Any]:
        cache, seen = carry
        options: dict[str, Any] = dict(
            model.attention_options(layer), implementation=implementation
        )
        layer, tables, slots = pages_of(layer)
        cache = kv_cache.write_tokens(cache, k, v, slots, layer, implementation)
        lens = inputs.context_lens
        if reads is not None and config.retention is not None:
            tables, lens = observing.tables_to_read(
                config.retention, reads, inputs, q, cache, layer, options
            )
        if config.batch_invariant:
            assert cache.v_pages is not None, "models with latent pages are refused"
            attended: Any = invariant.paged_attention(
                q,
                cache.k_pages,
                cache.v_pages,
                tables,
                lens,
                query_start_loc=inputs.query_start_loc,
                layer=layer,
                **options,
            )
            return attended, (cache, seen)
        attended = attention.paged_attention(
            q,
            cache.k_pages,
            cache.v_pages,
            tables,
            lens,
            query_start_loc=inputs.query_start_loc,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            layer=layer,
            shared_prefix=inputs.shared_prefix,
            return_lse=observer is not None,
            **options,
        )
        if observer is not None:
            attended, lse = attended
            seen = observer(seen, q, lse, cache, layer, options)
        return attended, (cache, seen)

    with layer_kernels.serving(implementation, config.batch_invariant):
        carry = (cache, None if observer is None else observing.nothing(inputs))
        hidden, (cache, seen) = model.trunk_loop(
            inputs.tokens,
            inputs.positions,
            attend,
            carry,
            is_unrolled=is_alone and backends.unrolls_layers(implementation),
            taps=config.seen_layers,
            length=config.max_model_len,
        )
    if seen is not None:
        seen = seen / model.config.num_layers
    return cache, hidden, seen


def add_observed(
    drops: Drops | None, batch: StepBatch, seen: jax.Array | None
) -> Drops | None:
    """Add what a step has observed of each row's blocks.

    Args:
      drops: of the block state.
      batch: the step's rows.
      seen: f32[S, M] of the batch's first S rows, from `run_trunk`.
    """
    if drops is None or drops.statistic is None or seen is None:
        return drops
    assert batch.observed is not None
    assert drops.observed is not None
    size = seen.shape[0]
    rows, ends = batch.rows[:size], (batch.starts + batch.num_tokens)[:size]
    is_live = (batch.num_tokens[:size] > 0) & (batch.observed[:size] < ends)
    return dataclasses.replace(
        drops,
        statistic=drops.statistic.at[rows].add(seen),
        observed=drops.observed.at[jnp.where(is_live, rows, drops.observed.size)].max(
            ends, mode="drop"
        ),
    )


def last_hidden(hidden: Any) -> jax.Array:
    """Return the hidden states [T, E] after the last layer, of `run_trunk`."""
    return hidden[0] if isinstance(hidden, tuple) else hidden


def _pages_of_layers(
    model: Decoder, inputs: StepInputs, config: EngineConfig
) -> Callable[[Any], tuple[Any, jax.Array, jax.Array]]:
    """Return a function of a layer: its index in the pages, block tables and slots."""
    tables, slots = inputs.block_tables, inputs.slot_mapping
    if len(config.group_windows) == 1:
        return lambda layer: (layer, tables, slots)
    found = cache_groups.groups_of_layers(
        model.config.windows, config.group_windows, config.max_model_len
    )

    def pages_of(layer: Any) -> tuple[Any, jax.Array, jax.Array]:
        if isinstance(layer, int):
            group, index = found.groups[layer], found.indices[layer]
        else:
            group, index = (
                jnp.asarray(of_layer, jnp.int32)[layer]
                for of_layer in (found.groups, found.indices)
            )
        return index, tables[group], slots[group]

    return pages_of


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
    stored = positions
    if batch.dropped is not None:
        stored = positions - batch.dropped[:size]
    return StepInputs(
        tokens=jnp.where(is_live, take(tokens, batch.seq_indices[:size], positions), 0),
        positions=jnp.where(is_live, positions, 0),
        slot_mapping=block_manager.slots(blocks, jnp.where(is_live, rows, -1), stored),
        block_tables=_tables(blocks, rows),
        context_lens=jnp.where(is_live, stored + 1, 0),
        query_start_loc=None,
    )


def _tables(blocks: BlockState, rows: jax.Array) -> jax.Array:
    """Return the tables of `rows`: i32[S, M], or i32[G, S, M] of several groups."""
    tables, number = take(blocks.block_tables, rows), len(blocks.windows)
    return tables if number == 1 else cache_groups.tables_by_group(tables, number)


def _ragged_inputs(
    tokens: jax.Array, blocks: BlockState, batch: StepBatch, size: int
) -> StepInputs:
    """Build the inputs of `size` tokens of all rows."""
    row, positions, is_live = token_rows(batch, size)
    ends = jnp.cumsum(batch.num_tokens)
    query_start_loc = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    is_row_live = batch.num_tokens > 0
    stored, starts = positions, batch.starts
    if batch.dropped is not None:
        stored, starts = positions - take(batch.dropped, row), starts - batch.dropped
    return StepInputs(
        tokens=jnp.where(
            is_live, take(tokens, take(batch.seq_indices, row), positions), 0
        ),
        positions=positions,
        slot_mapping=block_manager.slots(
            blocks, jnp.where(is_live, take(batch.rows, row), -1), stored
        ),
        block_tables=_tables(blocks, batch.rows),
        context_lens=jnp.where(is_row_live, starts + batch.num_tokens, 0),
        query_start_loc=query_start_loc,
    )
