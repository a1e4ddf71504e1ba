"""The order of waiting requests, compared with sorting in Python."""

import random
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import policies
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
            params=SamplingParams(priority=rng.randint(-3, 3)),
            cached=rng.randint(0, 6),
        )
        for arrival in arrivals
    ]


def cached_lens(found):
    """Two replicas; the second one has most."""
    return np.array([[0, request.cached] for request in found], np.int32)


def longest_first(waiting: policies.Waiting):
    return -waiting.prompt_lens


def least_missing(waiting: policies.Waiting):
    return waiting.prompt_lens - waiting.cached_lens


def nan_if_long(waiting: policies.Waiting):
    return jnp.where(waiting.prompt_lens > 4, jnp.nan, 1.0)


WEIGHTS = (1.0, -2.0, 0.5, 0.25, -3.0, 9.0)
SCORES = {
    "fcfs": lambda r: 0,
    "priority": lambda r: r.params.priority,
    "shortest_prompt": lambda r: len(r.prompt_token_ids),
    "longest_prefix": lambda r: -r.cached,
    "weighted": lambda r: (
        r.arrival
        - 2 * r.params.priority
        + 0.75 * len(r.prompt_token_ids)
        - 3 * r.cached
    ),
    longest_first: lambda r: -len(r.prompt_token_ids),
    least_missing: lambda r: len(r.prompt_token_ids) - r.cached,
    nan_if_long: lambda r: len(r.prompt_token_ids) > 4,
}


@pytest.mark.parametrize(
    "policy", SCORES, ids=lambda one: getattr(one, "__name__", one)
)
def test_requests_leave_the_queue_in_the_order_of_the_policy(policy):
    parameters = WEIGHTS if policy == "weighted" else ()
    queue = WaitingQueue(policy, parameters, cached_lens)
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
    def unread(found):
        raise AssertionError

    for policy, parameters in [
        (longest_first, ()),
        ("weighted", (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    ]:
        queue = WaitingQueue(policy, parameters, unread)
        for request in requests():
            queue.push(request)
        queue.order()
        assert queue.is_ordered


def test_a_score_follows_the_cache_while_requests_wait():
    queue = WaitingQueue("longest_prefix", (), cached_lens)
    first, second, *_ = requests()
    first.cached, second.cached = 5, 0
    queue.push(first)
    queue.push(second)
    queue.order()
    assert queue.peek() is first
    second.cached = 8
    queue.order()
    assert queue.peek() is second
