"""Random walks: the engine stays sound, and each request generates its own tokens.

Requests are submitted, run for some steps in a pool that is too small, are swapped or
recomputed, or are aborted; the prefix cache is reset. Each move is followed by a check
of all invariants. At the end each request that was not aborted has the tokens of a
loop.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from jpaged import engine
from jpaged.engine import request_table
from jpaged.kv import block_manager, prefix_cache
from jpaged.params import SamplingParams
from tests.engine.engine_test import MAX_LEN, STEPS, TIGHT, models
from tests.engine.prefix_cache_test import STEMS
from tests.support.engine.oracle import FOREVER, naive

pytestmark = pytest.mark.long

__all__ = ["models"]  # a fixture

CONFIG = dataclasses.replace(
    TIGHT,
    enable_prefix_caching=True,
    preemption="swap",
    num_swap_blocks=8,  # too few for all: some sequences are recomputed
    policy="longest_prefix",
    max_prompt_chunk=5,
)
REQUESTS = st.tuples(
    st.integers(0, 1),  # stem
    st.integers(1, 21),  # tokens of it
    st.integers(0, 2),  # further tokens
    st.integers(0, 3),  # samples; 0 is greedy
    st.integers(1, 14),  # generated tokens
)


class Walk:
    """An engine, and the requests that it should finish."""

    def __init__(self, model, config=CONFIG) -> None:
        self.model, self.config = model, config
        self.state = engine.init(model, config)
        self.unfinished: dict[int, tuple[list[int], SamplingParams, list[int]]] = {}
        self.num_finished = 0

    def submit(self, stem: int, length: int, more: int, n: int, count: int) -> None:
        prompt = STEMS[stem][:length] + [more] * more
        params = SamplingParams(
            n=max(n, 1), temperature=float(n > 0), seed=length, max_tokens=count
        )
        if (
            sum(len(seq_indices) for *_, seq_indices in self.unfinished.values()) + 3
            > 60
        ):
            return
        arrival = self.num_arrived = getattr(self, "num_arrived", -1) + 1
        self.state, (seq_indices,) = engine.submit(
            self.state, [prompt], params, arrivals=[arrival]
        )
        self.unfinished[arrival] = (prompt, params, seq_indices)

    def run(self, steps: int) -> None:
        self.state = engine.run(self.model, self.state, STEPS(steps))

    def abort(self, number: int) -> None:
        if self.unfinished:
            arrival = sorted(self.unfinished)[number % len(self.unfinished)]
            *_, seq_indices = self.unfinished.pop(arrival)
            mask = self.mask(seq_indices)
            self.state = engine.end(self.state, mask, np.int32(request_table.ABORT))
            self.state = engine.release(self.state, mask)

    def reset(self) -> None:
        self.state = engine.reset_prefix_cache(self.state)

    def mask(self, seq_indices: list[int]) -> np.ndarray:
        mask = np.zeros((self.config.max_num_requests,), np.bool_)
        mask[seq_indices] = True
        return mask

    def check(self) -> None:
        assert engine.violations(self.state) == []
        assert not self.state.counters.is_stalled

    def finish(self) -> None:
        self.run(FOREVER)
        self.check()
        assert not engine.has_work(self.state)
        assert (
            block_manager.num_free_blocks(self.state.blocks) == self.config.num_blocks
        )
        # Blocks are free or cached, and the host pool is empty.
        assert int(self.state.host.blocks.ref_counts.sum()) == 0
        cached = prefix_cache.is_cached(self.state.prefix_cache)
        assert cached.sum() <= self.config.num_blocks
        got: dict[int, list[list[int]]] = {arrival: [] for arrival in self.unfinished}
        for result in engine.collect(self.state):
            got[result.arrival].append(result.token_ids)
        prompts = [prompt for prompt, *_ in self.unfinished.values()]
        params = [param for _, param, _ in self.unfinished.values()]
        if prompts:
            expected = naive(self.model, prompts, params, max_model_len=MAX_LEN)
            for tokens, want in zip(got.values(), expected, strict=True):
                assert tokens == [one.tokens for one in want]
        self.num_finished = len(prompts)


def walk_randomly(model, config=CONFIG, max_examples: int = 10) -> None:
    """Raise unless random walks leave the engine sound."""

    class Machine(stateful.RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.walk = Walk(model, config)

        @stateful.rule(request=REQUESTS)
        def submit(self, request) -> None:
            self.walk.submit(*request)

        @stateful.rule(steps=st.integers(1, 9))
        def run(self, steps: int) -> None:
            self.walk.run(steps)

        @stateful.rule(number=st.integers(0, 9))
        def abort(self, number: int) -> None:
            self.walk.abort(number)

        @stateful.rule()
        def reset(self) -> None:
            self.walk.reset()

        @stateful.invariant()
        def is_sound(self) -> None:
            self.walk.check()

        def teardown(self) -> None:
            self.walk.finish()

    stateful.run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max_examples, stateful_step_count=25, deadline=None
        ),
    )


def walk_with_all_events(model, config=CONFIG) -> None:
    """One walk that has all the events that a random walk may miss."""
    walk, rng = Walk(model, config), np.random.default_rng(1)
    for round_ in range(6):
        for _ in range(5):
            stem, more, n = rng.integers(0, (2, 3, 4)).tolist()
            length, count = rng.integers(1, (22, 15)).tolist()
            walk.submit(stem, length, more, n, count)
        for _ in range(8):
            walk.run(1)
            walk.check()
        if round_ == 3:
            walk.abort(2)
            walk.reset()
    walk.finish()
    assert walk.num_finished == 29
    counters = walk.state.counters
    assert counters.num_swap_outs > 0
    assert counters.num_preemptions > counters.num_swap_outs
    assert counters.num_cached_tokens > 0
    assert counters.num_block_copies > 0


@pytest.fixture(scope="module")
def llama(models):
    return models["llama"]


def test_random_walks_leave_the_engine_sound(llama):
    walk_randomly(llama)


def test_many_requests_in_the_smallest_pool_use_all_features(llama):
    walk_with_all_events(llama)
