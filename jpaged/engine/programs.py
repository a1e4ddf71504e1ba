"""Programs: the parts of a step as functions that are compiled one by one.

Pipeline: state -> [programs] -> state, driven by the host (`serving.stepping`).

    schedule    settled state -> state with a scheduled step
    trunk       that step's tokens -> logits; one program per number of tokens
    decode      logits -> unsettled state with new tokens
    decode_loop trunk and decode for a number of rows, and the decode steps after it
    settle      unsettled state -> settled state

In this order they do what `engine.step` does in one program. Only `trunk` and
`decode_loop` see pages, and only `decode` and `decode_loop` depend on the features that
requests use. States here have no pages; they are views (`features`).

Shape symbols: N rows of logits, T tokens of the step, V vocabulary, E hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention.kv_cache import KVCache
from jpaged.config import EngineConfig
from jpaged.engine import (
    algorithms,
    bookkeeping,
    decode_loop,
    forward,
    iteration,
    sampling,
)
from jpaged.engine.bookkeeping import ScheduledStep, Unsettled
from jpaged.engine.state import EngineState
from jpaged.kv.block_manager import BlockState
from jpaged.models.decoder import Decoder


class Pages(NamedTuple):
    """The pages of one model."""

    cache: KVCache
    host: KVCache | None  # of the host pool


class StepSize(NamedTuple):
    """What decides which program computes a step."""

    is_live: jax.Array  # bool[], False: there is no work
    num_rows: jax.Array  # i32[], rows with tokens
    num_tokens: jax.Array  # i32[]
    num_logits: jax.Array  # i32[], rows that complete their known tokens


def schedule(state: EngineState) -> tuple[EngineState, ScheduledStep, StepSize]:
    """Schedule a step: which rows run, and where their tokens are stored."""
    state, scheduled = bookkeeping.begin_step(state, state.config)
    num_tokens = scheduled.batch.num_tokens
    size = StepSize(
        is_live=scheduled.is_live,
        num_rows=jnp.sum(num_tokens > 0),
        num_tokens=jnp.sum(num_tokens),
        num_logits=jnp.sum(scheduled.batch.has_logits),
    )
    return state, scheduled, size


def trunk(
    model: Decoder,
    pages: Pages,
    logits: Any,
    tokens: jax.Array,
    blocks: BlockState,
    scheduled: ScheduledStep,
    *,
    size: int,
    config: EngineConfig,
) -> tuple[Pages, Any, jax.Array, BlockState | None]:
    """Compute the tokens of a step.

    Args:
      model: the decoder.
      pages: its pages.
      logits: f32[N, V], working memory (`sampling.init_logits`).
      tokens: i32[R, L], the tokens of all sequences.
      blocks: with the step's tokens appended.
      scheduled: the step.
      size: the number of tokens that the program has space for.
      config: the engine's config.

    Returns:
      The pages, the logits of the step's entries, the hidden states [size, E], and the
      blocks with what retention has observed; None if it observes nothing.
    """
    cache, host = iteration.swap_pages(*pages, scheduled)
    cache = iteration.copy_pages(cache, scheduled, config)
    inputs = forward.step_inputs(tokens, blocks, scheduled.batch, size, is_decode=False)
    batch = scheduled.batch
    cache, hidden, seen = forward.run_trunk(model, cache, inputs, config, batch=batch)
    logits = sampling.next_logits(model, scheduled.entries, hidden, logits, config)
    after = None
    if seen is not None:
        drops = forward.add_observed(blocks.drops, batch, seen)
        after = dataclasses.replace(blocks, drops=drops)
    return Pages(cache, host), logits, forward.last_hidden(hidden), after


def prompt_logprobs(
    model: Decoder, state: EngineState, scheduled: ScheduledStep, hidden: jax.Array
) -> EngineState:
    """Write the log-probabilities of the step's prompt tokens into the request table.

    Args:
      model: the decoder.
      state: with `prompt_logprobs` in its config.
      scheduled: the step.
      hidden: [T, E], from `trunk`.
    """
    table = sampling.write_prompt_logprobs(
        model, state.requests, scheduled.batch, hidden, state.config
    )
    return dataclasses.replace(state, requests=table)


def decode(
    state: EngineState, scheduled: ScheduledStep, logits: Any
) -> tuple[EngineState, Unsettled]:
    """Generate the step's tokens from the logits of its entries."""
    return _decode(state, scheduled, logits, None)


def _decode(
    state: EngineState, scheduled: ScheduledStep, logits: Any, size: int | None
) -> tuple[EngineState, Unsettled]:
    sampled = iteration.decode(state, scheduled, logits, state.config, size)
    return bookkeeping.finish_step(state, scheduled, sampled)


def run_decode_loop(
    model: Decoder,
    pages: Pages,
    logits: Any,
    state: EngineState,
    scheduled: ScheduledStep,
    max_steps: jax.Array,
    *,
    size: int,
    config: EngineConfig,
) -> tuple[Pages, Any, EngineState, Unsettled]:
    """Run a scheduled decode step, and the decode steps after it.

    It ends before a step that needs the scheduler, or after `max_steps`.

    Args:
      model: the decoder.
      pages: its pages.
      logits: f32[N, V], working memory (`sampling.init_logits`).
      state: from `schedule`.
      scheduled: a step in which each row decodes one token, at most `size` rows.
      max_steps: i32[], at least 1.
      size: the number of rows that the program has space for.
      config: the engine's config.
    """
    cache, host = iteration.swap_pages(*pages, scheduled)
    # Only the steps of algorithms copy blocks again.
    is_forking = bool(algorithms.config_algorithms(config))
    if not is_forking:
        cache = iteration.copy_pages(cache, scheduled, config)
    last = state.counters.num_steps + max_steps
    carry = (cache, logits, state, scheduled, Unsettled.none(config), jnp.bool_(True))

    def step(carry: tuple) -> tuple:
        cache, logits, state, scheduled, before, _ = carry
        if is_forking:
            cache = iteration.copy_pages(cache, scheduled, config)
        inputs = forward.step_inputs(
            state.requests.tokens, state.blocks, scheduled.batch, size, is_decode=True
        )
        batch = scheduled.batch
        cache, hidden, seen = forward.run_trunk(
            model, cache, inputs, config, batch=batch
        )
        if seen is not None:
            drops = forward.add_observed(state.blocks.drops, batch, seen)
            blocks = dataclasses.replace(state.blocks, drops=drops)
            state = dataclasses.replace(state, blocks=blocks)
        logits = sampling.first_logits(
            model, scheduled.entries, hidden, logits, config, size
        )
        state, unsettled = _decode(state, scheduled, logits, size)
        unsettled = dataclasses.replace(
            unsettled,
            has_first=unsettled.has_first | before.has_first,
            has_finished=unsettled.has_finished | before.has_finished,
        )
        state, scheduled, is_scheduled = decode_loop.next_step(
            state, scheduled, unsettled, state.counters.num_steps < last, config
        )
        return cache, logits, state, scheduled, unsettled, is_scheduled

    carry = lax.while_loop(lambda carry: carry[-1], step, carry)
    cache, logits, state, _, unsettled, _ = carry
    return Pages(cache, host), logits, state, unsettled
