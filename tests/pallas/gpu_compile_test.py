"""The Hopper GPU's kernels, compiled to sm_90a programs with no GPU present.

What is read off the programs: ptxas kept everything in registers, the pool is neither
copied by attention nor by XLA's own writes and block copies. Where shared memory does
not suffice, Mosaic raises.
"""

import functools
import importlib.util
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpaged import attention
from jpaged.pallas.gpu import attention as gpu_attention

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs jax-cuda13-plugin, for the compiler; no GPU",
    ),
    pytest.mark.skipif(
        shutil.which("ptxas") is None, reason="needs ptxas of CUDA 13 on the path"
    ),
]

# What XLA asks about the device it compiles for: an H100 SXM, by its data sheet.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85000000000
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# heads, head_dim, block_size, dtype, options
SHAPES = {
    "llama_3_8b": ((32, 8), 128, 16, "bfloat16", {}),
    "qwen_2_5_7b": ((28, 4), 128, 64, "bfloat16", {}),
    "llama_2_7b": ((32, 32), 128, 32, "float16", {}),
    "llama_3_2_1b": ((32, 8), 64, 16, "bfloat16", {"logits_soft_cap": 50.0}),
    "one_key": ((16, 1), 128, 128, "bfloat16", {"sliding_window": 100}),
    "gemma_2_2b": ((8, 4), 256, 16, "bfloat16", {"logits_soft_cap": 50.0}),
    "gemma_2b": ((8, 1), 256, 64, "float16", {}),
}
NUM_BLOCKS = (512, 4096)


@functools.cache
def mesh() -> Mesh:
    machine = topologies.get_topology_desc(
        "", "cuda", target_config=H100, topology="1x1x1"
    )
    return Mesh(np.array(machine.devices[:1]), ("x",))


def compiled(function, *args, donate=()):
    sharding = NamedSharding(mesh(), PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def array(*shape: int, dtype="int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def pool(name: str, num_blocks: int = NUM_BLOCKS[0]) -> jax.ShapeDtypeStruct:
    (_, num_kv_heads), head_dim, block_size, dtype, _ = SHAPES[name]
    return array(2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)


def attend(name: str, *, is_ragged: bool, num_blocks: int = NUM_BLOCKS[0], **more):
    (num_heads, _), head_dim, _, dtype, options = SHAPES[name]
    num_rows, num_queries = 16, 128 if is_ragged else 16
    pages = pool(name, num_blocks)

    def call(q, k_pages, v_pages, tables, lens, starts, layer):
        return attention.paged_attention(
            *(q, k_pages, v_pages, tables, lens),
            query_start_loc=starts if is_ragged else None,
            layer=layer,
            implementation="mosaic_gpu",
            return_lse=True,
            **(options | more),
        )

    return compiled(
        call,
        array(num_queries, num_heads, head_dim, dtype=dtype),
        *(pages, pages),
        *(array(num_rows, 64), array(num_rows), array(num_rows + 1), array()),
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_attention_compiles_and_spills_no_register(name, is_ragged, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    text = attend(name, is_ragged=is_ragged).as_text()
    assert "mosaic_gpu" in text
    captured = capfd.readouterr()
    report = captured.out + captured.err
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    assert ("paged_attention_mosaic_gpu_kernel", "sm_90a") in kernels
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", report)} == {0}
    registers = {int(n) for n in re.findall(r"Used (\d+) registers", report)}
    # Of three warpgroups ptxas names what a thread begins with, a third of a core's.
    is_wide = SHAPES[name][1] > 128
    assert (168 if is_wide else gpu_attention._COMPUTE_REGISTERS) in registers


@pytest.mark.parametrize("shared_prefix", [None, True])
def test_attention_needs_no_memory_that_grows_with_the_pool(shared_prefix):
    more = dict(is_ragged=True, shared_prefix=shared_prefix)
    small, large = (
        attend("llama_3_8b", num_blocks=n, **more).memory_analysis() for n in NUM_BLOCKS
    )
    assert small.temp_size_in_bytes == large.temp_size_in_bytes


def test_page_updates_by_xla_happen_in_the_pools_memory():
    pages = pool("llama_3_8b", NUM_BLOCKS[1])
    size = 2 * pages.size * jnp.dtype(pages.dtype).itemsize

    def write(k_pages, v_pages, k, v, slots, layer):
        options = {"layer": layer, "implementation": "mosaic_gpu"}
        return attention.write_kv(k_pages, v_pages, k, v, slots, **options)

    def copy(k_pages, v_pages, src, dst):
        options = {"implementation": "mosaic_gpu"}
        return attention.copy_blocks(k_pages, v_pages, src, dst, **options)

    new = array(64, 8, 128, dtype="bfloat16")
    written = compiled(write, pages, pages, new, new, array(64), array(), donate=(0, 1))
    copied = compiled(copy, pages, pages, *[array(16)] * 2, donate=(0, 1))
    for program in (written, copied):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == size
        assert memory.temp_size_in_bytes < 2**22 < size / 32
