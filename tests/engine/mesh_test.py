"""The engine on a mesh generates the tokens of a single device.

`tests/support/engine/on_eight_devices.py` runs in a separate process with 8 virtual CPU
devices. All models are float32: in these runs, no token depends on the order of sums.
"""

import re

import pytest

from tests.support.runners import on_eight_devices

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("meshes")
    return on_eight_devices("engine.on_eight_devices", folder)


@pytest.mark.parametrize(
    ("case", "num_tokens"),
    [
        ("2 devices", 82),
        ("8 devices, 2 kv heads", 82),
        ("4 devices, swapping", 82),
        ("2 devices, beams", 88),
        ("experts on 2 x 2", 82),
        ("latents on 2 x 2", 82),
        ("4 devices, words first", 82),
        ("2 replicas, swapping", 146),
        ("2 replicas, drafts", 146),
        ("2 replicas, cascade", 146),
    ],
)
def test_tokens_are_those_of_one_device(found, case, num_tokens):
    one = found[case]
    # Two greedy requests of 18 tokens, two samples of 14, and three beams of 8 or one
    # more request of 18. A second replica has all requests but the last.
    assert one["num_tokens"] == num_tokens
    assert one["is_equal"]
    assert one["violations"] == []
    assert one["preemptions"] > 0 or "beams" in case
    assert (one["swapped"] > 0) == ("swapping" in case)


def test_replicas_end_independently(found):
    # Each replica has its own loop, and runs no steps after its last request.
    for case in ("swapping", "drafts", "cascade"):
        first, second = found[f"2 replicas, {case}"]["steps"]
        assert first > second > 0


def test_drafts_and_cascade_are_used_on_a_mesh(found):
    num_drafts, num_accepted = found["2 replicas, drafts"]["drafts"]
    assert 0 < num_accepted < num_drafts
    assert found["2 replicas, cascade"]["most_shared_blocks"] > 0


def test_each_device_holds_the_pages_of_its_own_heads(found):
    # [L, N, kv heads, P, D]: 2 heads on 8 devices are stored four times each.
    assert found["2 devices"]["on_device"] == [2, 14, 1, 4, 8]
    assert found["8 devices, 2 kv heads"]["on_device"] == [2, 14, 1, 4, 8]
    # One of two replicas, and one of its 2 heads.
    assert found["2 replicas, swapping"]["on_device"] == [2, 14, 1, 4, 8]


def test_a_step_has_two_sums_per_layer_and_sends_no_pages_and_no_weights(found):
    # Two layers with two sums each, and one of the embedding, in each of two programs:
    # decode steps and prompt steps. One gather, of the logits.
    counts = {"all-reduce": 2 * (2 * 2 + 1), "all-gather": 1}
    assert found["2 devices"]["collectives"]["counts"] == counts
    assert found["2 replicas, swapping"]["roomy_collectives"]["counts"] == counts


def test_replicas_send_nothing_to_each_other(found):
    # Groups of devices; from jax 0.12 on, names of axes.
    groups = found["2 devices"]["collectives"]["groups"]
    assert groups in (["{{0,1}}"], ["{'tensor'}"])
    groups = found["2 replicas, swapping"]["roomy_collectives"]["groups"]
    assert groups in (["{{0,1},{2,3}}"], ["{'tensor'}"])


def test_temporaries_do_not_grow_with_the_pool(found):
    before = found["2 devices"]["collectives"]["temporaries"]
    # 37 times the blocks: a copy of the larger pool's pages is 131 KB per device.
    for case in ("2 devices", "2 replicas, swapping"):
        after = found[case]["roomy_collectives"]["temporaries"]
        assert after - before < 20_000


@pytest.mark.parametrize(
    "move", ["2 to one", "one to 8", "8 to 2", "one to 4, swapping"]
)
def test_a_state_saved_on_one_mesh_continues_on_another(found, move):
    one = found[move]
    assert one["is_equal"]
    assert one["violations"] == []
    # No page is recomputed, although 8 devices store four times the kv heads of one.
    assert one["computed"] == one["computed_alone"]
    assert (one["num_swapped"] > 0) == ("swapping" in move)


def test_an_llm_on_replicas_generates_the_tokens_of_one_device(found):
    llm = found["LLM"]
    assert llm["num_outputs"] == 2 * (1 + 2 + 3 + 1 + 1 + 2)
    assert llm["is_equal"]
    assert min(llm["steps"]) > 0
    assert llm["timelines"] == llm["steps"]
    assert llm["is_sum"]


def test_requests_go_to_the_replica_with_their_prefix_while_loads_are_similar(found):
    # Loads may differ by a quarter of 96 slots. Two prompts of 22 tokens go to the
    # replica that has 20 of them; for the third, the load there is 44 tokens higher.
    assert found["LLM"]["cached"] == [20, 20, 0]


def test_pinned_prefixes_and_live_requests_on_replicas(found):
    llm = found["LLM"]
    assert llm["pinned_in"] == [0, 1]
    assert llm["is_pinned_equal"]
    assert llm["reasons"] == ["length", "abort"]
    assert llm["is_live_equal"]
    assert llm["is_streamed_equal"]
    assert llm["left"] == [0, 0]  # used blocks and sequence indices


def test_shardings_do_not_change(found):
    assert found["2 devices"]["stays"]
    assert found["2 replicas, swapping"]["stays"]


def test_unsupported_uses_of_replicas_raise(found):
    submit, save, load = found["2 replicas, swapping"]["refusals"]
    assert submit == "replica: expected from 0 to 1, got 2"
    assert "state: expected one replica, got 2 over the `data` axis" in save
    assert load.startswith("mesh: expected data=1")
    assert load.endswith("got data=2")
    assert re.fullmatch("replica: .*0 to 1, got 2", found["LLM"]["refusal"])
