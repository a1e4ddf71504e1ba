"""Pinned prefixes through the LLM: the same tokens with less computation and memory."""

import dataclasses

import numpy as np
import pytest

from jpaged.arithmetic import cdiv
from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import batcher
from tests.support.engine.full_llm import SIZES, is_idle
from tests.support.tiny_llm import SIZES as PLAIN_SIZES
from tests.support.tiny_llm import VOCAB_SIZE, tokens_of

pytestmark = pytest.mark.long

PREFIX = np.random.default_rng(3).integers(2, VOCAB_SIZE, 22).tolist()
NUM_BLOCKS = cdiv(len(PREFIX), SIZES["block_size"])
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True),
    BeamSearchParams(4, 6, ignore_eos=True),
    SamplingParams(n=2, seed=2, max_tokens=6, ignore_eos=True, presence_penalty=1.0),
]
TAILS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15], [5, 6, 8]]
PROMPTS = [[*PREFIX, *tail] for tail in TAILS]


@pytest.fixture(scope="module")
def llm(folder):
    # Without prefix caching, so that savings come from the pinned prefix alone.
    llm = LLM(folder, enable_prefix_caching=False, **SIZES)
    features = SamplingParams(
        max_tokens=2, presence_penalty=1.0, logprobs=2, prompt_logprobs=2
    )
    llm.warm_up([features, BeamSearchParams(8, 2)])
    return llm


@pytest.fixture(scope="module")
def expected(llm):
    """The outputs of PROMPTS without a prefix, and the number of computed tokens."""
    before = llm.stats()["computed_tokens"]
    outputs = tokens_of(llm.generate(PROMPTS, PARAMS))
    return outputs, llm.stats()["computed_tokens"] - before


def num_used(llm):
    stats = llm.stats()
    return stats["num_blocks"] - stats["num_free_blocks"]


def test_tokens_are_the_same_for_less_work_and_blocks_are_kept_until_release(
    llm, expected
):
    outputs, computed = expected
    llm.warm_up(PARAMS)
    compiled = llm.stats()["num_compilations"]
    with llm.pin(PREFIX) as prefix:
        assert prefix.token_ids == PREFIX
        prompts = [prefix.prompt(tail) for tail in TAILS]
        assert prompts == PROMPTS
        for is_first in (True, False):
            before = llm.stats()["computed_tokens"]
            assert tokens_of(llm.generate(prompts, PARAMS)) == outputs
            saved = computed - (llm.stats()["computed_tokens"] - before)
            # Each request computes its tail; the first run also computes the prefix.
            assert saved == (len(prompts) - is_first) * len(PREFIX)
            assert num_used(llm) == NUM_BLOCKS
    assert num_used(llm) == 0
    prefix.release()  # further calls have no effect
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == outputs
    assert llm.stats()["num_compilations"] == compiled
    assert is_idle(llm)


def test_requests_share_the_blocks_of_the_prefix(llm):
    params = dataclasses.replace(GREEDY, max_tokens=20)
    prompts = [[*PREFIX, 50 + i] for i in range(6)]
    outputs = tokens_of(llm.generate(prompts, params))
    preempted = llm.stats()["num_preemptions"]
    with llm.pin(PREFIX):
        assert tokens_of(llm.generate(prompts, params)) == outputs
        # Alone each uses 11 of 48 blocks; after the prefix 6 more, 5 are shared.
        assert llm.stats()["num_preemptions"] == preempted
        assert num_used(llm) == NUM_BLOCKS
    assert num_used(llm) == 0


@pytest.mark.parametrize("kept", [1, 8, 21, 22])
def test_a_prompt_maps_the_tokens_that_it_shares_with_the_prefix(kept, llm):
    # The last token is always computed: its logits give the next token.
    prompt = [*PREFIX[:kept]] if kept == len(PREFIX) else [*PREFIX[:kept], 3, 4]
    shared = min(kept, len(prompt) - 1)
    plain = tokens_of(llm.generate([prompt], GREEDY))
    with llm.pin(PREFIX):
        llm.generate([[8]], GREEDY)  # the prefix is computed beside this request
        before = llm.stats()["computed_tokens"]
        assert tokens_of(llm.generate([prompt], GREEDY)) == plain
        computed = llm.stats()["computed_tokens"] - before
        assert computed == len(prompt) - shared + GREEDY.max_tokens - 1


def test_the_longest_of_several_shared_prefixes_is_mapped(llm, expected):
    outputs, _ = expected
    with llm.pin(PREFIX[:10]) as short, llm.pin(PREFIX) as long:
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == outputs
        assert num_used(llm) == 3 + NUM_BLOCKS
        before = llm.stats()["computed_tokens"]
        llm.generate([PROMPTS[0]], GREEDY)
        computed = llm.stats()["computed_tokens"] - before
        assert computed == len(TAILS[0]) + GREEDY.max_tokens - 1
        long.release()
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == outputs
        assert num_used(llm) == 3
        assert short.token_ids == PREFIX[:10]
    assert num_used(llm) == 0


def test_a_prefix_can_be_released_while_requests_use_it(llm, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    params = dataclasses.replace(GREEDY, max_tokens=20)
    plain = tokens_of(llm.generate([PROMPTS[0]], params))
    prefix = llm.pin(PREFIX)
    stream = llm.stream([PROMPTS[0]], params)
    token_ids = list(next(stream).token_ids)
    assert len(token_ids) < 20
    prefix.release()
    assert num_used(llm) > 0
    for delta in stream:
        token_ids += delta.token_ids
    assert [[token_ids]] == plain
    assert num_used(llm) == 0


def test_a_prefix_released_before_it_is_computed_leaves_the_engine_idle(llm, expected):
    outputs, _ = expected
    llm.pin(PREFIX).release()
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == outputs
    assert num_used(llm) == 0
    assert is_idle(llm)


def test_prompt_logprobs_are_complete_beside_a_pinned_prefix(llm):
    params = dataclasses.replace(GREEDY, prompt_logprobs=2, logprobs=2)
    (plain,) = llm.generate([PROMPTS[0]], params)
    with llm.pin(PREFIX):
        llm.generate([PROMPTS[1]], GREEDY)
        (output,) = llm.generate([PROMPTS[0]], params)
    for one, other in zip(output.prompt_logprobs, plain.prompt_logprobs, strict=True):
        assert (one is None) == (other is None)
        for token, entry in (one or {}).items():
            assert entry.rank == other[token].rank
            assert abs(entry.logprob - other[token].logprob) < 1e-4


def test_the_continuation_of_a_text_prefix_has_no_second_bos(llm):
    with llm.pin("hello there ") as prefix:
        prompt = prefix.prompt("you")
        assert prompt == [*llm.tokenizer.encode("hello there "), *prompt[12:]]
        assert llm.tokenizer.decode(prompt) == "hello there you"
        assert repr(prefix) == "Prefix(12 tokens)"


def test_invalid_prefixes_and_too_many_prefixes_are_refused(llm):
    with llm.pin([5]), llm.pin([6]):
        with pytest.raises(ValueError, match=r"max_num_prefixes \(2\).* 2 are pinned"):
            llm.pin([7])
    with pytest.raises(ValueError, match=r"fewer than max_model_len \(64\), got 64"):
        llm.pin([5] * 64)
    with pytest.raises(ValueError, match=r"prefix: expected at least 1 token .* got 0"):
        llm.pin([])
    with pytest.raises(ValueError, match=r"from 0 to 299 .* got 300"):
        llm.pin([300])
    with pytest.raises(ValueError, match="expected text or a list of token ids"):
        llm.pin(3)
    assert num_used(llm) == 0
    assert is_idle(llm)


def test_a_request_that_does_not_fit_beside_pinned_blocks_is_refused(llm, monkeypatch):
    wide = BeamSearchParams(7, 16, ignore_eos=True)
    prompt = [5] * 9
    assert llm.check([prompt], wide) == [None]
    with llm.pin([4] * 48):
        (error,) = llm.check([prompt], wide)
        assert "the pool has 36 that are not pinned" in error
    # A prefix is refused if the running requests could not finish beside it.
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    stream = llm.stream([prompt, prompt], [GREEDY, wide])
    next(stream)
    with pytest.raises(ValueError, match="37 for the largest request that runs"):
        llm.pin([4] * 48)
    with llm.pin([4] * 20):
        assert sum(1 for _ in stream) > 0
    assert num_used(llm) == 0


def test_a_pinned_prefix_is_kept_when_the_engine_grows(folder, llm, expected):
    outputs, _ = expected
    other = LLM(folder, **PLAIN_SIZES)
    prefix = other.pin(PREFIX)
    assert tokens_of(other.generate(PROMPTS[:1], GREEDY)) == outputs[:1]
    assert num_used(other) == NUM_BLOCKS
    (beams,) = other.generate([[7]], BeamSearchParams(2, 4))
    assert other.config.max_beam_width >= 2
    assert tokens_of([beams]) == tokens_of(llm.generate([[7]], BeamSearchParams(2, 4)))
    assert num_used(other) == NUM_BLOCKS
    before = other.stats()["computed_tokens"]
    prompt = [*PREFIX, *TAILS[1]]  # no tail in common with the first prompt
    found = tokens_of(other.generate([prompt], GREEDY))
    computed = other.stats()["computed_tokens"] - before
    assert computed == len(TAILS[1]) + GREEDY.max_tokens - 1
    assert found == tokens_of(llm.generate([prompt], GREEDY))
    prefix.release()
    assert num_used(other) == 0


def test_a_call_with_a_new_feature_runs_beside_a_stream(folder, llm, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    other = LLM(folder, **PLAIN_SIZES)
    params = dataclasses.replace(GREEDY, max_tokens=20)
    stream = other.stream([[5, 6]], params)
    token_ids = list(next(stream).token_ids)
    before = other.config
    (output,) = other.generate([[7]], BeamSearchParams(2, 4))
    assert other.config != before
    (expected,) = llm.generate([[7]], BeamSearchParams(2, 4))
    assert tokens_of([output]) == tokens_of([expected])
    for delta in stream:
        token_ids += delta.token_ids
    assert tokens_of(llm.generate([[5, 6]], params)) == [[token_ids]]
    assert is_idle(other)
