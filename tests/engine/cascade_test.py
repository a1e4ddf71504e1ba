"""The engine with cascade attention generates the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, engine, load_model
from jpaged.engine import forward
from jpaged.kv import shared_prefix
from jpaged.params import BeamSearchParams, SamplingParams
from tests.support.engine.configs import QUICKLY, OneSizeConfig
from tests.support.engine.oracle import FOREVER, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

CONFIG = OneSizeConfig(
    num_blocks=60,
    block_size=4,
    max_num_seqs=6,
    max_model_len=48,
    max_num_batched_tokens=12,
    max_num_requests=20,
    max_beam_width=3,
    enable_prefix_caching=True,
    cascade=True,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=2))


@pytest.fixture
def _always(monkeypatch):
    """Use cascade attention for every shared block, however few they are."""
    find_shared_prefix = shared_prefix.find_shared_prefix

    def find_all(*args):
        return find_shared_prefix(*args, min_prefix_tokens=1, min_saved_tokens=1)

    monkeypatch.setattr(forward.shared_prefix, "find_shared_prefix", find_all)


def finished(model, prompts, params, config=CONFIG):
    @jax.jit
    def run(model, state):
        return engine.run.__wrapped__(model, state, jnp.int32(FOREVER))

    state = engine.init(model, config)
    state, _ = engine.submit(state, prompts, params, vocab_size=128)
    state = run.lower(model, state).compile(QUICKLY)(model, state)
    assert engine.violations(state) == []
    found: dict[int, list] = {}
    for result in engine.collect(state):
        found.setdefault(result.arrival, []).append(result.token_ids)
    return [found[arrival] for arrival in sorted(found)]


def workload():
    rng = np.random.default_rng(0)
    header = rng.integers(0, 128, 13).tolist()
    prompts = [[*header, n] for n in range(4)] + [[7, 8, 9]]
    params = [
        SamplingParams(n=1 + n % 3, seed=n, max_tokens=20, ignore_eos=True)
        for n in range(5)
    ]
    return prompts, params


@pytest.mark.usefixtures("_always")
def test_samples_and_prompts_that_share_prefixes_equal_the_loop(model):
    prompts, params = workload()
    want = naive(model, prompts, params, max_model_len=CONFIG.max_model_len)
    got = finished(model, prompts, params)
    assert got == [[one.tokens for one in samples] for samples in want]


@pytest.mark.slow
@pytest.mark.usefixtures("_always")
def test_beams_are_the_same_with_and_without_cascade(model):
    prompts = [list(range(20)), [5, 6]]
    params = [BeamSearchParams(beam_width=3, max_tokens=20, ignore_eos=True)] * 2
    plain = dataclasses.replace(CONFIG, cascade=False)
    got = finished(model, prompts, params)
    assert got == finished(model, prompts, params, plain)


@pytest.mark.usefixtures("_always")
def test_a_planted_fault_in_the_shared_prefixes_is_found(model, monkeypatch):
    find_shared_prefix = forward.shared_prefix.find_shared_prefix

    def other_leaders(*args):
        found = find_shared_prefix(*args)
        leaders = jnp.where(found.num_blocks > 0, 1 - found.leaders, found.leaders)
        return dataclasses.replace(found, leaders=jnp.abs(leaders))

    prompts, params = workload()
    want = naive(model, prompts, params, max_model_len=CONFIG.max_model_len)
    monkeypatch.setattr(forward.shared_prefix, "find_shared_prefix", other_leaders)
    # The tables are read from the leader's row; "cpu" reads those of any member.
    config = dataclasses.replace(CONFIG, attention="xla")
    got = finished(model, prompts, params, config)
    assert got != [[one.tokens for one in samples] for samples in want]


def test_the_reference_backend_supports_cascade_and_other_values_raise(model):
    sizes = dict(num_blocks=8, max_num_seqs=2, max_model_len=32)
    LLM(model, cascade=True, attention="reference", **sizes)
    with pytest.raises(ValueError, match=r"cascade: .* True or False, got 1"):
        LLM(model, cascade=1, **sizes)
