"""Synthetic tokens: prompts, sampled tokens and beam scores without a model.

Pipeline: scheduled step -> [synthetic_tokens] -> sampled step.

A simulated token is a number computed from its request, its sample and its position.
The prefix cache and the sharing of blocks after a preemption therefore compare the same
tokens as in the engine. Beams are the engine's beam search on synthetic
log-probabilities (`beam_log_probs`).

Shape symbols: R sequence indices of the request table, S batch rows, V vocabulary,
L tokens of the longest prompt.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.engine import algorithms, request_table
from jpaged.engine.iteration import SampledStep, ScheduledStep
from jpaged.engine.request_table import NO_ALGORITHM, RequestTable, SampledTokens
from jpaged.engine.state import EngineState
from jpaged.scheduler import NO_REQUEST
from jpaged.simulator.systems.base import SimulatedRequest

VOCABULARY = 64  # tokens that beams choose from


def mix(seed: jax.Array | int, value: jax.Array | int) -> jax.Array:
    """Hash two integers to a number from 0 to 2**31 - 1, i32 of their common shape."""
    word = jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    word = word ^ jnp.asarray(value).astype(jnp.uint32)
    for factor in (0x7FEB352D, 0x846CA68B):
        word = (word ^ (word >> 16)) * jnp.uint32(factor)
    return ((word ^ (word >> 15)) >> 1).astype(jnp.int32)


def prompt_tokens(
    request: SimulatedRequest, length: int, content_size: int
) -> jax.Array:
    """Return the tokens of a prompt; pieces with equal ids have equal tokens.

    Args:
      request: the request.
      length: L, tokens to pad to.
      content_size: prompt tokens of a piece.

    Returns:
      i32[L], 0 after the prompt.
    """
    position = jnp.arange(length, dtype=jnp.int32)
    tokens = mix(mix(request.number, -1), position)
    if request.content.shape[0]:
        piece = request.content.at[position // content_size]
        piece = piece.get(mode="fill", fill_value=-1)
        shared = mix(piece, position % content_size)
        tokens = jnp.where(piece >= 0, shared, tokens)
    return jnp.where(position < request.prompt_len, tokens, 0)


def computes_last_token(state: EngineState, scheduled: ScheduledStep) -> jax.Array:
    """bool[S], the row computes its last known token, so that a new one follows."""
    known = scheduler.row_values(state.requests.queue.num_tokens, state.rows)
    is_last = state.blocks.context_lens == known
    return is_last & (scheduled.plan.num_tokens > 0) & (state.rows != NO_REQUEST)


def sample_tokens(
    state: EngineState,
    scheduled: ScheduledStep,
    config: EngineConfig,
    beam_concentration: float,
) -> SampledStep:
    """Append a token to every row that computes its last known token.

    Args:
      state: the engine's state from `begin_step`.
      scheduled: the scheduled step.
      config: the engine's.
      beam_concentration: see `beam_log_probs`.
    """
    table, table_size = state.requests, config.max_num_requests
    number = state.counters.num_steps
    is_last = computes_last_token(state, scheduled)
    seq_indices = jnp.where(is_last, state.rows, table_size)
    known = jnp.minimum(seq_indices, table_size - 1)
    is_grouped = table.params.algorithms[known] != NO_ALGORITHM
    sampled = jnp.where(is_grouped, table_size, seq_indices)
    position = table.queue.num_tokens[known]
    sampling = jax.tree.map(lambda leaf: leaf[known], table.params.sampling)
    new = SampledTokens.zeros(sampled, config.num_logprobs)
    tokens = mix(mix(sampling.seed, sampling.sample + 1), position)
    new = dataclasses.replace(new, tokens=tokens)
    table, ended = request_table.extend(table, new, number)
    states, num_grouped = state.states, jnp.int32(0)
    parents = jnp.arange(state.rows.shape[0], dtype=jnp.int32)
    grouped = jnp.where(is_grouped, seq_indices, table_size)
    if algorithms.config_algorithms(config):
        logits = beam_log_probs(table, grouped, beam_concentration)
        table, states, parents, num_grouped = algorithms.step_algorithms(
            table,
            states,
            state.rows,
            algorithms.Logits(logits, grouped),
            number,
            config,
        )
    return SampledStep(
        table=table,
        states=states,
        parents=parents,
        num_new=jnp.sum(sampled < table_size, dtype=jnp.int32) + num_grouped,
        num_accepted=jnp.int32(0),
        is_settled=~jnp.any(ended) & ~jnp.any(grouped < table_size),
    )


def beam_log_probs(
    table: RequestTable, seq_indices: jax.Array, concentration: float
) -> jax.Array:
    """Return synthetic log-probabilities f32[S, V] of the rows' next tokens.

    They are a Zipf distribution over tokens, in an order that the last token of the
    sequence and its position decide. Equal beams see equal distributions, and different
    beams see different ones.

    Args:
      table: the request table.
      seq_indices: i32[S], R where the row has no beam.
      concentration: exponent of the distribution. The higher it is, the more often all
        beams continue the best one.
    """
    known = jnp.minimum(seq_indices, table.queue.num_tokens.shape[0] - 1)
    length = table.queue.num_tokens[known]
    last = table.tokens[known, length - 1]
    seed = mix(table.params.sampling.seed[known], length)
    token = jnp.arange(VOCABULARY, dtype=jnp.int32)
    order = mix(mix(seed, last)[:, None], token[None, :])
    noise = (order.astype(jnp.float32) + 0.5) / jnp.float32(2**31)
    # Gumbel noise makes a random order; the exponent spreads the scores.
    gumbel = -jnp.log(-jnp.log(noise))
    return jax.nn.log_softmax(concentration * gumbel, axis=1)
