"""What rows have observed: each query counts once, for its own request.

Blocks are never dropped here, so the attention that a row's blocks have got in total is
the number of its queries: every query's weights add up to one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import SamplingParams, engine, retention
from tests.support.engine.configs import QUICKLY, OneSizeConfig
from tests.support.tiny_llm import MAX_LEN, decoder, folder, random_prompts

__all__ = ["decoder", "folder"]
pytestmark = pytest.mark.long

CONFIG = dict(
    num_blocks=64,
    block_size=4,
    max_num_seqs=2,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=16,
    max_num_requests=8,
    max_num_stop_ids=32,
    enable_prefix_caching=True,
)
ALL = float(MAX_LEN)
run_engine = jax.jit(
    engine.run.__wrapped__, donate_argnames="state", compiler_options=QUICKLY
)


def steps_of(model, state):
    """The state after each step until nothing is left to do."""
    while engine.has_work(state):
        state = run_engine(model, state, jnp.int32(1))
        assert engine.violations(state) == []
        yield state


def observed_by(state, rows):
    """(computed tokens, total attention) of the rows."""
    drops = state.blocks.drops
    computed = np.asarray(state.blocks.context_lens + drops.dropped)
    total = np.asarray(drops.statistic).sum(axis=1)
    return [(int(computed[row]), float(total[row])) for row in rows]


def run_three_samples(decoder, method, seed):
    """Of three samples two run; the third starts while the first still runs.

    Returns what rows have observed after each step, and the samples' results.
    """
    config = OneSizeConfig(**CONFIG, retention=method)
    prompt = random_prompts(1, seed=5, longest=60)[0][:19]
    params = SamplingParams(
        n=3,
        seed=seed,
        max_tokens=30,
        stop_token_ids=range(0, 300, 10),
        ignore_eos=True,
    )
    start, _ = engine.submit(engine.init(decoder, config), [prompt], params)
    state, seen = start, []
    for state in steps_of(decoder, start):
        rows = np.flatnonzero(np.asarray(state.blocks.context_lens))
        if method.statistic is not None:
            seen += observed_by(state, rows)
    first, second, third = engine.collect(state)
    assert second.last_step < first.last_step
    assert second.last_step < third.first_step < first.last_step
    return seen, second, third


def test_samples_count_no_query_of_another_sample_and_none_twice(decoder):
    method = retention.heavy_hitters(max_tokens=ALL, every=ALL)
    seen, _, third = run_three_samples(decoder, method, seed=10)
    assert len(seen) > 30
    for computed, total in seen:
        assert total == pytest.approx(computed, rel=1e-4)
    assert third.num_dropped_tokens == 0


def test_a_source_that_has_dropped_blocks_is_no_source(decoder):
    method = retention.sink_and_window(num_sinks=4, window=8, every=0)
    _, second, third = run_three_samples(decoder, method, seed=8)
    # It maps the prompt from the prefix cache at once.
    assert third.first_step == second.last_step + 1
    assert third.num_dropped_tokens == 4


def test_queries_of_the_request_that_a_prefix_comes_from_do_not_count(decoder):
    number = 5
    method = retention.snapkv(max_tokens=ALL, queries=number, every=0)
    config = OneSizeConfig(**CONFIG, retention=method)
    shared = random_prompts(1, seed=6, longest=60)[0][:24]
    assert len(shared) == 24
    prompts = [shared, [*shared, 7, 8]]  # the second maps what the first computes
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    start, _ = engine.submit(engine.init(decoder, config), prompts, params)
    state, totals = start, {}
    for state in steps_of(decoder, start):
        for row, (computed, total) in enumerate(observed_by(state, range(2))):
            if computed and computed == len(prompts[row]):
                totals[row] = total
    assert int(state.counters.num_cached_tokens) > 0
    assert totals == {row: pytest.approx(number, rel=1e-4) for row in range(2)}
