"""The runner `decoding_zoo`: its measures on known texts, and a small run."""

import csv
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import decoding_zoo
from tests.support.runners import call_experiment, last_json


def test_measures_of_known_texts():
    assert decoding_zoo.repetition([1, 2, 3, 1, 2, 3, 1], 3) == 1 - 3 / 5
    assert decoding_zoo.repetition([1], 3) == 0
    assert decoding_zoo.distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3
    outputs = [
        SimpleNamespace(token_ids=[4, 4, 4, 4, 4], cumulative_logprob=math.log(0.5)),
        SimpleNamespace(token_ids=[1, 2, 3, 4, 5], cumulative_logprob=math.log(0.02)),
    ]
    found = decoding_zoo.quality(outputs)
    assert abs(found["perplexity"] - 0.01 ** (-1 / 10)) < 1e-9
    assert found["repetition"] == (0.5 + 0) / 2
    assert abs(found["diversity"] - (1 / 4 * 1 / 3 * 1 / 2 + 1) / 2) < 1e-9
    assert found["distinct_2"] == 5 / 8


@pytest.mark.long
def test_a_small_run_writes_a_table(tmp_path):
    methods = "greedy,sampling,best_of_n,tree_search"
    arguments = (f"--methods={methods}", "--max_tokens=8", f"--out={tmp_path}")
    status, out, err = call_experiment("decoding_zoo", *arguments)
    assert status == 0, err
    found = last_json(out)["details"]["methods"]
    assert list(found) == methods.split(",")
    assert found["greedy"]["perplexity"] < found["sampling"]["perplexity"]
    assert found["best_of_n"]["repetition"] <= found["sampling"]["repetition"]
    # Each token of a tree needs steps, and its nodes copy their last blocks.
    assert found["tree_search"]["steps"] > found["greedy"]["steps"]
    assert found["tree_search"]["block_copies"] > 0
    with (tmp_path / "zoo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == methods.split(",")
    assert float(rows[0]["diversity"]) == found["greedy"]["diversity"]


def test_the_potential_penalises_recent_tokens():
    state, gains = np.full((16,), -1, np.int32), []
    for token in (5, 6, 5, *range(20, 36), 6):
        state, gain = decoding_zoo.fresh_potential(jnp.asarray(state), jnp.int32(token))
        gains.append(float(gain))
    assert gains == [0, 0, -2, *[0] * 16, 0]


@pytest.mark.long
def test_particles_budgets_and_a_draft_model_that_is_the_model_itself():
    methods = "greedy,contrastive_decoding,smc,twisted_smc,thinking_budget,watermark"
    arguments = (f"--methods={methods}", "--max_tokens=6", "--prompt=def ")
    status, out, err = call_experiment(
        "decoding_zoo", *arguments, "--draft=tiny-python"
    )
    assert status == 0, err
    found = last_json(out)["details"]["methods"]
    assert list(found) == methods.split(",")
    # A model that is contrasted with itself keeps its scores.
    names = ("perplexity", "distinct_2", "diversity")
    for name in names:
        own, other = found["contrastive_decoding"][name], found["greedy"][name]
        assert abs(own - other) < 1e-3
    # A line break in the middle of a statement is improbable.
    assert found["thinking_budget"]["perplexity"] > found["greedy"]["perplexity"]


def test_the_draft_model_is_asked_for():
    status, _, err = call_experiment("decoding_zoo", "--methods=contrastive_decoding")
    assert status == 1
    assert "--draft: expected a smaller model" in err


def test_an_unknown_method_is_refused():
    status, _, err = call_experiment("decoding_zoo", "--methods=magic")
    assert status == 1
    assert "--methods: expected some of greedy" in err
