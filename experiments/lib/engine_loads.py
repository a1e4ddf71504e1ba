"""Loads: engines in the middle of a decode, and whole workloads, ready to be timed.

Beside the road: it drives the pure engine as a user would, with random prompts.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lib import baseline
from experiments.lib.timing import Contender
from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.engine import request_table, sampling
from jpaged.engine.request_table import NewTokens
from jpaged.models import Decoder
from jpaged.params import SamplingParams

_ALL_STEPS = 2**30  # an integer and not None: one program for whole and partial runs
_ABORT = engine.FINISH_REASONS.index("abort")


def random_prompts(
    lengths: Sequence[int], vocab_size: int, seed: int
) -> list[list[int]]:
    """Prompts of these lengths, tokens drawn evenly."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=n).tolist() for n in lengths]


def compile_s(model: Decoder, config: EngineConfig) -> float:
    """Seconds of the first step of an engine with these sizes, which compiles it.

    Short where jax's compilation cache has the program.
    """
    state = engine.init(model, config)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    state, _ = engine.submit(state, [[0]], params)
    begin = time.perf_counter()
    jax.block_until_ready(engine.run(model, state, 1))
    return time.perf_counter() - begin


def decoding_state(
    model: Decoder, config: EngineConfig, *, rows: int, context: int, steps: int
) -> engine.EngineState:
    """An engine whose `rows` all decode, `steps` // 2 steps before mean `context`.

    Prompts enter a budget at a time, so contexts differ by the steps that it took.

    Raises:
      ValueError: the context is too short for the steps before it.
    """
    longest_prefill = -(-rows * context // config.max_num_batched_tokens) + 1
    prompt_len = context - steps // 2 - longest_prefill
    if prompt_len < 1:
        raise ValueError(
            f"context: expected above {steps // 2 + longest_prefill} for {steps} steps "
            f"around it, got {context}; raise context or lower steps"
        )
    prompts = random_prompts([prompt_len] * rows, model.config.vocab_size, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=config.max_model_len)
    state = engine.init(model, config)
    state, _ = engine.submit(state, prompts, params)
    while True:
        state = engine.run(model, state, 1)
        lengths = np.asarray(state.blocks.context_lens)[np.asarray(state.rows) >= 0]
        is_decoding = len(lengths) == rows and lengths.min() >= prompt_len
        if is_decoding and lengths.mean() >= context - steps // 2:
            return state


def engine_steps(model: Decoder, state: engine.EngineState, steps: int) -> Contender:
    """So many decode steps of `engine.run` from `state`, in one call."""
    live = int(np.sum(np.asarray(state.rows) >= 0))

    def run(copied: engine.EngineState) -> engine.EngineState:
        return engine.run(model, copied, steps)

    # A step that did something else than decode every row would be another figure.
    after = jax.device_get(run(copy_state(state)).counters)
    before = jax.device_get(state.counters)
    assert after.num_steps - before.num_steps == steps
    assert after.num_generated - before.num_generated == steps * live
    return Contender(run, lambda: (copy_state(state),), units=steps)


def bookkeeping(state: engine.EngineState, steps: int) -> Contender:
    """The engine's step without pages, decoder and sampler: every row gets token 0.

    Schedule, append, pack the rows, count and extend the sequences, as in
    `engine.step`, in a loop inside one program.
    """
    config = state.config
    # The pages would be copied for nothing in each round.
    state = dataclasses.replace(state, cache=None)

    def step(state: engine.EngineState) -> engine.EngineState:
        scheduled = engine.begin_step(state, config)
        entries = sampling.make_entries(scheduled.table, scheduled.batch, config)
        table, ended = request_table.extend(
            scheduled.table,
            NewTokens.zeros(entries.seq_indices, config.num_logprobs),
            state.counters.num_steps,
        )
        decoded = engine.SampledStep(
            table=table,
            states=state.states,
            parents=jnp.arange(config.num_rows, dtype=jnp.int32),
            num_new=entries.num_sampled,
            num_accepted=jnp.int32(0),
            is_settled=~jnp.any(ended),
        )
        return engine.end_step(state, scheduled, decoded, state.cache)

    @jax.jit
    def run(state: engine.EngineState) -> engine.EngineState:
        limit = state.counters.num_steps + steps
        return lax.while_loop(
            lambda state: engine.has_work(state) & (state.counters.num_steps < limit),
            step,
            state,
        )

    live = int(np.sum(np.asarray(state.rows) >= 0))
    gained = run(state).counters.num_generated - state.counters.num_generated
    assert int(gained) == steps * live
    return Contender(run, lambda: (state,), units=steps)


class Workload(NamedTuple):
    """Requests that arrive at once, and how many tokens each is given."""

    prompts: list[list[int]]
    output_lens: list[int]


def lognormal_workload(
    *,
    num_requests: int,
    mean: float,
    sigma: float,
    least: int,
    most: int,
    vocab_size: int,
    seed: int,
) -> Workload:
    """Lengths exp(mu + sigma * normal), clipped; mu such that these draws' mean fits.

    Prompts and outputs have a mu of their own, so that both have the mean.
    """
    rng = np.random.default_rng(seed)

    def lengths() -> list[int]:
        draws = rng.standard_normal(num_requests)

        def at(mu: float) -> np.ndarray:
            return np.clip(np.rint(np.exp(mu + sigma * draws)), least, most)

        low, high = np.log(least) - 4 * sigma, np.log(most) + 4 * sigma
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle).mean() < mean else (low, middle)
        return at(high).astype(int).tolist()

    prompt_lens, output_lens = lengths(), lengths()
    return Workload(random_prompts(prompt_lens, vocab_size, seed), output_lens)


class EngineRun:
    """A workload through the engine, again and again with the same pages."""

    def __init__(self, model: Decoder, config: EngineConfig, load: Workload) -> None:
        self.model = model
        self.load = load
        self.state = engine.init(model, config)
        self.before = jax.device_get(self.state.counters)

    def prepare(self) -> tuple[engine.EngineState]:
        """The engine without requests."""
        everyone = jnp.ones_like(self.state.requests.queue.status, bool)
        state = engine.end(self.state, everyone, jnp.int32(_ABORT))
        self.state = engine.release(state, everyone)
        self.before = jax.device_get(self.state.counters)
        return (self.state,)

    def run(
        self, state: engine.EngineState, max_steps: int = _ALL_STEPS
    ) -> engine.EngineState:
        """Submits all, and runs to the end: one device call."""
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
            for n in self.load.output_lens
        ]
        state, _ = engine.submit(state, self.load.prompts, params)
        self.state = engine.run(self.model, state, max_steps)
        return self.state

    def equal_tokens_share(self, others: jax.Array) -> float:
        """Share of the last run's tokens that `others`, i32[B, longest], has too.

        Behind a token that rounding decided otherwise all may differ.
        """
        equal = 0
        results = engine.collect(self.state)
        for result, other in zip(results, np.asarray(others), strict=True):
            tokens = np.array(result.token_ids)
            equal += int(np.sum(tokens == other[: len(tokens)]))
        return equal / sum(self.load.output_lens)

    def statistics(self) -> dict[str, float]:
        """Of the last run to the end: steps, those with prompts, use of the pages."""
        after = jax.device_get(self.state.counters)
        results = engine.collect(self.state)
        lengths = [len(result.token_ids) for result in results]
        assert lengths == self.load.output_lens, lengths
        steps = int(after.num_steps - self.before.num_steps)
        first = max(result.first_step for result in results)
        return {
            "steps": steps,
            "steps_with_prompts": first + 1 - int(self.before.num_steps),
            "kv_token_share": float(after.token_share - self.before.token_share)
            / steps,
            "preemptions": int(after.num_preemptions - self.before.num_preemptions),
            "most_blocks_used": int(after.max_used_blocks),
        }


FORMS = {"calls": baseline.decode_calls, "loop": baseline.decode_loop}


class BaselineRun:
    """A workload as one static batch through the baseline, in one of its `FORMS`."""

    def __init__(self, model: Decoder, load: Workload, max_len: int) -> None:
        self.weights, self.shape = baseline.weights_of(model)
        self.max_len = max_len
        self.tokens, self.starts = baseline.pad_left(load.prompts)
        self.steps = max(load.output_lens) - 1
        self.form = "loop"

    def prefill(self) -> baseline.State:
        """The batch after its prompts."""
        return baseline.prefill(
            self.weights,
            self.tokens,
            self.starts,
            shape=self.shape,
            max_len=self.max_len,
        )

    def compile_s(self) -> float:
        """Seconds of the prompts and one step in the loop, which compiles them."""
        begin = time.perf_counter()
        state = self.prefill()
        decoded = baseline.decode_loop(self.weights, state, 1, shape=self.shape)
        jax.block_until_ready(decoded)
        return time.perf_counter() - begin

    def run(self) -> jax.Array:
        """All tokens i32[B, longest output]."""
        decode = FORMS[self.form]
        return decode(self.weights, self.prefill(), self.steps, shape=self.shape)[1]

    def decoders(self, steps: int) -> dict[str, Contender]:
        """Both forms of the decode loop, each timed on the same slots of one cache."""
        hold = [self.prefill()]
        slot, tokens = int(hold[0].slot), jnp.copy(hold[0].tokens)

        def prepare() -> tuple[baseline.State]:
            return (hold[0]._replace(slot=jnp.int32(slot), tokens=jnp.copy(tokens)),)

        def contender(decode) -> Contender:
            def run(state: baseline.State) -> jax.Array:
                hold[0], out = decode(self.weights, state, steps, shape=self.shape)
                return out

            return Contender(run, prepare, units=steps)

        return {name: contender(decode) for name, decode in FORMS.items()}


def copy_state(state: engine.EngineState) -> engine.EngineState:
    """A copy that may be donated."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))
