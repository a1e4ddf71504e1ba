"""Routing: which replica gets a request, beside the rule in plain words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jpaged.serving import routing

REPLICAS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()),
    min_size=1,
    max_size=5,
)


def in_plain_words(replicas, margin):
    """The same, by sorting lists of Python."""
    open_ = [(i, *one[:2]) for i, one in enumerate(replicas) if one[2]]
    if not open_:
        return None
    lightest = min(load for _, _, load in open_)
    longest = max(hit for _, hit, _ in open_)
    wanted = sorted((load, i) for i, hit, load in open_ if hit == longest)
    load, number = wanted[0]
    if load <= lightest + margin:
        return number
    return sorted((-hit, i) for i, hit, load in open_ if load == lightest)[0][1]


@given(replicas=REPLICAS, margin=st.sampled_from([0, 1, 2.5, 10]))
def test_the_choice_is_that_of_the_rule_in_plain_words(replicas, margin):
    hits, loads, has_room = (np.array(column) for column in zip(*replicas, strict=True))
    got = routing.choose(hits, loads, has_room, margin)
    assert got == in_plain_words(replicas, margin)


def test_with_nothing_cached_requests_alternate():
    loads, nothing, everyone = np.zeros(3, int), np.zeros(3, int), np.ones(3, bool)
    got = []
    for _ in range(6):
        replica = routing.choose(nothing, loads, everyone, margin=100)
        loads[replica] += 5
        got.append(replica)
    assert got == [0, 1, 2, 0, 1, 2]
