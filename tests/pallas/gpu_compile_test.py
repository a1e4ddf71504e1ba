"""The kernels for Hopper GPUs, compiled to sm_90a programs without a GPU.

The tests read off the compiled programs that ptxas spills no register, that neither
attention nor page updates copy the pool, and how many loops a decode step has. Where
shared memory does not suffice, Mosaic raises an error.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jpaged import attention, engine
from jpaged.config import EngineConfig
from jpaged.engine import bookkeeping, programs
from jpaged.models import ModelConfig, init_model
from jpaged.pallas.gpu import attention as gpu_attention
from tests.support.gpu_compiler import (
    ControlFlow,
    compile_for_gpu,
    control_flow,
    requires_compiler,
)

pytestmark = [pytest.mark.gpu_compile, requires_compiler]

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
NUM_LAYERS, NUM_BLOCKS = 2, 32768  # gigabytes, beside which results are small


def array(*shape: int, dtype="int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def pool(name: str) -> jax.ShapeDtypeStruct:
    (_, num_kv_heads), head_dim, block_size, dtype, _ = SHAPES[name]
    shape = NUM_LAYERS, NUM_BLOCKS, num_kv_heads, block_size, head_dim
    return array(*shape, dtype=dtype)


def pool_bytes(name: str) -> int:
    pages = pool(name)
    return 2 * pages.size * jnp.dtype(pages.dtype).itemsize


def attend(name: str, *, is_ragged: bool, **more):
    (num_heads, _), head_dim, _, dtype, options = SHAPES[name]
    num_rows, num_queries = 16, 128 if is_ragged else 16

    def call(q, k_pages, v_pages, tables, lens, starts, layer):
        return attention.paged_attention(
            *(q, k_pages, v_pages, tables, lens),
            query_start_loc=starts if is_ragged else None,
            layer=layer,
            implementation="mosaic_gpu",
            return_lse=True,
            **(options | more),
        )

    return compile_for_gpu(
        call,
        array(num_queries, num_heads, head_dim, dtype=dtype),
        *(pool(name), pool(name)),
        *(array(num_rows, 64), array(num_rows), array(num_rows + 1), array()),
    )


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_attention_spills_no_register_and_copies_no_pool(
    name, is_ragged, monkeypatch, capfd
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    program = attend(name, is_ragged=is_ragged)
    assert "mosaic_gpu" in program.as_text()
    captured = capfd.readouterr()
    report = captured.out + captured.err
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    assert ("paged_attention_mosaic_gpu_kernel", "sm_90a") in kernels
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", report)} == {0}
    registers = {int(n) for n in re.findall(r"Used (\d+) registers", report)}
    # For a kernel of three warpgroups ptxas reports the registers that a thread starts
    # with: a third of a core's.
    is_wide = SHAPES[name][1] > 128
    assert (168 if is_wide else gpu_attention._COMPUTE_REGISTERS) in registers
    assert temporaries(program) < 2**26 < pool_bytes(name) / 16


def test_attention_over_shared_prefixes_copies_no_pool():
    program = attend("llama_3_8b", is_ragged=True, shared_prefix=True)
    assert temporaries(program) < 2**26 < pool_bytes("llama_3_8b") / 16


def test_page_updates_by_xla_happen_in_the_pools_memory():
    pages = pool("llama_3_8b")

    def write(k_pages, v_pages, k, v, slots, layer):
        options = {"layer": layer, "implementation": "mosaic_gpu"}
        return attention.write_kv(k_pages, v_pages, k, v, slots, **options)

    def copy(k_pages, v_pages, src, dst):
        options = {"implementation": "mosaic_gpu"}
        return attention.copy_blocks(k_pages, v_pages, src, dst, **options)

    new = array(64, 8, 128, dtype="bfloat16")
    arguments = pages, pages, new, new, array(64), array()
    written = compile_for_gpu(write, *arguments, donate=(0, 1))
    copied = compile_for_gpu(copy, pages, pages, *[array(16)] * 2, donate=(0, 1))
    size = pool_bytes("llama_3_8b")
    for program in (written, copied):
        assert program.memory_analysis().alias_size_in_bytes == size
        assert temporaries(program) < 2**22 < size / 32


# ---- the engine's program


def test_the_counter_tells_dynamic_loops_counted_loops_and_branches_apart():
    def program(x, n):
        def body(_, x):
            x = lax.cond(x.sum() > 0, lambda x: jnp.sort(x), lambda x: x @ x, x)
            return lax.fori_loop(0, 7, lambda _, x: x @ x, x)

        return lax.fori_loop(0, n, body, x)

    text = compile_for_gpu(program, array(64, 64, dtype="float32"), array()).as_text()
    assert control_flow(text) == ControlFlow(1, 1, 1)


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
        head_dim=128,
        max_position_embeddings=256,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        torch_dtype="bfloat16",
    )
)


def test_the_engine_updates_the_pool_in_place_and_has_few_loops():
    config = EngineConfig(
        num_blocks=4096,
        max_num_seqs=2,
        max_model_len=256,
        max_num_batched_tokens=16,
        attention="mosaic_gpu",
    )
    model = jax.eval_shape(lambda: init_model(MODEL))
    state = jax.eval_shape(lambda model: engine.init(model, config), model)
    program = compile_for_gpu(engine.run, model, state, array())
    pages = state.cache.k_pages
    size = 2 * pages.size * pages.dtype.itemsize
    assert program.memory_analysis().alias_size_in_bytes >= size
    assert temporaries(program) < 2**24 < size / 4
    # 22 loops and 16 branches with jax 0.10.2 on 2026-11-30. Each step of a dynamic
    # loop and each branch makes the GPU wait for the host.
    found = control_flow(program)
    assert 0 < found.dynamic_loops <= 24
    assert found.branches <= 18


@pytest.mark.parametrize("sampling", ["greedy", "filtered"])
def test_the_decode_loop_waits_for_the_host_at_most_four_times_a_step(sampling):
    config = EngineConfig(
        num_blocks=4096,
        max_num_seqs=8,
        max_model_len=256,
        max_num_batched_tokens=16,
        enable_prefix_caching=True,
        num_recorded_events=64,
        num_recorded_steps=64,
        sampling=sampling,
        attention="mosaic_gpu",
    )
    model = jax.eval_shape(lambda: init_model(MODEL))
    state = jax.eval_shape(lambda model: engine.init(model, config), model)
    pages = programs.Pages(state.cache, None)
    view = dataclasses.replace(state, cache=None)
    scheduled = jax.eval_shape(lambda: bookkeeping.idle_step(config))
    logits = array(config.max_num_logits, MODEL.vocab_size, dtype="float32")
    loop = functools.partial(programs.run_decode_loop, size=8, config=config)
    arguments = (model, pages, logits, view, scheduled, array())
    program = compile_for_gpu(loop, *arguments, donate=(1, 2, 3))
    found = control_flow(program)
    # The loop over steps; before it, those for the copies of the first step. Sampling
    # has branches of its own: one is evaluated in a step whose rows are all greedy.
    assert found.dynamic_loops + found.branches <= (4 if sampling == "greedy" else 14)
    size = 2 * state.cache.k_pages.size * 2
    assert program.memory_analysis().alias_size_in_bytes >= size
    assert temporaries(program) < 2**24 < size / 4
