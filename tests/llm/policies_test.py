"""Policies of an LLM: they change the order of requests, and no token."""

import dataclasses

import pytest

from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.policies import YIELD
from jpaged.serving import engine_host
from tests.support.tiny_llm import GREEDY, SIZES, random_prompts, tokens_of

pytestmark = pytest.mark.long


def test_no_policy_changes_a_token(decoder, naive):
    llm = LLM(
        decoder,
        policy="fair_share",
        preemption_policy="feedback",
        preemption_parameters=(3.0, 9.0),
        eviction_policy="gdsf",
        budget_policy="fair_split",
        check_invariants=True,
        **SIZES | {"max_num_seqs": 2},
    )
    prompts = random_prompts(6, seed=5, longest=12)
    # Some wait for a prefix that another one computes.
    prompts = [[4] * 9 * (i % 2) + prompt for i, prompt in enumerate(prompts)]
    params = [
        dataclasses.replace(GREEDY, max_tokens=14, user=user)
        for user in ("ada", "ada", "ada", "bob", 7, None)
    ]
    outputs = llm.generate(prompts, params)
    assert tokens_of(outputs) == [[naive(prompt, 14)] for prompt in prompts]
    # Requests of lower levels gave back their rows, although there were enough blocks.
    assert llm.stats()["num_preemptions"] > 0
    ended = [max(event.time_s for event in output.events) for output in outputs]
    assert ended[3] < max(ended[:3])  # bob need not wait for all of ada's requests


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("shortest_job", [7, 8, 5, 6]),
        ("earliest_deadline", [8, 5, 6, 7]),
        ("fair_share", [5, 7, 8, 6]),
        (lambda requests: -requests.ages, [5, 6, 7, 8]),
    ],
)
def test_requests_on_the_host_have_the_order_of_the_policy(
    decoder, monkeypatch, policy, order
):
    llm = LLM(decoder, policy=policy, **SIZES)
    fields = [
        dict(max_tokens=9, deadline_ms=9000, user="ada"),
        dict(max_tokens=12, user="ada"),
        dict(max_tokens=3, user="bob"),
        dict(max_tokens=4, deadline_ms=100, user=5),
    ]
    submitted = []

    def submit(self, requests):
        (own,) = requests  # of the only replica
        submitted.extend(request.prompt_token_ids[0] for request in own)
        raise KeyboardInterrupt

    # No step runs: other tests check the order within the engine.
    monkeypatch.setattr(engine_host.EngineHost, "submit", submit)
    monkeypatch.setattr(engine_host.EngineHost, "prepare", lambda *requests: True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(
            [[5] * 2, [6] * 3, [7], [8] * 4],
            [SamplingParams(temperature=0.0, **one) for one in fields],
        )
    assert submitted == order


def test_a_bad_policy_is_refused_when_the_llm_is_made(decoder):
    def wrong_shape(rows):
        return rows.remaining[:1]

    with pytest.raises(ValueError, match=r"budget_policy: expected an integer for eac"):
        LLM(decoder, budget_policy=wrong_shape, **SIZES)
    with pytest.raises(ValueError, match="preemption_parameters"):
        LLM(decoder, preemption_parameters=3, **SIZES)
    with pytest.raises(ValueError, match="deadline_ms: expected an integer of at lea"):
        SamplingParams(deadline_ms=-1)
    for user in ("", True, 2**31, 1.5):
        with pytest.raises(ValueError, match="user: expected"):
            SamplingParams(user=user)
    assert YIELD == float("inf")
