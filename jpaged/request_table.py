"""Request table: what the engine knows of each sequence, as arrays.

Place on the road: user's requests -> [request_table] -> scheduler, decoding.

A request with n samples takes n places, one for each sample; they share the arrival
and name the first of them as their leader. Letters: R places, L tokens of the longest
sequence, E stop ids, C most likely tokens kept.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.decoding.sample import SamplingRows
from jpaged.scheduler import Queue

# Why a sequence ended.
NOT_FINISHED, STOP, LENGTH, ABORT = range(4)
NEVER = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestTable:
    """All sequences, waiting, running and finished, until they are released."""

    queue: Queue  # what the scheduler sees of them
    tokens: jax.Array  # i32[R, L], the prompt and what was generated
    logprobs: jax.Array  # f32[R, L], of the generated tokens, raw
    ranks: jax.Array  # i32[R, L], 1: the most likely token; [R, 0] without top_*
    top_ids: jax.Array  # i32[R, L, C]
    top_logprobs: jax.Array  # f32[R, L, C]
    token_limits: jax.Array  # i32[R], tokens at which the sequence ends
    stop_ids: jax.Array  # i32[R, E], padded with -1
    sampling: SamplingRows  # of arrays [R]
    finish_reasons: jax.Array  # i32[R]
    first_steps: jax.Array  # i32[R], step that gave the first token, or NEVER
    last_steps: jax.Array  # i32[R], step that gave the last token, or NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Submission:
    """New sequences on their way into the table, B of them; padding has place R."""

    places: jax.Array  # i32[B]
    leaders: jax.Array  # i32[B]
    arrivals: jax.Array  # i32[B]
    priorities: jax.Array  # i32[B]
    tokens: jax.Array  # i32[B, L]
    prompt_lens: jax.Array  # i32[B]
    token_limits: jax.Array  # i32[B]
    stop_ids: jax.Array  # i32[B, E]
    sampling: SamplingRows  # of arrays [B]


def init_table(config: EngineConfig) -> RequestTable:
    """A table of empty places."""
    places, length = config.max_num_requests, config.max_model_len
    kept = config.num_logprobs

    def full(*shape: int, value: int | float = 0, dtype=jnp.int32) -> jax.Array:
        return jnp.full((places, *shape), value, dtype)

    return RequestTable(
        queue=scheduler.init_queue(places),
        tokens=full(length),
        logprobs=full(length, dtype=jnp.float32),
        ranks=full(length if kept else 0),
        top_ids=full(length, kept),
        top_logprobs=full(length, kept, dtype=jnp.float32),
        token_limits=full(),
        stop_ids=full(config.max_num_stop_ids, value=-1),
        sampling=SamplingRows.greedy(places),
        finish_reasons=full(),
        first_steps=full(value=NEVER),
        last_steps=full(value=NEVER),
    )


def place(table: RequestTable, new: Submission) -> RequestTable:
    """The table with the new sequences waiting at their places."""

    def put(column: jax.Array, values: jax.Array | int) -> jax.Array:
        return column.at[new.places].set(values, mode="drop")

    queue = dataclasses.replace(
        table.queue,
        status=put(table.queue.status, scheduler.WAITING),
        arrivals=put(table.queue.arrivals, new.arrivals),
        priorities=put(table.queue.priorities, new.priorities),
        prompt_lens=put(table.queue.prompt_lens, new.prompt_lens),
        num_tokens=put(table.queue.num_tokens, new.prompt_lens),
        leaders=put(table.queue.leaders, new.leaders),
        num_preemptions=put(table.queue.num_preemptions, 0),
    )
    return dataclasses.replace(
        table,
        queue=queue,
        tokens=put(table.tokens, new.tokens),
        token_limits=put(table.token_limits, new.token_limits),
        stop_ids=put(table.stop_ids, new.stop_ids),
        sampling=jax.tree.map(put, table.sampling, new.sampling),
        finish_reasons=put(table.finish_reasons, NOT_FINISHED),
        first_steps=put(table.first_steps, NEVER),
        last_steps=put(table.last_steps, NEVER),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What decoding gave the rows of a step, S of them; padding has place R."""

    places: jax.Array  # i32[S], the sequence that gets the token
    tokens: jax.Array  # i32[S]
    logprobs: jax.Array  # f32[S]
    ranks: jax.Array  # i32[S], meaningful where top tokens are kept
    top_ids: jax.Array  # i32[S, C]
    top_logprobs: jax.Array  # f32[S, C]


def extend(
    table: RequestTable, new: NewTokens, step: jax.Array
) -> tuple[RequestTable, jax.Array]:
    """The table with the new tokens, and which of the sequences they end, bool[S].

    A sequence ends at one of its stop ids, or at its limit of tokens.
    """
    places = new.places
    num_places, _ = table.tokens.shape
    valid = places < num_places
    safe = jnp.where(valid, places, 0)
    position = table.queue.num_tokens[safe]
    is_stop = jnp.any(table.stop_ids[safe] == new.tokens[:, None], axis=1)
    is_full = position + 1 >= table.token_limits[safe]
    ended = valid & (is_stop | is_full)
    reason = jnp.where(is_stop, STOP, LENGTH)
    at_end = jnp.where(ended, places, num_places)
    is_first = position == table.queue.prompt_lens[safe]
    at_first = jnp.where(valid & is_first, places, num_places)

    def put(column: jax.Array, values: jax.Array) -> jax.Array:
        return column.at[places, position].set(values, mode="drop")

    queue = dataclasses.replace(
        table.queue,
        status=table.queue.status.at[at_end].set(scheduler.FINISHED, mode="drop"),
        num_tokens=table.queue.num_tokens.at[places].add(1, mode="drop"),
    )
    table = dataclasses.replace(
        table,
        queue=queue,
        tokens=put(table.tokens, new.tokens),
        logprobs=put(table.logprobs, new.logprobs),
        finish_reasons=table.finish_reasons.at[at_end].set(reason, mode="drop"),
        first_steps=table.first_steps.at[at_first].set(step, mode="drop"),
        last_steps=table.last_steps.at[places].set(step, mode="drop"),
    )
    if new.top_ids.shape[1]:
        table = dataclasses.replace(
            table,
            ranks=put(table.ranks, new.ranks),
            top_ids=put(table.top_ids, new.top_ids),
            top_logprobs=put(table.top_logprobs, new.top_logprobs),
        )
    return table, ended
