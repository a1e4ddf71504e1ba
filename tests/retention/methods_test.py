"""Methods with statistics in the engine, against rules in NumPy on a dense model."""

import dataclasses

import numpy as np
import pytest

from jpaged import LLM, SamplingParams, retention
from tests.support import retention_model as model
from tests.support.tiny_llm import (
    MAX_LEN,
    SIZES,
    decoder,
    folder,
    random_prompts,
)

__all__ = ["decoder", "folder"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [one[:40] for one in random_prompts(7, seed=8, longest=41)]
# Chunks of 7 tokens split the last queries of prompts; the pool is too small for all.
TIGHT = SIZES | dict(max_num_batched_tokens=7, num_blocks=24)
TIGHT_TOKENS = TIGHT | dict(block_size=1, num_blocks=96)


def heavy_hitters(blocks, scores):
    recent = model.recent_blocks(blocks, 6)
    scores = [np.inf if i in recent else s for i, s in enumerate(scores)]
    return model.highest(blocks, scores, 16)


def largest(blocks, scores):
    return model.highest(blocks, scores, 16)


def smallest(blocks, scores):
    return model.highest(blocks, [-s for s in scores], 16)


def snapkv(blocks, scores, kernel):
    recent = model.recent_blocks(blocks, 5)
    radius = kernel // 2 // len(blocks[0])
    earlier = [0.0 if i in recent else s for i, s in enumerate(scores)]
    pooled = [
        sum(earlier[max(0, i - radius) : i + radius + 1]) for i in range(len(scores))
    ]
    pooled = [np.inf if i in recent else s for i, s in enumerate(pooled)]
    return model.highest(blocks, pooled, 16)


CASES = {
    "heavy_hitters": (
        retention.heavy_hitters(max_tokens=16, recent=6, every=3),
        TIGHT,
        dict(rule=heavy_hitters, statistic="attention", every=3),
    ),
    "tova": (
        retention.tova(max_tokens=16, every=1),
        TIGHT,
        dict(rule=largest, statistic="recent", queries=1, every=1),
    ),
    "snapkv": (
        retention.snapkv(max_tokens=16, queries=5, kernel=5, every=4),
        TIGHT_TOKENS,
        dict(
            rule=lambda blocks, scores: snapkv(blocks, scores, 5),
            statistic="recent",
            queries=5,
            every=4,
        ),
    ),
    "knorm": (
        retention.knorm(max_tokens=16, every=2),
        TIGHT,
        dict(rule=smallest, statistic="key_norm", every=2),
    ),
}


@pytest.fixture(scope="module")
def observed(decoder):
    return model.ObservedModel(decoder)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_rule_on_a_dense_model(folder, observed, name):
    method, sizes, rule = CASES[name]
    expected = [
        observed.generate(
            prompt,
            GREEDY.max_tokens,
            MAX_LEN,
            block_size=sizes["block_size"],
            **rule,
        )
        for prompt in PROMPTS
    ]
    with LLM(folder, **sizes, retention=method, check_invariants=True) as llm:

        def generate(params=GREEDY):
            outputs = llm.generate(PROMPTS, params)
            return [list(one.outputs[0].token_ids) for one in outputs]

        assert generate() == expected
        assert generate() == expected  # prompts whose prefixes may be cached
        off = generate(dataclasses.replace(GREEDY, retention="off"))
        assert off != expected
        assert llm.stats()["num_preemptions"] > 0
        # Samples map the prompt, and count its queries once.
        params = SamplingParams(n=2, temperature=1.0, max_tokens=12, seed=3)
        (both,) = llm.generate(PROMPTS[1], params)
        (one,) = llm.generate(PROMPTS[1], dataclasses.replace(params, n=1))
        assert both.outputs[0].token_ids == one.outputs[0].token_ids


@pytest.mark.long
def test_quest_reads_the_blocks_whose_keys_could_match_best(folder, decoder):
    quest = model.ReadingModel(decoder, block_size=4, max_tokens=12)
    expected = [quest.greedy(p, GREEDY.max_tokens, MAX_LEN) for p in PROMPTS]
    method = retention.quest(max_tokens=12)
    with LLM(folder, **TIGHT, retention=method, check_invariants=True) as llm:

        def generate(params=GREEDY):
            outputs = llm.generate(PROMPTS, params)
            return [list(one.outputs[0].token_ids) for one in outputs]

        assert generate() == expected
        assert generate() == expected
        assert llm.stats()["num_preemptions"] > 0
        whole = model.ReadingModel(decoder, block_size=4, max_tokens=64)
        whole = [whole.greedy(p, GREEDY.max_tokens, MAX_LEN) for p in PROMPTS]
        assert whole != expected
        for setting in ("off", {"max_tokens": 64}):
            found = generate(dataclasses.replace(GREEDY, retention=setting))
            assert found == whole
