"""Weights that are changed in place or replaced, against scores without the engine."""

import jax
import numpy as np
import pytest
from flax import nnx

from jpaged.llm import LLM
from jpaged.models.loading.checkpoint import load_model
from jpaged.models.loading.sources import bundled_path
from jpaged.params import SamplingParams
from tests.support.tiny_llm import GREEDY, SIZES, random_prompts

pytestmark = pytest.mark.long

PROMPT = [5, 9, 13, 200, 77, 31, 8, 45, 99, 3, 17, 60, 61]
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def changed(model, seed):
    """The arrays of the model, multiplied by numbers near 1."""
    state = nnx.state(model)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    leaves = [
        leaf * rng.uniform(0.7, 1.3, leaf.shape).astype(leaf.dtype) for leaf in leaves
    ]
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture
def llm(decoder):
    """An LLM with weights of its own, and with PROMPT in its prefix cache."""
    llm = LLM(nnx.clone(decoder), **SIZES)
    llm.generate([PROMPT], PARAMS)
    return llm


def check_scores(llm, prompt=PROMPT):
    (output,) = llm.generate([prompt], PARAMS)
    sample = output.outputs[0]
    (score,) = llm.score([prompt], [list(sample.token_ids)])
    assert score.is_greedy
    assert sample.cumulative_logprob == pytest.approx(
        score.cumulative_logprob, abs=1e-4
    )
    return output


def test_weights_changed_in_place_drop_what_was_cached(llm):
    assert check_scores(llm).metrics["num_cached_tokens"] > 0
    with llm.pin(PROMPT[:9]) as prefix:
        nnx.update(llm.model, changed(llm.model, 1))
        check_scores(llm, prefix.prompt([4, 5]))
        assert check_scores(llm).metrics["num_cached_tokens"] <= 9
    assert check_scores(llm).metrics["num_cached_tokens"] > 0
    nnx.update(llm.model, changed(llm.model, 2))
    stream = llm.stream([PROMPT], PARAMS)
    ids = [token for delta in stream for token in delta.token_ids]
    (score,) = llm.score([PROMPT], [ids])
    assert score.is_greedy


def test_requests_that_run_during_a_change_leave_nothing_behind(llm):
    live = llm.submit(PROMPT[:8], GREEDY)
    next(live)
    nnx.update(llm.model, changed(llm.model, 3))
    prompt = [*PROMPT[:8], *live.output().outputs[0].token_ids]
    check_scores(llm, prompt[:-1])
    check_scores(llm)


def test_a_model_of_the_same_config_can_be_assigned(llm, decoder):
    new = nnx.clone(llm.model)
    nnx.update(new, changed(new, 4))
    before = llm.generate([PROMPT], PARAMS)[0].outputs[0].cumulative_logprob
    llm.model = new
    assert llm.model is new
    after = check_scores(llm).outputs[0].cumulative_logprob
    assert abs(before - after) > 1e-3
    nnx.update(new, changed(new, 5))
    check_scores(llm)
    for prompt in random_prompts(3, seed=6):
        check_scores(llm, prompt)
    assert llm.stats()["num_compilations"] <= 6  # of one set of programs


def test_what_does_not_fit_is_refused(llm):
    with pytest.raises(ValueError, match="model: expected a Decoder"):
        llm.model = None
    live = llm.submit(PROMPT, PARAMS)
    with pytest.raises(ValueError, match="model: expected no open requests, got 1"):
        llm.model = nnx.clone(llm.model)
    live.abort()
    live.output()
    other = load_model(bundled_path("tiny-python"), "float32")
    with pytest.raises(ValueError, match="model: expected a Decoder with the config"):
        llm.model = other
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), nnx.state(llm.model))
    nnx.update(llm.model, half)
    with pytest.raises(ValueError, match="model: expected weights of the same shapes"):
        llm.generate([PROMPT], PARAMS)
