"""Cache groups: layers with a window give blocks back, and no token changes.

Small models of families with windows run with groups, in pools that are too small for
one table, and their tokens are those of a loop that recomputes everything.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.kv import block_manager, cache_groups
from jpaged.params import SamplingParams
from tests.engine.engine_test import STEPS
from tests.engine.walk_test import CONFIG as WALK
from tests.engine.walk_test import walk_randomly, walk_with_all_events
from tests.models.families_test import write_case
from tests.support.engine.configs import OneSizeConfig
from tests.support.engine.oracle import differences, generate, naive
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


@pytest.mark.parametrize("name", WINDOWS)
def test_random_walks_leave_the_groups_sound(load, name):
    model = load(name)
    walk_randomly(model, walk_config(model), max_examples=5)
