"""Pinned prefixes through the LLM: the same tokens for less work and memory."""

import dataclasses

import numpy as np
import pytest

from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import batcher
from tests.support.engine.full_llm import SIZES, VOCAB_SIZE, grow, is_idle, make_folder

pytestmark = pytest.mark.long

PREFIX = np.random.default_rng(3).integers(2, VOCAB_SIZE, 22).tolist()
NUM_BLOCKS = -(-len(PREFIX) // SIZES["block_size"])
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
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(folder):
    # What is not pinned is forgotten, so that what pinning saves can be counted.
    llm = LLM(folder, enable_prefix_caching=False, **SIZES)
    grow(llm)
    return llm


@pytest.fixture(scope="module")
def expected(llm):
    """What PROMPTS give without a prefix, and the tokens computed for them."""
    before = llm.stats()["computed_tokens"]
    outputs = tokens_of(llm.generate(PROMPTS, PARAMS))
    return outputs, llm.stats()["computed_tokens"] - before


def tokens_of(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def num_used(llm):
    stats = llm.stats()
    return stats["num_blocks"] - stats["num_free_blocks"]


def test_the_same_tokens_for_less_work_and_the_blocks_are_kept_until_release(
    llm, expected
):
    outputs, computed = expected
    compiled = llm.stats()["num_compilations"]
    with llm.pin(PREFIX) as prefix:
        assert prefix.token_ids == PREFIX
        prompts = [prefix.prompt(tail) for tail in TAILS]
        assert prompts == PROMPTS
        for is_first in (True, False):
            before = llm.stats()["computed_tokens"]
            assert tokens_of(llm.generate(prompts, PARAMS)) == outputs
            saved = computed - (llm.stats()["computed_tokens"] - before)
            # Each request computes what comes behind it; the first run the prefix too.
            assert saved == (len(prompts) - is_first) * len(PREFIX)
            assert num_used(llm) == NUM_BLOCKS
    assert num_used(llm) == 0
    prefix.release()  # a second time it does nothing
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
        # Alone each takes 11 blocks of the 48; behind the prefix 6 more, five shared.
        assert llm.stats()["num_preemptions"] == preempted
        assert num_used(llm) == NUM_BLOCKS
    assert num_used(llm) == 0


@pytest.mark.parametrize("kept", [1, 8, 21, 22])
def test_a_prompt_shares_what_it_has_in_common_with_the_prefix(kept, llm):
    # The last token is always computed: its logits are what follows.
    prompt = [*PREFIX[:kept]] if kept == len(PREFIX) else [*PREFIX[:kept], 3, 4]
    shared = min(kept, len(prompt) - 1)
    plain = tokens_of(llm.generate([prompt], GREEDY))
    with llm.pin(PREFIX):
        llm.generate([[8]], GREEDY)  # the prefix is computed beside it
        before = llm.stats()["computed_tokens"]
        assert tokens_of(llm.generate([prompt], GREEDY)) == plain
        computed = llm.stats()["computed_tokens"] - before
        assert computed == len(prompt) - shared + GREEDY.max_tokens - 1


def test_of_several_prefixes_the_longest_common_one_is_taken(llm, expected):
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


def test_a_prefix_may_go_while_requests_use_it(llm, monkeypatch):
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


def test_a_prefix_that_goes_before_it_was_computed_leaves_nothing_behind(llm, expected):
    outputs, _ = expected
    llm.pin(PREFIX).release()
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == outputs
    assert num_used(llm) == 0
    assert is_idle(llm)


def test_prompt_logprobs_are_whole_beside_a_pinned_prefix(llm):
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


def test_a_prefix_of_text_is_continued_by_text_without_a_second_bos(llm):
    with llm.pin("hello there ") as prefix:
        prompt = prefix.prompt("you")
        assert prompt == [*llm.tokenizer.encode("hello there "), *prompt[12:]]
        assert llm.tokenizer.decode(prompt) == "hello there you"
        assert repr(prefix) == "Prefix(12 tokens)"


def test_too_many_and_too_long_and_wrong_prefixes_are_refused(llm):
    with llm.pin([5]), llm.pin([6]):
        with pytest.raises(ValueError, match=r"max_num_prefixes \(2\).* 2 are pinned"):
            llm.pin([7])
    with pytest.raises(ValueError, match=r"fewer than max_model_len \(64\), got 64"):
        llm.pin([5] * 64)
    with pytest.raises(ValueError, match=r"from 1 token to .* got 0"):
        llm.pin([])
    with pytest.raises(ValueError, match=r"from 0 to 299 .* got 300"):
        llm.pin([300])
    with pytest.raises(ValueError, match="wanted text or a list of token ids"):
        llm.pin(3)
    assert num_used(llm) == 0
    assert is_idle(llm)


def test_what_does_not_fit_beside_the_pinned_blocks_is_refused(llm, monkeypatch):
    wide = BeamSearchParams(7, 16, ignore_eos=True)
    prompt = [5] * 9
    assert llm.check([prompt], wide) == [None]
    with llm.pin([4] * 48):
        (error,) = llm.check([prompt], wide)
        assert "the pool has 36 that are not pinned" in error
    # Nor may a prefix come beside which what runs could not end.
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    stream = llm.stream([prompt, prompt], [GREEDY, wide])
    next(stream)
    with pytest.raises(ValueError, match="37 for the largest request that runs"):
        llm.pin([4] * 48)
    with llm.pin([4] * 20):
        assert sum(1 for _ in stream) > 0
    assert num_used(llm) == 0


def test_a_prefix_outlives_a_call_for_which_the_engine_is_compiled_again(
    folder, llm, expected
):
    outputs, _ = expected
    other = LLM(folder, enable_prefix_caching=False, **SIZES)
    prefix = other.pin(PREFIX)
    assert tokens_of(other.generate(PROMPTS[:1], GREEDY)) == outputs[:1]
    assert num_used(other) == NUM_BLOCKS
    grow(other)
    assert other.config == llm.config
    assert num_used(other) == NUM_BLOCKS
    before = other.stats()["computed_tokens"]
    assert tokens_of(other.generate(PROMPTS[:1], GREEDY)) == outputs[:1]
    computed = other.stats()["computed_tokens"] - before
    assert computed == len(TAILS[0]) + GREEDY.max_tokens - 1
    assert tokens_of(other.generate(PROMPTS, PARAMS)) == outputs
    prefix.release()
    assert num_used(other) == 0


def test_a_call_for_which_the_engine_is_compiled_again_waits_for_a_stream(
    folder, llm, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    other = LLM(folder, enable_prefix_caching=False, **SIZES)
    stream = other.stream([[5, 6]], dataclasses.replace(GREEDY, max_tokens=20))
    token_ids = list(next(stream).token_ids)
    before = other.config
    (output,) = other.generate([[7]], BeamSearchParams(2, 4))
    assert other.config != before
    (expected,) = llm.generate([[7]], BeamSearchParams(2, 4))
    assert tokens_of([output]) == tokens_of([expected])
    for delta in stream:
        token_ids += delta.token_ids
    params = dataclasses.replace(GREEDY, max_tokens=20)
    assert tokens_of(llm.generate([[5, 6]], params)) == [[token_ids]]
    assert is_idle(other)
