"""Self-consistency: the answer that most of several samples give.

Source: Wang et al. 2022. https://arxiv.org/abs/2203.11171
"""

import collections
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple


class Vote(NamedTuple):
    """The result of `self_consistency`."""

    answer: Hashable
    share: float  # of the samples that have an answer
    outputs: list[Any]  # those with this answer


def self_consistency(
    outputs: Iterable[Any], answer_of: Callable[[str], Hashable | None]
) -> Vote | None:
    """Return the most frequent answer, on ties the one that comes first.

    Args:
      outputs: outputs of a request, such as those of `SamplingParams(n=8)`.
      answer_of: maps a text to its answer, or None if it has none.

    Returns:
      None if no text has an answer.
    """
    found: dict[Hashable, list[Any]] = collections.defaultdict(list)
    for output in outputs:
        answer = answer_of(output.text)
        if answer is not None:
            found[answer].append(output)
    if not found:
        return None
    answer = max(found, key=lambda one: len(found[one]))
    total = sum(map(len, found.values()))
    return Vote(answer, len(found[answer]) / total, found[answer])
