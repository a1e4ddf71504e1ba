"""The runner `plan`: weights beside the shardings of `load_model`, the rest by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from jpaged import parallel
from jpaged.models.decoder import Decoder
from jpaged.models.loading.placing import placement
from jpaged.models.shapes import random_config
from jpaged.simulator import plan
from jpaged.simulator.costs.chips import find_chip
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


class FakeDevice:
    """The attributes of a device that a sharding needs."""

    process_index, platform, device_kind = 0, "cpu", "none"

    def __init__(self, number):
        self.id = number


def placed_bytes(config, tensor, expert):
    """Bytes on one device, by the shardings of parameters in `load_model`."""
    devices = np.array([FakeDevice(n) for n in range(tensor * expert)])
    mesh = jax.sharding.Mesh(
        devices.reshape(1, expert, tensor),
        parallel.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    sharding_of = placement(config, mesh)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(model))
    ):
        sharding = sharding_of([step.key for step in path], leaf.shape)
        shape = sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


@pytest.mark.parametrize(
    ("name", "tensor", "expert"),
    [
        ("llama-3-70b", 16, 1),
        ("opt-125m", 4, 1),
        ("qwen2.5-0.5b", 2, 1),
        ("mixtral-8x7b", 2, 4),
        ("gpt2", 4, 1),
    ],
)
def test_weight_bytes_equal_those_of_the_placed_parameters(name, tensor, expert):
    config = dataclasses.replace(random_config(name), num_layers=2)
    found = plan.weight_bytes(config, tensor, expert)
    assert found == placed_bytes(config, tensor, expert)
    assert found < plan.weight_bytes(config)


def test_pages_use_the_memory_beside_weights_and_temporaries():
    config = random_config("llama-3-8b")  # 32 layers
    found = plan.plan_mesh(config, find_chip("h100"), tensor=2)
    # 32 layers, keys and values, 4 of 8 heads of 128 numbers, 2 bytes each.
    token = 32 * 2 * 4 * 128 * 2
    assert found.page_bytes == found.kv_tokens * token
    left = found.available_bytes - found.weight_bytes - found.temporary_bytes
    assert 0 <= left - found.page_bytes < 16 * token
    assert found.collectives["all_reduce"] == {"count": 65, "bytes": 64 * 4096 * 2}
    assert found.collectives["all_gather"] == {"count": 1, "bytes": 64 * 128256 * 4}


def test_a_method_that_reads_extremes_of_keys_leaves_fewer_tokens():
    config, chip = random_config("llama-3-8b"), find_chip("h100")
    found = [
        plan.plan_mesh(config, chip, has_key_extremes=has) for has in (False, True)
    ]
    without, extremes = (one.kv_tokens for one in found)
    # A block of 16 tokens in bfloat16, and two float32 numbers of each of its columns.
    assert abs(extremes - without * (16 * 2) / (16 * 2 + 4)) <= 16
    status, out, err = call_experiment("plan", "--retention=quest")
    assert status == 0, err
    assert last_json(out)["kv_tokens"] == extremes
    status, _, err = call_experiment("plan", "--tensor=2", "--retention=quest")
    assert status == 1
    assert "--retention: expected none with several chips" in err


def test_chips_that_share_a_kv_head_store_it_completely():
    config = dataclasses.replace(random_config("llama-3-70b"), num_layers=2)
    eight = plan.plan_mesh(config, find_chip("tpu-v5e"), tensor=8)
    sixteen = plan.plan_mesh(config, find_chip("tpu-v5e"), tensor=16)
    assert eight.page_bytes / eight.kv_tokens == sixteen.page_bytes / sixteen.kv_tokens


def test_the_runner_reports_a_model_that_does_not_fit():
    status, out, err = call_experiment("plan", "--model=opt-13b", "--chip=rtx-4090")
    assert status == 0, err
    result = last_json(out)
    assert not result["fits"]
    assert result["kv_tokens"] == 0
    assert result["weight_bytes"] > 25e9


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor": 3},
            "tensor: expected a divisor of num_heads=32, such as 1 or 2, got 3",
        ),
        ({"expert": 2}, "expert: expected a divisor of num_experts=1"),
        ({"data": 0}, "data: expected at least 1, got 0"),
        ({"memory_fraction": 2.0}, "memory_fraction: expected more than 0"),
    ],
)
def test_invalid_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        plan.plan_mesh(random_config("llama-3-8b"), find_chip("h100"), **sizes)


def test_an_unknown_chip_is_named():
    status, _, err = call_experiment("plan", "--chip=abacus")
    assert status == 1
    assert "expected one of a100-40g" in err
    assert "Traceback" not in err
