"""Engines in the middle of decoding, ready to be timed.

They drive the pure engine as a user would, with random prompts.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lib.timing import Contender
from jpaged import engine
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.cpu import huge_pages
from jpaged.engine import request_table
from jpaged.engine.request_table import SampledTokens
from jpaged.models import Decoder
from jpaged.params import SamplingParams

_ABORT = engine.FINISH_REASONS.index("abort")


def random_prompts(
    lengths: Sequence[int], vocab_size: int, seed: int
) -> list[list[int]]:
    """Prompts of these lengths, with uniformly random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=n).tolist() for n in lengths]


def compile_seconds(model: Decoder, config: EngineConfig) -> float:
    """Times the first step of an engine, which compiles it.

    The time is short if jax's compilation cache has the program.
    """
    state = engine.init(model, config)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    state, _ = engine.submit(state, [[0]], params)
    begin = time.perf_counter()
    jax.block_until_ready(engine.run(model, state, 1))
    return time.perf_counter() - begin


def copy_state(state: engine.EngineState) -> engine.EngineState:
    """Copies a state, so that the copy can be donated."""
    copied = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    huge_pages.move(copied.cache)  # as `LLM` does
    return copied


def clear_state(state: engine.EngineState) -> engine.EngineState:
    """Aborts and releases all requests of an engine; its memory stays allocated."""
    everything = jnp.ones_like(state.requests.queue.status, bool)
    state = engine.end(state, everything, jnp.int32(_ABORT))
    return engine.release(state, everything)


def live_context_lens(state: engine.EngineState) -> np.ndarray:
    """Context lengths of the batch rows in use, i32[number of rows in use]."""
    return np.asarray(state.blocks.context_lens)[np.asarray(state.rows) >= 0]


def decoding_state(
    model: Decoder, config: EngineConfig, *, rows: int, context: int, steps: int
) -> engine.EngineState:
    """An engine whose rows all decode, `steps` // 2 steps before the mean `context`.

    Each step computes prompts up to the token budget, so the contexts of the rows
    differ by the number of steps that all prompts took.

    Args:
      model: The model.
      config: Sizes of the engine.
      rows: Number of requests, all of which decode.
      context: Mean context length at the middle of the timed steps.
      steps: Number of steps that will be timed.

    Raises:
      ValueError: The context is shorter than the steps before it.
    """
    longest_prefill = cdiv(rows * context, config.max_num_batched_tokens) + 1
    prompt_len = context - steps // 2 - longest_prefill
    if prompt_len < 1:
        raise ValueError(
            f"--context: expected above {steps // 2 + longest_prefill} for {steps} "
            f"steps around it, got {context}; raise --context or lower --steps"
        )
    prompts = random_prompts([prompt_len] * rows, model.config.vocab_size, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=config.max_model_len)
    state = engine.init(model, config)
    huge_pages.move(model)
    state, _ = engine.submit(state, prompts, params)
    while True:
        state = engine.run(model, state, 1)
        lengths = live_context_lens(state)
        is_decoding = len(lengths) == rows and lengths.min() >= prompt_len
        if is_decoding and lengths.mean() >= context - steps // 2:
            return state


def engine_steps(model: Decoder, state: engine.EngineState, steps: int) -> Contender:
    """Decode steps of `engine.run` from `state`, in one call."""
    live = len(live_context_lens(state))

    def run(copied: engine.EngineState) -> engine.EngineState:
        return engine.run(model, copied, steps)

    # Only steps in which every row decodes one token are comparable.
    after = jax.device_get(run(copy_state(state)).counters)
    before = jax.device_get(state.counters)
    assert after.num_steps - before.num_steps == steps
    assert after.num_generated - before.num_generated == steps * live
    return Contender(run, lambda: (copy_state(state),), units=steps)


def bookkeeping_steps(state: engine.EngineState, steps: int) -> Contender:
    """Engine steps without pages, decoder and sampler: every row gets token 0.

    As in `engine.step`, each step schedules, appends, packs the rows, counts and
    extends the sequences. The steps are a loop in one program.
    """
    config = state.config
    # Without this, each round would copy the pages for nothing.
    state = dataclasses.replace(state, cache=None)

    def step(state: engine.EngineState) -> engine.EngineState:
        state, scheduled = engine.begin_step(state, config)
        entries = scheduled.entries
        table, ended = request_table.extend(
            state.requests,
            SampledTokens.zeros(entries.seq_indices, config.num_logprobs),
            state.counters.num_steps,
        )
        sampled = engine.SampledStep(
            table=table,
            states=state.states,
            parents=jnp.arange(config.num_rows, dtype=jnp.int32),
            num_new=entries.num_sampled,
            num_accepted=jnp.int32(0),
            is_settled=~jnp.any(ended),
        )
        return engine.end_step(state, scheduled, sampled, state.cache)

    run = jax.jit(lambda state: loop_steps(step, state, steps))
    live = len(live_context_lens(state))
    gained = run(state).counters.num_generated - state.counters.num_generated
    assert int(gained) == steps * live
    return Contender(run, lambda: (state,), units=steps)


def loop_steps(
    step: Callable[[engine.EngineState], engine.EngineState],
    state: engine.EngineState,
    steps: int,
) -> engine.EngineState:
    """Runs `step` up to `steps` times while there is work, in one `while_loop`."""
    limit = state.counters.num_steps + steps
    return lax.while_loop(
        lambda state: engine.has_work(state) & (state.counters.num_steps < limit),
        step,
        state,
    )
