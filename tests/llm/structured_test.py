"""Structured outputs through the LLM: sampled, greedy and beams in one batch.

The expected tokens come from a loop over the plain forward that checks for each token
whether a text of the constraint can still start that way.
"""

import dataclasses
import json
import re

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
from tests.support.engine.algorithms_oracle import Plain
from tests.support.engine.full_llm import (
    CHOICES,
    CONSTRAINTS,
    MAX_LEN,
    REGEX,
)
from tests.support.tiny_llm import EOS, is_idle

pytestmark = pytest.mark.long

PROMPTS = [[7, 30, 111], [9], [222, 3, 14, 15, 92, 65, 35, 89, 79]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=50)


@pytest.fixture
def llm(full_llm):
    return full_llm


def is_valid(name, text):
    if name == "regex":
        return re.fullmatch(REGEX, text) is not None
    if name == "choice":
        return text in CHOICES
    if name == "one letter":
        return text == "a"
    found = json.loads(text)
    return (
        set(found) == {"ok", "a", "b"}
        and isinstance(found["ok"], bool)
        and found["a"] in ("ab", "xyz", 7)
        and len(found["b"]) <= 2
        and all(isinstance(item, bool) for item in found["b"])
    )


def test_all_kinds_of_requests_generate_texts_of_their_constraints(llm):
    compiled = llm.stats()["num_compilations"]
    names = ["json", "regex", "choice"]
    kinds = [
        dataclasses.replace(GREEDY, max_tokens=42),
        SamplingParams(n=4, seed=3, max_tokens=42),
        SamplingParams(n=2, seed=8, temperature=3.0, top_k=40, max_tokens=42),
        BeamSearchParams(4, 42),
        BeamSearchParams(3, 42, length_penalty=2.0, early_stopping=True),
        AlgorithmParams(race, 4, max_tokens=42, seed=1),
    ]
    cases = [(name, kind) for kind in kinds for name in names]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(cases))]
    params = [
        dataclasses.replace(kind, structured_outputs=CONSTRAINTS[name])
        for name, kind in cases
    ]
    free = dataclasses.replace(GREEDY, max_tokens=12, ignore_eos=True)
    alone = llm.generate([PROMPTS[0]], free)[0].outputs[0].token_ids
    outputs = llm.generate([*prompts, PROMPTS[0]], [*params, free])
    texts = set()
    for (name, kind), output in zip(cases, outputs, strict=False):
        for sample in output.outputs:
            if kind.__class__ is AlgorithmParams:
                # The algorithm also ends rows within a text.
                continue
            assert sample.finish_reason == "stop"
            assert sample.token_ids[-1] in EOS
            assert is_valid(name, sample.text), (name, sample.text)
            texts.add(sample.text)
    assert len(texts) > 12
    # The request beside them is unconstrained.
    assert outputs[-1].outputs[0].token_ids == alone
    assert llm.stats()["num_compilations"] == compiled
    assert is_idle(llm)


def test_tokens_are_those_of_a_loop_that_checks_each_token(llm, oracle):
    sampled = SamplingParams(n=3, seed=4, temperature=1.5, max_tokens=20)
    for kind in (GREEDY, sampled):
        params = dataclasses.replace(kind, structured_outputs=CONSTRAINTS["choice"])
        outputs = llm.generate(PROMPTS, params)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            for sample in output.outputs:
                expected = oracle.tokens(
                    prompt, kind, number=sample.index, mask=oracle.choice_mask(CHOICES)
                )
                assert (sample.token_ids, sample.finish_reason) == expected


@pytest.mark.parametrize("width", [1, 3, 8])
def test_beams_are_those_of_a_slow_search_over_the_allowed_tokens(width, llm, oracle):
    params = BeamSearchParams(
        width, 12, structured_outputs=CONSTRAINTS["choice"], early_stopping="never"
    )
    outputs = llm.generate(PROMPTS, params)
    mask, plain = oracle.choice_mask(CHOICES), Plain(llm.model, MAX_LEN)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = constrained_search(plain, prompt, params, mask)
        assert [sample.token_ids for sample in output.outputs] == expected


def constrained_search(plain, prompt, params, mask):
    from tests.support.beam_oracle import SlowBeams

    def logprobs_of(prefixes):
        found = plain([[*prompt, *prefix] for prefix in prefixes])
        allowed = np.stack([mask(list(prefix)) for prefix in prefixes])
        return np.where(allowed, found, -np.inf)

    found = SlowBeams(
        width=params.beam_width,
        max_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        stop_ids=EOS,
    ).run(logprobs_of)
    return [list(tokens) for _, tokens in found]


def test_beams_without_a_text_of_the_constraint_end_as_dead_ends(llm):
    # The letter followed by one of the EOS tokens: there are no other outputs.
    params = BeamSearchParams(8, 12, structured_outputs=CONSTRAINTS["one letter"])
    (output,) = llm.generate([PROMPTS[0]], params)
    real, rest = output.outputs[: len(EOS)], output.outputs[len(EOS) :]
    assert {tuple(sample.token_ids[1:]) for sample in real} == {(t,) for t in EOS}
    assert all(sample.text == "a" for sample in real)
    assert [sample.score for sample in real] == sorted(
        (sample.score for sample in real), reverse=True
    )
    assert len(rest) == 8 - len(EOS)
    for sample in rest:
        assert (sample.token_ids, sample.text) == ([], "")
        assert (sample.finish_reason, sample.score) == ("dead_end", None)
    assert is_idle(llm)


def id_of(llm, text):
    (token,) = llm.tokenizer.encode(text)
    return token


def dead_ends(llm, oracle):
    """Rules that contradict the constraint after a different number of tokens."""
    y, e, oh = id_of(llm, "y"), id_of(llm, "e"), oracle.pieces.index("ev")
    choice = CONSTRAINTS["choice"]
    return [
        dict(allowed_token_ids=[id_of(llm, "5")], structured_outputs=choice),
        dict(allowed_token_ids=[y, e], structured_outputs=choice),
        dict(
            allowed_token_ids=[y, e, oh],
            bad_words=[[y, e], [e], [oh, e]],
            structured_outputs=choice,
        ),
    ]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_dead_end_ends_its_request_with_a_reason_and_the_others_continue(
    is_streamed, llm, oracle, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    mask = oracle.choice_mask(CHOICES)
    ends = [
        SamplingParams(n=n, seed=n, max_tokens=9, **fields)
        for fields in dead_ends(llm, oracle)
        for n in (1, 3)
    ]
    free = dataclasses.replace(GREEDY, max_tokens=15, ignore_eos=True)
    params = [free, *ends, BeamSearchParams(2, 6)]
    prompts = [PROMPTS[i % 3] for i in range(len(params))]
    alone = llm.generate([prompts[0], prompts[-1]], [params[0], params[-1]])
    if is_streamed:
        found = {}
        for delta in llm.stream(prompts, params):
            tokens, _ = found.get((delta.request, delta.sample), ([], None))
            entry = ([*tokens, *delta.token_ids], delta.finish_reason)
            found[delta.request, delta.sample] = entry
        outputs = [
            [found[i, j] for j in range(getattr(param, "n", 2))]
            for i, param in enumerate(params)
        ]
    else:
        outputs = [
            [(sample.token_ids, sample.finish_reason) for sample in output.outputs]
            for output in llm.generate(prompts, params)
        ]
    for prompt, param, output in zip(prompts[1:], ends, outputs[1:], strict=False):
        expected = [
            oracle.tokens(prompt, param, number=i, mask=mask) for i in range(param.n)
        ]
        assert output == expected
        assert {reason for _, reason in output} == {"dead_end"}
    assert {len(tokens) for output in outputs[1:-1] for tokens, _ in output} >= {0, 1}
    for output, one in zip((outputs[0], outputs[-1]), alone, strict=True):
        assert output == [(s.token_ids, s.finish_reason) for s in one.outputs]
    assert is_idle(llm)
    assert llm.stats()["num_free_blocks"] == llm.stats()["num_blocks"]


def test_more_constraints_than_the_pool_holds_run_one_after_the_other(llm):
    words = ["a", "ba", "hot", "old", "dad", "cat", "fee", "bee", "sad", "hat", "lad"]
    params = [
        SamplingParams(
            seed=i, max_tokens=9, structured_outputs=StructuredOutputsParams(choice=[w])
        )
        for i, w in enumerate(words)
    ]
    assert len(words) > llm.config.automata.num_automata
    for _ in range(2):
        for word, param in zip(words, params, strict=True):
            (output,) = llm.generate([PROMPTS[0]], param)
            assert output.outputs[0].text == word
    assert len(words) > llm.config.automata.num_automata


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (dict(regex="(ab"), "regex"),
        (dict(choice=["né"]), r"choice\[0\]: expected a text that the model's tokens"),
        (dict(regex="[N]n"), "the constraint cannot be met"),
        (dict(json={"type": "tuple"}), "json"),
        (dict(choice=["a" * 60]), r"max_tokens: expected at least"),
    ],
)
def test_an_impossible_constraint_is_refused_before_any_step_runs(params, match, llm):
    steps = llm.stats()["num_steps"]
    constraint = StructuredOutputsParams(**params)
    for kind in (
        SamplingParams(max_tokens=9, structured_outputs=constraint),
        BeamSearchParams(2, 9, structured_outputs=constraint),
        AlgorithmParams(race, 4, max_tokens=9, structured_outputs=constraint),
    ):
        with pytest.raises(ValueError, match=match):
            llm.generate([PROMPTS[0]], kind)
    assert llm.stats()["num_steps"] == steps
