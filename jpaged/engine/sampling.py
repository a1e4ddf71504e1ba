"""Sampling: from hidden states to logits, and a token for each sampled row.

Pipeline: forward -> hidden states -> [sampling] -> request table.

Logits and sampler are compiled for a few numbers of rows, and a step uses the smallest
that is large enough. Rows of decoding algorithms get their logits here too;
`algorithms` continues with them.

Shape symbols: S batch rows, N rows of logits, V vocabulary, E hidden size, T tokens of
the step, R sequences of the request table.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import switch_in_place, when
from jpaged.config import EngineConfig
from jpaged.decoding import bit_masks, constraints, rules
from jpaged.decoding.rule_arrays import LogitsRules
from jpaged.decoding.sample import (
    SamplingRows,
    invariant_logprobs,
    processed_logits,
    sample,
    token_keys,
    token_logprobs,
    top_logprobs,
)
from jpaged.engine import forward, processing, request_table
from jpaged.engine.batch import Entries, StepBatch, bucket, pack, token_rows
from jpaged.engine.request_table import RequestTable, SampledTokens
from jpaged.indexing import put, take
from jpaged.models import layer_kernels
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder

_SAMPLED_ROWS = 8  # rows that the sampler processes at a time
_PROMPT_ROWS = 32  # prompt tokens whose log-probabilities are computed at a time


def _automaton_states(
    table: RequestTable, entries: Entries, config: EngineConfig
) -> jax.Array:
    """States i32[N] of the entries' automata before the positions they predict."""
    offsets = entries.offsets
    if config.automata is None:
        return jnp.zeros_like(offsets)
    seq_indices = jnp.minimum(entries.seq_indices, config.max_num_requests - 1)
    states = take(table.automaton_states, seq_indices)
    if not config.num_drafts:
        return states
    known = table.queue.num_tokens[seq_indices]

    def advance(number: jax.Array, states: jax.Array) -> jax.Array:
        drafts = table.tokens.at[seq_indices, known + number].get(mode="clip")
        index = table.params.automata[seq_indices]
        after = constraints.next_states(table.automata, index, states, drafts)
        return jnp.where(number < offsets, after, states)

    return lax.fori_loop(0, config.num_drafts, advance, states)


def next_logits(
    model: Decoder,
    entries: Entries,
    hidden: Any,
    logits: Any,
    config: EngineConfig,
) -> Any:
    """Compute the logits of the entries.

    Args:
      model: the decoder.
      entries: the rows of logits.
      hidden: [T, E], hidden states of the step's tokens.
      logits: f32[N, V], working memory, allocated once for a run; `SeenLogits` if
        algorithms need more.
      config: the engine's sizes.

    Returns:
      `logits` with the entries' logits in front; the other rows are unchanged.
    """

    def run(size: int, logits: Any) -> Any:
        return first_logits(model, entries, hidden, logits, config, size)

    sizes = config.logit_buckets
    number = entries.num_sampled + entries.num_grouped
    index = jnp.where(number == 0, -1, bucket(sizes, number))
    return switch_in_place(
        index, [functools.partial(run, size) for size in sizes], logits
    )


def first_logits(
    model: Decoder,
    entries: Entries,
    hidden: Any,
    logits: Any,
    config: EngineConfig,
    size: int,
) -> Any:
    """Compute the logits of the first `size` entries; see `next_logits`."""
    at = entries.tokens[:size]
    last = forward.last_hidden(hidden)[at]
    with layer_kernels.serving(config.attention, config.batch_invariant):
        values = model.logits(last)
        if not config.sees_more:
            return logits.at[:size].set(values)
        layers = hidden[1] if config.seen_layers else ()
        found = SeenLogits(
            values,
            last if config.seen_hidden else None,
            tuple(model.logits(layer[at]) for layer in layers),
        )
    return jax.tree.map(lambda x, new: x.at[:size].set(new), logits, found)


class SeenLogits(NamedTuple):
    """The logits of a step, with what else algorithms need of the decoder."""

    values: jax.Array  # f32[N, V]
    hidden: jax.Array | None  # [N, E]
    layers: tuple[jax.Array, ...]  # f32[N, V] for each of the config's `seen_layers`


def init_logits(config: EngineConfig, sizes: ModelConfig) -> Any:
    """Allocate the working memory for logits."""
    shape = (config.max_num_logits, sizes.vocab_size)
    values = jnp.zeros(shape, jnp.float32)
    if not config.sees_more:
        return values
    shape = (config.max_num_logits, sizes.hidden_size)
    hidden = jnp.zeros(shape, sizes.dtype) if config.seen_hidden else None
    return SeenLogits(
        values, hidden, tuple(jnp.zeros_like(values) for _ in config.seen_layers)
    )


def init_hidden(config: EngineConfig, sizes: ModelConfig, size: int) -> Any:
    """Allocate the working memory for hidden states of `size` tokens."""
    hidden = jnp.zeros((size, sizes.hidden_size), sizes.dtype)
    if not config.seen_layers:
        return hidden
    return hidden, tuple(jnp.zeros_like(hidden) for _ in config.seen_layers)


def sample_tokens(
    table: RequestTable,
    entries: Entries,
    logits: jax.Array,
    config: EngineConfig,
    size: int | None = None,
) -> SampledTokens:
    """Sample a token for each sampled entry.

    The sampler is little work but a large program. It is therefore compiled for
    `_SAMPLED_ROWS` rows, and processes the entries in chunks.

    Args:
      table: the request table.
      entries: the rows of logits.
      logits: f32[N, V], their logits.
      config: the engine's sizes.
      size: the step has at most this number of entries. The number of chunks is then
        static, so that a GPU does not wait for the host. None: N.
    """
    (num_rows,) = entries.seq_indices.shape
    is_sampled = jnp.arange(num_rows, dtype=jnp.int32) < entries.num_sampled
    seq_indices = jnp.where(is_sampled, entries.seq_indices, config.max_num_requests)
    new = SampledTokens.zeros(seq_indices, config.num_logprobs, config.num_mask_words)
    before: processing.ChainStates = ()  # states of processors
    if config.processors:
        at = jnp.minimum(seq_indices, config.max_num_requests - 1)
        before = jax.tree.map(lambda column: column[at], table.processor_states)
        new = dataclasses.replace(
            new, processor_states=before, is_faulty=new.is_dead_end
        )
    states = _automaton_states(table, entries, config)
    width = min(_SAMPLED_ROWS, num_rows if size is None else size)
    if config.batch_invariant:  # the number of rows decides how XLA sums
        width = min(_SAMPLED_ROWS, num_rows)
    if config.num_drafts and any(kind.init for c in config.processors for kind in c):
        return _sample_by_offset(table, entries, logits, new, states, config, width)

    def chunk(index: jax.Array, new: SampledTokens) -> SampledTokens:
        # The last chunk is moved back to fit, and samples some rows a second time.
        start = jnp.minimum(index * width, num_rows - width)
        cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=width)
        found = _sample_rows(
            table,
            cut(seq_indices, start),
            cut(entries.positions, start),
            cut(states, start),
            cut(logits, start),
            config,
            jax.tree.map(functools.partial(cut, start_index=start), before),
        )

        def write(column: jax.Array, value: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(column, value, start, axis=0)

        found = {
            name: jax.tree.map(write, getattr(new, name), value)
            for name, value in found.items()
        }
        return dataclasses.replace(new, **found)

    if size is None:
        return lax.fori_loop(0, cdiv(entries.num_sampled, width), chunk, new)
    if size <= width:
        return chunk(jnp.int32(0), new)
    return lax.fori_loop(0, cdiv(size, width), chunk, new)


def _sample_by_offset(
    table: RequestTable,
    entries: Entries,
    logits: jax.Array,
    new: SampledTokens,
    states: jax.Array,
    config: EngineConfig,
    width: int,
) -> SampledTokens:
    """Sample all entries of rows with drafts whose processors have states.

    The state behind a draft is that after the token sampled in its place: if the two
    differ, the entries behind the draft are rejected anyway.

    Args:
      table: the request table.
      entries: the rows of logits.
      logits: f32[N, V].
      new: with the sequences' indices, and their states before the step.
      states: i32[N], of automata.
      config: the engine's sizes.
      width: entries that are sampled at a time.
    """
    (num_rows,) = new.seq_indices.shape
    index = jnp.arange(num_rows, dtype=jnp.int32)
    first = new.processor_states

    def sample_offset(offset: jax.Array, new: SampledTokens) -> SampledTokens:
        is_now = new.seq_indices < config.max_num_requests
        is_now &= entries.offsets == offset
        order = pack(is_now)

        def chunk(number: jax.Array, new: SampledTokens) -> SampledTokens:
            start = jnp.minimum(number * width, num_rows - width)
            at = lax.dynamic_slice_in_dim(order, start, width)
            before = jax.tree.map(
                lambda own, after: jnp.where(
                    (offset == 0).reshape((1,) * own.ndim),
                    own[at],
                    after[jnp.maximum(at - 1, 0)],
                ),
                first,
                new.processor_states,
            )
            seq_indices = jnp.where(
                is_now[at], new.seq_indices[at], config.max_num_requests
            )
            found = _sample_rows(
                table,
                seq_indices,
                entries.positions[at],
                states[at],
                logits[at],
                config,
                before,
            )
            to = jnp.where(is_now[at], index[at], num_rows)
            found = {
                name: jax.tree.map(
                    lambda column, value: put(column, to, value),
                    getattr(new, name),
                    value,
                )
                for name, value in found.items()
            }
            return dataclasses.replace(new, **found)

        return lax.fori_loop(0, cdiv(jnp.sum(is_now), width), chunk, new)

    return lax.fori_loop(0, config.num_drafts + 1, sample_offset, new)


def _sample_rows(
    table: RequestTable,
    seq_indices: jax.Array,
    positions: jax.Array,
    states: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
    processor_states: processing.ChainStates = (),
) -> dict[str, Any]:
    """Columns of SampledTokens for a few rows; sequence index R is padding."""
    valid = seq_indices < config.max_num_requests
    seq_indices = jnp.where(valid, seq_indices, 0)
    rows = SamplingRows.greedy(seq_indices.shape[0])
    if config.sampling != "greedy" or config.processors:
        rows = _rows(table.params.sampling, rows, seq_indices, valid)
    allowed = _apply_rules(table, seq_indices, positions, valid, logits, config)
    allowed = request_table.constrain(table, seq_indices, states, valid, allowed)
    processed = None
    if config.processors:
        processed = request_table.process(
            table,
            seq_indices,
            valid,
            allowed,
            config,
            num_tokens=positions,
            keys=token_keys(rows.seed, rows.sample, positions),
            temperature=rows.temperature,
            states=processor_states,
        )
        allowed = processed.logits
        rows = dataclasses.replace(rows, temperature=processed.temperature)
    tokens, logprobs = sample(allowed, rows, positions, config.sampling)
    found: dict[str, Any] = {"tokens": tokens, "logprobs": logprobs}
    if processed is not None:
        found["processor_states"] = processed.next_states(tokens)
        found["is_faulty"] = processed.is_faulty
    has_rules = config.rules is not None or config.automata is not None
    has_rules |= bool(config.processors)
    if has_rules:
        found["is_dead_end"] = jnp.max(allowed, axis=1) == -jnp.inf
    is_processed = config.logprobs_mode == "processed"
    if is_processed or config.num_mask_words:
        filtered = processed_logits(allowed, rows, config.sampling)
        logits = filtered if is_processed else logits
        if config.num_mask_words:
            found["masks"] = bit_masks.packed(filtered > -jnp.inf)
    if config.batch_invariant:
        found["logprobs"] = invariant_logprobs(logits, tokens)
    elif is_processed or has_rules:
        # Raw log-probabilities are those of the model, before rules and constraints.
        found["logprobs"], _ = token_logprobs(logits, tokens)
    return found | _ranked(logits, tokens, config)


def _ranked(
    logits: jax.Array, tokens: jax.Array, config: EngineConfig
) -> dict[str, jax.Array]:
    """The most likely tokens and the ranks of the chosen ones, if they are kept."""
    if not config.num_logprobs:
        return {}
    values, ids = top_logprobs(logits, config.num_logprobs)
    _, ranks = token_logprobs(logits, tokens)
    return {"top_logprobs": values, "top_ids": ids, "ranks": ranks}


def _rows(columns: Any, idle: Any, seq_indices: jax.Array, valid: jax.Array) -> Any:
    """Parameters [S, ...] of `seq_indices`; `idle` for rows that are not `valid`."""

    def pick(column: jax.Array, none: jax.Array) -> jax.Array:
        mask = valid.reshape((-1,) + (1,) * (none.ndim - 1))
        return jnp.where(mask, take(column, seq_indices), none)

    return jax.tree.map(pick, columns, idle)


def _apply_rules(
    table: RequestTable,
    seq_indices: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
) -> jax.Array:
    """Apply the logits rules of the sequences `seq_indices` to `logits` f32[S, V]."""
    if config.rules is None:
        return logits
    idle = LogitsRules.none(seq_indices.shape[0], config.rules)
    mine = _rows(table.params.rules, idle, seq_indices, valid)
    return lax.cond(
        jnp.any(rules.is_any(mine)),
        lambda logits: rules.apply(
            logits,
            mine,
            table.tokens[seq_indices],
            table.queue.prompt_lens[seq_indices],
            positions,
            table.params.stop_ids[seq_indices],
        ),
        lambda logits: logits,
        logits,
    )


def write_prompt_logprobs(
    model: Decoder,
    table: RequestTable,
    batch: StepBatch,
    hidden: jax.Array,
    config: EngineConfig,
) -> RequestTable:
    """Write the log-probabilities of the prompt tokens of this step into the table.

    Only for sequences that keep them. As for generated tokens, a token's
    log-probability is stored at the token's own position.

    Args:
      model: the decoder.
      table: the request table.
      batch: the step's rows.
      hidden: [T, E], hidden states of the step's tokens.
      config: the engine's sizes.
    """
    if not config.prompt_logprobs:
        return table
    (num_tokens, _) = hidden.shape
    row, positions, is_live = token_rows(batch, num_tokens)
    seq_indices = batch.seq_indices[row]
    is_kept = is_live & table.params.keeps_prompt_logprobs[seq_indices]
    is_kept &= positions + 1 < table.queue.prompt_lens[seq_indices]
    order = pack(is_kept)
    size = min(_PROMPT_ROWS, num_tokens)

    def put_logprobs(index: jax.Array, table: RequestTable) -> RequestTable:
        start = jnp.minimum(index * size, num_tokens - size)
        at = lax.dynamic_slice_in_dim(order, start, size)
        seq_index = jnp.where(is_kept[at], seq_indices[at], config.max_num_requests)
        position = positions[at] + 1
        with layer_kernels.serving(config.attention, config.batch_invariant):
            logits = model.logits(hidden[at])
        tokens = table.tokens[seq_indices[at], position]
        if config.batch_invariant:
            found = {"logprobs": invariant_logprobs(logits, tokens)}
        else:
            found = {"logprobs": token_logprobs(logits, tokens)[0]}
        found |= _ranked(logits, tokens, config)
        columns = {
            name: put(getattr(table, name), (seq_index, position), value)
            for name, value in found.items()
        }
        return dataclasses.replace(table, **columns)

    def run(table: RequestTable) -> RequestTable:
        number = jnp.sum(is_kept, dtype=jnp.int32)
        return lax.fori_loop(0, cdiv(number, size), put_logprobs, table)

    return when(jnp.any(is_kept), run, table)
