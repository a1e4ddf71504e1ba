"""Next tokens: from hidden states to logits, rules, and a token for each sampled row.

Place on the road: forward -> hidden states -> [next_tokens] -> request table.

Logits and sampler are compiled for a few numbers of rows, and a step takes the smallest
that holds what is live. Rows of decoding algorithms get their logits here too, and go
on in `groups`.

Letters: S rows, N rows of logits, V vocabulary, E hidden size, R places.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import switch_in_place, when
from jpaged.config import EngineConfig
from jpaged.decoding import constraints, rules
from jpaged.decoding.rule_arrays import LogitsRules
from jpaged.decoding.sample import (
    SamplingRows,
    sample,
    token_logprobs,
    top_logprobs,
)
from jpaged.engine import request_table
from jpaged.engine.forward import Batch, bucket, pack, token_rows
from jpaged.engine.request_table import NO_ALGORITHM, NewTokens, RequestTable
from jpaged.models.decoder import Decoder

_SAMPLED_ROWS = 8  # rows that the sampler takes at a time
_PROMPT_ROWS = 32  # prompt tokens whose log-probabilities are computed at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """The rows of logits: first those that are sampled, then those of algorithms."""

    seq_indices: jax.Array  # i32[N], the sequence; R behind the last
    positions: jax.Array  # i32[N], in it, of the token that the logits are for
    tokens: jax.Array  # i32[N], the token of the step that they come from
    offsets: jax.Array  # i32[N], drafts between the last known token and this one's
    states: jax.Array  # i32[N], of the sequence's automaton before that token
    num_sampled: jax.Array  # i32[]
    num_grouped: jax.Array  # i32[]


def make_entries(table: RequestTable, batch: Batch, config: EngineConfig) -> Entries:
    """An entry for each row of the batch that has computed all its known tokens, and
    behind it one for each of the row's drafts."""
    is_grouped = table.params.algorithms[batch.seq_indices] != NO_ALGORITHM
    is_sampled = batch.has_logits & ~is_grouped
    counts = jnp.where(batch.has_logits, 1 + batch.num_drafts, 0)
    order = pack(is_sampled)
    order = order[pack(batch.has_logits[order])]
    ends = jnp.cumsum(counts[order])
    index = jnp.arange(config.max_num_logits, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    has_logits = index < ends[-1]
    row = jnp.where(has_logits, row, 0)
    offsets = jnp.where(has_logits, index - (ends - counts[order])[row], 0)
    row = order[row]
    ahead = offsets - batch.num_drafts[row]
    last = jnp.cumsum(batch.num_tokens) - 1
    return Entries(
        seq_indices=jnp.where(
            has_logits, batch.seq_indices[row], config.max_num_requests
        ),
        positions=(batch.starts + batch.num_tokens)[row] + ahead,
        tokens=jnp.maximum(last[row] + ahead, 0),
        offsets=offsets,
        states=_automaton_states(table, batch.seq_indices[row], offsets, config),
        num_sampled=jnp.sum(jnp.where(is_sampled, counts, 0)),
        num_grouped=jnp.sum(jnp.where(is_grouped, counts, 0)),
    )


def _automaton_states(table, seq_indices, offsets, config: EngineConfig) -> jax.Array:
    """The states of the sequences' automata behind `offsets` drafts, i32[N]."""
    states = table.automaton_states[seq_indices]
    if not table.digests.shape[0]:
        return states
    known = table.queue.num_tokens[seq_indices]

    def advance(number, states):
        drafts = table.tokens.at[seq_indices, known + number].get(mode="clip")
        index = table.params.automata[seq_indices]
        after = constraints.next_states(table.automata, index, states, drafts)
        return jnp.where(number < offsets, after, states)

    return lax.fori_loop(0, config.num_drafts, advance, states)


def next_logits(
    model: Decoder,
    entries: Entries,
    hidden: jax.Array,
    logits: jax.Array,
    config: EngineConfig,
) -> jax.Array:
    """`logits` f32[N, V] of the entries; `hidden` [T, E] is that of the step's tokens.

    The rows behind them keep what they held: `logits` is working memory, allocated
    once.
    """

    def run(size, logits):
        return logits.at[:size].set(model.logits(hidden[entries.tokens[:size]]))

    sizes = config.logit_buckets
    number = entries.num_sampled + entries.num_grouped
    index = jnp.where(number == 0, -1, bucket(sizes, number))
    return switch_in_place(
        index, [functools.partial(run, size) for size in sizes], logits
    )


def sample_tokens(
    table: RequestTable, entries: Entries, logits: jax.Array, config: EngineConfig
) -> NewTokens:
    """A new token for each sampled entry.

    The sampler is compiled for one row and for a few, and walks the rows so: it is
    small work but a large program.
    """
    (num_rows,) = entries.seq_indices.shape
    is_sampled = jnp.arange(num_rows, dtype=jnp.int32) < entries.num_sampled
    seq_indices = jnp.where(is_sampled, entries.seq_indices, config.max_num_requests)
    new = NewTokens.zeros(seq_indices, config.num_logprobs)

    def run(size, new):
        def chunk(index, new):
            # The last chunk slides back to fit, and samples some rows a second time.
            start = jnp.minimum(index * size, num_rows - size)
            cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=size)
            found = _sample_rows(
                table,
                cut(seq_indices, start),
                cut(entries.positions, start),
                cut(entries.states, start),
                cut(logits, start),
                config,
            )
            put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
            found = {
                name: put(getattr(new, name), value, start)
                for name, value in found.items()
            }
            return dataclasses.replace(new, **found)

        return lax.fori_loop(0, cdiv(entries.num_sampled, size), chunk, new)

    sizes = sorted({config.row_buckets[0], min(_SAMPLED_ROWS, config.max_num_seqs)})
    branches = [functools.partial(run, size) for size in sizes]
    index = jnp.where(entries.num_sampled <= sizes[0], 0, len(sizes) - 1)
    index = jnp.where(entries.num_sampled == 0, -1, index)
    return switch_in_place(index, branches, new)


def _sample_rows(
    table, seq_indices, positions, states, logits, config
) -> dict[str, jax.Array]:
    """Columns of NewTokens for a few rows; places of R are padding."""
    valid = seq_indices < config.max_num_requests
    seq_indices = jnp.where(valid, seq_indices, 0)
    idle = SamplingRows.greedy(seq_indices.shape[0])
    rows = _rows(table.params.sampling, idle, seq_indices, valid)
    allowed = _apply_rules(table, seq_indices, positions, valid, logits, config)
    allowed = request_table.constrain(table, seq_indices, states, valid, allowed)
    tokens, logprobs = sample(allowed, rows, positions)
    found = {"tokens": tokens, "logprobs": logprobs}
    if config.rules is not None or config.automata is not None:
        # Log-probabilities are the model's, whatever the rules say.
        found["logprobs"], _ = token_logprobs(logits, tokens)
        found["is_dead_end"] = jnp.max(allowed, axis=1) == -jnp.inf
    return found | _ranked(logits, tokens, config)


def _ranked(logits, tokens, config: EngineConfig) -> dict[str, jax.Array]:
    """The most likely tokens, and the ranks of the chosen ones, where they are kept."""
    if not config.num_logprobs:
        return {}
    values, ids = top_logprobs(logits, config.num_logprobs)
    _, ranks = token_logprobs(logits, tokens)
    return {"top_logprobs": values, "top_ids": ids, "ranks": ranks}


def _rows(columns, idle, seq_indices: jax.Array, valid: jax.Array):
    """Return parameters [S, ...] of `seq_indices`; `idle` where not `valid`."""

    def pick(column: jax.Array, none: jax.Array) -> jax.Array:
        mask = valid.reshape((-1,) + (1,) * (none.ndim - 1))
        return jnp.where(mask, column[seq_indices], none)

    return jax.tree.map(pick, columns, idle)


def _apply_rules(table, seq_indices, positions, valid, logits, config: EngineConfig):
    """`logits` f32[S, V] after the logits rules of the sequences at `seq_indices`."""
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


def rate_prompts(
    model: Decoder,
    table: RequestTable,
    batch: Batch,
    hidden: jax.Array,
    config: EngineConfig,
) -> RequestTable:
    """The table with the log-probabilities of prompt tokens that this step computed.

    For the sequences that asked for them; a token's stand at its own position, like
    those of generated tokens. `hidden` [T, E] is that of the step's tokens.
    """
    if not config.prompt_logprobs:
        return table
    (num_tokens, _) = hidden.shape
    row, positions, is_live = token_rows(batch, num_tokens)
    seq_indices = batch.seq_indices[row]
    is_rated = is_live & table.params.keeps_prompt_logprobs[seq_indices]
    is_rated &= positions + 1 < table.queue.prompt_lens[seq_indices]
    order = pack(is_rated)
    size = min(_PROMPT_ROWS, num_tokens)

    def rate(index: jax.Array, table: RequestTable) -> RequestTable:
        start = jnp.minimum(index * size, num_tokens - size)
        at = lax.dynamic_slice_in_dim(order, start, size)
        seq_index = jnp.where(is_rated[at], seq_indices[at], config.max_num_requests)
        position = positions[at] + 1
        logits = model.logits(hidden[at])
        tokens = table.tokens[seq_indices[at], position]
        found = {"logprobs": token_logprobs(logits, tokens)[0]}
        found |= _ranked(logits, tokens, config)
        columns = {
            name: getattr(table, name).at[seq_index, position].set(value, mode="drop")
            for name, value in found.items()
        }
        return dataclasses.replace(table, **columns)

    def run(table: RequestTable) -> RequestTable:
        number = jnp.sum(is_rated, dtype=jnp.int32)
        return lax.fori_loop(0, cdiv(number, size), rate, table)

    return when(jnp.any(is_rated), run, table)
