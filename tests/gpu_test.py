"""Tests on a real NVIDIA GPU: results against float64, updates in place, an engine.

    JAX_PLATFORMS=cuda python -m pytest -m gpu tests/gpu_test.py

The cases are those of `attention_test`. Each backend runs all cases that it supports.
"""

import functools
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, SamplingParams, attention
from jpaged.attention import backends
from jpaged.pages.backend import AttentionCall
from tests.support.attention import oracle
from tests.support.attention.cases import (
    FAULTS,
    GPU_SHAPES,
    LSE_TOLERANCE,
    TOLERANCES,
    check,
    check_copies,
    check_fault,
    check_in_place,
    check_writes,
    decode_case,
    lengths_around,
    many_lengths,
    ragged_case,
)
from tests.support.attention.oracle import make_case, relative_errors
from tests.support.attention.prefix_cases import GROUPS, OWN_TOKENS, QUERIES, group_case
from tests.support.attention.quantised_cases import KERNEL_TOLERANCES, case_of
from tests.support.paths import ROOT

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = ("xla", "triton", "mosaic_gpu")


def supports(implementation: str, name: str) -> bool:
    (num_heads, num_kv_heads), head_dim, block_size, dtype, _ = GPU_SHAPES[name]
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    pages = array((1, num_kv_heads, block_size, head_dim))
    q = array((1, num_heads, head_dim))
    try:
        backends.choose_backend(implementation, pages, call=AttentionCall(q))
    except ValueError:
        return False
    return True


_PAIRS = itertools.product(IMPLEMENTATIONS, GPU_SHAPES)
SUPPORTED = [(one, name) for one, name in _PAIRS if supports(one, name)]


@pytest.fixture(autouse=True, scope="module")
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(
            "needs an NVIDIA GPU: this process computes on "
            f"{jax.devices()[0].device_kind} (JAX_PLATFORMS="
            f"{os.environ.get('JAX_PLATFORMS', '')})"
        )


@pytest.fixture(autouse=True)
def _installed(request):
    arguments = getattr(request.node, "callspec", None)
    implementation = arguments and arguments.params.get("implementation")
    if implementation == "triton":
        pytest.importorskip("jax_triton", exc_type=ImportError)
    if implementation == "mosaic_gpu":
        capability = float(getattr(jax.devices()[0], "compute_capability", 0))
        if not 9 <= capability < 10:
            pytest.skip(f"needs a Hopper GPU, got compute capability {capability}")


@pytest.mark.parametrize(("implementation", "name"), SUPPORTED)
def test_decode_equals_the_oracle_at_every_length(implementation, name):
    case, options = decode_case(name)
    check(case, implementation, **options)


@pytest.mark.parametrize(("implementation", "name"), SUPPORTED)
def test_ragged_equals_the_oracle_on_chunks_decodes_and_empty_rows(
    implementation, name
):
    case, options = ragged_case(name)
    check(case, implementation, **options)


SIZES = dict(heads=(8, 2), head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_rows_that_share_their_first_blocks_equal_the_oracle(implementation):
    check(make_case(many_lengths(16), shared_blocks=4, **SIZES), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_long_row_beside_short_ones_equals_the_oracle(implementation):
    check(make_case([20_000, 1, 0, 300, 17], **SIZES), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [(8, 2), (32, 2), (8, 8)])
@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "chunks"])
def test_prefixes_that_are_read_once_equal_the_oracle(queries, heads, implementation):
    sizes = SIZES | dict(heads=heads, queries=queries)
    case, shared = group_case(GROUPS, OWN_TOKENS, **sizes)
    call = functools.partial(
        attention.paged_attention, implementation=implementation, return_lse=True
    )
    arrays = jax.tree.map(jnp.asarray, oracle.arrays(case))
    for options in ({}, dict(sliding_window=50, logits_soft_cap=2.0)):
        attend = jax.jit(functools.partial(call, **options))
        out, lse = attend(**arrays, shared_prefix=shared)
        tolerances = TOLERANCES["bfloat16"], LSE_TOLERANCE
        oracle.check_result(case, out, lse, *tolerances, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_breaks_the_tolerance(fault, implementation):
    check_fault(make_case([2048, 300, 17, 64], **SIZES), fault, implementation, rows=4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layer", [None, 1])
def test_writes_are_exact(dtype, layer, implementation):
    check_writes(dtype, layer, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layer", [None, 1, "all"])
def test_copies_are_exact(layer, implementation):
    check_copies("bfloat16", layer, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_donated_pools_are_updated_in_their_own_memory(implementation):
    check_in_place(implementation)


# ---- quantised pages

OF_8_BITS = ("xla", "triton")
QUANTISED = [
    ("groups_of_4", "int8"),
    ("groups_of_4", "uint8"),
    ("groups_of_4", "float8_e4m3fn"),
    ("groups_of_7", "uint8"),
    ("one_group_64", "int8"),
    ("one_group_64", "uint8"),
    ("heads_of_256", "int8"),
    ("heads_of_256", "uint8"),
    ("one_group", "int8"),
    ("groups_of_16_float16", "int8"),
    ("groups_of_7_window_of_1", "int8"),
    ("everything", "int8"),
    ("everything", "uint8"),
]


def relative_errors_of(arguments, case, implementation, **options):
    """Return the relative error of each vector against float64 attention."""
    call = functools.partial(
        attention.paged_attention, implementation=implementation, **options
    )
    expected, _ = oracle.attention(case, **options)
    return relative_errors(jax.jit(call)(**arguments), expected)


@pytest.mark.parametrize("implementation", OF_8_BITS)
@pytest.mark.parametrize(("name", "dtype"), QUANTISED)
def test_quantised_pages_equal_the_oracle_on_the_dequantised_values(
    name, dtype, implementation
):
    shape = GPU_SHAPES[name]
    size, tolerance = shape[2], KERNEL_TOLERANCES[shape[3]]
    chunks = [257, 2 * size + 9, 0, size + 1, size, 40, 1, 70]
    queries = [1, 9, 0, size + 1, 1, 0, 1, 37]
    for contexts, lens in ((lengths_around(size), None), (chunks, queries)):
        arguments, case, options = case_of(shape, contexts, lens, dtype=dtype)
        error = relative_errors_of(arguments, case, implementation, **options).max()
        assert error < tolerance, (contexts, error)


@pytest.mark.parametrize("implementation", OF_8_BITS)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scale_of_another_token_breaks_the_tolerance(axis, name, implementation):
    shape = GPU_SHAPES["groups_of_4"]
    arguments, case, _ = case_of(shape, [2048, 300, 17, 64], dtype="int8")
    arguments[name] = jnp.roll(arguments[name], 1, axis=axis)
    errors = relative_errors_of(arguments, case, implementation).max(axis=-1)
    assert not (errors < 2 * KERNEL_TOLERANCES["bfloat16"]).any()


@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.parametrize("name", ["write_kv", "copy_blocks"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_updates_of_quantised_pages_equal_those_of_xla_and_are_in_place(
    dtype, name, implementation
):
    shape, numbers = (2, 256, 2, 16, 64), jnp.arange(8, dtype=jnp.int32)
    k = jax.random.normal(jax.random.key(0), (8, 2, 64), "bfloat16")
    rest = {
        "write_kv": (k, 2 * k, 3 * numbers - 3),
        "copy_blocks": (numbers, 8 + numbers),
    }
    scale = jnp.arange(np.prod(shape[:-1]), dtype=jnp.float32).reshape(shape[:-1])
    pages = jnp.broadcast_to(scale[..., None] % 128, shape).astype(dtype)
    pools = [pages, pages + 1, scale, scale + 1]

    def update(k_pages, v_pages, k_scale, v_scale, implementation):
        options = dict(k_scale=k_scale, v_scale=v_scale, layer=1)
        call = functools.partial(getattr(attention, name), **options)
        return call(k_pages, v_pages, *rest[name], implementation=implementation)

    expected = [np.asarray(pool).tobytes() for pool in update(*pools, "xla")]
    addresses = [pool.unsafe_buffer_pointer() for pool in pools]
    update = functools.partial(update, implementation=implementation)
    after = jax.jit(update, donate_argnums=(0, 1, 2, 3))(*pools)
    assert [np.asarray(pool).tobytes() for pool in after] == expected
    assert [pool.unsafe_buffer_pointer() for pool in after] == addresses


def check_last_blocks(num_blocks: int, implementation: str) -> None:
    """Check that the last blocks of a pool are written and read."""
    case = make_case([40, 33], heads=(8, 8), head_dim=128, dtype="bfloat16")
    own = len(case.k_pages)
    shape = (num_blocks, *case.k_pages.shape[1:])
    pools = [jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(2)]
    slots = 16 * (num_blocks - own) + np.arange(16 * own, dtype=np.int32)
    rows = (
        jnp.asarray(pages.transpose(0, 2, 1, 3).reshape(16 * own, *shape[1::2]))
        for pages in (case.k_pages, case.v_pages)
    )
    write = functools.partial(attention.write_kv, implementation=implementation)
    write = jax.jit(write, donate_argnums=(0, 1))
    pools = write(*pools, *rows, jnp.asarray(slots))
    tables = np.where(
        (case.block_tables >= 0) & (case.block_tables < own),
        case.block_tables + num_blocks - own,
        case.block_tables,
    )
    attend = functools.partial(attention.paged_attention, implementation=implementation)
    lens = jnp.asarray(case.context_lens)
    got = jax.jit(attend)(jnp.asarray(case.q), *pools, jnp.asarray(tables), lens)
    expected, _ = oracle.attention(case)
    assert relative_errors(got, expected).max() < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_after_2_to_the_31_elements_are_written_and_read(implementation):
    check_last_blocks(2**31 // (8 * 16 * 128) + 64, implementation)


def tokens(implementation: str, kv_dtype: str) -> list[list[int]]:
    """Return the greedy tokens of an engine on this process's device."""
    llm = LLM(
        "tiny-python",
        dtype="float32",
        kv_dtype=kv_dtype,
        num_blocks=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,  # the longer prompt is computed in chunks
        attention=implementation,
    )
    prompts = ["def main():", "import numpy as np\n" * 8, "class Queue:\n    "]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(prompts, params, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


def tokens_on_cpu(kv_dtype: str) -> list[list[int]]:
    code = (
        "import json, sys, gpu_test; print(json.dumps(gpu_test.tokens(*sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "xla", kv_dtype],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_engine_generates_the_same_tokens_as_on_a_cpu(implementation):
    # "mosaic_gpu" supports 16-bit pages only.
    kv_dtype = "bfloat16" if implementation == "mosaic_gpu" else "float32"
    assert tokens(implementation, kv_dtype) == tokens_on_cpu(kv_dtype)
