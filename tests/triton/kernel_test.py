"""The Triton kernels in Triton's interpreter.

Attention is compared with the float64 oracle, and page updates with those of XLA, bit
for bit. `compile_test` compiles the same kernels.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import attention
from jpaged.triton import attention as triton_attention
from jpaged.triton import pages as triton_pages
from jpaged.triton.tiles import TritonTiles
from tests.support.attention import oracle
from tests.support.attention.oracle import make_case, relative_errors
from tests.support.attention.prefix_cases import GROUPS, OWN_TOKENS, QUERIES, group_case

# Not `importorskip`: `triton_interpreter` sets a variable before it imports triton.
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: extra `gpu-compile`", allow_module_level=True)
from tests.support.attention import triton_interpreter

pytestmark = pytest.mark.gpu_compile

# As in `tests/attention/attention_test.py`.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
LSE_TOLERANCE = 1e-4
# Tiles so small that a few tokens need several tiles, and rows are split.
SMALL = TritonTiles(query_rows=32, tokens=16, programs=16, least_chunk=32)
# heads, head_dim, block_size, dtype, options; groups of 1 to 16 heads.
SHAPES = {
    "one_group": ((2, 2), 64, 16, "float32", {}),
    "groups_of_4": ((8, 2), 128, 16, "bfloat16", {}),
    "groups_of_7": ((14, 2), 64, 64, "float16", {}),
    "one_key": ((16, 1), 16, 128, "float32", {"logits_soft_cap": 5.0}),
    "window": ((4, 2), 32, 16, "float32", {"sliding_window": 40}),
    "window_of_1": ((4, 4), 16, 32, "float32", {"sliding_window": 1}),
    "large_heads": ((2, 1), 256, 32, "bfloat16", {"scale": 0.2}),
    "everything": (
        (6, 2),
        32,
        16,
        "float32",
        dict(sinks=True, sliding_window=60, logits_soft_cap=2.0, scale=0.31),
    ),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    for module in (triton_attention, triton_pages):
        monkeypatch.setattr(module, "launch", triton_interpreter.launch)
    monkeypatch.setattr(
        triton_attention.triton_tiles, "default_tiles", lambda *_: SMALL
    )


def errors(case, **options):
    """Return the largest errors of an output vector and of a log-sum-exp."""
    arrays = jax.tree.map(jnp.asarray, oracle.arrays(case))
    call = functools.partial(
        attention.paged_attention, implementation="triton", return_lse=True, **options
    )
    out, lse = jax.jit(call)(**arrays)
    options.pop("shared_prefix", None)
    want_out, want_lse = oracle.attention(case, **options)
    assert out.dtype == case.q.dtype
    same = np.where(np.isneginf(want_lse), np.isneginf(lse), True)
    assert same.all()
    lse_error = np.abs(np.where(np.isneginf(want_lse), 0, lse - want_lse)).max()
    return relative_errors(out, want_out).max(), lse_error


def check(name, contexts, queries=None, **more):
    heads, head_dim, block_size, dtype, options = SHAPES[name]
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = np.linspace(-2, 3, heads[0]).astype(np.float32)
    sizes = dict(heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    error, lse_error = errors(make_case(contexts, queries, **sizes, **more), **options)
    # `<`, because NaN would pass `not >`.
    assert error < TOLERANCES[dtype]
    assert lse_error < LSE_TOLERANCE


def ragged_lengths(block_size):
    """Context lengths and numbers of queries of chunks, decode rows and empty rows."""
    contexts = [130, 2 * block_size + 9, 0, block_size + 1, block_size, 40, 1, 70]
    # A prompt without context, or of large blocks the last tokens of a long one.
    return contexts, [1, 9, 0, min(block_size + 1, 33), 1, 0, 1, 37]


@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_oracle_at_every_length(name):
    size = SHAPES[name][2]
    check(name, [257, 0, 1, size - 1, size, size + 1])


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_decode_rows_and_empty_rows_equal_the_oracle(name):
    check(name, *ragged_lengths(SHAPES[name][2]), num_padding=5)


def test_a_long_row_is_split_and_blocks_can_be_shared():
    check("groups_of_4", [2048, 100, 300, 5], shared_blocks=4)


@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (None, {}),
        (QUERIES, dict(sinks=True, sliding_window=50, logits_soft_cap=2.0)),
    ],
)
def test_shared_prefixes_equal_the_oracle(queries, options):
    if options.get("sinks"):
        options = options | {"sinks": np.linspace(-2, 3, 16).astype(np.float32)}
    dtype = "bfloat16" if queries is None else "float32"
    sizes = dict(heads=(16, 1), head_dim=16, dtype=dtype, queries=queries)
    case, shared = group_case(GROUPS, OWN_TOKENS, **sizes)
    error, lse_error = errors(case, shared_prefix=shared, **options)
    assert error < TOLERANCES[dtype]
    assert lse_error < LSE_TOLERANCE


def test_the_work_list_splits_rows_by_their_lengths_within_its_bounds():
    lens = jnp.array([4000, 0, 10, 300], jnp.int32)
    starts = jnp.array([0, 1, 2, 3, 40], jnp.int32)
    work = triton_attention.plan_work(lens, starts, jnp.int32(2**30), 8, 8, SMALL)
    items, parts = np.diff(work.items), np.diff(work.parts)
    assert work.chunk == 512  # 4010 tokens over 8, in whole tiles of 16
    assert items.tolist() == [8, 1, 1, 5]
    assert parts.tolist() == [8, 0, 0, 0]


def test_a_layer_of_a_stacked_pool_equals_that_layer_alone():
    case = make_case([5, 33, 0, 16], heads=(2, 1))
    stack = [np.full_like(case.k_pages, np.nan)] * 3
    pools = []
    for pages in (case.k_pages, case.v_pages):
        pools.append(jnp.asarray(np.stack([stack[0], pages, stack[2]])))
    tables, lens = jnp.asarray(case.block_tables), jnp.asarray(case.context_lens)
    got = attention.paged_attention(
        jnp.asarray(case.q), *pools, tables, lens, layer=1, implementation="triton"
    )
    want, _ = oracle.attention(case)
    assert relative_errors(got, want).max() < TOLERANCES["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writes_equal_those_of_xla_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.standard_normal((2, 5, 3, 16, 32)), dtype)
    k, v = jnp.asarray(rng.standard_normal((2, 4, 3, 32)), dtype)
    slots = jnp.array([17, -1, 79, 80], jnp.int32)
    arguments = (pages, pages + 1, k, v, slots)
    want = attention.write_kv(*arguments, layer=1, implementation="xla")
    got = attention.write_kv(*arguments, layer=1, implementation="triton")
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layer", [None, 1])
def test_copies_equal_those_of_xla_bit_for_bit(layer):
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.standard_normal((2, 6, 3, 16, 128)), "float32")
    src, dst = jnp.array([[0, -1, 2, 3], [4, 1, -1, 5]], jnp.int32)
    arguments = (pages, pages + 1, src, dst)
    want = attention.copy_blocks(*arguments, layer=layer, implementation="xla")
    got = attention.copy_blocks(*arguments, layer=layer, implementation="triton")
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("fault", ["values_for_keys", "one_token_less", "lost_part"])
def test_a_planted_fault_exceeds_the_tolerance(fault, monkeypatch):
    case = make_case([200, 17], heads=(4, 2), head_dim=32)
    attend, plan_work = triton_attention.attend, triton_attention.plan_work

    def wrong(q, k_pages, v_pages, tables, lens, starts, **options):
        if fault == "values_for_keys":
            k_pages = v_pages
        if fault == "one_token_less":
            lens = lens - 1
        return attend(q, k_pages, v_pages, tables, lens, starts, **options)

    def short(*arguments):
        work = plan_work(*arguments)
        return work._replace(parts=work.parts.at[1:].add(-1))

    monkeypatch.setattr(triton_attention, "attend", wrong)
    if fault == "lost_part":
        monkeypatch.setattr(triton_attention, "plan_work", short)
    error, _ = errors(case)
    assert not error < 1e-2


def test_unsupported_head_sizes_raise():
    case = make_case([5], head_dim=80)
    pages = jnp.asarray(case.k_pages)
    with pytest.raises(ValueError, match=r"'triton' cannot serve .* got 80"):
        attention.copy_blocks(
            *(pages, pages), *jnp.zeros((2, 1), jnp.int32), implementation="triton"
        )
