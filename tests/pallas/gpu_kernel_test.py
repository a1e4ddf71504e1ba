"""The kernels for Hopper GPUs in Mosaic's GPU interpret mode, against float64.

In this mode uninitialised shared memory is NaN. The cases also set everything to NaN
that must not be read. The work list is compared with Python lists. `gpu_compile_test`
compiles the same kernels.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged import LLM, attention
from jpaged.pallas.gpu import attention as gpu_attention
from jpaged.pallas.gpu import calls as gpu
from jpaged.pallas.gpu import work as gpu_work
from jpaged.pallas.gpu.plan import GpuTiles
from tests.support.attention import oracle
from tests.support.attention.oracle import Case, make_case, relative_errors
from tests.support.attention.prefix_cases import group_case
from tests.support.paths import ROOT

# As in `tests/attention/attention_test.py`.
TOLERANCES = {"float16": 1e-3, "bfloat16": 4e-3}
LSE_TOLERANCE = 1e-4
# Parts so short that a few tokens need several; few blocks, because each takes time.
SMALL = GpuTiles(shared_bytes=2**16, blocks=4, part_tokens=64)

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the GPU interpret mode of jax 0.10 has no product with a transposed side",
)


@pytest.fixture
def small_sizes(monkeypatch):
    monkeypatch.setattr(gpu, "GPU_TILES", SMALL)


def run(case: Case, **options):
    arrays = jax.tree.map(jnp.asarray, oracle.arrays(case))
    call = functools.partial(
        attention.paged_attention,
        implementation="mosaic_gpu",
        return_lse=True,
        **options,
    )
    # Reports threads that use the same memory without waiting for each other.
    params = plgpu.InterpretGPUParams(detect_races=True)
    with plgpu.force_gpu_interpret_mode(params):
        return jax.block_until_ready(jax.jit(call)(**arrays))


def check(case: Case, **options) -> None:
    device = dict(options)
    if "sinks" in options:
        device["sinks"] = jnp.asarray(options["sinks"])
    out, lse = run(case, **device)
    tolerance = TOLERANCES[case.k_pages.dtype.name]
    oracle.check_result(case, out, lse, tolerance, LSE_TOLERANCE, **options)


SINKS = np.linspace(-2.0, 3.0, 4).astype(np.float32)


@interpreted
def test_decode_equals_the_oracle_at_every_length(small_sizes):
    lengths = [0, 1, 15, 16, 17, 0, 150]
    check(make_case(lengths, heads=(8, 2), head_dim=128, dtype="bfloat16"))


@interpreted
def test_large_blocks_windows_and_a_soft_cap_equal_the_oracle(small_sizes):
    case = make_case(
        [5, 140], heads=(3, 1), head_dim=64, block_size=128, dtype="float16"
    )
    check(case, sliding_window=70, logits_soft_cap=2.0)


@interpreted
def test_chunks_decode_rows_and_empty_rows_equal_the_oracle(small_sizes):
    #          decode, chunk after context, empty, fresh prompt, chunk
    contexts, queries = [67, 25, 0, 17, 40], [1, 9, 0, 17, 18]
    case = make_case(
        contexts,
        queries,
        heads=(4, 1),
        head_dim=64,
        block_size=32,
        dtype="bfloat16",
        num_padding=3,
    )
    case.q[45:] = np.nan
    check(case, sinks=SINKS, sliding_window=37, scale=0.2)


@interpreted
def test_a_traced_layer_and_window_equal_that_layer_alone(small_sizes):
    case = make_case([5, 33], heads=(2, 1), head_dim=64, dtype="bfloat16")
    k_pages, v_pages = np.full((2, 2, *case.k_pages.shape), np.nan, case.q.dtype)
    k_pages[1], v_pages[1] = case.k_pages, case.v_pages
    all_layers = dataclasses.replace(case, k_pages=k_pages, v_pages=v_pages)
    options = {"layer": jnp.int32(1), "sliding_window": jnp.int32(9)}
    got, _ = run(all_layers, **options)
    want, _ = oracle.attention(case, sliding_window=9)
    assert relative_errors(got, want).max() < TOLERANCES["bfloat16"]


@interpreted
def test_released_blocks_in_front_of_the_window_are_not_read(small_sizes):
    case = make_case([40, 90], heads=(2, 1), head_dim=64, dtype="bfloat16")
    check(oracle.without_front(case, 9), sliding_window=9)


@pytest.mark.long
@interpreted
def test_shared_prefixes_equal_the_oracle(small_sizes):
    # A virtual row holds two rows of 32 heads, so the group of three has two virtual
    # rows. One row of the group of two has a chunk, so that no other row shares it.
    groups = {1: (2, 1, 2, 4), 5: (1, 5, 6)}
    sizes = dict(heads=(32, 1), head_dim=64, dtype="bfloat16")
    case, shared = group_case(
        groups, [20, 3, 17, 0, 1, 5, 2], queries=[1, 1, 1, 0, 1, 1, 2], **sizes
    )
    sinks = np.linspace(-2.0, 3.0, 32).astype(np.float32)
    options = dict(sliding_window=50, sinks=sinks)
    device = options | {"sinks": jnp.asarray(sinks)}
    out, lse = run(case, shared_prefix=shared, **device)
    want = case, out, lse, TOLERANCES["bfloat16"], LSE_TOLERANCE
    oracle.check_result(*want, **options)


@interpreted
def test_the_output_is_nan_if_unseen_values_are_not_cleared(monkeypatch, small_sizes):
    monkeypatch.setattr(gpu_attention, "_clear_unseen", lambda *args: None)
    out, _ = run(make_case([33], heads=(2, 1), head_dim=64, dtype="bfloat16"))
    assert np.isnan(np.asarray(out, np.float32)).all()


@interpreted
def test_a_buffer_that_is_refilled_too_early_is_reported(monkeypatch, small_sizes):
    wait, calls = plgpu.barrier_wait, []

    def all_but_the_first(barrier):
        calls.append(barrier)
        if len(calls) > 1:
            wait(barrier)

    monkeypatch.setattr(gpu_attention.plgpu, "barrier_wait", all_but_the_first)
    monkeypatch.setattr(gpu, "GPU_TILES", dataclasses.replace(SMALL, part_tokens=512))
    case = make_case([300], heads=(2, 1), head_dim=64, dtype="bfloat16")
    with pytest.raises(Exception, match="RACE DETECTED"):
        run(case)


def shifted_table(case: Case) -> Case:
    return dataclasses.replace(case, block_tables=np.roll(case.block_tables, 1, axis=0))


def one_key_less(case: Case) -> Case:
    return dataclasses.replace(case, context_lens=case.context_lens - 1)


@interpreted
@pytest.mark.parametrize("fault", [shifted_table, one_key_less])
def test_a_planted_fault_exceeds_the_tolerance(fault, small_sizes):
    case = make_case([33, 64], heads=(2, 1), head_dim=64, dtype="bfloat16")
    got, _ = run(fault(case))
    want, _ = oracle.attention(case)
    errors = relative_errors(got, want)
    assert not (errors < TOLERANCES["bfloat16"]).all(axis=1).any()


# ---- heads of 256, for which two warpgroups multiply


def with_threads(function) -> None:
    """Call a function of this module in a process with enough threads.

    Each thread of a kernel that waits occupies one of XLA's threads, of which there are
    as many as cores. On two cores three warpgroups would wait forever.
    """
    code = (
        "import tests.conftest, tests.pallas.gpu_kernel_test as test; "
        f"test.{function.__name__}()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"NPROC": "8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def heads_of_256(contexts, queries=None, **more) -> Case:
    sizes = dict(heads=(4, 2), head_dim=256, dtype="bfloat16")
    return make_case(contexts, queries, **sizes, **more)


def check_heads_of_256() -> None:
    gpu.GPU_TILES = SMALL
    check(heads_of_256([0, 1, 16, 150]), logits_soft_cap=3.0)
    case = heads_of_256([67, 0, 40], [2, 0, 35], block_size=128, num_padding=2)
    check(case, sinks=SINKS, sliding_window=37)


def check_faults() -> None:
    gpu.GPU_TILES = SMALL
    wait, put = plgpu.barrier_wait, gpu_attention._put

    def columns_of_the_other(acc, total, out, role, *rest, **scratch):
        put(acc, total, out, 1 - role, *rest, **scratch)

    gpu_attention._put = columns_of_the_other
    case = heads_of_256([33])
    got, _ = run(case)
    want, _ = oracle.attention(case)
    assert (relative_errors(got, want) > TOLERANCES["bfloat16"]).all()

    def without_waiting(*args, **scratch):
        plgpu.barrier_wait = lambda barrier: None
        put(*args, **scratch)
        plgpu.barrier_wait = wait

    gpu_attention._put = without_waiting
    with pytest.raises(Exception, match="RACE DETECTED"):
        run(case)


@interpreted
@pytest.mark.parametrize("checked", [check_heads_of_256, check_faults])
@pytest.mark.long
def test_heads_of_256_equal_the_oracle_and_faults_are_reported(checked):
    with_threads(checked)


# ---- the work list


def tiles_and_items(starts, contexts, *, tile_queries, num_full, window=2**30):
    num_queries = starts[-1] + 3
    tiles = gpu_work.query_tiles(
        jnp.array(starts, jnp.int32),
        jnp.array(contexts, jnp.int32),
        jnp.int32(window),
        num_tiles=gpu_work.max_tiles(num_queries, len(contexts), tile_queries),
        tile_queries=tile_queries,
        group=2,
        rows=8,
        max_tokens=4096,
    )
    num_items = tiles.row.shape[0] + num_full
    sizes = dict(unit=16, units=2, min_steps=2)
    items = gpu_work.split_tiles(tiles, num_items=num_items, **sizes)
    return jax.tree.map(np.asarray, (tiles, *items))


@pytest.mark.parametrize("num_full", [1, 4, 40])
def test_items_cover_each_tile_once_in_parts_of_about_equal_length(num_full):
    starts, contexts = [0, 1, 1, 8, 10], [4000, 0, 100, 37]
    tiles, items, first, count = tiles_and_items(
        starts, contexts, tile_queries=4, num_full=num_full, window=3000
    )
    expected = [(0, 0, 1), (2, 1, 4), (2, 5, 3), (3, 8, 2)]  # row, first query, number
    n = len(expected)
    found = zip(tiles.row[:n], tiles.first[:n], tiles.queries[:n], strict=True)
    assert [tuple(map(int, tile)) for tile in found] == expected
    assert (tiles.end_token[:n] == [4000, 97, 100, 37]).all()
    assert (tiles.queries[n:] == 0).all()
    assert (count[n:] == 0).all()
    steps = []
    for tile in range(n):
        own = range(first[tile], first[tile] + count[tile])
        covered = [
            unit
            for item in own
            for unit in range(
                items.unit[item], items.unit[item] + 2 * items.steps[item]
            )
        ]
        begin, end = tiles.first_token[tile] // 16, -(-tiles.end_token[tile] // 16)
        assert covered == list(range(begin, begin + len(covered)))
        assert 0 <= len(covered) - (end - begin) < 2
        assert (items.tile[list(own)] == tile).all()
        steps += [int(items.steps[item]) for item in own]
    assert items.steps.sum() == sum(steps)
    assert max(steps) <= max(-(-sum(steps) // num_full), 2)


def test_each_query_finds_its_tile():
    tile = gpu_work.tile_of_queries(jnp.array([0, 1, 1, 8, 10], jnp.int32), 10, 4)
    assert tile.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 3, 3]


# ---- unsupported calls

WRONG = {
    "k_pages: expected bfloat16 or float16, got float32": {"dtype": "float32"},
    "k_pages: expected a block_size of 16, 32 or .* got 48": {"block_size": 48},
    "k_pages: expected a head_dim of 64, 128 or 256, got 192": {"head_dim": 192},
    "q: expected at most 64 heads to a key/value head, got 65": {"heads": (65, 1)},
}


@pytest.mark.parametrize("message", WRONG)
def test_an_unsupported_call_raises_and_names_another_backend(message):
    case = make_case([5], **({"head_dim": 64, "dtype": "bfloat16"} | WRONG[message]))
    arrays = [jnp.asarray(x) for x in dataclasses.astuple(case)[:5]]
    with pytest.raises(
        ValueError, match=r"'mosaic_gpu' cannot serve this \('xla' can\): " + message
    ):
        attention.paged_attention(*arrays, implementation="mosaic_gpu")


def test_a_mesh_of_several_devices_raises():
    case = make_case([5], head_dim=64, dtype="bfloat16")
    arrays = [jnp.asarray(x) for x in dataclasses.astuple(case)[:5]]
    call = functools.partial(attention.paged_attention, implementation="mosaic_gpu")
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"expected one device, .* got a mesh .*2"),
    ):
        jax.eval_shape(call, *arrays)


def test_an_llm_without_a_gpu_raises():
    with pytest.raises(ValueError, match=r"got 'mosaic_gpu', which needs a Hopper GPU"):
        LLM("random:opt-125m", attention="mosaic_gpu")
