"""The engine with a host pool: the same tokens, and swapped blocks are not recomputed.

A run with constant swapping is compared with one in a pool that holds all sequences,
and with a loop without a cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model, scheduler
from jpaged.config import Speculation
from jpaged.engine import snapshots
from jpaged.kv import block_manager
from jpaged.llm import LLM
from jpaged.models import Decoder
from jpaged.params import BeamSearchParams, SamplingParams
from tests.support.engine.configs import QUICKLY, OneSizeConfig
from tests.support.engine.oracle import FOREVER, differences, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

VOCABULARY = checkpoints.LLAMA["vocab_size"]
MAX_LEN = 40
# The smallest legal pool for a beam search of 3 rows at full length is 28 blocks.
HUGE = OneSizeConfig(
    num_blocks=400,
    block_size=4,
    max_num_seqs=6,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=12,
    max_num_requests=40,
    max_num_prefixes=1,
    max_beam_width=3,
)
TINY = dataclasses.replace(HUGE, num_blocks=30, watermark=0.0)
SWAPS = dataclasses.replace(TINY, preemption="swap", num_swap_blocks=200)
CONFIGS = {
    "swap": SWAPS,
    # The host pool holds only few sequences; the others are recomputed.
    "swap_and_recompute": dataclasses.replace(SWAPS, num_swap_blocks=9),
    # The cache evicts blocks for sequences that are swapped in, and shares its own.
    "swap_and_prefix_cache": dataclasses.replace(SWAPS, enable_prefix_caching=True),
}


@functools.partial(jax.jit, donate_argnames="state", compiler_options=QUICKLY)
def run(model, state, max_steps=FOREVER):
    return engine.run.__wrapped__(model, state, max_steps)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=1))


def requests():
    """Greedy requests, samples and beams, all up to max_model_len."""
    rng = np.random.default_rng(0)
    prompts, params = [], []
    for number in range(9):
        length = int(rng.integers(1, 14))
        prompts.append(rng.integers(0, VOCABULARY, length).tolist())
        ends = dict(max_tokens=MAX_LEN - length, ignore_eos=True)
        match number % 3:
            case 0:
                one = SamplingParams(temperature=0.0, **ends)
            case 1:
                one = SamplingParams(n=1 + number // 3, seed=number, **ends)
            case 2:
                one = BeamSearchParams(beam_width=3, **ends)
        params.append(one)
    return prompts, params


def start(model, config, prompts, params):
    state = engine.init(model, config)
    return engine.submit(state, prompts, params, vocab_size=VOCABULARY)


def outputs(state) -> list[tuple]:
    return [
        (result.arrival, result.sample, result.token_ids, result.finish_reason)
        for result in engine.collect(state)
    ]


def is_empty(state) -> bool:
    """Whether no block of either pool is in use, by counts and by tables."""
    assert engine.violations(state) == []
    pools = [state.blocks] + ([] if state.host is None else [state.host.blocks])
    return all(
        block_manager.violations(blocks) == []
        and not np.asarray(blocks.ref_counts).any()
        for blocks in pools
    )


@pytest.fixture(scope="module")
def expected(model):
    state, _ = start(model, HUGE, *requests())
    state = run(model, state)
    assert int(state.counters.num_preemptions) == 0
    return outputs(state)


@pytest.fixture(scope="module")
def ends(model):
    """The idle engines after the same requests, one for each config."""
    found = {}
    for name, config in CONFIGS.items():
        state, _ = start(model, config, *requests())
        found[name] = run(model, state)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_those_of_a_pool_that_holds_all_sequences(name, ends, expected):
    state = ends[name]
    assert not bool(state.counters.is_stalled)
    assert outputs(state) == expected
    assert is_empty(state)
    assert int(state.counters.num_swap_outs) > 3
    assert int(state.counters.num_swapped_blocks) > 9


def test_swapped_tokens_are_not_recomputed(model, ends):
    counters = jax.device_get({name: end.counters for name, end in ends.items()})
    swap, mixed = counters["swap"], counters["swap_and_recompute"]
    assert swap.num_swap_outs == swap.num_preemptions
    assert 0 < mixed.num_swap_outs < mixed.num_preemptions
    state, _ = start(model, HUGE, *requests())
    once = run(model, state).counters.num_tokens
    # Except for samples whose source was swapped: they compute their prompts.
    assert swap.num_tokens - once < 20
    assert mixed.num_tokens - once > 20


def test_greedy_and_sampled_tokens_equal_a_loop_without_a_cache(model):
    prompts, params = requests()
    kept = [i for i, one in enumerate(params) if isinstance(one, SamplingParams)]
    prompts, params = ([some[i] for i in kept] * 2 for some in (prompts, params))
    state, _ = start(model, SWAPS, prompts, params)
    state = run(model, state)
    results = [[] for _ in prompts]
    for result in engine.collect(state):
        results[result.arrival].append(result)
    expected = naive(model, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []
    assert int(state.counters.num_swap_outs) > 5
    assert is_empty(state)


def run_until_swapped(model, config):
    state, seq_indices = start(model, config, *requests())
    for _ in range(500):
        state = run(model, state, 1)
        swapped = np.flatnonzero(
            np.asarray(state.requests.queue.status) == scheduler.SWAPPED
        )
        if len(swapped) and int((np.asarray(state.host.blocks.ref_counts) > 1).sum()):
            return state, seq_indices, swapped
    raise AssertionError("no sequence was swapped with shared blocks")


def test_shared_blocks_stay_shared_in_the_host_pool(model):
    state, _, swapped = run_until_swapped(model, SWAPS)
    host = jax.device_get(state.host.blocks)
    assert engine.violations(state) == []
    assert (host.context_lens[swapped] > 0).any()
    held = np.asarray(-(-host.context_lens // 4)).sum()
    assert (host.ref_counts > 0).sum() < held
    assert state.host.cache.k_pages.sharding.memory_kind == "pinned_host"


def test_ending_a_swapped_request_frees_its_blocks_in_the_host_pool(model, expected):
    state, seq_indices, swapped = run_until_swapped(model, SWAPS)
    ended = next(mine for mine in seq_indices if set(mine) & set(swapped.tolist()))
    mask = np.zeros(SWAPS.max_num_requests, bool)
    mask[ended] = True
    before = int((np.asarray(state.host.blocks.ref_counts) > 0).sum())
    state = engine.end(state, mask, np.int32(3))
    assert block_manager.violations(state.host.blocks) == []
    assert int((np.asarray(state.host.blocks.ref_counts) > 0).sum()) < before
    state = run(model, state)
    assert not engine.has_work(state)
    assert is_empty(state)
    arrival = seq_indices.index(ended)
    assert [one for one in outputs(state) if one[0] != arrival] == [
        one for one in expected if one[0] != arrival
    ]


def test_snapshots_have_the_host_pool(model, expected, tmp_path):
    state, _, _ = run_until_swapped(model, SWAPS)
    snapshots.save(tmp_path / "here", state)
    for config in (SWAPS, TINY):  # TINY has no host pool: all sequences are recomputed
        other = snapshots.load(tmp_path / "here", model, config)
        assert engine.violations(other) == []
        if config == SWAPS:
            kind = other.host.cache.k_pages.sharding.memory_kind
            assert kind == "pinned_host"
        assert outputs(run(model, other)) == expected


def test_violations_in_the_host_pool_are_reported(model):
    state, _, swapped = run_until_swapped(model, SWAPS)
    host, queue = state.host, state.requests.queue
    blocks = dataclasses.replace(
        host.blocks, ref_counts=host.blocks.ref_counts.at[0].add(1)
    )
    leaked = dataclasses.replace(host, blocks=blocks)
    assert (
        "host pool: block 0"
        in engine.violations(dataclasses.replace(state, host=leaked))[0]
    )
    queue = dataclasses.replace(
        queue, status=queue.status.at[int(swapped[0])].set(scheduler.WAITING)
    )
    table = dataclasses.replace(state.requests, queue=queue)
    (one,) = engine.violations(dataclasses.replace(state, requests=table))
    assert f"sequence {swapped[0]}: has blocks in the host pool" in one


def test_no_request_is_admitted_while_another_is_swapped(model):
    state, _, _ = run_until_swapped(model, SWAPS)
    before = np.asarray(state.requests.queue.status)
    for _ in range(20):
        waiting = before == scheduler.WAITING
        was_swapped = (before == scheduler.SWAPPED).any()
        state = run(model, state, 1)
        after = np.asarray(state.requests.queue.status)
        if was_swapped:
            assert not (waiting & (after == scheduler.RUNNING)).any()
        before = after


def test_swapping_with_a_pinned_prefix_and_a_draft_model(model, tmp_path):
    draft = load_model(
        checkpoints.write_tiny_llama(tmp_path / "draft", num_hidden_layers=1)
    )
    pair = engine.DraftedModel(model, draft)
    prefix = list(range(9))
    prompts, params = requests()
    prompts = [prefix + prompt for prompt in prompts if len(prompt) < 20][:4]
    ends = dict(max_tokens=18, ignore_eos=True)
    params = [SamplingParams(temperature=0.0, **ends) for _ in prompts]
    found = []
    for blocks, swaps in ((400, 0), (19, 60)):
        config = dataclasses.replace(
            HUGE,
            num_blocks=blocks,
            max_beam_width=0,
            preemption="swap" if swaps else "recompute",
            num_swap_blocks=swaps,
            speculation=Speculation("model", num_tokens=2),
        )
        state = engine.init(pair, config)
        state, seq_index = engine.pin(state, prefix)
        state, _ = engine.submit(state, prompts, params, vocab_size=VOCABULARY)
        state = run(pair, state)
        assert not engine.has_work(state)
        state = engine.unpin(state, [seq_index])
        assert is_empty(state)
        found.append((outputs(state), jax.device_get(state.counters)))
    (expected, _), (tokens, counters) = found
    assert tokens == expected
    assert counters.num_swap_outs > 0
    # Both models are equal: if the draft model's pages were not swapped, some drafts
    # would be rejected.
    assert counters.num_accepted == counters.num_drafts > 20


def test_an_llm_swaps_and_counts_also_after_a_larger_program_is_compiled(model):
    llm = LLM(
        model,
        num_blocks=12,
        block_size=4,
        max_num_seqs=HUGE.max_num_seqs,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=HUGE.max_num_batched_tokens,
        max_num_prefixes=0,
        preemption="swap",
        num_swap_blocks=40,
    )
    prompts = [list(range(i, i + 9)) for i in range(5)]
    params = [SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)] * 5
    expected = [
        one[0].tokens for one in naive(model, prompts, params, max_model_len=40)
    ]
    with llm:
        for one in (params[0], dataclasses.replace(params[0], logprobs=1)):
            before = llm.stats()["num_swapped_blocks"]
            outputs = llm.generate(prompts, one, progress=False)
            assert [one.outputs[0].token_ids for one in outputs] == expected
            assert llm.stats()["num_swapped_blocks"] > before
            assert sum(one.metrics["num_preemptions"] for one in outputs) > 0
        assert llm.stats()["num_compilations"] >= 2
        assert llm.stats()["num_free_blocks"] == 12


WRONG = {
    "num_swap_blocks: expected at least 1 with preemption='swap', got 0": dict(
        preemption="swap"
    ),
    "num_swap_blocks: expected 0 with preemption='recompute', got 3": dict(
        num_swap_blocks=3
    ),
    "preemption: expected one of .*, got 'drop'": dict(preemption="drop"),
    "num_swap_blocks: expected an integer of at least 0, got -1": dict(
        preemption="swap", num_swap_blocks=-1
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_invalid_swap_config_raises(message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HUGE, **WRONG[message])


def test_the_compiled_run_copies_neither_pool(model):
    config = dataclasses.replace(
        SWAPS, num_blocks=20_000, num_swap_blocks=40_000, max_beam_width=0
    )
    state = engine.init(model, config)
    compiled = engine.run.lower(model, state, jnp.int32(1)).compile()
    memory = compiled.memory_analysis()
    pools = (state.cache, state.host.cache)
    device, host = (
        sum(pages.nbytes for pages in jax.tree.leaves(cache)) for cache in pools
    )
    assert memory.alias_size_in_bytes > device + host
    # Some numbers per block, and not the pages of one array.
    assert memory.temp_size_in_bytes < device / 4
