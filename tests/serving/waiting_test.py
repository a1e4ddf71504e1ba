"""The order of waiting requests, compared with sorting in Python."""

import random
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import policies
from jpaged.config import EngineConfig
from jpaged.engine import request_attributes
from jpaged.params import SamplingParams
from jpaged.serving.waiting import WaitingQueue

NUMBER = 13


def requests(seed=0):
    """Requests with random lengths and priorities, in a random order of arrival."""
    rng = random.Random(seed)
    arrivals = rng.sample(range(100), NUMBER)
    return [
        types.SimpleNamespace(
            arrival=arrival,
            prompt_token_ids=[1] * rng.randint(1, 9),
            params=SamplingParams(
                priority=rng.randint(-3, 3),
                max_tokens=rng.randint(1, 9),
                deadline_ms=rng.choice([None, rng.randint(0, 900)]),
                user=rng.choice([None, 1, "ada"]),
            ),
            cached=rng.randint(0, 6),
            submitted_s=rng.choice([9.5, 9.75]),
        )
        for arrival in arrivals
    ]


class FakeHost:
    """An engine at 10 s with two replicas; the second one caches most."""

    def cached_lens(self, found):
        return np.array([[0, request.cached] for request in found], np.int32)

    def user_tokens(self):
        return {1: 5, request_attributes.user_number("ada"): 3}

    def time_s(self):
        return 10.0


def queue_of(policy, parameters=(), host=None):
    config = EngineConfig(num_blocks=4, policy=policy, policy_parameters=parameters)
    return WaitingQueue(config, host or FakeHost())


def longest_first(waiting: policies.Waiting):
    return -waiting.prompt_lens


def least_missing(waiting: policies.Waiting):
    return waiting.prompt_lens - waiting.cached_lens


def by_user_tokens(waiting: policies.Waiting):
    return waiting.user_tokens


# The check of a policy has prompts of at most 8 tokens.
def nan_if_long(waiting: policies.Waiting):
    return jnp.where(waiting.prompt_lens > 8, jnp.nan, 1.0)


WEIGHTS = (1.0, -2.0, 0.5, 0.25, -3.0, 9.0)
SCORES = {
    "fcfs": lambda r: 0,
    "priority": lambda r: r.params.priority,
    "shortest_prompt": lambda r: len(r.prompt_token_ids),
    "longest_prefix": lambda r: -r.cached,
    "shortest_job": lambda r: r.params.max_tokens,
    "feedback": lambda r: 0,
    "earliest_deadline": lambda r: (
        float("inf")
        if r.params.deadline_ms is None
        else r.params.deadline_ms + r.submitted_s * 1000
    ),
    by_user_tokens: lambda r: {None: 0, 1: 5, "ada": 3}[r.params.user],
    "weighted": lambda r: (
        r.arrival
        - 2 * r.params.priority
        + 0.75 * len(r.prompt_token_ids)
        - 3 * r.cached
    ),
    longest_first: lambda r: -len(r.prompt_token_ids),
    least_missing: lambda r: len(r.prompt_token_ids) - r.cached,
    nan_if_long: lambda r: len(r.prompt_token_ids) > 8,
}


@pytest.mark.parametrize(
    "policy", SCORES, ids=lambda one: getattr(one, "__name__", one)
)
def test_requests_leave_the_queue_in_the_order_of_the_policy(policy):
    parameters = WEIGHTS if policy == "weighted" else ()
    queue = queue_of(policy, parameters)
    given = requests()
    score = SCORES[policy]
    expected = sorted(given, key=lambda r: (score(r), r.arrival))
    for request in given[:-1]:
        queue.push(request)
    queue.order()
    queue.push(given[-1])  # one that comes later
    queue.order()
    assert len(queue) == NUMBER
    assert {r.arrival for r in queue} == {r.arrival for r in given}
    assert queue.first(4) == expected[:4]
    found = []
    while queue.is_ordered:
        found.append(queue.peek())
        assert queue.pop() is found[-1]
    assert [r.arrival for r in found] == [r.arrival for r in expected]
    assert len(queue) == 0


def test_the_cache_is_only_read_for_policies_that_need_it():
    class Unread:
        """An engine that must not be asked."""

    for policy, parameters in [
        (longest_first, ()),
        ("weighted", (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    ]:
        queue = queue_of(policy, parameters, Unread())
        for request in requests():
            queue.push(request)
        queue.order()
        assert queue.is_ordered


def test_a_score_follows_the_cache_while_requests_wait():
    queue = queue_of("longest_prefix")
    first, second, *_ = requests()
    first.cached, second.cached = 5, 0
    queue.push(first)
    queue.push(second)
    queue.order()
    assert queue.peek() is first
    second.cached = 8
    queue.order()
    assert queue.peek() is second
