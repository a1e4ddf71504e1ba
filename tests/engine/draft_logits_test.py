"""Algorithms that read the draft model: contrastive decoding beside a plain loop."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.config import EngineConfig, Speculation
from jpaged.decoding import contrib
from jpaged.engine import algorithms
from jpaged.kv import block_manager
from jpaged.params import AlgorithmParams, SamplingParams
from jpaged.serving.runner import needs_empty_table
from tests.support.engine.algorithms_oracle import Plain
from tests.support.engine.configs import one_size
from tests.support.engine.oracle import FOREVER
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

VOCABULARY, MAX_LEN, LENGTH = checkpoints.LLAMA["vocab_size"], 32, 8
CONTRAST = contrib.contrastive_decoding(alpha=0.02, beta=0.8)
CONFIG = EngineConfig(
    num_blocks=14,  # two requests at a time, or a request of two rows
    block_size=4,
    max_num_seqs=4,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=8,
    max_num_requests=16,
    enable_prefix_caching=True,
    speculation=Speculation("model", num_tokens=2),
    algorithms=((CONTRAST, 1), (CONTRAST, 2)),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    large = checkpoints.write_tiny_llama(root / "large")
    small = checkpoints.write_tiny_llama(root / "small", num_hidden_layers=1, seed=5)
    return load_model(large), load_model(small)


def expected(models, prompt, beta):
    large, small = (Plain(model, MAX_LEN) for model in models)
    tokens = []
    for _ in range(LENGTH):
        text = [[*prompt, *tokens]]
        scores = (1 + beta) * large(text)[0] - beta * small(text)[0]
        scores[large(text)[0] < large(text)[0].max() + np.log(0.02)] = -np.inf
        tokens.append(int(scores.argmax()))
    return tokens


def test_contrastive_decoding_equals_a_loop_beside_speculation(models):
    config = one_size(algorithms.with_needs(CONFIG))
    assert config.seen_draft
    rng = np.random.default_rng(0)
    start = rng.integers(3, VOCABULARY, 9).tolist()  # more than a block in common
    prompts = [start + rng.integers(3, VOCABULARY, n).tolist() for n in (1, 3, 2, 4, 1)]
    settings = dict(max_tokens=LENGTH, ignore_eos=True)
    params = [
        AlgorithmParams(CONTRAST, **settings),
        AlgorithmParams(CONTRAST, parameters={"beta": 0.0}, **settings),
        SamplingParams(temperature=0.0, **settings),
        AlgorithmParams(CONTRAST, 2, **settings),
        AlgorithmParams(CONTRAST, parameters={"beta": 2.0}, **settings),
    ]
    state = engine.init(engine.DraftedModel(*models), config)
    state, _ = engine.submit(state, prompts, params, vocab_size=VOCABULARY)
    state = engine.run(engine.DraftedModel(*models), state, jnp.int32(FOREVER))
    found = {}
    for result in engine.collect(state):
        found.setdefault(result.arrival, []).append(list(result.token_ids))
    betas = [0.8, 0.0, 0.0, 0.8, 2.0]
    for number, (prompt, beta) in enumerate(zip(prompts, betas, strict=True)):
        tokens = expected(models, prompt, beta)
        assert found[number] == [tokens] * (2 if number == 3 else 1)
    assert expected(models, prompts[0], 0.0) != found[0][0]
    assert int(state.counters.num_drafts) > 0
    assert int(state.counters.num_cached_tokens) > 0
    assert block_manager.violations(state.blocks) == []


def test_the_first_such_request_waits_for_an_empty_table():
    assert needs_empty_table(CONFIG, algorithms.with_needs(CONFIG))
    same = dataclasses.replace(CONFIG, num_logprobs=2)
    assert not needs_empty_table(CONFIG, same)


def test_it_needs_a_draft_model():
    config = dataclasses.replace(algorithms.with_needs(CONFIG), speculation=None)
    with pytest.raises(ValueError, match="expected an engine with a draft model"):
        engine.check_request(
            config, [5], AlgorithmParams(CONTRAST), vocab_size=VOCABULARY
        )
