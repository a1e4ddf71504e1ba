"""The engine with a prefix cache: the same tokens from fewer computed ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, scheduler
from jpaged.engine import sharing
from jpaged.kv import block_manager, prefix_cache
from jpaged.params import SamplingParams
from tests.engine.engine_test import MAX_LEN, ROOMY, STEPS, TIGHT, VOCABULARY, models
from tests.support.engine.oracle import FOREVER, differences, generate, naive

pytestmark = pytest.mark.long

__all__ = ["models"]  # a fixture

# Two stems only, so that most prompts share a prefix with another one.
_RNG = np.random.default_rng(5)
STEMS = [_RNG.integers(0, VOCABULARY, 21).tolist() for _ in range(2)]
PROMPTS = [
    STEMS[number % 2][: 21 - number % 7] + _RNG.integers(0, 3, number % 4).tolist()
    for number in range(14)
] + [STEMS[0][:8], STEMS[0][:16], STEMS[1][:16]]
PARAMS = [
    SamplingParams(
        n=1 + number % 3 * (number % 2),
        temperature=0.7 * (number % 2),
        seed=number,
        max_tokens=3 + number % 9,
        priority=-number % 5,
    )
    for number in range(len(PROMPTS))
]
CACHED, CACHED_TIGHT = (
    dataclasses.replace(
        config, enable_prefix_caching=True, prompt_logprobs=True, num_logprobs=1
    )
    for config in (ROOMY, TIGHT)
)
SHORT = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(models):
    return models["llama"]


@pytest.fixture(scope="module")
def expected(llama):
    return naive(llama, PROMPTS, PARAMS, max_model_len=MAX_LEN)


@pytest.mark.parametrize("config", [CACHED, CACHED_TIGHT], ids=["roomy", "tight"])
def test_tokens_are_those_of_a_loop_that_recomputes_everything(llama, expected, config):
    state, results = generate(llama, config, PROMPTS, PARAMS)
    assert differences(state, results, expected) == []
    assert engine.violations(state) == []
    assert 0 < state.counters.num_cached_tokens < state.counters.num_prompt_tokens
    assert state.counters.num_prompt_tokens == sum(map(len, PROMPTS))

    # The same requests in reverse order find more: all blocks that are not evicted.
    cold = int(state.counters.num_cached_tokens)
    seq_indices = np.ones((config.max_num_requests,), np.bool_)
    state = engine.release(state, seq_indices)
    order = list(range(len(PROMPTS)))[::-1]
    state, _ = engine.submit(
        state, [PROMPTS[i] for i in order], [PARAMS[i] for i in order]
    )
    state = engine.run(llama, state, STEPS(FOREVER))
    again = [[] for _ in PROMPTS]
    for result in engine.collect(state):
        again[order[result.arrival]].append(result)
    assert differences(state, again, expected) == []
    assert engine.violations(state) == []
    if config is CACHED:
        assert int(state.counters.num_cached_tokens) - cold > cold


def test_tables_and_cache_are_sound_after_every_step_of_a_tight_pool(llama, expected):
    step = jax.jit(engine.step, donate_argnums=1)
    state = engine.init(llama, CACHED_TIGHT)
    state, _ = engine.submit(state, PROMPTS, PARAMS)
    while engine.has_work(state):
        state = step(llama, state)
        assert engine.violations(state) == []
    assert state.counters.num_preemptions > 0
    results = [[] for _ in PROMPTS]
    for result in engine.collect(state):
        results[result.arrival].append(result)
    assert differences(state, results, expected) == []


def computed(llama, config, prompts, params=SHORT, state=None):
    """Run the prompts; return the idle engine and the number of computed tokens."""
    state = engine.init(llama, config) if state is None else state
    before = int(state.counters.num_tokens)
    state, _ = engine.submit(state, prompts, params)
    state = engine.run(llama, state, STEPS(FOREVER))
    state = engine.release(state, np.ones((config.max_num_requests,), np.bool_))
    return state, int(state.counters.num_tokens) - before


def test_requests_that_are_admitted_together_compute_their_common_prompt_once(llama):
    prompt = STEMS[0]
    _, number = computed(llama, CACHED, [prompt[:5]] * 4)
    # The common prompt once; for each its last token and one decode step.
    assert number == 4 + 4 * 2
    apart = [[*prompt[:5], 1], [*prompt[:5], 2], [*prompt[:4], 3]]
    _, number = computed(llama, CACHED, apart)
    # The second maps five tokens of the first: one block and a part of another.
    assert number == (6 + 1) + (1 + 1) + (1 + 1)


def test_a_later_request_computes_only_the_tokens_after_its_cached_blocks(llama):
    prompt = STEMS[0][:18]
    state, number = computed(llama, CACHED, [prompt])
    assert number == 18 + 1
    # 16 tokens are four whole blocks, but a prompt's last token is always computed.
    for length, hit in ((18, 16), (17, 16), (16, 12), (4, 0)):
        before = int(state.counters.num_cached_tokens)
        state, number = computed(llama, CACHED, [prompt[:length]], state=state)
        assert number == length - hit + 1
        assert int(state.counters.num_cached_tokens) - before == hit
    state, number = computed(
        llama, CACHED, [prompt], state=engine.reset_prefix_cache(state)
    )
    assert number == 18 + 1


def test_generated_tokens_are_found_by_a_prompt_that_continues_them(llama):
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    state = engine.init(llama, CACHED)
    state, _ = engine.submit(state, [STEMS[0][:6]], params)
    state = engine.run(llama, state, STEPS(FOREVER))
    (result,) = engine.collect(state)
    state = engine.release(state, np.ones((CACHED.max_num_requests,), np.bool_))
    longer = [*result.prompt_token_ids, *result.token_ids, 1, 2, 3]
    # The last of 14 tokens was never computed: 13 tokens are three blocks and a part.
    _, number = computed(llama, CACHED, [longer], state=state)
    assert number == len(longer) - 12 + 1


def test_a_full_pool_keeps_the_most_recently_used_blocks(llama):
    first, second, third = ([number] * 16 for number in (1, 2, 3))
    # 12 blocks: each prompt with its output needs five, four of which are full.
    state, _ = computed(llama, CACHED_TIGHT, [first])
    state, _ = computed(llama, CACHED_TIGHT, [second], state=state)
    state, _ = computed(llama, CACHED_TIGHT, [first], state=state)
    state, _ = computed(llama, CACHED_TIGHT, [third], state=state)
    known = np.asarray(
        prefix_cache.match(
            state.prefix_cache, jnp.array([first, second, third]), jnp.full(3, 16)
        )[1]
    )
    assert known[[0, 2]].tolist() == [16, 16]
    assert known[1] < 16


def test_a_prompt_with_logprobs_is_computed_completely(llama):
    with_logprobs = dataclasses.replace(SHORT, prompt_logprobs=1)
    prompt = STEMS[0][:18]
    state, _ = computed(llama, CACHED, [prompt])
    _, number = computed(llama, CACHED, [prompt], with_logprobs, state=state)
    assert number == 18 + 1


def test_a_request_does_not_wait_for_a_source_that_was_aborted(llama):
    """The first of two equal prompts is aborted while the second waits for it."""
    prompt = STEMS[0][:12]
    state = engine.init(llama, CACHED)
    state, (first, second) = engine.submit(state, [prompt, prompt], SHORT)
    state = engine.run(llama, state, STEPS(1))
    sources = state.requests.queue.sources
    assert int(sources[second[0]]) == first[0]
    mask = np.zeros((CACHED.max_num_requests,), np.bool_)
    mask[first] = True
    state = engine.end(state, mask, np.int32(3))
    state = engine.run(llama, state, STEPS(FOREVER))
    assert int(state.requests.queue.status[second[0]]) == scheduler.FINISHED
    (want,) = naive(llama, [prompt], [SHORT], max_model_len=MAX_LEN)
    got = next(r for r in engine.collect(state) if r.seq_index == second[0])
    assert got.token_ids == want[0].tokens


def test_a_row_truncated_into_a_cached_block_overwrites_no_block_that_stays_cached():
    blocks = block_manager.init_state(
        num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=4
    )
    blocks, _ = block_manager.append(blocks, jnp.array([8, 0]))
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    cache = prefix_cache.init_prefix_cache(8, 4)
    cache, blocks = prefix_cache.insert(cache, blocks, tokens, 0)

    # The only owner writes in place, and the cache forgets this block only.
    alone = block_manager.truncate(blocks, jnp.array([6, 0]))
    left, after, appended = sharing.append_tokens(cache, alone, jnp.array([1, 0]))
    assert appended.copy_dst.tolist() == [-1, -1]
    assert after.block_tables[0].tolist() == [0, 1, -1, -1]
    assert np.flatnonzero(prefix_cache.is_cached(left)).tolist() == [0]

    # With another owner, the row gets a copy, and the block stays cached.
    shared = block_manager.fork(blocks, jnp.array([0, 0]))
    shared = block_manager.truncate(shared, jnp.array([6, 8]))
    left, after, appended = sharing.append_tokens(cache, shared, jnp.array([1, 0]))
    assert appended.copy_src.tolist() == [1, -1]
    assert after.block_tables[0].tolist() == [0, 2, -1, -1]
    assert np.flatnonzero(prefix_cache.is_cached(left)).tolist() == [0, 1]
