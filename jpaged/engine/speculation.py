"""Speculation: guesses of the next tokens, which one step of the model then judges.

Place on the road: scheduler -> [speculation] -> block manager, forward; and
next tokens -> [speculation] -> request table.

A row that decodes gets drafts behind its last known token: from its own text
(`decoding.prompt_lookup`) or from a smaller model, which keeps its keys and values in
pages of its own under the same block tables. The step computes logits for all of them,
as for a prompt's chunk, and the sampler draws each position's token with that
position's own key, as it would without drafts. While the drafts are what was drawn,
they stand, and the token behind them is gained in the same step; the rest is rolled
back by `block_manager.truncate`. So the tokens, greedy or sampled, are those of plain
decoding, whatever the drafts are: only their number per step changes
(docs/decisions/speculation.md).

Letters: S rows, N rows of logits, R places.
Source: Leviathan et al. 2023. https://arxiv.org/abs/2211.17192
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding.prompt_lookup import prompt_lookup
from jpaged.engine import forward, request_table, sampling
from jpaged.engine.forward import Batch
from jpaged.engine.request_table import NO_ALGORITHM, NewTokens, RequestTable
from jpaged.engine.sampling import Entries
from jpaged.kv import block_manager
from jpaged.kv.block_manager import BlockState
from jpaged.models.decoder import Decoder
from jpaged.scheduler import NO_REQUEST, row_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftedModel:
    """A model, and a smaller one of the same vocabulary that guesses its tokens."""

    target: Decoder
    draft: Decoder

    @property
    def config(self):
        """The target's config."""
        return self.target.config


def count_drafts(
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    num_tokens: jax.Array,
    config: EngineConfig,
) -> tuple[RequestTable, jax.Array]:
    """The table, and how many drafts each row gets in this step, i32[S].

    Only rows that decode get any, as far as the step's budget of tokens, the free
    blocks and the request's own limit reach: drafts never take anything from others.
    Those of prompt lookup are in the table afterwards, behind the known tokens.
    """
    params = config.speculation
    known = row_values(table.queue.num_tokens, rows)
    decodes = (num_tokens == 1) & (blocks.context_lens + 1 == known)
    kinds = row_values(table.params.algorithms, rows, 0)
    decodes &= (kinds == NO_ALGORITHM) & ~row_values(table.params.is_prefix, rows, True)
    # The token behind the last draft has to fit as well.
    room = row_values(table.params.token_limits, rows) - known - 1
    most = jnp.where(decodes, jnp.clip(room, 0, params.num_tokens), 0)
    table, most = when(
        jnp.any(most > 0), lambda carry: _look_up(*carry, rows, params), (table, most)
    )
    left = config.max_num_batched_tokens - jnp.sum(num_tokens)
    before = jnp.cumsum(most) - most
    most = jnp.clip(left - before, 0, most)
    needed = jnp.sum(block_manager.blocks_needed(blocks, num_tokens + most))
    fits = needed <= block_manager.num_free_blocks(blocks)
    return table, jnp.where(fits, most, 0)


def _look_up(table, most, rows, params) -> tuple[RequestTable, jax.Array]:
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
    batch: Batch,
    hidden: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
) -> tuple[RequestTable, KVCache, jax.Array, jax.Array]:
    """The table with the small model's drafts, its cache, and the working memory.

    First it computes what the step computes, so that it knows all that the target
    knows; then a token at a time. It draws with the keys that the target will draw
    with, so where the two agree, so do their samples.
    """
    states = table.automaton_states
    is_alone = table.params.algorithms[batch.seq_indices] == NO_ALGORITHM
    num_drafts = jnp.where(is_alone, batch.num_drafts, 0)
    known = dataclasses.replace(
        batch,
        num_tokens=jnp.where(is_alone, batch.num_tokens - num_drafts, 0),
        num_drafts=jnp.zeros_like(num_drafts),
        has_logits=num_drafts > 0,
    )

    def compute(cache, hidden, table, batch):
        return forward.hidden_states(model, cache, table, blocks, batch, hidden, config)

    first = _packed(known, known.num_tokens > 0)
    cache, hidden = compute(cache, hidden, table, first)
    # By place: the rows are packed anew for every draft.
    limits = jnp.zeros(table.queue.status.shape, jnp.int32)
    limits = limits.at[batch.seq_indices].max(num_drafts)

    def guess(number, carry):
        table, cache, hidden, logits, batch = carry
        entries = sampling.make_entries(table, batch, config)
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
    carry = lax.fori_loop(0, jnp.max(num_drafts), guess, carry)
    table, cache, hidden, logits, _ = carry
    return (
        dataclasses.replace(table, automaton_states=states),
        cache,
        hidden,
        logits,
    )


def _packed(batch: Batch, takes_part: jax.Array) -> Batch:
    """The batch with the rows that take part in front."""
    order = forward.pack(takes_part)
    return jax.tree.map(lambda column: column[order], batch)


def _write_drafts(table, new: NewTokens, entries: Entries) -> RequestTable:
    """The table with drafts behind the known tokens, and automata in their states."""
    seq_indices = new.seq_indices
    tokens = table.tokens.at[seq_indices, entries.positions].set(
        new.tokens, mode="drop"
    )
    states = request_table.advance(
        table, jnp.minimum(seq_indices, table.queue.status.shape[0] - 1), new.tokens
    )
    states = table.automaton_states.at[seq_indices].set(states, mode="drop")
    return dataclasses.replace(table, tokens=tokens, automaton_states=states)


def accept(
    table: RequestTable, new: NewTokens, entries: Entries, step: jax.Array, most: int
) -> tuple[RequestTable, jax.Array, jax.Array]:
    """The table with the tokens that stand, and what became of the drafts.

    A row's tokens stand up to the first that is not the draft at its position. Returns
    also whether any sequence ended, bool[], and the number of tokens gained, i32[].
    `most`: drafts of a row.
    """
    table_size, _ = table.tokens.shape
    safe = jnp.minimum(new.seq_indices, table_size - 1)
    is_other = new.tokens != table.tokens[safe, entries.positions]
    # Mismatches before each entry in its own row.
    is_other = is_other.astype(jnp.int32)
    before = jnp.cumsum(is_other) - is_other
    first = jnp.arange(before.shape[0], dtype=jnp.int32) - entries.offsets
    stands = (new.seq_indices < table_size) & (before == before[first])

    def extend(offset, carry):
        table, is_any, gained = carry
        takes = stands & (entries.offsets == offset) & ~table.queue.has_ended[safe]
        seq_indices = jnp.where(takes, new.seq_indices, table_size)
        mine = dataclasses.replace(new, seq_indices=seq_indices)
        table, ended = request_table.extend(table, mine, step)
        gained += jnp.sum(takes & ~new.is_dead_end, dtype=jnp.int32)
        return table, is_any | jnp.any(ended), gained

    carry = (table, jnp.bool_(False), jnp.int32(0))
    return lax.fori_loop(0, most + 1, extend, carry)


def roll_back(
    table: RequestTable, rows: jax.Array, blocks: BlockState, num_drafts: jax.Array
) -> BlockState:
    """The blocks without what was computed for drafts that did not stand.

    `num_drafts` i32[S] are those that the rows had.
    """
    known = row_values(table.queue.num_tokens, rows) - 1
    held = blocks.context_lens
    lens = jnp.where(num_drafts > 0, jnp.minimum(known, held), held)
    return block_manager.truncate(blocks, lens)
