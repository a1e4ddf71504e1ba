"""Attention: every backend against the float64 oracle, and exact page updates.

In all cases tables are shuffled, their unused entries are garbage, and every slot and
block that no sequence owns holds NaN (see `oracle.make_case`).
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import attention
from jpaged.attention import backends, merge_states, paged_attention
from jpaged.attention.backends import XLA
from jpaged.cpu import library
from jpaged.pages.backend import AttentionCall
from tests.support.attention import oracle
from tests.support.attention.cases import (
    FAULTS,
    LSE_TOLERANCE,
    SHAPES,
    TOLERANCES,
    assert_bitwise,
    attend,
    check,
    check_copies,
    check_fault,
    check_in_place,
    check_writes,
    decode_case,
    many_lengths,
    on_device,
    ragged_case,
    run,
    some_pages,
)
from tests.support.attention.oracle import Case, make_case, relative_errors

# The backends that run everywhere. `tests/pallas/tpu_kernel_test.py` tests those of
# TPUs, `tests/gpu_test.py` those of GPUs.
IMPLEMENTATIONS = ("reference", "xla")

# The reference has no tiles, so a few shapes with all options are enough for it.
OF_REFERENCE = ("groups_of_7", "tokens_as_blocks", "scaled", "everything")
DECODE = [("xla", name) for name in SHAPES]
DECODE += [("reference", name) for name in OF_REFERENCE]
# Decode rows of a ragged call have the loops of decode: the other shapes differ there.
RAGGED = [case for case in DECODE if case[1] not in ("one_group", "groups_of_16")]


@pytest.mark.parametrize(("implementation", "name"), DECODE)
def test_decode_equals_the_oracle_at_every_length(name, implementation):
    case, options = decode_case(name)
    check(case, implementation, **options)


@pytest.mark.parametrize(("implementation", "name"), RAGGED)
def test_ragged_equals_the_oracle_on_chunks_decode_rows_and_empty_rows(
    name, implementation
):
    case, options = ragged_case(name)
    check(case, implementation, **options)


@pytest.mark.parametrize(
    ("implementation", "window"), [("xla", None), ("xla", 40), ("reference", None)]
)
def test_many_rows_that_share_their_first_blocks_equal_the_oracle(
    implementation, window
):
    case = make_case(many_lengths(16), shared_blocks=4, seed=1)
    check(case, implementation, sliding_window=window)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_decode_rows_beside_long_chunks_equal_the_oracle(implementation):
    contexts = [2048, 300, *range(1, 38, 2), 64, 0]
    queries = [5, 300, *[1] * 19, 64, 0]
    check(make_case(contexts, queries, heads=(2, 1), num_padding=1), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_queries_give_zeros_even_if_they_are_nan(implementation):
    case = make_case([20, 3], [4, 1], num_padding=6)
    case.q[5:] = np.nan
    out, lse = run(case, implementation)
    assert (np.asarray(out[5:]) == 0).all()
    assert np.isneginf(lse[5:]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [None, [0, 0, 0]])
def test_a_step_with_only_empty_rows_gives_zeros(queries, implementation):
    case = make_case([0, 0, 0], queries, num_padding=4)
    out, lse = run(case, implementation)
    assert (np.asarray(out) == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_a_stacked_pool_equals_a_pool_of_one_layer(implementation):
    case = make_case([5, 33, 0, 16], [1, 20, 0, 3])
    stacked = np.stack([np.full_like(case.k_pages, np.nan)] * 3)
    k_pages, v_pages = stacked, stacked.copy()
    k_pages[1], v_pages[1] = case.k_pages, case.v_pages
    arguments = on_device(case) | {
        "k_pages": jnp.asarray(k_pages),
        "v_pages": jnp.asarray(v_pages),
    }
    expected, _ = run(case, implementation)
    call = functools.partial(paged_attention, implementation=implementation)
    traced = jax.jit(call)(**arguments, layer=jnp.int32(1))
    static = jax.jit(functools.partial(call, layer=1))(**arguments)
    np.testing.assert_array_equal(traced, expected)
    np.testing.assert_array_equal(static, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_of_decode_equals_a_loop(implementation):
    cases = [make_case([17, 0, 40], seed=seed) for seed in range(3)]
    batch = {
        name: jnp.stack([on_device(case)[name] for case in cases])
        for name in on_device(cases[0])
    }
    call = functools.partial(paged_attention, implementation=implementation)
    got = jax.jit(jax.vmap(lambda arguments: call(**arguments)))(batch)
    for row, case in zip(got, cases, strict=True):
        expected, _ = oracle.attention(case)
        assert relative_errors(row, expected).max() < TOLERANCES["float32"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_queries_can_read_bfloat16_pages(implementation):
    case = make_case([40, 7], dtype="bfloat16")
    case = dataclasses.replace(case, q=case.q.astype(np.float32))
    out, _ = run(case, implementation)
    expected, _ = oracle.attention(case)
    assert out.dtype == jnp.float32
    assert relative_errors(out, expected).max() < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_results_equal_those_computed_by_hand(implementation):
    # One head of one number, blocks of two tokens, table [1, 0]: tokens 0, 1 in block
    # 1 and token 2 in block 0. Keys log 1, log 2, log 5; values 8, 4, 2; query 1.
    keys, values = np.log([5.0, 9.0, 1.0, 2.0]), [2.0, np.nan, 8.0, 4.0]
    case = Case(
        q=np.ones((1, 1, 1), np.float32),
        k_pages=np.array(keys, np.float32).reshape(2, 1, 2, 1),
        v_pages=np.array(values, np.float32).reshape(2, 1, 2, 1),
        block_tables=np.array([[1, 0]], np.int32),
        context_lens=np.zeros(1, np.int32),
    )

    def at(length, **options):
        step = dataclasses.replace(case, context_lens=np.array([length], np.int32))
        out, lse = run(step, implementation, **options)
        return [float(out[0, 0, 0]), float(np.exp(lse[0, 0]))]

    close = functools.partial(pytest.approx, rel=1e-5)
    assert at(0) == [0.0, 0.0]
    assert at(1) == close([8.0, 1.0])  # weights 1
    assert at(2) == close([16 / 3, 3.0])  # (1 * 8 + 2 * 4) / (1 + 2)
    assert at(3) == close([26 / 8, 8.0])  # (1 * 8 + 2 * 4 + 5 * 2) / (1 + 2 + 5)
    assert at(3, sliding_window=2) == close([18 / 7, 7.0])  # without the first token
    assert at(3, sliding_window=1) == close([2.0, 5.0])
    # Scale 2 squares the weights: (1 * 8 + 4 * 4 + 25 * 2) / (1 + 4 + 25).
    assert at(3, scale=2.0) == close([74 / 30, 30.0])
    # A sink of log 2 only adds to the denominator: 26 / (8 + 2).
    sink = np.log([2.0]).astype(np.float32)
    assert at(3, sinks=sink) == close([2.6, 10.0])
    assert at(0, sinks=sink) == [0.0, 0.0]
    # Every score is about c * tanh(score / c) = c * tanh(huge): equal weights.
    assert at(3, scale=1e6, logits_soft_cap=1e-3)[0] == close(14 / 3, rel=1e-3)


def split_case(case: Case, cut: int) -> tuple[Case, Case]:
    """Return decode cases of the first `cut` tokens of each row and of the others."""
    block_size = case.k_pages.shape[2]
    assert cut % block_size == 0
    head = np.minimum(case.context_lens, cut)
    tail = case.context_lens - head
    columns = cut // block_size
    return (
        dataclasses.replace(case, context_lens=head),
        dataclasses.replace(
            case, context_lens=tail, block_tables=case.block_tables[:, columns:]
        ),
    )


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("xla", "float32"), ("xla", "bfloat16"), ("reference", "float32")],
)
def test_merged_states_equal_attention_over_the_union(dtype, implementation):
    case = make_case([0, 5, 32, 33, 100], dtype=dtype)
    first, second = split_case(case, 32)
    merged, lse = jax.jit(merge_states)(
        *run(first, implementation), *run(second, implementation)
    )
    expected, expected_lse = oracle.attention(case)
    assert merged.dtype == case.q.dtype
    # Both parts were rounded to bfloat16 before, hence the factor 2.
    assert relative_errors(merged, expected).max() < 2 * TOLERANCES[dtype]
    np.testing.assert_allclose(lse, expected_lse, atol=LSE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("queries", [None, [1, 20, 1, 9, 2]])
def test_a_planted_fault_breaks_the_tolerance(fault, queries):
    # bfloat16 has the largest tolerance: what breaks it breaks the others.
    case = make_case([2048, 300, 17, 64, 33], queries, dtype="bfloat16")
    check_fault(case, fault, "xla", rows=5 if queries is None else 33)


def decode_arguments(context: int, width: int, num_rows: int = 4) -> dict:
    case = make_case([context] * num_rows, spare_columns=0)
    tables = np.full((num_rows, width), -1, np.int32)
    tables[:, : case.block_tables.shape[1]] = case.block_tables
    return on_device(dataclasses.replace(case, block_tables=tables))


def test_memory_of_decode_does_not_grow_with_the_table_width():
    def temporaries(width: int) -> int:
        arguments = decode_arguments(16, width)
        lowered = attend.lower(**arguments, implementation="xla")
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # A temporary of one byte for each slot of a table would be 4 rows * 16 * width;
    # copies of the tables themselves, 4 rows * 4 bytes * width, are allowed twice.
    width = 4096
    assert temporaries(width) - temporaries(16) <= 2 * 4 * 4 * width + 4096


def products_run(monkeypatch, arguments: dict) -> int:
    """Count the matrix products that the compiled program runs, by callbacks."""
    count = 0
    einsum = jnp.einsum

    def increase():
        nonlocal count
        count += 1

    def counting(*args, **kwargs):
        jax.debug.callback(increase)
        return einsum(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(jnp, "einsum", counting)
        # A new partial is a new function for jax, so nothing compiled before is used.
        call = jax.jit(functools.partial(paged_attention, implementation="xla"))
        jax.block_until_ready(call(**arguments))
        jax.effects_barrier()
    return count


def test_work_of_decode_grows_with_the_contexts_and_not_with_the_tables(monkeypatch):
    count = functools.partial(products_run, monkeypatch)
    short = count(decode_arguments(16, 8))
    assert short > 0
    assert count(decode_arguments(16, 512)) == short
    assert count(decode_arguments(2048, 512)) >= 8 * short


def test_work_of_ragged_grows_with_the_contexts_and_not_with_the_tables(monkeypatch):
    def count(context: int, width: int) -> int:
        arguments = decode_arguments(context, width, num_rows=2)
        arguments["q"] = jnp.ones((5, 4, 16), jnp.float32)
        arguments["query_start_loc"] = jnp.array([0, 1, 5], jnp.int32)
        return products_run(monkeypatch, arguments)

    short = count(16, 8)
    assert short > 0
    assert count(16, 512) == short
    assert count(2048, 512) >= 4 * short


# ---- write_kv and copy_blocks, compared bit by bit


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_write_kv_writes_exactly_the_named_slots(dtype, layer):
    check_writes(dtype, layer, None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint16])  # uint16: its bits
def test_write_kv_casts_to_the_dtype_of_the_pages(dtype):
    pages = jnp.zeros((2, 1, 2, 3), dtype)
    values = some_pages(1, 1, 3)
    written = jnp.asarray(values)
    k_pages, _ = attention.write_kv(
        pages, pages, written, written, jnp.array([3], jnp.int32)
    )
    assert_bitwise(k_pages[1, 0, 1], values[0, 0].astype(jnp.bfloat16).view(dtype))
    assert not k_pages[0].any()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", [None, 1, "all"])
def test_copy_blocks_copies_exactly_the_named_blocks(dtype, layer):
    check_copies(dtype, layer, None)


# A CPU widens bfloat16 to write it (jax 0.10), so caches store its bits there.
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
def test_donated_pools_are_updated_in_their_own_memory(dtype):
    check_in_place("xla", dtype)


def test_uint16_pages_are_read_as_the_bits_of_bfloat16():
    case = make_case([40, 7], dtype="bfloat16")
    bits = {
        name: getattr(case, name).view(np.uint16) for name in ("k_pages", "v_pages")
    }
    out, _ = run(dataclasses.replace(case, **bits), None)
    expected, _ = oracle.attention(case)
    assert relative_errors(out, expected).max() < TOLERANCES["bfloat16"]


# ---- invalid arguments


def fitting() -> dict[str, jax.Array]:
    return on_device(make_case([5, 9]))


def integers(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


WRONG = {
    "implementation: expected None or one of": {"implementation": "cuda"},
    "k_scale: expected None beside pages of float32": {"k_scale": jnp.ones(1)},
    "v_scale: expected None beside pages of float32": {"v_scale": jnp.ones(1)},
    "shared_prefix: expected True, or the result": {"shared_prefix": integers(1)},
    r"k_pages: expected rank 4 \[N, K, P, D\]": {"k_pages": jnp.ones((2, 2, 3, 4, 5))},
    r"k_pages: expected rank 5 .* with layer=": {"layer": 0},
    r"v_pages: expected float32\[.*\] like k_pages": {
        "v_pages": jnp.ones((1, 2, 3, 4))
    },
    "q: expected floating": {"q": integers(2, 4, 16)},
    "q: expected head_dim 16 as in k_pages, got 8": {"q": jnp.ones((2, 4, 8))},
    "q: expected a number of heads that is a multiple": {"q": jnp.ones((2, 3, 16))},
    "q: expected one query for each of the 2 rows": {"q": jnp.ones((3, 4, 16))},
    "block_tables: expected integers of rank 2": {"block_tables": integers(2)},
    r"context_lens: expected integers of rank 1, got float32\[2\]": {
        "context_lens": jnp.ones(2)
    },
    r"context_lens: expected shape \(2,\)": {"context_lens": integers(3)},
    r"query_start_loc: expected shape \(3,\), got \(2,\)": {
        "query_start_loc": integers(2)
    },
    r"sinks: expected shape \(4,\), got \(2,\)": {"sinks": jnp.ones(2)},
    "sliding_window: expected at least 1, got 0": {"sliding_window": 0},
    "logits_soft_cap: expected above 0, got 0": {"logits_soft_cap": 0.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_arguments_raise_an_error_that_names_them(message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**(fitting() | WRONG[message]))


def test_page_updates_with_invalid_arguments_raise_an_error():
    pages, k, slots = jnp.zeros((3, 2, 4, 8)), jnp.zeros((5, 2, 8)), integers(5)
    with pytest.raises(ValueError, match=r"v: expected shape \(5, 2, 8\)"):
        attention.write_kv(pages, pages, k, k[:, :1], slots)
    with pytest.raises(ValueError, match=r"k: expected shape \(4, 2, 8\)"):
        attention.write_kv(pages, pages, k, k, slots[:4])
    with pytest.raises(ValueError, match="slot_mapping: expected integers of rank 1"):
        attention.write_kv(pages, pages, k, k, jnp.zeros(5))
    with pytest.raises(ValueError, match="k_pages: expected rank 5"):
        attention.write_kv(pages, pages, k, k, slots, layer=0)
    with pytest.raises(ValueError, match=r"dst: expected shape \(5,\) like src"):
        attention.copy_blocks(pages, pages, slots, slots[:2])
    with pytest.raises(ValueError, match="src: expected integers"):
        attention.copy_blocks(pages, pages, jnp.zeros(5), slots)
    with pytest.raises(ValueError, match="k_pages: expected rank 5"):
        attention.copy_blocks(pages, pages, slots, slots, layer=1)


# ---- backends as records


def test_backends_have_the_names_that_the_type_lists():
    assert typing.get_args(backends.Implementation) == attention.IMPLEMENTATIONS


def test_the_default_is_the_first_available_backend_that_supports_the_call(monkeypatch):
    plain = jax.ShapeDtypeStruct((3, 2, 16, 64), jnp.float32)
    default = "xla" if library.problem() else "cpu"  # without a C++ compiler, "xla"
    assert backends.choose_backend(None, plain).name == default
    no_lse = dataclasses.replace(XLA, name="no_lse", returns_lse=False)
    elsewhere = dataclasses.replace(XLA, name="elsewhere", platform="tpu")
    monkeypatch.setattr(backends, "BACKENDS", (elsewhere, no_lse, XLA))
    names = ("elsewhere", "no_lse", "xla")
    monkeypatch.setitem(backends.PREFERRED, "cpu", names)
    q = jax.ShapeDtypeStruct((1, 2, 64), jnp.float32)
    for needs_lse, name in ((False, "no_lse"), (True, "xla")):
        call = AttentionCall(q, needs_lse=needs_lse)
        assert backends.choose_backend(None, plain, call=call).name == name
    with pytest.raises(ValueError, match=r"'no_lse' cannot serve .* return_lse: "):
        backends.choose_backend("no_lse", plain, call=call)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [(64, 16, "bfloat16"), (80, 16, "float32"), (32, 48, "float32"), (64, 16, "int8")],
)
def test_layouts_store_pages_in_their_own_shape(head_dim, block_size, dtype):
    shape = (3, 2, block_size, head_dim)
    pages = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for name in ("xla", "mosaic_tpu"):
        layout = backends.layout(name)
        stored = layout.store(pages)
        assert stored.shape[-2:] == layout.page_shape(block_size, head_dim, dtype)
        back = stored.reshape(layout.plain_shape(stored, head_dim))[..., :head_dim]
        np.testing.assert_array_equal(back, pages)
