"""Decoding costs: what of a step is blocks, algorithm, scheduler and the rest.

Beside the road. The engine's step is built again without the decoder, from the parts of
`jpaged.engine`, so that single parts can be left out: the difference is their cost.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lib.engine_loads import copy_state
from experiments.lib.timing import Contender
from jpaged import engine
from jpaged.attention import kv_cache
from jpaged.compat import when
from jpaged.engine import algorithms, request_table, sampling
from jpaged.engine.request_table import NewTokens
from jpaged.kv.block_manager import NO_BLOCK

# Parts of a step beside scheduler and append, in the order in which they are added.
PARTS = ("algorithm", "fork", "copies")
_NUM_LOGITS = 4  # logits that follow each other


def bookkeeping(
    state: engine.EngineState, steps: int, parts: tuple[str, ...], vocab_size: int
) -> Contender:
    """So many steps without the decoder, with these of PARTS.

    The logits are random ones. Without "algorithm" every row gets token 0, without
    "fork" it continues itself, without "copies" no block is copied.
    """
    config = state.config
    rng = np.random.default_rng(3)
    shape = (_NUM_LOGITS * config.max_num_seqs, vocab_size)
    # As wide as those of the random-weight models that are timed.
    values = jnp.asarray(0.5 * rng.standard_normal(shape, np.float32))

    def decoded_as(table, states, parents, num_new, is_settled) -> engine.SampledStep:
        return engine.SampledStep(
            table=table,
            states=states,
            parents=parents,
            num_new=num_new,
            num_accepted=jnp.int32(0),
            is_settled=jnp.bool_(is_settled),
        )

    def decode(state, scheduled, entries, values) -> engine.SampledStep:
        number = state.counters.num_steps
        own = jnp.arange(config.num_rows, dtype=jnp.int32)
        if "algorithm" not in parts:
            new = NewTokens.zeros(entries.seq_indices, config.num_logprobs)
            table, _ = request_table.extend(scheduled.table, new, number)
            num_new = entries.num_grouped
            return decoded_as(table, state.states, own, num_new, True)
        # Each step's places stand at its own rows of the logits: nothing is copied.
        seq_indices = jnp.full((shape[0],), config.max_num_requests, jnp.int32)
        start = number % _NUM_LOGITS * config.max_num_seqs
        seq_indices = lax.dynamic_update_slice(
            seq_indices, entries.seq_indices, (start,)
        )
        table, states, parents, num_new = algorithms.step_algorithms(
            scheduled.table,
            state.states,
            scheduled.rows,
            algorithms.Logits(values, seq_indices),
            number,
            config,
        )
        has_fork = "fork" in parts
        parents = parents if has_fork else own
        return decoded_as(table, states, parents, num_new, not has_fork)

    def step(values, state: engine.EngineState) -> engine.EngineState:
        scheduled = engine.begin_step(state, config)
        copies, cache = scheduled.appended, state.cache
        if "copies" in parts:
            cache = when(
                jnp.any(copies.copy_dst != NO_BLOCK),
                lambda cache: kv_cache.copy_blocks(
                    cache, copies.copy_src, copies.copy_dst
                ),
                cache,
            )
        entries = sampling.make_entries(scheduled.table, scheduled.batch, config)
        decoded = decode(state, scheduled, entries, values)
        return engine.end_step(state, scheduled, decoded, cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(values, state: engine.EngineState) -> engine.EngineState:
        limit = state.counters.num_steps + steps
        return lax.while_loop(
            lambda state: engine.has_work(state) & (state.counters.num_steps < limit),
            functools.partial(step, values),
            state,
        )

    if "copies" not in parts:  # the pages would be copied for nothing in each round
        state = dataclasses.replace(state, cache=None)
    after = jax.device_get(run(values, copy_state(state)).counters)
    before = jax.device_get(state.counters)
    assert after.num_steps - before.num_steps == steps
    return Contender(run, lambda: (values, copy_state(state)), units=steps)


def shares_of_step(seconds: dict[str, float]) -> dict[str, float]:
    """What the parts of a beam step are of it; their sum is 1.

    Args:
      seconds: of "step", of its matrix "products" and of "attention"; and of the
        bookkeeping with "none" of PARTS and up to each of them.
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
