"""The TPU's kernels and an engine, compiled to TPU programs without a TPU.

The tests read off the compiled programs that pools are updated in their own memory and
that no temporary has the size of a pool.
"""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import compile_tpu
from jpaged import attention
from jpaged.attention import backends
from jpaged.config import EngineConfig
from jpaged.models import ModelConfig
from jpaged.serving import memory

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None
        and "TPU_LIBRARY_PATH" not in os.environ,
        reason="needs libtpu: extra `tpu`",
    ),
]

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# heads, head_dim, block_size, dtype, options
SHAPES = {
    "llama_3_8b": ((32, 8), 128, 16, "bfloat16", {}),
    "qwen_2_5_7b": ((28, 4), 128, 64, "bfloat16", {}),
    "llama_2_7b": ((32, 32), 128, 32, "bfloat16", {}),
    "llama_3_2_1b": ((32, 8), 64, 16, "bfloat16", {"return_lse": True}),
    "gpt_2": ((12, 12), 64, 16, "float32", {}),
    "heads_of_16": ((8, 2), 16, 16, "bfloat16", {}),
    "gemma_2_2b": ((8, 4), 256, 16, "float32", {"logits_soft_cap": 50.0}),
    "one_key": ((16, 1), 128, 128, "bfloat16", {"sliding_window": 100}),
}
NUM_BLOCKS = (512, 4096)


def compiled(topology: str, function, *args, donate=()):
    """Return the program of `function` for one device."""
    mesh = compile_tpu.tpu_mesh(topology, 1)
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    # The kernel is compiled for the TPU of the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, donate_argnums=donate).lower(
            *jax.tree.map(placed, args)
        )
        return lowered.compile()


def array(*shape: int, dtype="int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def pool(name: str, num_blocks: int) -> jax.ShapeDtypeStruct:
    (_, num_kv_heads), head_dim, block_size, dtype, _ = SHAPES[name]
    page = backends.layout("mosaic_tpu").page_shape(block_size, head_dim, dtype)
    return array(2, num_blocks, num_kv_heads, *page, dtype=dtype)


def attend(name: str, topology: str, *, is_ragged: bool, num_blocks=512):
    (num_heads, _), head_dim, _, dtype, options = SHAPES[name]
    num_rows, num_queries = 16, 128 if is_ragged else 16
    pages = pool(name, num_blocks)

    def call(q, k_pages, v_pages, tables, lens, starts, layer):
        return attention.paged_attention(
            *(q, k_pages, v_pages, tables, lens),
            query_start_loc=starts if is_ragged else None,
            layer=layer,
            implementation="mosaic_tpu",
            **options,
        )

    return compiled(
        topology,
        call,
        array(num_queries, num_heads, head_dim, dtype=dtype),
        *(pages, pages),
        *(array(num_rows, 64), array(num_rows), array(num_rows + 1), array()),
    )


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_attention_compiles_for_every_shape(name, is_ragged):
    text = attend(name, "v5e:2x2", is_ragged=is_ragged).as_text()
    assert 'custom_call_target="tpu_custom_call"' in text


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_attention_compiles_for_every_topology(topology):
    for name in ("llama_3_8b", "llama_3_2_1b", "gemma_2_2b"):
        attend(name, topology, is_ragged=True)
        attend(name, topology, is_ragged=False)


@pytest.mark.parametrize("name", ["llama_3_8b", "llama_3_2_1b", "heads_of_16"])
def test_attention_needs_no_memory_that_grows_with_the_pool(name):
    small, large = (
        temporaries(attend(name, "v5e:2x2", is_ragged=True, num_blocks=n))
        for n in NUM_BLOCKS
    )
    assert small == large


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["llama_3_8b", "gpt_2", "heads_of_16", "gemma_2_2b"])
def test_page_updates_happen_in_the_pools_memory(name, topology):
    (_, num_kv_heads), head_dim, block_size, dtype, _ = SHAPES[name]
    num_blocks = NUM_BLOCKS[1] * max(128 // head_dim, 1)
    pages = pool(name, num_blocks)
    # The program stores the pools without padding.
    size = 2 * num_blocks * num_kv_heads * block_size * head_dim
    size *= 2 * jnp.dtype(dtype).itemsize

    def write(k_pages, v_pages, k, v, slots, layer):
        options = {"layer": layer, "implementation": "mosaic_tpu"}
        return attention.write_kv(k_pages, v_pages, k, v, slots, **options)

    def copy(k_pages, v_pages, src, dst):
        options = {"implementation": "mosaic_tpu"}
        return attention.copy_blocks(k_pages, v_pages, src, dst, **options)

    new = array(64, num_kv_heads, head_dim, dtype=dtype)
    written = compiled(
        topology, write, pages, pages, new, new, array(64), array(), donate=(0, 1)
    )
    copied = compiled(topology, copy, pages, pages, *[array(16)] * 2, donate=(0, 1))
    for program in (written, copied):
        assert program.memory_analysis().alias_size_in_bytes == size
        assert temporaries(program) < 2**22 < size / 16


# ---- the engine's program, on one device and on four that share the heads

MODEL = ModelConfig.from_hf(
    dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        torch_dtype="bfloat16",
    )
)


def run(num_blocks: int, tensor: int, implementation: str = "mosaic_tpu", **more):
    sizes = dict(max_num_seqs=2, max_model_len=256, max_num_batched_tokens=16) | more
    config = EngineConfig(num_blocks=num_blocks, attention=implementation, **sizes)
    mesh = compile_tpu.tpu_mesh("v5e:2x2", tensor)
    return compile_tpu.compile_run(MODEL, config, mesh)


def pool_bytes(num_blocks: int, tensor: int, implementation: str = "mosaic_tpu") -> int:
    """Return the pool's bytes per device; four devices store each of 2 heads twice."""
    sizes = (16, "bfloat16", implementation, tensor)
    return num_blocks * memory.block_bytes(MODEL, *sizes)


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_engine_updates_the_pool_in_place_and_sends_only_sums(tensor):
    small, large = (run(n, tensor) for n in NUM_BLOCKS)
    for program, num_blocks in ((small, NUM_BLOCKS[0]), (large, NUM_BLOCKS[1])):
        pool = pool_bytes(num_blocks, tensor)
        assert program.memory_analysis().alias_size_in_bytes >= pool
        # For each of the two step sizes: two sums per layer, and one of the embedding.
        expected = (
            {"all-reduce": 2 * (2 * 2 + 1), "all-gather": 1} if tensor > 1 else {}
        )
        assert compile_tpu.count_collectives(program) == expected
    heads = 2 if tensor == 1 else 1
    # Two tokens in a row of 128.
    assert f"bf16[2,{NUM_BLOCKS[1]},{heads},8,128]" in large.as_text()
    # The block manager has a few bytes per block; the pool has kilobytes.
    grown = temporaries(large) - temporaries(small)
    assert grown < 128 * (NUM_BLOCKS[1] - NUM_BLOCKS[0])
    assert temporaries(large) < pool_bytes(NUM_BLOCKS[1], tensor) // 2


def test_shared_prefixes_copy_no_pool_and_send_nothing():
    small, large = (run(n, 4, max_num_seqs=4, cascade=True) for n in NUM_BLOCKS)
    grown = temporaries(large) - temporaries(small)
    assert grown < 128 * (NUM_BLOCKS[1] - NUM_BLOCKS[0])
    assert temporaries(large) < pool_bytes(NUM_BLOCKS[1], 4) // 2
    expected = {"all-reduce": 2 * (2 * 2 + 1), "all-gather": 1}
    assert compile_tpu.count_collectives(large) == expected


def test_the_check_finds_that_plain_xla_copies_the_pool():
    program = run(NUM_BLOCKS[1], 1, "xla")
    assert temporaries(program) > pool_bytes(NUM_BLOCKS[1], 1, "xla") // 2


def test_the_runner_prints_what_a_device_needs():
    command = [sys.executable, "-m", "experiments.compile_tpu", "--num_layers=1"]
    command += ["--model=qwen2.5-0.5b", "--tensor_parallel=2", "--max_num_seqs=1"]
    command += ["--max_num_batched_tokens=8", "--num_blocks=64", "--max_model_len=64"]
    command += ["--kv_dtype=int8", "--block_size=32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["compiled"]
    assert result["fits"]
    # For one row the compiler gathers the logits by summing their parts.
    assert result["collectives"] == {"all-reduce": 2 * (2 * 1 + 1) + 1}
    assert result["compile_s"] > 0
    # Half of the tied embedding of 151,936 by 896 in bfloat16, and little else: the
    # product with it, which needs the order [hidden, vocabulary], makes no copy.
    assert 136e6 < result["bytes_per_chip"] < 200e6


def test_unknown_topologies_raise():
    with pytest.raises(ValueError, match=r"topology: expected one of"):
        compile_tpu.tpu_mesh("v9:2x2", 1)
    with pytest.raises(ValueError, match="from 1 to 4, the devices of v5e:2x2, got 8"):
        compile_tpu.tpu_mesh("v5e:2x2", 8)


def test_unknown_page_dtypes_raise():
    with pytest.raises(ValueError, match=r"kv_dtype: expected one of .*, got 'int4'"):
        compile_tpu.check_kv_dtype("int4")
