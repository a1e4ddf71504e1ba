"""Cost breakdown of a decode step: scheduler, algorithm, fork and block copies.

The engine's step is rebuilt without the decoder from the functions of `jpaged.engine`,
so that single parts can be left out. The difference of two times is a part's cost.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lib.engine_loads import copy_state, loop_steps
from experiments.lib.timing import Contender
from jpaged import engine
from jpaged.attention import kv_cache
from jpaged.compat import when
from jpaged.engine import algorithms, request_table
from jpaged.engine.request_table import SampledTokens
from jpaged.kv.block_manager import NO_BLOCK

# Parts of a step beside scheduler and append, in the order in which they are added.
PARTS = ("algorithm", "fork", "copies")
_NUM_LOGITS = 4  # sets of logits, used by the steps in turn


def partial_steps(
    state: engine.EngineState, steps: int, parts: tuple[str, ...], vocab_size: int
) -> Contender:
    """Engine steps without the decoder, with some of `PARTS`.

    The logits are random. Without "algorithm" every row gets token 0; without "fork"
    every row continues itself; without "copies" no block is copied.

    Args:
      state: An engine during decoding.
      steps: Steps in one run.
      parts: The parts to include, of `PARTS`.
      vocab_size: Size of the vocabulary.
    """
    config = state.config
    rng = np.random.default_rng(3)
    shape = (_NUM_LOGITS * config.max_num_seqs, vocab_size)
    # The standard deviation is about that of the random-weight models' logits.
    logits = jnp.asarray(0.5 * rng.standard_normal(shape, np.float32))

    @functools.partial(jax.jit, donate_argnums=1)
    def run(logits: jax.Array, state: engine.EngineState) -> engine.EngineState:
        return loop_steps(functools.partial(_step, parts, logits), state, steps)

    if "copies" not in parts:  # otherwise each round would copy the pages for nothing
        state = dataclasses.replace(state, cache=None)
    after = jax.device_get(run(logits, copy_state(state)).counters)
    before = jax.device_get(state.counters)
    assert after.num_steps - before.num_steps == steps
    return Contender(run, lambda: (logits, copy_state(state)), units=steps)


def _step(
    parts: tuple[str, ...], logits: jax.Array, state: engine.EngineState
) -> engine.EngineState:
    """One step with these parts."""
    state, scheduled = engine.begin_step(state, state.config)
    copies, cache = scheduled.appended, state.cache
    if "copies" in parts:
        assert cache is not None
        cache = when(
            jnp.any(copies.copy_dst != NO_BLOCK),
            lambda cache: kv_cache.copy_blocks(cache, copies.copy_src, copies.copy_dst),
            cache,
        )
    sampled = _sampled(parts, logits, state, scheduled)
    return engine.end_step(state, scheduled, sampled, cache)


def _sampled(
    parts: tuple[str, ...],
    logits: jax.Array,
    state: engine.EngineState,
    scheduled: engine.ScheduledStep,
) -> engine.SampledStep:
    """Tokens and parents by the algorithms, or token 0 without "algorithm"."""
    config, number = state.config, state.counters.num_steps
    entries = scheduled.entries
    own = jnp.arange(config.num_rows, dtype=jnp.int32)
    if "algorithm" not in parts:
        new = SampledTokens.zeros(entries.seq_indices, config.num_logprobs)
        table, _ = request_table.extend(state.requests, new, number)
        states, parents, num_new = state.states, own, entries.num_grouped
    else:
        # The sequence indices point at another set of logits in each step, so that no
        # logits are copied.
        seq_indices = jnp.full((logits.shape[0],), config.max_num_requests, jnp.int32)
        start = number % _NUM_LOGITS * config.max_num_seqs
        seq_indices = lax.dynamic_update_slice(
            seq_indices, entries.seq_indices, (start,)
        )
        table, states, parents, num_new = algorithms.step_algorithms(
            state.requests,
            state.states,
            state.rows,
            algorithms.Logits(logits, seq_indices),
            number,
            config,
        )
    return engine.SampledStep(
        table=table,
        states=states,
        parents=parents if "fork" in parts else own,
        num_new=num_new,
        num_accepted=jnp.int32(0),
        is_settled=jnp.bool_("fork" not in parts),
    )


def shares_of_step(seconds: dict[str, float]) -> dict[str, float]:
    """Shares of a beam step that its parts take; they add up to 1.

    Args:
      seconds: Seconds of the whole "step", its matrix "products" and its "attention",
        and of steps without the decoder: with "none" of `PARTS`, and with the parts up
        to and including each of them.
    """
    step = seconds["step"]
    shares = {
        "products": seconds["products"] / step,
        "attention": seconds["attention"] / step,
        "scheduler": seconds["none"] / step,
        "algorithm": (seconds["algorithm"] - seconds["none"]) / step,
        "fork": (seconds["fork"] - seconds["algorithm"]) / step,
        "copies": (seconds["copies"] - seconds["fork"]) / step,
    }
    return shares | {"rest": 1.0 - sum(shares.values())}
