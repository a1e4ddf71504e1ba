"""The decoder's layers on GPUs: no loop, no branch and no copy of the pool in them.

Programs are compiled for a GPU without a GPU, with the attention of both kernels.
"""

import functools
import importlib.util
import os
import sys

import jax
import pytest

from jpaged.attention import kv_cache
from jpaged.config import EngineConfig
from jpaged.engine import forward
from jpaged.models import ModelConfig, init_model
from jpaged.models.inputs import StepInputs
from tests.support.gpu_compiler import (
    ControlFlow,
    compile_for_gpu,
    control_flow,
    requires_compiler,
)

pytestmark = [pytest.mark.gpu_compile, requires_compiler]

SIZES = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    torch_dtype="bfloat16",
)
LLAMA = dict(SIZES, model_type="llama", hidden_act="silu")
# Windows in every other layer, and soft caps.
GEMMA = dict(
    SIZES,
    model_type="gemma2",
    hidden_activation="gelu_pytorch_tanh",
    sliding_window=64,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    query_pre_attn_scalar=128,
)
ROWS, TOKENS, BLOCKS = 8, 32, 8192


def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def hopper(monkeypatch):
    """Lets jax-triton compile for a GPU that is not there."""
    if importlib.util.find_spec("jax_triton") is None:
        pytest.skip("needs jax-triton: extra `triton`")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter is on, for tests/triton: run this file alone")
    import jax_triton  # noqa: F401

    library = sys.modules["jax_triton.triton_lib"].triton_kernel_call_lib
    monkeypatch.setattr(library, "get_compute_capability", lambda _: 90)


def trunk(model_file, attention, *, is_ragged=False, kv_dtype="bfloat16"):
    """The compiled trunk of one step, and the bytes of its pool."""
    config = ModelConfig.from_hf(model_file)
    model = jax.eval_shape(lambda: init_model(config))
    cache = jax.eval_shape(
        functools.partial(
            kv_cache.init_kv_cache,
            num_layers=config.num_layers,
            num_blocks=BLOCKS,
            num_kv_heads=config.num_kv_heads,
            block_size=16,
            head_dim=config.head_dim,
            dtype=kv_dtype,
            implementation=attention,
        )
    )
    size = TOKENS if is_ragged else ROWS
    inputs = StepInputs(
        *(array(size), array(size), array(size), array(ROWS, 16), array(ROWS)),
        array(ROWS + 1) if is_ragged else None,
    )

    config = EngineConfig(num_blocks=8, attention=attention)

    def run(model, cache, inputs):
        return forward.run_trunk(model, cache, inputs, config)

    program = compile_for_gpu(run, model, cache, inputs, donate=(1,))
    return program, sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
    )


def check(program, pool_bytes):
    assert control_flow(program) == ControlFlow(0, 0, 0)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    # Partial results of the kernels; a copy of one layer's keys is 67 MB of bfloat16.
    assert memory.temp_size_in_bytes < 2**24 < pool_bytes / 16


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("model_file", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_layers_have_no_loop_and_no_branch_with_mosaic(model_file, is_ragged):
    program, pool_bytes = trunk(model_file, "mosaic_gpu", is_ragged=is_ragged)
    assert program.as_text().count('custom_call_target="mosaic_gpu') >= 4
    check(program, pool_bytes)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("model_file", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_layers_have_no_loop_and_no_branch_with_triton(model_file, kv_dtype, hopper):
    check(*trunk(model_file, "triton", kv_dtype=kv_dtype))


def test_plain_attention_keeps_its_layers_in_one_counted_loop():
    program, _ = trunk(LLAMA, "xla")
    assert control_flow(program).counted_loops >= 1
