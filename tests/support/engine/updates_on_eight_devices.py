"""Weight updates on 8 virtual CPU devices, for `tests/llm/weight_update_mesh_test.py`.

One process, because the number of devices is set before jax starts. The last line of
its output is one JSON object.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jpaged import LLM, SamplingParams, make_mesh
from jpaged.models.decoder import init_model
from jpaged.serving.weights import named_leaves
from tests.support.models.tiny_llama import tiny_llama

SIZES = dict(max_num_seqs=4, num_blocks=32, block_size=4, max_num_batched_tokens=16)
PARAMS = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
PROMPTS = [[3, 5, 7, 9, 11, 2], [4, 6, 8], [3, 5, 7, 9, 11, 2, 8, 1], [12, 13]]


def run(llm: LLM) -> list[list[int]]:
    """The tokens of all prompts."""
    outputs = llm.generate(PROMPTS, PARAMS, progress=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def sharded(model, mesh, spec):
    """The weights, each split over its first axis as a trainer might."""
    sharding = NamedSharding(mesh, spec)
    return {k: jax.device_put(v, sharding) for k, v in named_leaves(model).items()}


def main() -> None:
    """Updates LLMs on meshes from weights that are elsewhere."""
    old = tiny_llama()
    new = init_model(old.config, seed=7)
    expected = run(LLM(new, **SIZES, max_model_len=64))
    found = {"differs": run(LLM(old, **SIZES, max_model_len=64)) != expected}
    trainer = jax.make_mesh((8,), ("fsdp",))
    sources = {
        "one device": nnx.state(new),
        "trainer's mesh": sharded(new, trainer, PartitionSpec("fsdp")),
        "copies": sharded(new, trainer, PartitionSpec()),
        "numpy": jax.tree.map(np.asarray, named_leaves(new)),
        "decoder": new,
    }
    for axes in ({"tensor": 2}, {"data": 2, "tensor": 2}):
        llm = LLM(old, **SIZES, max_model_len=64, mesh=make_mesh(**axes))
        llm.warm_up(PARAMS)  # otherwise programs are compiled beside the first calls
        run(llm)
        compiled = llm.stats()["num_compilations"]
        before = [leaf.sharding for leaf in jax.tree.leaves(llm.model)]
        for name, weights in sources.items():
            llm.update_weights(old)
            with jax.transfer_guard_device_to_host("allow"):
                llm.update_weights(weights)
            after = [leaf.sharding for leaf in jax.tree.leaves(llm.model)]
            shared = {
                shard.data.unsafe_buffer_pointer()
                for leaf in jax.tree.leaves(weights)
                if isinstance(leaf, jax.Array)
                for shard in leaf.addressable_shards
            } & {
                shard.data.unsafe_buffer_pointer()
                for leaf in jax.tree.leaves(llm.model)
                for shard in leaf.addressable_shards
            }
            found[f"{name} on {axes}"] = dict(
                tokens=run(llm) == expected,
                shardings=before == after,
                shared=len(shared),
            )
        found[f"compiled on {axes}"] = llm.stats()["num_compilations"] - compiled
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
