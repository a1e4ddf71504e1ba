"""Algorithm inputs: the arguments of the steps of a group of requests.

Pipeline: logits, request table -> [algorithm_inputs] -> algorithms.

Shape symbols: R sequences of the request table, N rows of logits, G requests that are
batched, W rows of one request, V vocabulary, E hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.config import EngineConfig
from jpaged.decoding.base import Context
from jpaged.decoding.sample import token_keys
from jpaged.engine import request_table
from jpaged.engine.processing import Processing
from jpaged.engine.request_table import RequestTable


class DraftLogits(NamedTuple):
    """Logits of the draft model, which has other rows than the step."""

    values: jax.Array  # f32[N, V]
    seq_indices: jax.Array  # i32[N], the sequence of each row; R: none


class Logits(NamedTuple):
    """The logits of a step, with their sequences and what else algorithms need."""

    values: jax.Array  # f32[N, V]
    seq_indices: jax.Array  # i32[N], the sequence of each row; R: none
    hidden: jax.Array | None = None  # [N, E]
    layers: tuple[jax.Array, ...] = ()  # f32[N, V] each, of the config's `seen_layers`
    draft: DraftLogits | None = None


class GroupInputs(NamedTuple):
    """Inputs of the steps of G requests, and of what follows their decisions."""

    keys: jax.Array  # key[G, W]
    scores: jax.Array  # f32[G, W, V], log-probabilities after rules and processors
    raw: jax.Array  # f32[G, W, V], the model's
    entries: jax.Array  # i32[G, W], row of the step's logits
    known: jax.Array  # i32[G, W], sequence index, 0 for unused rows
    processed: Processing | None


def group_inputs(
    table: RequestTable, seq_indices: jax.Array, logits: Logits, config: EngineConfig
) -> GroupInputs:
    """Return keys and log-probabilities of the rows `seq_indices` i32[G, W].

    A row without logits in this step gets those of another row. With processed
    log-probabilities, the probabilities of the tokens that are allowed sum to 1.
    """
    table_size, (num_groups, num_rows) = table.queue.status.shape[0], seq_indices.shape
    index = _rows_of(logits.seq_indices, table_size)[seq_indices]
    raw = logits.values[index.reshape(-1)]
    raw = raw - jax.nn.logsumexp(raw, axis=1, keepdims=True)
    is_used = seq_indices < table_size
    known = jnp.where(is_used, seq_indices, 0)
    flat, flat_used = known.reshape(-1), is_used.reshape(-1)
    states = table.automaton_states[flat]
    values = request_table.constrain(table, flat, states, flat_used, raw)

    number = jnp.tile(jnp.arange(num_rows, dtype=jnp.int32), num_groups)
    seeds = jnp.repeat(table.params.sampling.seed[known[:, 0]], num_rows)
    # All running rows have the same length. Rows that have ended get new keys too,
    # because they may continue another row.
    lengths = jnp.max(
        jnp.where(is_used, table.queue.num_tokens[known], 0), axis=1, keepdims=True
    )
    lengths = jnp.broadcast_to(lengths, seq_indices.shape).reshape(-1)
    keys, processed = token_keys(seeds, number, lengths), None
    if config.processors and table.params.processors is not None:
        # Log-probabilities have no temperature.
        processed = request_table.process(
            table,
            flat,
            flat_used,
            values,
            config,
            num_tokens=table.queue.num_tokens[flat],
            keys=keys,
            temperature=jnp.zeros(flat.shape, jnp.float32),
            states=jax.tree.map(lambda x: x[flat], table.processor_states),
        )
        values = processed.logits
    if config.logprobs_mode == "processed" and values is not raw:
        total = jax.nn.logsumexp(values, axis=1, keepdims=True)
        values = jnp.where(total == -jnp.inf, values, values - total)

    def grouped(array: jax.Array) -> jax.Array:
        return array.reshape(num_groups, num_rows, *array.shape[1:])

    return GroupInputs(
        grouped(keys), grouped(values), grouped(raw), index, known, processed
    )


def group_context(
    algorithm: Any,
    parameters: dict[str, jax.Array],
    table: RequestTable,
    inputs: GroupInputs,
    logits: Logits,
    config: EngineConfig,
) -> Context:
    """Return what the algorithm needs beside the logits, with the axes [G, W]."""
    vocab_size, needs = logits.values.shape[1], algorithm.needs
    num_tokens = table.queue.num_tokens[inputs.known]
    tokens = hidden = layers = draft = None
    if "history" in needs:
        tokens = table.tokens[inputs.known]
        index = jnp.arange(tokens.shape[-1], dtype=jnp.int32)[None, None, :]
        tokens = jnp.where(index < num_tokens[..., None], tokens, vocab_size)
    if "hidden" in needs:
        assert logits.hidden is not None
        hidden = logits.hidden[inputs.entries]
    if "layers" in needs:
        known = dict(zip(config.seen_layers, logits.layers, strict=True))
        layers = jnp.stack(
            [known[layer][inputs.entries] for layer in algorithm.layers], axis=1
        )
    if "draft" in needs and logits.draft is not None:
        values, seq_indices = logits.draft
        at = _rows_of(seq_indices, table.queue.status.shape[0])[inputs.known]
        draft = jax.nn.log_softmax(values[at], axis=-1)
    return Context(
        parameters=parameters,
        prompt_lens=table.queue.prompt_lens[inputs.known],
        num_tokens=num_tokens,
        limits=table.params.token_limits[inputs.known],
        tokens=tokens,
        hidden=hidden,
        layers=layers,
        draft=draft,
    )


def _rows_of(seq_indices: jax.Array, table_size: int) -> jax.Array:
    """The row i32[R + 1] of each sequence among `seq_indices`; 0 if it has none."""
    order = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)
    return jnp.zeros((table_size + 1,), jnp.int32).at[seq_indices].set(order)
