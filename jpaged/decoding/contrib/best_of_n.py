"""Best of n: the sample that a verifier scores highest, or the answer it favours.

Source: Cobbe et al. 2021. https://arxiv.org/abs/2110.14168
The weighted vote: Li et al. 2022. https://arxiv.org/abs/2206.02336
"""

import collections
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from jpaged.validation import error, number


class Best(NamedTuple):
    """The result of `best_of_n`."""

    output: Any
    score: float
    scores: list[float]  # of all outputs, in their order
    answer: Hashable = None  # of the output; None without `answer_of`
    share: float = 1.0  # scores of outputs with this answer, as a share of all answers'


def best_of_n(
    outputs: Iterable[Any],
    score_of: Callable[[str], float],
    answer_of: Callable[[str], Hashable | None] | None = None,
) -> Best:
    """Return the output with the highest score, on ties the one that comes first.

        (request,) = llm.generate(prompt, SamplingParams(n=8))
        best = best_of_n(request.outputs, score_of)

    Args:
      outputs: outputs of a request, at least one.
      score_of: the verifier: maps a text to a finite number, larger is better.
      answer_of: maps a text to its answer, or None if it has none. With it, the answer
        whose outputs have the largest sum of scores is chosen, and the result is the
        best output with this answer. Scores must then not be negative.

    Returns:
      The output, its score, and the scores of all outputs.

    Raises:
      ValueError: there are no outputs, no output has an answer, a score is not a finite
        number, or a score is negative with `answer_of`.
    """
    outputs = list(outputs)
    if not outputs:
        raise error("outputs", "at least one output", outputs)
    low = -math.inf if answer_of is None else 0.0
    scores = [
        number(f"score_of(outputs[{i}].text)", score_of(one.text), low)
        for i, one in enumerate(outputs)
    ]
    if answer_of is None:
        at = max(range(len(scores)), key=scores.__getitem__)
        return Best(outputs[at], scores[at], scores)
    answers = [answer_of(one.text) for one in outputs]
    totals: dict[Hashable, float] = collections.defaultdict(float)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            totals[answer] += score
    if not totals:
        raise error("answer_of", "an answer in at least one output", answers)
    answer = max(totals, key=lambda one: totals[one])
    members = [i for i, one in enumerate(answers) if one == answer]
    at = max(members, key=scores.__getitem__)
    total = sum(totals.values())
    share = totals[answer] / total if total else 1.0 / len(totals)
    return Best(outputs[at], scores[at], scores, answer, share)
