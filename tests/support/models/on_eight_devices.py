"""Measurements for `tests/parallel/mesh_test.py`: models on 8 virtual CPU devices.

All measurements run in one process, because the number of devices is set before jax
starts. The argument is an empty folder; the last output line is one JSON object.
"""

import contextlib
import gc
import json
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
from flax import nnx

from jpaged import LLM, load_model, make_mesh, save_model
from jpaged.models import shapes
from jpaged.models.loading import placing
from jpaged.models.loading.stored import SafetensorsTensor
from tests.models.families_test import write_case
from tests.support.models import checkpoints
from tests.support.models.reference_models import relative_error

BIASED = {"attention_bias": True, "mlp_bias": True}
# 8 query heads read 2 KV heads: 2 devices store one head each, 4 and 8 have copies.
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
# 6 KV heads on 4 devices: two halves of 3 heads, each on two devices. The vocabulary of
# 126 is not divisible, so it is replicated.
KV_6 = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4}
KV_6 |= {"vocab_size": 126, "tie_word_embeddings": True}
# Each case has a division of its own; `measure_llama` and `measure_int8` add others.
MESHES = {
    "llama": [{"tensor": 2}, {"tensor": 8}],
    "llama_kv_6": [{"tensor": 4}],
    "opt": [{"tensor": 2, "data": 2}, {"tensor": 8}],
    "gpt2": [{"tensor": 4}],
    "phi3": [{"tensor": 4}],
    "mixtral": [{"expert": 2}, {"tensor": 2, "expert": 4}],
    "qwen3_moe": [{"expert": 2}, {"tensor": 4, "expert": 2}],
    "gpt_oss": [{"tensor": 2, "expert": 2, "data": 2}],
    "deepseek_v3": [{"tensor": 4, "expert": 2}],
}
TOKENS = np.random.default_rng(0).integers(3, 120, (2, 9), dtype=np.int32)
apply = jax.jit(lambda model, tokens: model(tokens))


def write(folder: pathlib.Path, name: str) -> pathlib.Path:
    if name == "llama":
        return checkpoints.write_tiny_llama(folder, **GQA, **BIASED)
    if name == "llama_kv_6":
        return checkpoints.write_tiny_llama(folder, **KV_6)
    if name == "opt":
        return checkpoints.write_tiny_opt(folder, num_attention_heads=8)
    return write_case(folder, name)


@contextlib.contextmanager
def watched(found: dict):
    """Count the numbers that are read, and the largest part of an array on a device."""
    found |= {"read": 0, "on_device": 0}
    view, put = SafetensorsTensor.view, placing.Shards.write

    def count(self, index):
        part = view(self, index)
        found["read"] += part.size
        return part

    def weigh(self, *args):
        put(self, *args)
        largest = max(
            shard.data.size for x in jax.live_arrays() for shard in x.addressable_shards
        )
        found["on_device"] = max(found["on_device"], largest)

    with mock.patch.object(SafetensorsTensor, "view", count):
        with mock.patch.object(placing.Shards, "write", weigh):
            yield


def values(model) -> list[np.ndarray]:
    return [placing.gathered(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def are_equal(left, right) -> bool:
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(values(left), values(right), strict=True)
    )


def refusal(function, *args, **options) -> str:
    try:
        function(*args, **options)
    except ValueError as error:
        return str(error)
    return "not refused"


def measure_logits(root: pathlib.Path) -> dict:
    """For each case and mesh, the error of the logits against one device."""
    found = {}
    for name, meshes in MESHES.items():
        folder = write(root / name, name)
        want = apply(load_model(folder), TOKENS)
        for sizes in meshes:
            model = load_model(folder, mesh=make_mesh(**sizes))
            key = " ".join([name, *(f"{axis}={n}" for axis, n in sizes.items())])
            found[key] = relative_error(apply(model, TOKENS), want)
    return found


def measure_llama(root: pathlib.Path) -> dict:
    folder, found = root / "llama", {}
    mesh = make_mesh(tensor=4, data=2)
    gc.collect()  # no arrays of earlier models remain on the devices
    # Small pieces, so that arrays are read and assembled from several pieces.
    with mock.patch.object(placing, "PIECE", 1000), watched(found):
        model = load_model(folder, mesh=mesh)
    plain = load_model(folder)
    want = apply(plain, TOKENS)
    found["stored"] = sum(x.size for x in checkpoints.read_tensors(folder).values())
    found["shards"] = {
        ".".join(map(str, path)): [list(shard.data.shape), len(param[...].devices())]
        for path, param in nnx.to_flat_state(nnx.state(model))
        for shard in param[...].addressable_shards[:1]
    }
    found["key_of_each_device"] = [
        list(shard.index[1].indices(16)[:2])
        for shard in model.layers[0].attention.key.weight[...].addressable_shards
    ]
    found["is_equal"] = are_equal(model, plain)
    found["eager_error"] = relative_error(model(TOKENS), want)
    for each, name in ((plain, "one"), (model, "many")):
        save_model(each, root / "saved" / name)
    found["is_saved_alike"] = all(
        (root / "saved/one" / file).read_bytes()
        == (root / "saved/many" / file).read_bytes()
        for file in ("config.json", "model.safetensors")
    )
    narrow = [load_model(folder, "bfloat16", mesh=m) for m in (None, mesh)]
    found["is_equal_in_bfloat16"] = are_equal(*narrow)
    found["llm_refusal"] = refusal(LLM, model)
    put = placing.Shards.write

    def rolled(self, region, piece, values):
        put(self, region, piece, np.roll(values, 1, axis=-1))

    with mock.patch.object(placing.Shards, "write", rolled):
        spoiled = load_model(folder, mesh=mesh)
    found["planted_fault"] = relative_error(apply(spoiled, TOKENS), want)
    return found


def measure_int8(root: pathlib.Path) -> dict:
    found = {}
    cases = {"gpt2": {"tensor": 4}, "mixtral": {"tensor": 2, "expert": 2}}
    for name, sizes in cases.items():
        plain = load_model(root / name, quantization="int8")
        mesh = make_mesh(**sizes)
        with mock.patch.object(placing, "PIECE", 500):
            model = load_model(root / name, quantization="int8", mesh=mesh)
        error = relative_error(apply(model, TOKENS), apply(plain, TOKENS))
        found[name] = [are_equal(model, plain), error]
    return found


def measure_random() -> dict:
    # "random:NAME" of a shape as small as the others.
    tiny = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32}
    tiny |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with mock.patch.dict(shapes.SHAPES, {"tiny": tiny}):
        plain = load_model("random:tiny")
        model = load_model("random:tiny", mesh=make_mesh(tensor=2))
    key = model.layers[1].attention.key.weight[...]
    errors = [
        relative_error(x, y) for x, y in zip(values(model), values(plain), strict=True)
    ]
    return {"error": max(errors), "shard": list(key.addressable_shards[0].data.shape)}


def measure_refusals(root: pathlib.Path) -> dict:
    plain = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
    return {
        "too many": refusal(make_mesh, tensor=4, data=3),
        "heads": refusal(load_model, root / "gpt2", mesh=make_mesh(tensor=8)),
        "experts": refusal(load_model, root / "qwen3_moe", mesh=make_mesh(expert=4)),
        "no experts": refusal(load_model, root / "llama", mesh=make_mesh(expert=2)),
        "axes": refusal(load_model, root / "llama", mesh=plain),
        "random": refusal(load_model, "random:gpt2", mesh=make_mesh(tensor=8)),
    }


def main() -> None:
    root = pathlib.Path(sys.argv[1])
    assert len(jax.devices()) == 8
    found = {"logits": measure_logits(root), "llama": measure_llama(root)}
    found |= {"int8": measure_int8(root), "random": measure_random()}
    print(json.dumps(found | {"refusals": measure_refusals(root)}))


if __name__ == "__main__":
    main()
