"""The engine with a host's pool: the same tokens, and nothing is computed twice.

A run under constant swapping is compared with one in a pool that holds everything, and
with a loop that knows no cache at all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model, scheduler
from jpaged.config import EngineConfig, Speculation
from jpaged.engine import snapshots
from jpaged.kv import block_manager
from jpaged.llm import LLM
from jpaged.models import Decoder
from jpaged.params import BeamSearchParams, SamplingParams
from tests.support.engine.oracle import FOREVER, differences, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

VOCABULARY = checkpoints.LLAMA["vocab_size"]
MAX_LEN = 40
# The smallest legal pool for a beam search of 3 rows at full length is 28 blocks.
HUGE = EngineConfig(
    num_blocks=400,
    block_size=4,
    max_num_seqs=6,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=12,
    max_num_requests=40,
    max_num_prefixes=1,
    max_beam_width=3,
)
QUICKLY = {"xla_backend_optimization_level": 0}  # a program for every config
TINY = dataclasses.replace(HUGE, num_blocks=30, watermark=0.0)
SWAPS = dataclasses.replace(TINY, preemption="swap", num_swap_blocks=200)
CONFIGS = {
    "swap": SWAPS,
    # Few at a time find room there, the others are computed again.
    "swap_and_recompute": dataclasses.replace(SWAPS, num_swap_blocks=9),
    # Who comes back takes blocks that the cache has to give up, and shares what it has.
    "swap_and_prefix_cache": dataclasses.replace(SWAPS, enable_prefix_caching=True),
}


@functools.partial(jax.jit, donate_argnames="state", compiler_options=QUICKLY)
def run(model, state, max_steps=FOREVER):
    return engine.run.__wrapped__(model, state, max_steps)


@pytest.fixture(autouse=True, scope="module")
def _few_shapes():
    """One decode shape and one prompt shape, so that the engines compile quickly."""
    patch = pytest.MonkeyPatch()
    patch.setattr(EngineConfig, "row_buckets", (HUGE.max_num_seqs,))
    patch.setattr(EngineConfig, "token_buckets", (HUGE.max_num_batched_tokens,))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=1))


def requests():
    """Greedy ones, samples and beams, all at the longest that the tables hold."""
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
    """Nothing leaked: nobody uses a block of either pool, counted by the tables too."""
    assert engine.violations(state) == []
    pools = [state.blocks] + ([] if state.host is None else [state.host.blocks])
    return all(
        block_manager.violations(blocks) == []
        and not np.asarray(blocks.ref_counts).any()
        for blocks in pools
    )


@pytest.fixture(scope="module")
def wanted(model):
    state, _ = start(model, HUGE, *requests())
    state = run(model, state)
    assert int(state.counters.num_preemptions) == 0
    return outputs(state)


@pytest.fixture(scope="module")
def ends(model):
    """The idle engines after the same requests, in each of the configs."""
    found = {}
    for name, config in CONFIGS.items():
        state, _ = start(model, config, *requests())
        found[name] = run(model, state)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_a_pool_that_holds_everything(name, ends, wanted):
    state = ends[name]
    assert not bool(state.counters.is_stalled)
    assert outputs(state) == wanted
    assert is_empty(state)
    assert int(state.counters.num_swap_outs) > 3
    assert int(state.counters.num_swapped_blocks) > 9


def test_what_is_swapped_is_not_computed_again(model, ends):
    counters = jax.device_get({name: end.counters for name, end in ends.items()})
    swap, mixed = counters["swap"], counters["swap_and_recompute"]
    assert swap.num_swap_outs == swap.num_preemptions
    assert 0 < mixed.num_swap_outs < mixed.num_preemptions
    state, _ = start(model, HUGE, *requests())
    once = run(model, state).counters.num_tokens
    # But for samples whose source was away: they computed their prompts themselves.
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
    wanted = naive(model, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, wanted) == []
    assert int(state.counters.num_swap_outs) > 5
    assert is_empty(state)


def run_until_swapped(model, config):
    state, seq_indices = start(model, config, *requests())
    for _ in range(500):
        state = run(model, state, 1)
        away = np.flatnonzero(
            np.asarray(state.requests.queue.status) == scheduler.SWAPPED
        )
        if len(away) and int((np.asarray(state.host.blocks.ref_counts) > 1).sum()):
            return state, seq_indices, away
    raise AssertionError("nobody was swapped with shared blocks")


def test_blocks_that_sequences_share_are_shared_on_the_host(model):
    state, _, away = run_until_swapped(model, SWAPS)
    host = jax.device_get(state.host.blocks)
    assert engine.violations(state) == []
    assert (host.context_lens[away] > 0).any()
    held = np.asarray(-(-host.context_lens // 4)).sum()
    assert (host.ref_counts > 0).sum() < held
    assert state.host.cache.k_pages.sharding.memory_kind == "pinned_host"


def test_who_is_ended_while_swapped_leaves_the_hosts_pool(model, wanted):
    state, seq_indices, away = run_until_swapped(model, SWAPS)
    gone = next(mine for mine in seq_indices if set(mine) & set(away.tolist()))
    mask = np.zeros(SWAPS.max_num_requests, bool)
    mask[gone] = True
    before = int((np.asarray(state.host.blocks.ref_counts) > 0).sum())
    state = engine.end(state, mask, np.int32(3))
    assert block_manager.violations(state.host.blocks) == []
    assert int((np.asarray(state.host.blocks.ref_counts) > 0).sum()) < before
    state = run(model, state)
    assert not engine.has_work(state)
    assert is_empty(state)
    arrival = seq_indices.index(gone)
    assert [one for one in outputs(state) if one[0] != arrival] == [
        one for one in wanted if one[0] != arrival
    ]


def test_what_is_on_the_host_is_in_a_snapshot(model, wanted, tmp_path):
    state, _, _ = run_until_swapped(model, SWAPS)
    snapshots.save(tmp_path / "here", state)
    for config in (SWAPS, TINY):  # which has no host: everything is computed again
        other = snapshots.load(tmp_path / "here", model, config)
        assert engine.violations(other) == []
        if config == SWAPS:
            kind = other.host.cache.k_pages.sharding.memory_kind
            assert kind == "pinned_host"
        assert outputs(run(model, other)) == wanted


def test_faults_in_the_hosts_pool_are_reported(model):
    state, _, away = run_until_swapped(model, SWAPS)
    host, queue = state.host, state.requests.queue
    blocks = dataclasses.replace(
        host.blocks, ref_counts=host.blocks.ref_counts.at[0].add(1)
    )
    leaked = dataclasses.replace(host, blocks=blocks)
    assert (
        "host: block 0" in engine.violations(dataclasses.replace(state, host=leaked))[0]
    )
    queue = dataclasses.replace(
        queue, status=queue.status.at[int(away[0])].set(scheduler.WAITING)
    )
    table = dataclasses.replace(state.requests, queue=queue)
    (one,) = engine.violations(dataclasses.replace(state, requests=table))
    assert f"place {away[0]}: has blocks on the host" in one


def test_nobody_is_admitted_while_somebody_is_swapped(model):
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


def test_prefixes_are_pinned_and_the_drafts_pages_travel_too(model, tmp_path):
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
    (wanted, _), (tokens, counters) = found
    assert tokens == wanted
    assert counters.num_swap_outs > 0
    # The two models are one: had its pages stayed behind, it would guess otherwise.
    assert counters.num_accepted == counters.num_drafts > 20


def test_an_llm_swaps_and_counts_and_goes_on_after_it_was_compiled_anew(model):
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
    wanted = [one[0].tokens for one in naive(model, prompts, params, max_model_len=40)]
    with llm:
        for one in (params[0], dataclasses.replace(params[0], logprobs=1)):
            before = llm.stats()["num_swapped_blocks"]
            outputs = llm.generate(prompts, one, progress=False)
            assert [one.outputs[0].token_ids for one in outputs] == wanted
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
def test_a_config_that_cannot_swap_is_refused(message):
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
    # A few numbers for each block, and not the pages of one array.
    assert memory.temp_size_in_bytes < device / 4
