"""Self-consistency against counting by hand."""

import collections
import dataclasses
import random

import pytest

from jpaged.decoding.contrib import self_consistency


@dataclasses.dataclass
class Output:
    text: str


def last_number(text):
    words = [word for word in text.split() if word.isdigit()]
    return words[-1] if words else None


@pytest.mark.parametrize("seed", range(5))
def test_the_vote_is_that_of_a_counter(seed):
    rng = random.Random(seed)
    texts = [f"so it is {rng.choice('12345')}" for _ in range(9)] + ["I do not know"]
    rng.shuffle(texts)
    outputs = [Output(text) for text in texts]
    # Counter.most_common keeps the order of first appearance among equals, too.
    counts = collections.Counter(text[-1] for text in texts if text[-1].isdigit())
    (answer, number), *_ = counts.most_common()
    vote = self_consistency(outputs, last_number)
    assert (vote.answer, vote.share) == (answer, number / 9)
    assert vote.outputs == [each for each in outputs if each.text[-1] == answer]


def test_there_is_no_vote_without_answers():
    assert self_consistency([Output("no"), Output("idea")], last_number) is None
    assert self_consistency([], last_number) is None
