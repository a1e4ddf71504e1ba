"""Routing: the chosen replica against a second implementation of the rule."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jpaged.serving import routing

REPLICAS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()),
    min_size=1,
    max_size=5,
)


def choose_by_sorting(replicas, margin):
    """The same rule, on Python lists."""
    able = [
        (i, cached, load)
        for i, (cached, load, is_able) in enumerate(replicas)
        if is_able
    ]
    if not able:
        return None
    lightest = min(load for _, _, load in able)
    longest = max(cached for _, cached, _ in able)
    load, index = min((load, i) for i, cached, load in able if cached == longest)
    if load <= lightest + margin:
        return index
    return min((-cached, i) for i, cached, load in able if load == lightest)[1]


@given(replicas=REPLICAS, margin=st.sampled_from([0, 1, 2.5, 10]))
def test_the_choice_is_that_of_the_second_implementation(replicas, margin):
    columns = (np.array(column) for column in zip(*replicas, strict=True))
    got = routing.choose_replica(*columns, margin)
    assert got == choose_by_sorting(replicas, margin)


def test_without_cached_prefixes_requests_alternate():
    loads, cached, has_capacity = np.zeros(3, int), np.zeros(3, int), np.ones(3, bool)
    got = []
    for _ in range(6):
        replica = routing.choose_replica(cached, loads, has_capacity, margin=100)
        loads[replica] += 5
        got.append(replica)
    assert got == [0, 1, 2, 0, 1, 2]
