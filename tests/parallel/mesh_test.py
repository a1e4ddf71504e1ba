"""Models on a mesh of devices: placement of arrays, and equal logits.

`tests/support/models/on_eight_devices.py` measures, in a separate process with 8
virtual CPU devices.
"""

import jax
import pytest
from flax import nnx

from jpaged import make_mesh, parallel
from jpaged.models import Decoder, ModelConfig
from tests.models.families_test import GOLDEN
from tests.support.models.families import CASES
from tests.support.runners import on_eight_devices

pytestmark = pytest.mark.long

# Sums over devices have another order than sums over one matrix. In float32,
# differences of up to 1.3e-6 of the largest logit occurred; the planted fault has more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("meshes")
    return on_eight_devices("models.on_eight_devices", folder)


def test_logits_on_2_4_and_8_devices_are_those_of_one(found):
    errors = found["logits"]
    assert len(errors) == 13
    assert {name for name, error in errors.items() if not error < TOLERANCE} == set()
    assert found["llama"]["eager_error"] < TOLERANCE


def test_values_in_a_wrong_position_change_the_logits(found):
    assert found["llama"]["planted_fault"] > 0.1


def test_each_device_holds_its_part_of_each_parameter(found):
    # On tensor=4 and data=2: 8 query heads of size 8, 2 KV heads, intermediate size 96,
    # vocabulary 128.
    layer = {
        "attention.query.weight": [64, 16],
        "attention.query.bias": [16],
        "attention.key.weight": [64, 8],  # one of two heads, with its query heads
        "attention.key.bias": [8],
        "attention.value.weight": [64, 8],
        "attention.value.bias": [8],
        "attention.out.weight": [16, 64],
        "attention.out.bias": [64],
        "mlp.gate.weight": [64, 24],
        "mlp.gate.bias": [24],
        "mlp.up.weight": [64, 24],
        "mlp.up.bias": [24],
        "mlp.down.weight": [24, 64],
        "mlp.down.bias": [64],
        "attention_norm.weight": [64],
        "mlp_norm.weight": [64],
    }
    expected = {"embedding": [32, 64], "output.weight": [64, 32]}
    expected |= {"final_norm.weight": [64]}
    for i in range(2):
        expected |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shards = found["llama"]["shards"]
    assert shards == {name: [shape, 8] for name, shape in expected.items()}
    columns = [[0, 8], [0, 8], [8, 16], [8, 16]]
    assert found["llama"]["key_of_each_device"] == 2 * columns


def test_each_number_is_read_once_and_each_device_stores_only_its_part(found):
    llama = found["llama"]
    assert llama["read"] == llama["stored"]
    assert llama["on_device"] == 32 * 64  # its part of the embedding


def test_weights_on_a_mesh_are_bitwise_those_of_one_device(found):
    assert found["llama"]["is_equal"]
    assert found["llama"]["is_equal_in_bfloat16"]
    for is_equal, error in found["int8"].values():
        assert is_equal
        assert error < TOLERANCE


def test_a_sharded_model_is_saved_as_the_same_files(found):
    assert found["llama"]["is_saved_alike"]


def test_random_weights_on_a_mesh_are_those_of_one_device_up_to_rounding(found):
    assert found["random"]["error"] < 1e-6
    assert found["random"]["shard"] == [32, 16]


def test_errors_name_the_sizes_that_would_work(found):
    refusals = found["refusals"]
    for key, parts in {
        "too many": [
            "at most the 8 visible devices, got tensor=4, expert=1, data=3, ",
            "in total 12",
            "tensor=4, expert=1, data=2 would work",
            "--xla_force_host_platform_device_count=12",
        ],
        "heads": [
            "num_heads=4, intermediate_size=192, got tensor=8; 1 or 2 or 4 would"
        ],
        "experts": ["the 6 experts of the model, got expert=4; 1 or 2 or 3 would work"],
        "no experts": ["got expert=2; 1 would work"],
        "axes": ["expected one of jpaged.make_mesh", "got Mesh("],
        "random": ["num_heads=12, intermediate_size=3072, got tensor=8"],
    }.items():
        for part in parts:
            assert part in refusals[key]
    refusal = found["llama"]["llm_refusal"]
    assert refusal.startswith("mesh: ")
    assert "which is on 8 devices" in refusal


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2"])
@pytest.mark.parametrize("name", parallel.AXES)
def test_an_invalid_axis_size_raises(name, size):
    with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1"):
        make_mesh(**{name: size})


def test_a_mesh_can_have_one_device():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "expert": 1, "tensor": 1}
    assert mesh.devices.tolist() == [[[jax.devices()[0]]]]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_every_parameter_of_every_family_has_a_rule_and_every_rule_a_parameter(
    quantization,
):
    used = set()
    mesh = make_mesh()
    for number, name in enumerate(CASES):
        config = ModelConfig.from_hf(GOLDEN[name]["config"])
        object.__setattr__(config, "quantization", quantization)
        object.__setattr__(config, "vocab_first", number % 2 == 1)  # True on TPUs
        model = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        for path, param in nnx.to_flat_state(nnx.state(model)):
            parallel.param_sharding(mesh, path, param.shape, config.num_kv_heads)
            names = path[2:] if path[0] == "layers" else path
            kept = [n for n in names if n not in ("weight", "bias", "scale")]
            used.add(".".join(kept))
    assert used == set(parallel.RULES)
