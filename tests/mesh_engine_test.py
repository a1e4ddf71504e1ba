"""The engine on a mesh: everybody's tokens are those of one device.

`engine_on_eight_devices.py` runs, in a process of its own with 8 virtual CPU devices.
In float32, where sums in another order decide no token of these runs.
"""

import pytest
from runners import on_eight_devices

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("meshes")
    return on_eight_devices("engine_on_eight_devices.py", folder)


@pytest.mark.parametrize(
    ("case", "num_tokens"),
    [
        ("2 devices", 82),
        ("8 devices, 2 kv heads", 82),
        ("4 devices, swapping", 82),
        ("2 devices, beams", 88),
        ("experts on 2 x 2", 82),
    ],
)
def test_tokens_are_those_of_one_device(found, case, num_tokens):
    one = found[case]
    # Greedy rows of 18 tokens, two samples of 14; three beams of 8, or another 18.
    assert one["num_tokens"] == num_tokens
    assert one["is_equal"]
    assert one["violations"] == []
    assert one["preemptions"] > 0 or "beams" in case
    assert (one["swapped"] > 0) == ("swapping" in case)


def test_each_device_holds_the_pages_of_its_own_heads(found):
    # [L, N, kv heads, P, D]: 2 heads on 8 devices are stored four times each.
    assert found["2 devices"]["on_device"] == [2, 14, 1, 4, 8]
    assert found["8 devices, 2 kv heads"]["on_device"] == [2, 14, 1, 4, 8]


def test_a_step_sums_twice_a_layer_and_sends_no_pages_and_no_weights(found):
    counts = found["2 devices"]["collectives"]
    # Two layers, two sums each, one of the embedding; compiled for steps of decodes and
    # of prompts. One gather, of the logits.
    assert {k: v for k, v in counts.items() if k != "temporaries"} == {
        "all-reduce": 2 * (2 * 2 + 1),
        "all-gather": 1,
    }


def test_temporaries_do_not_grow_with_the_pool(found):
    before = found["2 devices"]["collectives"]["temporaries"]
    after = found["2 devices"]["roomy_collectives"]["temporaries"]
    # 37 times the blocks: a copy of the larger pool's pages would be 131 KB a device.
    assert after - before < 20_000


@pytest.mark.parametrize(
    "move", ["2 to one", "one to 8", "8 to 2", "one to 4, swapping"]
)
def test_what_was_saved_on_a_mesh_goes_on_on_another(found, move):
    one = found[move]
    assert one["is_equal"]
    assert one["violations"] == []
    # No page was computed again, though 8 devices store four times the kv heads of one.
    assert one["computed"] == one["computed_alone"]
    assert (one["num_swapped"] > 0) == ("swapping" in move)


def test_the_llm_runs_on_a_mesh_and_refuses_replicas(found):
    assert found["LLM"]["num_tokens"] == 18
    assert found["LLM"]["is_equal"]
    assert "replicas over `data` are not built yet" in found["LLM"]["refusal"]
