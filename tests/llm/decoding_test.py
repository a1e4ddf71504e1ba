"""All of SamplingParams through the LLM, beside beams and a custom algorithm.

The expected tokens come from loops over the plain forward, with the rules in numpy.
"""

import dataclasses
import math

import numpy as np
import pytest

from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.serving import batcher
from tests.engine.algorithms_test import race
from tests.support.engine.algorithms_oracle import Plain, drive, search
from tests.support.engine.full_llm import MAX_LEN, VOCAB_SIZE
from tests.support.tiny_llm import EOS, is_idle

pytestmark = pytest.mark.long

GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
PROMPT = [7, 30, 111, 222, 9]


@pytest.fixture
def llm(full_llm):
    return full_llm


@pytest.fixture(scope="module")
def free_run(oracle):
    """The greedy tokens after PROMPT without any rule."""
    tokens, _ = oracle.tokens(PROMPT, GREEDY)
    return tokens


def random_prompts(count, seed=0, longest=24):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return [rng.integers(2, VOCAB_SIZE, length).tolist() for length in lengths]


def outputs_of(output):
    return [(one.token_ids, one.finish_reason) for one in output.outputs]


# Rules. Each gets the tokens without it, so that it has something to change.

RULES = {
    "repetition_penalty": lambda run: dict(repetition_penalty=1.8),
    "repetition_reward": lambda run: dict(repetition_penalty=0.4),
    "presence_penalty": lambda run: dict(
        presence_penalty=2.0, allowed_token_ids=run[:3]
    ),
    "presence_reward": lambda run: dict(presence_penalty=-2.0),
    "frequency_penalty": lambda run: dict(
        frequency_penalty=1.5, allowed_token_ids=run[:3]
    ),
    "min_tokens": lambda run: dict(
        min_tokens=7, stop_token_ids=[run[2], run[9]], ignore_eos=False
    ),
    "logit_bias": lambda run: dict(logit_bias={run[0]: -9.0, 50: 3.5, 51: 3.4}),
    "allowed_token_ids": lambda run: dict(allowed_token_ids=range(100, 130)),
    "bad_words": lambda run: dict(bad_words=[[run[0]], run[3:5], run[5:8]]),
    "a bad word that starts in the prompt": lambda run: dict(bad_words=[[9, run[0]]]),
    "all": lambda run: dict(
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        min_tokens=3,
        logit_bias={run[1]: 1.0, run[2]: -2.0},
        allowed_token_ids=[t for t in range(VOCAB_SIZE) if t % 7],
        bad_words=[run[1:3], [run[4]]],
        stop_token_ids=[run[1]],
        ignore_eos=False,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_the_same_effect_as_in_numpy(name, llm, oracle, free_run):
    greedy = dataclasses.replace(GREEDY, **RULES[name](free_run))
    sampled = dataclasses.replace(
        greedy, n=3, temperature=0.9, top_p=0.95, seed=11, max_tokens=8
    )
    params = [greedy, sampled, GREEDY]
    outputs = llm.generate([PROMPT] * 3, params)
    for param, output in zip(params, outputs, strict=True):
        expected = [oracle.tokens(PROMPT, param, number=i) for i in range(param.n)]
        assert outputs_of(output) == expected
    # The request beside it has no rule, and the rule changes tokens.
    assert outputs_of(outputs[2]) == [(free_run, "length")]
    changes = outputs_of(outputs[0]) != [(free_run, "length")]
    assert changes == (name != "a bad word that starts in the prompt")


def test_bad_words_of_text_are_never_generated(llm, oracle, free_run):
    pieces = [oracle.pieces[token] for token in free_run]
    words = [pieces[0][0], pieces[3]]
    params = SamplingParams(n=4, seed=3, max_tokens=12, bad_words=words)
    (output,) = llm.generate([PROMPT], params)

    def is_allowed(token_ids):
        """Which tokens may follow: none after which a word is in the text."""
        text = "".join(oracle.pieces[token] for token in token_ids)
        texts = [text + piece for piece in oracle.pieces]
        is_end = np.isin(np.arange(VOCAB_SIZE), EOS)
        return is_end | [not any(word in t for word in words) for t in texts]

    free = dataclasses.replace(params, bad_words=())
    expected = [
        oracle.tokens(PROMPT, free, number=i, mask=is_allowed) for i in range(4)
    ]
    assert outputs_of(output) == expected
    assert words[1] in oracle.pieces  # a token of its own, and parts of others
    assert not any(word in sample.text for sample in output.outputs for word in words)


def test_bad_words_apply_within_structured_output_and_with_ignored_eos(llm, oracle):
    regex = StructuredOutputsParams(regex="[a-c]{6}")
    params = SamplingParams(seed=1, max_tokens=12, bad_words=["ab", "c"])
    both = dataclasses.replace(params, structured_outputs=regex)
    ignored = dataclasses.replace(params, ignore_eos=True)
    constrained, free = llm.generate([PROMPT] * 2, [both, ignored])
    text = constrained.outputs[0].text
    assert len(text) == 6
    assert set(text) <= set("ab")
    assert "ab" not in text
    assert len(free.outputs[0].token_ids) == 12
    assert not any(word in free.outputs[0].text for word in ("ab", "c"))
    impossible = dataclasses.replace(both, bad_words=["a", "b", "c"])
    with pytest.raises(ValueError, match="bad_words: expected strings that leave"):
        llm.generate([PROMPT], impossible)


def test_the_text_can_include_what_ended_it(llm, oracle, free_run):
    pieces = [oracle.pieces[token] for token in free_run]
    text = "".join(pieces)
    stop = pieces[2] + pieces[3]
    string = dataclasses.replace(GREEDY, stop=[stop], include_stop_str_in_output=True)
    token = dataclasses.replace(
        GREEDY, stop_token_ids=free_run[4:5], include_stop_str_in_output=True
    )
    first, second = llm.generate([PROMPT] * 2, [string, token])
    assert first.outputs[0].text == text[: text.index(stop) + len(stop)]
    assert first.outputs[0].stop_reason == stop
    end = free_run.index(free_run[4]) + 1
    assert second.outputs[0].text == "".join(pieces[:end])
    assert second.outputs[0].stop_reason == free_run[4]
    deltas = list(llm.stream([PROMPT], string))
    assert "".join(delta.text for delta in deltas) == first.outputs[0].text


def test_a_stop_string_that_is_a_special_token_ends_the_text(llm, free_run):
    # The prompt's most probable token becomes "<s>", which the text leaves out.
    bias = {0: 1000.0}
    after_two = dataclasses.replace(GREEDY, logit_bias=bias, min_tokens=0, stop=["<s>"])
    (output,) = llm.generate([PROMPT], after_two)
    sample = output.outputs[0]
    assert (sample.token_ids, sample.text) == ([0], "")
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "<s>")
    shown = dataclasses.replace(
        GREEDY, logit_bias=bias, skip_special_tokens=False, max_tokens=2
    )
    (output,) = llm.generate([PROMPT], shown)
    assert output.outputs[0].text == "<s><s>"


def test_stop_strings_are_ignored_before_min_tokens(llm, oracle, free_run):
    pieces = [oracle.pieces[token] for token in free_run]
    text = "".join(pieces)
    early, late = pieces[2] + pieces[3], pieces[9] + pieces[10]
    assert text.count(early) == text.count(late) == 1
    params = dataclasses.replace(GREEDY, min_tokens=7)
    params = [dataclasses.replace(params, stop=[early, s]) for s in (late, "none")]
    first, second = llm.generate([PROMPT] * 2, params)
    (sample,) = first.outputs
    assert sample.token_ids == free_run[:11]
    assert (sample.text, sample.stop_reason) == (text[: text.index(late)], late)
    assert outputs_of(second) == [(free_run, "length")]
    assert second.outputs[0].text == text
    (output,) = llm.generate([PROMPT], dataclasses.replace(GREEDY, stop=[early]))
    assert len(output.outputs[0].token_ids) == 4


def test_a_seed_gives_the_same_tokens_beside_any_requests(llm):
    params = SamplingParams(n=2, seed=5, temperature=1.1, max_tokens=10, min_tokens=4)
    (alone,) = llm.generate([PROMPT], params)
    others = [BeamSearchParams(4, 9), GREEDY, dataclasses.replace(params, seed=6)]
    outputs = llm.generate([*random_prompts(3), PROMPT], [*others, params])
    assert outputs_of(outputs[3]) == outputs_of(alone)
    (other,) = llm.generate([PROMPT], dataclasses.replace(params, seed=6))
    assert outputs_of(other) != outputs_of(alone)


# Log-probabilities


def check_entries(found, row, token, count, tokenizer):
    likely = np.argsort(-row, kind="stable")[: count if count >= 0 else None].tolist()
    assert set(found) == {*likely, token}
    assert next(iter(found)) == token
    for other, entry in found.items():
        assert math.isclose(entry.logprob, row[other], abs_tol=1e-4)
        # Some of 300 tokens differ by less than the error of float32.
        above = (row > row[other] + 1e-4).sum()
        assert above < entry.rank <= 1 + (row > row[other] - 1e-4).sum()
        assert entry.decoded_token == tokenizer.decoded_token(other)


@pytest.mark.parametrize("count", [0, 3, -1])
def test_logprobs_are_the_models_own_with_any_rules_and_temperature(count, llm, oracle):
    params = SamplingParams(
        n=2, seed=2, temperature=1.7, top_k=50, max_tokens=6, logprobs=count,
        repetition_penalty=1.5, logit_bias={8: 5.0}, bad_words=[[9]],
    )  # fmt: skip
    (output,) = llm.generate([PROMPT], params)
    for sample in output.outputs:
        rows = oracle.logprobs([*PROMPT, *sample.token_ids])[len(PROMPT) - 1 :]
        total = 0.0
        for row, token, found in zip(
            rows, sample.token_ids, sample.logprobs, strict=False
        ):
            check_entries(found, row, token, count, llm.tokenizer)
            total += row[token]
        assert len(sample.logprobs) == len(sample.token_ids)
        assert math.isclose(sample.cumulative_logprob, total, abs_tol=1e-3)


def check_prompt(output, prompt, count, oracle, tokenizer):
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    rows = oracle.logprobs(prompt)
    for row, token, found in zip(
        rows, prompt[1:], output.prompt_logprobs[1:], strict=False
    ):
        check_entries(found, row, token, count, tokenizer)


@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs_are_those_of_the_plain_forward(count, llm, oracle):
    # One token, a few tokens, and more tokens than three steps compute.
    prompts = [[40], *random_prompts(3, seed=4), list(range(100, 150))]
    params = SamplingParams(max_tokens=2, seed=0, prompt_logprobs=count)
    params = [
        params,
        *[dataclasses.replace(params, n=1 + i) for i in (0, 1, 2)],
        params,
    ]
    outputs = llm.generate([*prompts, PROMPT], [*params, GREEDY])
    for prompt, output in zip(prompts, outputs, strict=False):
        check_prompt(output, prompt, count, oracle, llm.tokenizer)
        assert all(sample.logprobs is None for sample in output.outputs)
    assert outputs[-1].prompt_logprobs is None


def test_prompt_logprobs_survive_preemption(llm, oracle):
    prompts = random_prompts(10, seed=9, longest=30)
    params = SamplingParams(
        n=2, max_tokens=25, seed=0, prompt_logprobs=1, logprobs=1, ignore_eos=True
    )
    before = llm.stats()["num_preemptions"]
    outputs = llm.generate(prompts, params)
    assert llm.stats()["num_preemptions"] > before
    for prompt, output in zip(prompts, outputs, strict=True):
        check_prompt(output, prompt, 1, oracle, llm.tokenizer)
        expected = [oracle.tokens(prompt, params, number=i) for i in range(2)]
        assert outputs_of(output) == expected


# All kinds of requests in one call


def mixed_load(free_run):
    prompts = random_prompts(10, seed=12)
    kinds = [
        GREEDY,
        BeamSearchParams(4, 8, num_return=2),
        SamplingParams(n=3, seed=1, max_tokens=9, frequency_penalty=1.0, stop="e"),
        AlgorithmParams(race, 4, max_tokens=8, seed=4, ignore_eos=True),
        BeamSearchParams(7, 6, early_stopping="never", length_penalty=0.3),
    ]
    return prompts, [kinds[i % len(kinds)] for i in range(len(prompts))]


def test_all_kinds_in_one_call_match_their_references_and_compile_nothing(
    llm, oracle, free_run
):
    compiled = llm.stats()["num_compilations"]
    plain = Plain(llm.model, MAX_LEN)
    prompts, params = mixed_load(free_run)
    outputs = llm.generate(prompts, params)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        if isinstance(param, BeamSearchParams):
            ends = dataclasses.replace(param, stop_token_ids=EOS)
            expected = search(plain, prompt, ends)[: param.num_return]
            assert outputs_of(output) == [(one.tokens, one.reason) for one in expected]
            for sample, one in zip(output.outputs, expected, strict=True):
                score = one.logprob / len(one.tokens) ** param.length_penalty
                assert math.isclose(sample.score, score, abs_tol=1e-4)
        elif isinstance(param, AlgorithmParams):
            expected, _ = drive(plain, prompt, param)
            assert outputs_of(output) == [(one.tokens, one.reason) for one in expected]
            assert all(sample.score is None for sample in output.outputs)
        else:
            for sample in output.outputs:
                tokens, reason = oracle.tokens(prompt, param, number=sample.index)
                assert sample.token_ids == tokens[: len(sample.token_ids)]
                assert sample.finish_reason == reason or sample.stop_reason == "e"
        assert [sample.index for sample in output.outputs] == list(
            range(len(output.outputs))
        )
    assert is_idle(llm)
    llm.generate(prompts[::-1], params[::-1])
    assert llm.stats()["num_compilations"] == compiled


def test_the_deltas_of_a_stream_with_beams_equal_the_outputs_of_generate(
    llm, free_run, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    prompts, params = mixed_load(free_run)
    expected = llm.generate(prompts, params)
    text, token_ids, ends, counts = {}, {}, {}, {}
    for delta in llm.stream(prompts, params):
        key = (delta.request, delta.sample)
        assert key not in ends
        counts[key] = counts.get(key, 0) + 1
        text[key] = text.get(key, "") + delta.text
        token_ids[key] = token_ids.get(key, []) + delta.token_ids
        if delta.finish_reason is not None:
            ends[key] = (delta.finish_reason, delta.stop_reason)
    for i, output in enumerate(expected):
        for sample in output.outputs:
            key = (i, sample.index)
            assert (text[key], token_ids[key]) == (sample.text, sample.token_ids)
            assert ends[key] == (sample.finish_reason, sample.stop_reason)
            # The best beams are only known at the end; samples are streamed.
            if not isinstance(params[i], SamplingParams):
                assert counts[key] == 1
    assert max(counts.values()) > 3
    assert len(ends) == sum(len(output.outputs) for output in expected)
    assert is_idle(llm)


def test_invalid_requests_return_their_error_while_the_others_run(llm, free_run):
    invalid = [
        (BeamSearchParams(9, 4), r"beam_width: expected at most max_num_seqs (8)"),
        (AlgorithmParams(race, 12), "num_rows: expected at most max_num_seqs (8)"),
        (SamplingParams(logit_bias={999: 1}), "token ids below the model's vocab_size"),
        (SamplingParams(prompt_logprobs=400), "at most max_logprobs (300), got 400"),
        (SamplingParams(bad_words=[[5, 300]]), "bad_words: expected token ids below"),
        (BeamSearchParams(8, 60), "in each of 8 rows need"),
    ]
    params = [GREEDY, *(param for param, _ in invalid)]
    before = llm.stats()
    with pytest.raises(ValueError, match="6 of 7 requests are invalid, none was run"):
        llm.generate([PROMPT] * 7, params)
    assert llm.stats()["num_steps"] == before["num_steps"]
    assert [error is None for error in llm.check([PROMPT] * 7, params)] == (
        [True] + [False] * 6
    )
    valid, *others = llm.generate([PROMPT] * 7, params, on_error="return")
    assert outputs_of(valid) == [(free_run, "length")]
    for output, (_, message) in zip(others, invalid, strict=True):
        assert message in output.error
        assert output.outputs == []
    assert llm.stats()["num_compilations"] == before["num_compilations"]
    assert is_idle(llm)
