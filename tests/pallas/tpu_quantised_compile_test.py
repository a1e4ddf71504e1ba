"""The TPU's kernels and an engine on pages of 8 bits, compiled without a TPU.

As in `tpu_compile_test`, the programs copy neither pages nor scales.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from experiments import compile_tpu
from jpaged import attention
from jpaged.config import EngineConfig
from jpaged.pallas.tpu import attention as tpu_attention
from jpaged.serving import memory
from tests.pallas import tpu_compile_test
from tests.pallas.tpu_compile_test import (
    MODEL,
    TOPOLOGIES,
    array,
    compiled,
    temporaries,
)

pytestmark = tpu_compile_test.pytestmark

NUM_SLOTS = 2**20
# heads, head_dim, block_size, dtypes of pages and of q, options
SHAPES = {
    "llama_3_8b": ((32, 8), 128, 32, "int8", "bfloat16", {}),
    "llama_3_8b_of_128": ((32, 8), 128, 128, "uint8", "bfloat16", {"return_lse": True}),
    "llama_3_2_1b": ((32, 8), 64, 128, "int8", "bfloat16", {}),
    "gemma_2_2b": ((8, 4), 256, 32, "uint8", "float32", {"logits_soft_cap": 50.0}),
    "blocks_of_16": ((16, 1), 128, 16, "float8_e4m3fn", "bfloat16", {}),
    "two_keys": ((14, 2), 64, 64, "uint8", "bfloat16", {"sliding_window": 100}),
    "scales_of_all_heads": ((16, 16), 128, 256, "int8", "bfloat16", {}),
}
UPDATED = [
    *((name, TOPOLOGIES[0]) for name in ("gemma_2_2b", "blocks_of_16")),
    *(
        (name, each)
        for name in ("llama_3_8b", "llama_3_8b_of_128")
        for each in TOPOLOGIES
    ),
]


def pools(name: str):
    """Return pages and scales, of keys and of values."""
    (_, num_kv_heads), head_dim, block_size, dtype, *_ = SHAPES[name]
    shape = (2, NUM_SLOTS // block_size, num_kv_heads)
    pages = array(*shape, block_size, max(head_dim, 128), dtype=dtype)
    scales = array(*shape, max(block_size, 128), dtype="float32")
    return pages, pages, scales, scales


def attend(name: str, topology: str):
    (num_heads, _), head_dim, _, _, q_dtype, options = SHAPES[name]
    num_rows, num_queries = 16, 128

    def call(q, k_pages, v_pages, k_scale, v_scale, tables, lens, starts, layer):
        return attention.paged_attention(
            *(q, k_pages, v_pages, tables, lens),
            query_start_loc=starts,
            k_scale=k_scale,
            v_scale=v_scale,
            layer=layer,
            implementation="mosaic_tpu",
            **options,
        )

    return compiled(
        topology,
        call,
        array(num_queries, num_heads, head_dim, dtype=q_dtype),
        *pools(name),
        *(array(num_rows, 64), array(num_rows), array(num_rows + 1), array()),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_attention_compiles_for_every_shape_and_copies_nothing(name):
    program = attend(name, "v5e:2x2")
    assert 'custom_call_target="tpu_custom_call"' in program.as_text()
    # Tiles of queries and little else; the pools have gigabytes.
    assert temporaries(program) < 2**23


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
@pytest.mark.parametrize("name", ["llama_3_8b", "llama_3_8b_of_128"])
def test_attention_compiles_for_every_topology(topology, name):
    assert temporaries(attend(name, topology)) < 2**23


def test_the_check_finds_that_scales_as_narrow_as_a_block_are_copied():
    def call(scales, *args):
        return attention.paged_attention(
            *args, k_scale=scales, v_scale=scales, implementation="mosaic_tpu", layer=0
        )

    pages, _, scales, _ = pools("llama_3_8b")
    narrow = array(*scales.shape[:3], 32, dtype="float32")
    rest = (array(16, 64), array(16))
    args = (array(16, 32, 128, dtype="bfloat16"), pages, pages, *rest)
    assert temporaries(compiled("v5e:2x2", call, scales, *args)) < 2**23
    size = narrow.size * 4
    assert temporaries(compiled("v5e:2x2", call, narrow, *args)) > size


@pytest.mark.parametrize(("name", "topology"), UPDATED)
def test_page_updates_happen_in_the_pools_memory(name, topology):
    (_, num_kv_heads), head_dim, *_ = SHAPES[name]
    arrays = pools(name)
    size = sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)

    def call(function, k_pages, v_pages, k_scale, v_scale, *rest, **options):
        options |= dict(k_scale=k_scale, v_scale=v_scale, implementation="mosaic_tpu")
        return function(k_pages, v_pages, *rest, **options)

    def write(*args):
        return call(attention.write_kv, *args[:-1], layer=args[-1])

    def copy(*args):
        return call(attention.copy_blocks, *args)

    new = array(64, num_kv_heads, head_dim, dtype="bfloat16")
    written = (write, *arrays, new, new, array(64), array())
    copied = (copy, *arrays, array(16), array(16))
    for call_and_arguments in (written, copied):
        program = compiled(topology, *call_and_arguments, donate=range(4))
        assert program.memory_analysis().alias_size_in_bytes == size
        assert temporaries(program) < 2**21 < size / 32


# ---- the engine's program


def run(num_blocks: int, num_kv_heads: int, tensor: int):
    model = dataclasses.replace(MODEL, num_kv_heads=num_kv_heads)
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=32,
        max_num_seqs=2,
        max_model_len=256,
        max_num_batched_tokens=16,
        attention="mosaic_tpu",
    )
    mesh = compile_tpu.tpu_mesh("v5e:2x2", tensor)
    size = memory.block_bytes(model, 32, "int8", "mosaic_tpu", tensor)
    return compile_tpu.compile_run(model, config, mesh, "int8"), num_blocks * size


def moved(program, num_blocks: int, num_kv_heads: int) -> list[str]:
    """Return the lines that copy pages or scales, or move them to another memory."""
    text = program.as_text()
    pages = rf"s8\[2,{num_blocks},{num_kv_heads},32,128\]"
    scales = rf"f32\[2,{num_blocks},{num_kv_heads},128\]"
    assert re.search(pages, text)
    assert re.search(scales, text)
    pool = rf"({pages}|{scales})"
    found = rf"{pool}\{{[^}}]*S\(|= \(?{pool}\S* copy"
    return [line for line in text.splitlines() if re.search(found, line)]


@pytest.mark.parametrize("is_left_in_place", [True, False])
def test_the_engine_updates_pages_and_scales_in_place(is_left_in_place, monkeypatch):
    """Four devices store each of 2 key/value heads twice.

    Without a constraint XLA moves so small a pool next to the core for a step.
    """
    if not is_left_in_place:
        monkeypatch.setattr(tpu_attention, "_keep_in_place", lambda arrays: arrays)
        jax.clear_caches()
    program, size = run(4096, 2, 4)
    assert size == 4096 * 2 * 2 * (32 * 128 + 4 * 128)
    assert program.memory_analysis().alias_size_in_bytes >= size
    assert (moved(program, 4096, 1) == []) == is_left_in_place
    assert temporaries(program) < 14e6 < size  # whatever the pool's size
    # For each of the two step sizes: two sums per layer, and one of the embedding.
    expected = {"all-reduce": 2 * (2 * 2 + 1), "all-gather": 1}
    assert compile_tpu.count_collectives(program) == expected
