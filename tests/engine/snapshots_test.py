"""An engine saved during a run and loaded elsewhere generates the same tokens."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jpaged import engine, scheduler
from jpaged.engine import snapshots
from jpaged.params import SamplingParams
from tests.engine.engine_test import MAX_LEN, ROOMY, STEPS, models
from tests.engine.prefix_cache_test import CACHED, CACHED_TIGHT, PARAMS, PROMPTS
from tests.support.engine.oracle import FOREVER, differences, naive
from tests.support.models import checkpoints
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

__all__ = ["models"]  # a fixture
PREEMPTING = 25  # steps after which the tight pool has preempted


@pytest.fixture(scope="module")
def llama(models):
    return models["llama"]


@pytest.fixture(scope="module")
def expected(llama):
    return naive(llama, PROMPTS, PARAMS, max_model_len=MAX_LEN)


def scheduled(llama, config):
    """The engine with all requests, after some steps."""
    state, _ = engine.submit(engine.init(llama, config), PROMPTS, PARAMS)
    return engine.run(llama, state, STEPS(PREEMPTING))


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """A folder with the tight engine during its run."""
    folder = tmp_path_factory.mktemp("snapshots") / "middle"
    state = scheduled(llama, CACHED_TIGHT)
    assert state.counters.num_preemptions > 0
    assert (state.rows != scheduler.NO_REQUEST).sum() > 1
    snapshots.save(folder, state)
    return folder


def finished(llama, state):
    state = engine.run(llama, state, STEPS(FOREVER))
    results = [[] for _ in PROMPTS]
    for result in engine.collect(state):
        results[result.arrival].append(result)
    return state, results


def test_an_engine_of_the_same_sizes_gets_the_whole_state_back(llama, saved):
    state, loaded = scheduled(llama, CACHED_TIGHT), snapshots.load(saved, llama)
    assert loaded.config == CACHED_TIGHT
    for (path, mine), leaf in zip(
        jax.tree_util.tree_leaves_with_path(loaded), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_array_equal(mine, leaf, err_msg=str(path))


CONFIGS = {
    "another policy": dataclasses.replace(CACHED_TIGHT, policy="longest_prefix"),
    "no cache": dataclasses.replace(CACHED, enable_prefix_caching=False),
    "more blocks and tokens": CACHED,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_equal_those_of_an_uninterrupted_run(llama, saved, expected, name):
    state = snapshots.load(saved, llama, CONFIGS[name])
    state, results = finished(llama, state)
    assert differences(state, results, expected) == []
    assert engine.violations(state) == []


KILLED = """
import os, signal, sys
from tests.engine.engine_test import STEPS
from tests.engine.prefix_cache_test import CACHED_TIGHT, PARAMS, PROMPTS
from jpaged import engine, load_model
from jpaged.engine import snapshots
model = load_model(sys.argv[1])
state, _ = engine.submit(engine.init(model, CACHED_TIGHT), PROMPTS, PARAMS)
for number in range(3):
    state = engine.run(model, state, STEPS(20))
    snapshots.save(f"{sys.argv[2]}/{number}", state)
engine.run(model, state, STEPS(1))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_run_of_a_killed_process_continues_in_another(llama, expected, tmp_path):
    weights = checkpoints.write_tiny_llama(tmp_path / "llama")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(weights), str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = snapshots.load(tmp_path / "2", llama)
    assert 0 < len(engine.collect(state)) < sum(param.n for param in PARAMS)
    state, results = finished(llama, state)
    assert differences(state, results, expected) == []


def test_snapshots_that_cannot_be_loaded_raise(llama, saved, tmp_path):
    with pytest.raises(FileExistsError, match="expected a new folder, got"):
        snapshots.save(saved, engine.init(llama, CACHED_TIGHT))
    with pytest.raises(FileNotFoundError, match="has no config"):
        snapshots.load(tmp_path, llama)
    longer = dataclasses.replace(CACHED_TIGHT, max_model_len=64, num_blocks=32)
    with pytest.raises(ValueError, match=r"'max_model_len': \(48, 64\)"):
        snapshots.load(saved, llama, longer)
    small = dataclasses.replace(CACHED_TIGHT, num_blocks=3)
    with pytest.raises(ValueError, match="expected num_blocks of at least"):
        snapshots.load(saved, llama, small)


def test_a_snapshot_of_another_format_raises_and_names_both_formats(
    llama, saved, tmp_path
):
    folder = tmp_path / "old"
    shutil.copytree(saved, folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"format": 1}))
    message = r"expected a snapshot of format 3, got format 1, .* another version"
    with pytest.raises(ValueError, match=message):
        snapshots.load(folder, llama)


def test_a_config_with_functions_must_be_given(llama, tmp_path):
    def mine(waiting):
        return -waiting.arrivals

    config = dataclasses.replace(ROOMY, policy=mine)
    state, _ = engine.submit(
        engine.init(llama, config), [[1, 2, 3]], SamplingParams(max_tokens=1)
    )
    snapshots.save(tmp_path / "policy", state)
    with pytest.raises(ValueError, match=r"policy \{'function': 'mine'\}"):
        snapshots.load(tmp_path / "policy", llama)
    state = snapshots.load(tmp_path / "policy", llama, config)
    assert state.config is config
