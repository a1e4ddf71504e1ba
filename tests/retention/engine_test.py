"""Retention in the engine, against dense attention with an independent mask."""

import dataclasses

import pytest

from jpaged import LLM, BeamSearchParams, SamplingParams, retention
from tests.support import retention_model as model
from tests.support.tiny_llm import (
    MAX_LEN,
    SIZES,
    decoder,
    folder,
    is_idle,
    random_prompts,
)

__all__ = ["decoder", "folder"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [one[:36] for one in random_prompts(6, seed=3, longest=38)]
METHOD = retention.sink_and_window(num_sinks=4, window=9, every=5)


@pytest.fixture(scope="module")
def dense(decoder):
    return model.DenseModel(decoder)


def expected(dense, prompt, params=GREEDY, *, block_size=4, rule=None, **when):
    when = dict(every=5) | when
    rule = rule or model.sink_and_window(4, 9)
    total = len(prompt) + params.max_tokens
    mask, _ = model.visible_tokens(total, len(prompt), block_size, rule, **when)
    return dense.greedy(prompt, params.max_tokens, mask, MAX_LEN)


def generate(llm, prompts=PROMPTS, params=GREEDY):
    return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **SIZES, retention=METHOD, check_invariants=True)


@pytest.mark.long
def test_tokens_are_those_of_a_dense_model_with_the_mask(llm, dense):
    assert generate(llm) == [expected(dense, prompt) for prompt in PROMPTS]
    # A full mask gives other tokens, so the test would see a method that keeps all.
    whole = [expected(dense, p, rule=lambda b: set(range(len(b)))) for p in PROMPTS]
    assert generate(llm) != whole
    # Prompts whose prefixes are cached now.
    assert generate(llm) == [expected(dense, prompt) for prompt in PROMPTS]
    assert llm.stats()["prefix_hit_ratio"] > 0
    assert is_idle(llm)


@pytest.mark.long
def test_requests_have_numbers_of_their_own_and_compile_nothing(llm, dense):
    llm.warm_up(GREEDY)
    known = llm.stats()["num_compilations"]
    settings = (
        dict(num_sinks=0, window=4, every=1),
        dict(window=12, every=0),
        dict(prompt_every=6),
        dict(num_sinks=8, window=2, every=3, prompt_every=3),
        "off",
    )
    params = [dataclasses.replace(GREEDY, retention=one) for one in settings]
    found = [generate(llm, PROMPTS, one) for one in params]
    assert llm.stats()["num_compilations"] == known
    for one, tokens in zip(settings, found, strict=True):
        if one == "off":
            rule, when = (lambda blocks: set(range(len(blocks)))), {}
        else:
            numbers = dict(METHOD.parameters) | one
            rule = model.sink_and_window(
                int(numbers["num_sinks"]), int(numbers["window"])
            )
            when = {name: int(numbers[name]) for name in ("every", "prompt_every")}
        assert tokens == [expected(dense, p, rule=rule, **when) for p in PROMPTS], one


@pytest.mark.long
def test_dropped_tokens_are_counted(llm):
    counted = llm.stats()["num_dropped_tokens"]
    for prompt in PROMPTS[:2]:
        (output,) = llm.generate([prompt], GREEDY)
        # The last token is never stored, and no decision follows the one before it.
        computed = len(prompt) + GREEDY.max_tokens - 2
        rule = model.sink_and_window(4, 9)
        _, stored = model.visible_tokens(computed, len(prompt), 4, rule, every=5)
        assert output.metrics["num_dropped_tokens"] == computed - len(stored) > 0
        counted += computed - len(stored)
        assert llm.stats()["num_dropped_tokens"] == counted
    off = dataclasses.replace(GREEDY, retention="off")
    (output,) = llm.generate(PROMPTS[:1], off)
    assert output.metrics["num_dropped_tokens"] == 0
    params = BeamSearchParams(beam_width=2, max_tokens=24, ignore_eos=True)
    (output,) = llm.generate(PROMPTS[:1], params)
    assert output.metrics["num_dropped_tokens"] > 0
    assert llm.stats()["num_dropped_tokens"] > counted


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        dict(num_blocks=16, max_num_batched_tokens=7),
        dict(num_blocks=16, preemption="swap", num_swap_blocks=20),
        dict(num_blocks=64, block_size=1, enable_prefix_caching=False),
    ],
    ids=["recompute", "swap", "tokens"],
)
def test_preemption_and_small_blocks_change_no_token(folder, dense, options):
    sizes = SIZES | options
    with LLM(folder, **sizes, retention=METHOD, check_invariants=True) as llm:
        block_size = sizes["block_size"]
        tokens = [expected(dense, p, block_size=block_size) for p in PROMPTS]
        assert generate(llm) == tokens
        assert llm.stats()["num_preemptions"] > 0


@pytest.mark.long
def test_samples_share_what_is_left(llm):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=16, seed=5)
    (together,) = llm.generate(PROMPTS[0], params)
    found = [list(one.token_ids) for one in together.outputs]
    (alone,) = llm.generate(PROMPTS[0], dataclasses.replace(params, n=1))
    assert found[0] == list(alone.outputs[0].token_ids)
    assert len({tuple(one) for one in found}) == 3
    assert is_idle(llm)


@pytest.mark.long
def test_beams_share_and_drop_blocks(llm, dense):
    greedy = BeamSearchParams(beam_width=1, max_tokens=24, ignore_eos=True)
    wide = dataclasses.replace(greedy, beam_width=2)
    outputs = llm.generate([*PROMPTS[:2], PROMPTS[0]], [greedy, greedy, wide])
    for prompt, output in zip(PROMPTS[:2], outputs, strict=False):
        assert list(output.outputs[0].token_ids) == expected(dense, prompt)
    first, second = outputs[2].outputs
    assert first.token_ids != second.token_ids
    assert first.score >= outputs[0].outputs[0].score
    assert is_idle(llm)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (None, {"window": 8}, "the engine has no retention method"),
        (METHOD, {"windo": 8}, "expected names among .*'windo'"),
        (METHOD, {"every": -2}, "every: expected an integer from 0"),
    ],
)
def test_numbers_that_a_request_cannot_have_are_refused(folder, method, given, message):
    llm = LLM(folder, **SIZES, retention=method)
    with pytest.raises(ValueError, match=message):
        llm.generate([5, 6], SamplingParams(retention=given))
    assert llm.stats()["num_compilations"] == 0
    with pytest.raises(ValueError, match="retention: expected None, 'off' or a dict"):
        SamplingParams(retention=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(retention="h2"), "retention: expected None, a retention.Retention"),
        (
            dict(retention="random", speculative_config={"method": "ngram"}),
            "retention: expected None with speculation",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **SIZES, **settings)
