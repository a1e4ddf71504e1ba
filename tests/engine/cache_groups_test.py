"""Cache groups: layers with a window give blocks back, and no token changes.

Small models of families with windows run with groups, in pools that are too small for
one table, and their tokens are those of a loop that recomputes everything.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.config import EngineConfig, Speculation
from jpaged.engine import snapshots
from jpaged.kv import block_manager, cache_groups
from jpaged.params import SamplingParams
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload
from tests.engine.engine_test import STEPS
from tests.engine.walk_test import CONFIG as WALK
from tests.engine.walk_test import walk_randomly, walk_with_all_events
from tests.models.families_test import write_case
from tests.simulator.simulator_test import HALF
from tests.support.engine.configs import QUICKLY, OneSizeConfig
from tests.support.engine.oracle import FOREVER, differences, generate, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

MAX_LEN, WINDOW, SIZE = 64, 8, 4
BASE = OneSizeConfig(
    num_blocks=64,
    block_size=SIZE,
    max_num_seqs=3,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=8,
    max_num_requests=16,
)
# Llamas with windows: the layers without one.
WINDOWS = {"all_windows": (), "three_groups": (1,)}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Function that returns a model: a family's case, or a Llama with windows."""
    root, loaded = tmp_path_factory.mktemp("models"), {}

    def load_named(name):
        if name not in loaded:
            if name in WINDOWS:
                folder = checkpoints.write_tiny_llama(root / name, num_hidden_layers=3)
                model = load_model(folder)
                model.config = dataclasses.replace(
                    model.config, sliding_window=WINDOW, full_layers=WINDOWS[name]
                )
            else:
                model = load_model(write_case(root / name, name))
            loaded[name] = model
        return loaded[name]

    return load_named


def grouped(model, **changes):
    """The config with the model's groups."""
    found = cache_groups.layer_groups(model.config.windows, MAX_LEN).windows
    return dataclasses.replace(BASE, group_windows=found, **changes)


def requests(model, count=6):
    rng = np.random.default_rng(count)
    prompts = [
        rng.integers(0, model.config.vocab_size, n).tolist()
        for n in rng.integers(1, 40, count)
    ]
    params = [
        SamplingParams(n=1 + i % 2 * 2, temperature=float(i % 2), seed=i, max_tokens=20)
        for i in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["all_windows", "gemma2", "gemma3", "gpt_oss"])
def test_tokens_are_those_of_a_loop_in_the_smallest_pool(load, name, cached):
    model = load(name)
    config = grouped(model)
    assert set(config.group_windows) == (
        {WINDOW} if name == "all_windows" else {None, WINDOW}
    )
    # The longest sequence fits and no further block.
    least = cache_groups.blocks_of_length(
        config.group_windows, SIZE, 60, config.largest_chunk
    )
    config = dataclasses.replace(config, num_blocks=least, enable_prefix_caching=cached)
    prompts, params = requests(model)
    expected = naive(model, prompts, params, max_model_len=MAX_LEN)
    state, results = generate(model, config, prompts, params)
    assert differences(state, results, expected) == []
    assert int(state.counters.num_preemptions) > 0


def test_layers_of_a_draft_model_are_divided_over_the_groups(load):
    target = load("three_groups")
    # One layer of the draft sees everything, and two see 6 tokens.
    rough = jax.tree.map(
        lambda w: w + 0.004 * jnp.sin(1000 * w).astype(w.dtype), target
    )
    rough.config = dataclasses.replace(
        target.config, sliding_window=WINDOW - 2, full_layers=(0,)
    )
    drafts = Speculation("model", num_tokens=2)
    config = grouped(target, speculation=drafts, num_blocks=3 * 64)
    assert config.group_windows == (None, WINDOW, WINDOW)
    placed = cache_groups.groups_of_layers(
        rough.config.windows, config.group_windows, MAX_LEN
    )
    assert (placed.num_layers, sorted(placed.groups)) == (1, [0, 1, 2])
    least = cache_groups.blocks_of_length(
        config.group_windows, SIZE, 60, config.largest_chunk
    )
    prompts, params = requests(target)
    expected = naive(target, prompts, params, max_model_len=MAX_LEN)
    model, counters = engine.DraftedModel(target, rough), []
    run = jax.jit(
        engine.run.__wrapped__, donate_argnames="state", compiler_options=QUICKLY
    )
    for one in (
        dataclasses.replace(config, group_windows=(None,), num_blocks=64),
        config,
        dataclasses.replace(config, num_blocks=least, enable_prefix_caching=True),
    ):
        state, results = generate(model, one, prompts, params, run=run)
        assert differences(state, results, expected) == []
        counters.append(jax.device_get(state.counters))
    one_table, groups, tight = counters
    # The draft reads the same, so the target agrees with it as often.
    assert groups.num_drafts == one_table.num_drafts
    assert 0 < groups.num_accepted == one_table.num_accepted < groups.num_drafts
    assert tight.num_preemptions > 0
    # A layer that sees everything has no place if all groups have windows.
    config = dataclasses.replace(config, group_windows=(WINDOW,))
    model = engine.DraftedModel(load("all_windows"), rough)
    with pytest.raises(ValueError, match="see more tokens than a group"):
        engine.init(model, config)


def walk_config(model):
    """A pool for one sequence of the greatest length, and too small a host pool."""
    found = cache_groups.layer_groups(model.config.windows, WALK.max_model_len).windows
    config = dataclasses.replace(WALK, group_windows=found)
    least = cache_groups.blocks_of_length(
        found, WALK.block_size, WALK.max_model_len, config.largest_chunk
    )
    return dataclasses.replace(config, num_blocks=least, num_swap_blocks=2 * least // 3)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_walk_with_all_events(load, name):
    model = load(name)
    walk_with_all_events(model, walk_config(model))


def test_random_walks_leave_the_groups_sound(load):
    model = load("three_groups")
    walk_randomly(model, walk_config(model), max_examples=3)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_row_far_beyond_its_window_keeps_a_constant_number_of_blocks(load, name):
    model = load(name)
    config, counts = grouped(model, max_num_seqs=1, max_num_batched_tokens=4), []
    state, _ = engine.submit(
        engine.init(model, config), [[1, 2]], SamplingParams(max_tokens=60, seed=1)
    )
    while engine.has_work(state):
        state = engine.run(model, state, STEPS(1))
        counts.append(cache_groups.num_stored_blocks(state.blocks)[:, 0].tolist())
        assert engine.violations(state) == []
    # Three blocks of 4 tokens at most hold the 7 tokens before the next one.
    for window, blocks in zip(config.group_windows, np.transpose(counts), strict=True):
        assert max(blocks) == (3 if window else 15)  # the last step frees the row
        assert set(blocks[20:-1].tolist()) <= ({2, 3} if window else set(range(5, 16)))
    assert int(state.counters.max_used_blocks) == sum(
        3 if window else 16 for window in config.group_windows
    )
    assert int(state.counters.single_table_blocks) == 16 * len(config.group_windows)


def one_token_early(release, state, held):
    longer = dataclasses.replace(state, context_lens=state.context_lens + 1)
    return dataclasses.replace(release(longer, held), context_lens=state.context_lens)


@pytest.mark.parametrize("name", WINDOWS)
def test_faults_are_found(load, name, monkeypatch):
    model = load(name)
    config, found = grouped(model, max_num_seqs=1), []
    release = cache_groups.release_front
    monkeypatch.setattr(
        cache_groups, "release_front", functools.partial(one_token_early, release)
    )
    prompt = list(range(7))
    with jax.disable_jit():
        blocks = engine.init(model, config).blocks
        for _ in range(12):
            blocks = cache_groups.release_front(blocks, jnp.zeros((1,), jnp.bool_))
            found += block_manager.violations(blocks)
            blocks, _ = block_manager.append(blocks, jnp.array([1]))
    assert any("inside the window have no block" in one for one in found)
    params = SamplingParams(temperature=0, max_tokens=30)
    state, _ = engine.submit(engine.init(model, config), [prompt], params)
    run = jax.jit(lambda model, state: engine.run.__wrapped__(model, state, STEPS(50)))
    (result,) = engine.collect(run(model, state))
    ((expected,),) = naive(model, [prompt], [params], max_model_len=MAX_LEN)
    assert result.token_ids != expected.tokens


@pytest.mark.parametrize("name", ["gemma2", "three_groups"])
def test_a_saved_engine_continues_with_its_groups(load, name, tmp_path):
    model = load(name)
    config = grouped(model, enable_prefix_caching=True, num_blocks=40)
    prompts, params = requests(model)
    expected = naive(model, prompts, params, max_model_len=MAX_LEN)
    state, _ = engine.submit(engine.init(model, config), prompts, params)
    snapshots.save(tmp_path / "saved", engine.run(model, state, STEPS(20)))
    loaded = {"same": None, "more": dataclasses.replace(config, num_blocks=60)}
    other = dataclasses.replace(config, group_windows=(None,))
    with pytest.raises(ValueError, match="group_windows, algorithms and"):
        snapshots.load(tmp_path / "saved", model, other)
    for changed in loaded.values():
        state = snapshots.load(tmp_path / "saved", model, changed)
        assert engine.violations(state) == []
        state = engine.run(model, state, STEPS(FOREVER))
        results = [[] for _ in prompts]
        for result in engine.collect(state):
            results[result.arrival].append(result)
        assert differences(state, results, expected) == []


def test_the_simulator_preempts_less_with_groups():
    arrivals = np.arange(12) * 0.4
    workload = Workload(arrivals, [20 + i for i in range(12)], [40] * 12)
    sizes = dict(
        block_size=4,
        max_num_seqs=6,
        max_model_len=96,
        max_num_batched_tokens=16,
        max_num_requests=32,
        enable_prefix_caching=True,
        preemption="swap",
    )
    found = {}
    for windows in ((None,), (None, 16)):
        blocks = 40 * len(windows)
        config = EngineConfig(
            **sizes,
            num_blocks=blocks,
            num_swap_blocks=blocks // 2,
            group_windows=windows,
        )
        outcome = simulate(EngineSystem(config), workload, HALF)
        assert sum(outcome.summary()["kv_composition"].values()) == pytest.approx(1)
        found[windows] = outcome
    one_table, groups = found.values()
    assert groups.summary()["num_preemptions"] < one_table.summary()["num_preemptions"]
    assert groups.makespan < one_table.makespan
