"""Bursts: requests that arrive at once, through the engine and through the baseline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import baseline
from experiments.lib.engine_loads import clear_state, random_prompts
from experiments.lib.timing import Contender
from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.models import Decoder
from jpaged.params import SamplingParams

_ALL_STEPS = 2**30  # not None: an integer shares the program of partial runs


class Burst(NamedTuple):
    """Requests that arrive at once."""

    prompts: list[list[int]]
    output_lens: list[int]  # tokens to generate for each prompt


def lognormal_burst(
    *,
    num_requests: int,
    mean: float,
    sigma: float,
    least: int,
    most: int,
    vocab_size: int,
    seed: int,
) -> Burst:
    """Samples prompt and output lengths from a clipped lognormal distribution.

    A length is exp(mu + sigma * normal), rounded and clipped. `mu` is chosen for
    prompts and for outputs separately, such that the mean of the samples is `mean`.

    Args:
      num_requests: Number of requests.
      mean: Mean length in tokens.
      sigma: Standard deviation of the logarithm.
      least: Shortest length.
      most: Longest length.
      vocab_size: Tokens are sampled uniformly below it.
      seed: Seed of lengths and tokens.
    """
    rng = np.random.default_rng(seed)

    def sample_lengths() -> list[int]:
        normal = rng.standard_normal(num_requests)

        def lengths_for(mu: float) -> np.ndarray:
            return np.clip(np.rint(np.exp(mu + sigma * normal)), least, most)

        low, high = np.log(least) - 4 * sigma, np.log(most) + 4 * sigma
        for _ in range(50):
            middle = (low + high) / 2
            is_short = lengths_for(middle).mean() < mean
            low, high = (middle, high) if is_short else (low, middle)
        return lengths_for(high).astype(int).tolist()

    prompt_lens, output_lens = sample_lengths(), sample_lengths()
    return Burst(random_prompts(prompt_lens, vocab_size, seed), output_lens)


class EngineBurst:
    """Runs a burst through the engine repeatedly, with the same pages."""

    def __init__(self, model: Decoder, config: EngineConfig, burst: Burst) -> None:
        self.model = model
        self.burst = burst
        self.state = engine.init(model, config)
        self.before = jax.device_get(self.state.counters)

    def prepare(self) -> tuple[engine.EngineState]:
        """Returns the engine without requests."""
        self.state = clear_state(self.state)
        self.before = jax.device_get(self.state.counters)
        return (self.state,)

    def run(
        self, state: engine.EngineState, max_steps: int = _ALL_STEPS
    ) -> engine.EngineState:
        """Submits all requests and runs the engine in one device call."""
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
            for n in self.burst.output_lens
        ]
        state, _ = engine.submit(state, self.burst.prompts, params)
        self.state = engine.run(self.model, state, max_steps)
        return self.state

    def equal_tokens_share(self, others: jax.Array) -> float:
        """Share of the last run's tokens that equal `others`, i32[B, longest].

        Rounding can decide a token differently; the rest of that sequence may then
        differ too.
        """
        equal = 0
        results = engine.collect(self.state)
        for result, other in zip(results, np.asarray(others), strict=True):
            tokens = np.array(result.token_ids)
            equal += int(np.sum(tokens == other[: len(tokens)]))
        return equal / sum(self.burst.output_lens)

    def statistics(self) -> dict[str, float]:
        """Steps, preemptions and memory use of the last complete run."""
        after = jax.device_get(self.state.counters)
        results = engine.collect(self.state)
        lengths = [len(result.token_ids) for result in results]
        assert lengths == self.burst.output_lens, lengths
        steps = int(after.num_steps - self.before.num_steps)
        first = max(result.first_step for result in results)
        share = float(after.token_share - self.before.token_share) / steps
        return {
            "steps": steps,
            "steps_with_prompts": first + 1 - int(self.before.num_steps),
            "kv_token_share": share,
            "preemptions": int(after.num_preemptions - self.before.num_preemptions),
            "most_blocks_used": int(after.max_used_blocks),
        }


FORMS = {"calls": baseline.decode_calls, "loop": baseline.decode_loop}


class BaselineBurst:
    """Runs a burst as one static batch through the baseline, in one of its `FORMS`."""

    def __init__(self, model: Decoder, burst: Burst, max_len: int) -> None:
        self.weights, self.shape = baseline.weights_of(model)
        self.max_len = max_len
        self.tokens, self.starts = baseline.pad_left(burst.prompts)
        self.steps = max(burst.output_lens) - 1
        self.form = "loop"

    def prefill(self) -> baseline.StaticBatch:
        """Computes the prompts."""
        return baseline.prefill(
            self.weights,
            self.tokens,
            self.starts,
            shape=self.shape,
            max_len=self.max_len,
        )

    def compile_seconds(self) -> float:
        """Times the prompts and one step of the loop, which compiles them."""
        begin = time.perf_counter()
        state = self.prefill()
        decoded = baseline.decode_loop(self.weights, state, 1, shape=self.shape)
        jax.block_until_ready(decoded)
        return time.perf_counter() - begin

    def run(self) -> jax.Array:
        """Returns all tokens, i32[B, longest output]."""
        decode = FORMS[self.form]
        return decode(self.weights, self.prefill(), self.steps, shape=self.shape)[1]

    def decoders(self, steps: int) -> dict[str, Contender]:
        """Both forms of the decode loop, timed on the same slots of one cache."""
        latest = [self.prefill()]
        slot, tokens = int(latest[0].slot), jnp.copy(latest[0].tokens)

        def prepare() -> tuple[baseline.StaticBatch]:
            return (latest[0]._replace(slot=jnp.int32(slot), tokens=jnp.copy(tokens)),)

        def contender(decode: Callable[..., Any]) -> Contender:
            def run(state: baseline.StaticBatch) -> jax.Array:
                latest[0], out = decode(self.weights, state, steps, shape=self.shape)
                return out

            return Contender(run, prepare, units=steps)

        return {name: contender(decode) for name, decode in FORMS.items()}
