"""The runners `grpo` and `rollout_sharing`: rewards, and their smallest runs."""

import jax
import numpy as np
import pytest

from experiments import grpo
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def usual_promotion():
    """optax relies on JAX's usual promotion, which users have."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_rewards_are_what_their_tasks_say():
    assert grpo.short_lines("a" * 24 + "\n" + "b" * 10) == 1.0
    assert grpo.short_lines("a" * 30) == pytest.approx(1 - 6 / 30)
    assert grpo.short_lines("") == 1.0
    assert grpo.parses("x = 1\ny = (") == 1.0  # the last line is not complete
    assert grpo.parses("x = = 1\ny") == 0.0
    assert grpo.parses("\n\n") == 0.0


@pytest.mark.parametrize("rank", [0, 2])
def test_the_smallest_run_trains_and_compiles_nothing_after_its_first_step(rank):
    status, out, _ = call_experiment(
        "grpo",
        "--num_steps=4",
        "--num_prompts=2",
        "--num_samples=4",
        "--max_tokens=12",
        "--nobaseline",
        f"--lora_rank={rank}",
    )
    assert status == 0
    details = last_json(out)["details"]
    assert np.shape(details["rewards"]) == (1, 4)
    assert details["num_weight_updates"] == 5
    assert details["logprob_gap"] < 1e-4
    assert details["blocks_saved_by_sharing"] > 0
    assert last_json(out)["tokens_per_s"]["rollout"] > 0


def test_sharing_computes_each_prompt_once():
    status, out, _ = call_experiment(
        "rollout_sharing", "--num_samples=4", "--prompt_tokens=40", "--max_tokens=4"
    )
    assert status == 0
    details = last_json(out)["details"]
    shared, repeated, alone = (
        details[f"{way}, n=4"] for way in ("shared", "repeated", "alone")
    )

    def computed(found):
        return [epoch["prompt_tokens"] for epoch in found["epochs"]]

    # 4 prompts of 40 tokens, of which 32 are whole blocks.
    # Each further sample computes the last token, whose logits it needs.
    assert 160 <= computed(shared)[0] <= 160 + 4 * 3
    assert computed(shared)[2] == computed(shared)[0]
    assert computed(alone) == [640, 640, 640]
    assert computed(shared)[1] < 160
    assert computed(repeated)[1] < computed(repeated)[2] < 640
    assert shared["max_used_blocks"] < alone["max_used_blocks"]
