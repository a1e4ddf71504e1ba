"""Speculation: drafts of the next tokens, which the model verifies in one step.

Pipeline: scheduler -> [speculation] -> block manager, forward; and
sampling -> [speculation] -> request table.

A decode row gets drafts behind its last known token: from its own text
(`decoding.prompt_lookup`), or from a draft model, a smaller model that stores its keys
and values in pages of its own under the same block tables. The step computes logits for
all drafts, as for a prompt chunk, and the sampler samples the token of each position
with the key of that position, as it would without drafts. A draft is accepted if it
equals the sampled token and all drafts before it are accepted; the sampled token behind
the last accepted draft is valid too. `block_manager.truncate` rolls back the other
drafts. So the tokens, greedy or sampled, are those of decoding without drafts, whatever
the drafts are; only the number of tokens per step changes
(docs/decisions/speculation.md).

Shape symbols: S batch rows, N rows of logits, R sequences of the request table, T
tokens of the step, E hidden size, V vocabulary.

Source: Leviathan et al. 2023. https://arxiv.org/abs/2211.17192
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig, Speculation
from jpaged.decoding.prompt_lookup import prompt_lookup
from jpaged.engine import batch as step_batch
from jpaged.engine import forward, request_table, sampling
from jpaged.engine.algorithms import DraftLogits
from jpaged.engine.batch import Entries, StepBatch
from jpaged.engine.request_table import NO_ALGORITHM, RequestTable, SampledTokens
from jpaged.kv import block_manager
from jpaged.kv.block_manager import BlockState
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.scheduler import NO_REQUEST, row_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftedModel:
    """A target model with a draft model: a smaller one of the same vocabulary."""

    target: Decoder
    draft: Decoder

    @property
    def config(self) -> ModelConfig:
        """The target's config."""
        return self.target.config


def count_drafts(
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    config: EngineConfig,
) -> tuple[RequestTable, jax.Array]:
    """Decide how many drafts each row gets in this step.

    Only decode rows get drafts, within the step's token budget, the free blocks and the
    request's token limit. Drafts never take tokens or blocks from another row.

    Args:
      table: the request table.
      rows: i32[S], sequence index of each row.
      blocks: the block state, before the step's tokens are appended.
      num_tokens: i32[S], tokens of each row in the step.
      config: the engine's config, with `speculation`.

    Returns:
      The table, with the drafts of prompt lookup behind the known tokens, and i32[S]:
      drafts of each row.
    """
    params = config.speculation
    assert params is not None
    known = row_values(table.queue.num_tokens, rows)
    decodes = (num_tokens == 1) & (blocks.context_lens + 1 == known)
    kinds = row_values(table.params.algorithms, rows, 0)
    decodes &= (kinds == NO_ALGORITHM) & ~row_values(table.params.is_prefix, rows, True)
    # The token behind the last draft must be within the limit as well.
    left = row_values(table.params.token_limits, rows) - known - 1
    most = jnp.where(decodes, jnp.clip(left, 0, params.num_tokens), 0)
    table, most = when(
        jnp.any(most > 0), lambda carry: _look_up(*carry, rows, params), (table, most)
    )
    left = config.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(most) - most
    most = jnp.clip(left - before, 0, most)
    needed = jnp.sum(block_manager.blocks_needed(blocks, num_tokens + most))
    fits = needed <= block_manager.num_free_blocks(blocks)
    return table, jnp.where(fits, most, 0)


def _look_up(
    table: RequestTable, most: jax.Array, rows: jax.Array, params: Speculation
) -> tuple[RequestTable, jax.Array]:
    """Write the drafts of prompt lookup into the table; count them, at most `most`."""
    if params.method != "prompt_lookup":
        return table, most
    seq_indices = jnp.where(rows == NO_REQUEST, 0, rows)
    num_known = table.queue.num_tokens[seq_indices]
    drafts, found = prompt_lookup(
        table.tokens[seq_indices],
        num_known,
        num_drafts=params.num_tokens,
        min_ngram=params.min_ngram,
        max_ngram=params.max_ngram,
    )
    number = jnp.minimum(most, found)
    index = jnp.arange(params.num_tokens, dtype=jnp.int32)[None, :]
    is_draft = index < number[:, None]
    at = jnp.where(is_draft, num_known[:, None] + index, table.tokens.shape[1])
    tokens = table.tokens.at[seq_indices[:, None], at].set(drafts, mode="drop")
    return dataclasses.replace(table, tokens=tokens), number


def draft(
    model: Decoder,
    cache: KVCache,
    table: RequestTable,
    blocks: BlockState,
    batch: StepBatch,
    hidden: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
    seen: jax.Array | None = None,
) -> tuple[RequestTable, KVCache, jax.Array, jax.Array, DraftLogits | None]:
    """Write the draft model's drafts into the table.

    The draft model first computes all tokens of the step, so that its pages have the
    same tokens as the target's. Then it generates one token at a time. It samples with
    the keys that the target will use: where the two models agree, their samples agree.

    Args:
      model: the draft model.
      cache: its pages.
      table: the request table.
      blocks: with the step's tokens and drafts appended.
      batch: the step's rows.
      hidden: [T, E] of the draft model, working memory.
      logits: f32[N, V], working memory.
      config: the engine's config.
      seen: f32[N, V], further working memory if algorithms need the draft's logits.

    Returns:
      The table, the cache, both working memories, and the logits of algorithms' rows.
    """
    states, processor_states = table.automaton_states, table.processor_states
    is_alone = table.params.algorithms[batch.seq_indices] == NO_ALGORITHM
    num_drafts = jnp.where(is_alone, batch.num_drafts, 0)
    takes_part = is_alone if seen is None else jnp.ones_like(is_alone)
    known = dataclasses.replace(
        batch,
        num_tokens=jnp.where(takes_part, batch.num_tokens - num_drafts, 0),
        num_drafts=jnp.zeros_like(num_drafts),
        has_logits=num_drafts > 0,
    )

    def compute(
        cache: KVCache, hidden: jax.Array, table: RequestTable, batch: StepBatch
    ) -> tuple[KVCache, jax.Array]:
        found = forward.hidden_states(
            model, cache, table, blocks, batch, hidden, config
        )
        return found[:2]

    first = _packed(known, known.num_tokens > 0)
    cache, hidden = compute(cache, hidden, table, first)
    found = None
    if seen is not None:
        groups = dataclasses.replace(known, has_logits=batch.has_logits & ~is_alone)
        groups = _packed(groups, known.num_tokens > 0)
        entries = step_batch.make_entries(table, groups, config)
        values = sampling.next_logits(model, entries, hidden, seen, config)
        found = DraftLogits(values, entries.seq_indices)
    # Per sequence, because the rows are packed again for every draft.
    limits = jnp.zeros(table.queue.status.shape, jnp.int32)
    limits = limits.at[batch.seq_indices].max(num_drafts)

    def generate(number: jax.Array, carry: Any) -> Any:
        table, cache, hidden, logits, batch = carry
        entries = step_batch.make_entries(table, batch, config)
        logits = sampling.next_logits(model, entries, hidden, logits, config)
        new = sampling.sample_tokens(table, entries, logits, config)
        table = _write_drafts(table, new, entries)
        batch = dataclasses.replace(
            batch,
            starts=batch.starts + batch.num_tokens,
            num_tokens=batch.has_logits.astype(jnp.int32),
            has_logits=batch.has_logits & (limits[batch.seq_indices] > number + 1),
        )
        batch = _packed(batch, batch.num_tokens > 0)
        cache, hidden = compute(cache, hidden, table, batch)
        return table, cache, hidden, logits, batch

    carry = (table, cache, hidden, logits, first)
    carry = lax.fori_loop(0, jnp.max(num_drafts), generate, carry)
    table, cache, hidden, logits, _ = carry
    return (
        dataclasses.replace(
            table, automaton_states=states, processor_states=processor_states
        ),
        cache,
        hidden,
        logits,
        found,
    )


def _packed(batch: StepBatch, takes_part: jax.Array) -> StepBatch:
    """Move the rows that take part to the front."""
    order = step_batch.pack(takes_part)
    return jax.tree.map(lambda column: column[order], batch)


def _write_drafts(
    table: RequestTable, new: SampledTokens, entries: Entries
) -> RequestTable:
    """Write drafts behind the known tokens, and the states after them.

    The caller restores the states of automata and of logits processors.
    """
    seq_indices = new.seq_indices
    tokens = table.tokens.at[seq_indices, entries.positions].set(
        new.tokens, mode="drop"
    )
    states = request_table.next_automaton_states(
        table, jnp.minimum(seq_indices, table.queue.status.shape[0] - 1), new.tokens
    )
    states = table.automaton_states.at[seq_indices].set(states, mode="drop")
    if new.processor_states:
        table = request_table.put_processor_states(
            table, seq_indices, new.processor_states
        )
    return dataclasses.replace(table, tokens=tokens, automaton_states=states)


def accept(
    table: RequestTable,
    new: SampledTokens,
    entries: Entries,
    step: jax.Array,
    most: int,
) -> tuple[RequestTable, jax.Array, jax.Array]:
    """Append the accepted tokens to their sequences.

    A row's tokens are accepted up to and including the first that differs from the
    draft at its position.

    Args:
      table: the request table, with drafts behind the known tokens.
      new: the sampled token of each entry.
      entries: the rows of logits.
      step: i32[], number of the step.
      most: maximum number of drafts of a row.

    Returns:
      The table; bool[], whether any sequence has ended; and i32[], the number of
      generated tokens.
    """
    table_size, _ = table.tokens.shape
    safe = jnp.minimum(new.seq_indices, table_size - 1)
    is_other = new.tokens != table.tokens[safe, entries.positions]
    # Count mismatches before each entry; an entry is accepted if its row has none.
    is_other = is_other.astype(jnp.int32)
    before = jnp.cumsum(is_other) - is_other
    first = jnp.arange(before.shape[0], dtype=jnp.int32) - entries.offsets
    is_accepted = (new.seq_indices < table_size) & (before == before[first])

    def extend(
        offset: jax.Array, carry: tuple[RequestTable, jax.Array, jax.Array]
    ) -> tuple[RequestTable, jax.Array, jax.Array]:
        table, is_any, gained = carry
        is_now = is_accepted & (entries.offsets == offset)
        is_now &= ~table.queue.has_ended[safe]
        seq_indices = jnp.where(is_now, new.seq_indices, table_size)
        mine = dataclasses.replace(new, seq_indices=seq_indices)
        table, ended = request_table.extend(table, mine, step)
        gained += jnp.sum(is_now & ~new.is_dead_end, dtype=jnp.int32)
        return table, is_any | jnp.any(ended), gained

    carry = (table, jnp.bool_(False), jnp.int32(0))
    return lax.fori_loop(0, most + 1, extend, carry)


def roll_back(
    table: RequestTable, rows: jax.Array, blocks: BlockState, num_drafts: jax.Array
) -> BlockState:
    """Remove the keys and values of rejected drafts from the blocks.

    Args:
      table: the request table, with the accepted tokens.
      rows: i32[S], sequence index of each row.
      blocks: with the step's tokens and drafts appended.
      num_drafts: i32[S], drafts of each row in the step.
    """
    known = row_values(table.queue.num_tokens, rows) - 1
    held = blocks.context_lens
    lens = jnp.where(num_drafts > 0, jnp.minimum(known, held), held)
    return block_manager.truncate(blocks, lens)
