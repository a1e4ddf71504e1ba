"""The runner `draft_trees`: drafts and steps of texts that are known."""

import pytest

from experiments import draft_trees
from tests.support.runners import call_experiment, last_json


def test_drafts_continue_earlier_occurrences():
    known = [5, 6, 7, 8, 5, 6, 9, 5, 6]
    assert draft_trees.drafts(known, 1, 2) == [(9, 5)]
    assert draft_trees.drafts(known, 2, 2) == [(9, 5), (7, 8)]
    assert draft_trees.drafts(known, 8, 1) == [(9,), (7,)]
    assert draft_trees.drafts([1, 2, 3], 4, 2) == []
    assert draft_trees.drafts([4, 4], 4, 2) == [(4,)]


def test_steps_of_a_known_text():
    # After 5, 6 the last occurrence drafts 9, 5; the one before drafts 7, 8.
    prompt, text = [5, 6, 7, 8, 5, 6, 9, 5, 6], [7, 8, 3]
    chain = draft_trees.count_steps(prompt, text, 1, 2)
    tree = draft_trees.count_steps(prompt, text, 2, 2)
    assert (chain.num_tokens, chain.num_steps) == (3, 2)  # 7, then 8 and 3
    assert (tree.num_tokens, tree.num_steps) == (3, 1)
    assert (tree.num_row_tokens, tree.num_nodes) == (4, 4)
    shared = draft_trees.count_steps([1, 2, 3, 1, 2, 4, 1], [2, 3], 2, 2)
    assert (shared.num_row_tokens, shared.num_nodes) == (4, 3)  # 2 4 and 2 3


@pytest.mark.long
def test_a_small_run_has_more_tokens_per_step_with_more_branches():
    status, out, err = call_experiment("draft_trees", "--max_tokens=24")
    assert status == 0, err
    found = last_json(out)["details"]["branches"]
    rates = [row["tokens_per_step"] for row in found.values()]
    assert list(found) == ["1", "2", "4", "8"]
    assert 1 <= rates[0] <= rates[-1]
