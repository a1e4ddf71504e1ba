"""The attention kernel in C++: the float64 oracle, exact invariance, invalid calls.

In all cases tables are shuffled, their unused entries are garbage, and every slot and
block that no sequence owns holds NaN (see `oracle.make_case`).
"""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.attention import backends, paged_attention
from jpaged.attention.backends import choose_backend
from jpaged.cpu import library
from jpaged.pages.backend import AttentionCall
from tests.support.attention import oracle, prefix_cases
from tests.support.attention.cases import (
    FAULTS,
    GPU_SHAPES,
    LSE_TOLERANCE,
    TOLERANCES,
    attend,
    check,
    check_fault,
    decode_case,
    many_lengths,
    on_device,
    ragged_case,
    run,
)
from tests.support.attention.oracle import check_result, make_case, relative_errors
from tests.support.attention.quantised_cases import case_of as quantised_case_of
from tests.support.cpu_kernels import needs_compiler

pytestmark = [
    pytest.mark.long,
    needs_compiler,
]
call_cpu = functools.partial(paged_attention, implementation="cpu")


@pytest.mark.parametrize("name", GPU_SHAPES)
def test_decode_equals_the_oracle_at_every_length(name):
    case, options = decode_case(name)
    check(case, "cpu", **options)


@pytest.mark.parametrize("name", GPU_SHAPES)
def test_ragged_equals_the_oracle_on_chunks_decode_rows_and_empty_rows(name):
    case, options = ragged_case(name)
    check(case, "cpu", **options)


@pytest.mark.parametrize("window", [None, 40])
def test_many_rows_that_share_their_first_blocks_equal_the_oracle(window):
    case = make_case(many_lengths(16), shared_blocks=4, seed=1)
    check(case, "cpu", sliding_window=window)


@pytest.mark.parametrize("window", [None, 700])
def test_long_rows_and_chunks_in_several_spans_equal_the_oracle(window):
    contexts = [2048, 300, *range(1, 38, 2), 64, 0, 3000]
    queries = [5, 300, *[1] * 19, 64, 0, 1]
    case = make_case(contexts, queries, heads=(2, 1), num_padding=1)
    check(case, "cpu", sliding_window=window)


QUANTISED = {
    "groups_of_4": ((8, 2), 64, 16, "float32", {}),
    "odd_sizes": ((3, 3), 17, 5, "bfloat16", {}),
    "window_and_cap": (
        (4, 2),
        128,
        16,
        "float16",
        dict(sliding_window=40, logits_soft_cap=3.0, sinks=True),
    ),
}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_pages_equal_the_oracle_on_the_dequantised_values(name, dtype):
    contexts = [257, 0, 1, 15, 16, 17, 700, 48]
    for queries in (None, [257, 0, 1, 9, 1, 1, 5, 0]):
        arguments, case, options = quantised_case_of(
            QUANTISED[name], contexts, queries, dtype=dtype
        )
        given = {k: jnp.asarray(v) if k == "sinks" else v for k, v in options.items()}
        out = attend(**arguments, implementation="cpu", **given)
        expected, _ = oracle.attention(case, **options)
        worst = relative_errors(out, expected).max()
        assert worst < TOLERANCES[QUANTISED[name][3]]


def test_bits_of_bfloat16_are_read():
    case = make_case([40, 7], dtype="bfloat16")
    bits = {
        name: getattr(case, name).view(np.uint16) for name in ("k_pages", "v_pages")
    }
    out, _ = run(dataclasses.replace(case, **bits), "cpu")
    expected, _ = run(case, "cpu")
    np.testing.assert_array_equal(out, expected)


def test_float32_queries_can_read_bfloat16_pages():
    case = make_case([40, 7], dtype="bfloat16")
    case = dataclasses.replace(case, q=case.q.astype(np.float32))
    out, _ = run(case, "cpu")
    expected, _ = oracle.attention(case)
    assert out.dtype == jnp.float32
    assert relative_errors(out, expected).max() < TOLERANCES["float32"]


@pytest.mark.parametrize("queries", [None, [3, 0, 0]])
def test_padding_and_empty_rows_give_zeros_even_if_they_are_nan(queries):
    case = make_case([3 if queries else 0, 0, 0], queries, num_padding=4)
    case.q[3 if queries else 0 :] = np.nan
    out, lse = run(case, "cpu")
    first = 3 if queries else 0
    assert (np.asarray(out[first:]) == 0).all()
    assert np.isneginf(lse[first:]).all()


def test_nan_in_a_visible_key_or_value_shows_in_the_result():
    for name in ("k_pages", "v_pages"):
        case = make_case([1, 40])
        pages = getattr(case, name)
        for row in range(2):
            pages[case.block_tables[row, 0], :, 0] = np.nan
        out, _ = run(case, "cpu")
        assert np.isnan(out).all()


def test_a_layer_of_a_stacked_pool_equals_a_pool_of_one_layer():
    case = make_case([5, 33, 0, 16], [1, 20, 0, 3])
    stacked = np.stack([np.full_like(case.k_pages, np.nan)] * 3)
    k_pages, v_pages = stacked, stacked.copy()
    k_pages[1], v_pages[1] = case.k_pages, case.v_pages
    arguments = on_device(case) | {
        "k_pages": jnp.asarray(k_pages),
        "v_pages": jnp.asarray(v_pages),
    }
    expected, _ = run(case, "cpu")
    traced = jax.jit(call_cpu)(**arguments, layer=jnp.int32(1))
    static = jax.jit(functools.partial(call_cpu, layer=1))(**arguments)
    np.testing.assert_array_equal(traced, expected)
    np.testing.assert_array_equal(static, expected)


def test_traced_windows_scales_and_soft_caps_equal_numbers():
    case = make_case([5, 90, 0, 16])
    options = dict(scale=0.3, sliding_window=20, logits_soft_cap=2.0)
    traced = {k: jnp.asarray(v) for k, v in options.items()}
    traced["scale"] = traced["scale"].astype(jnp.float32)
    traced["logits_soft_cap"] = traced["logits_soft_cap"].astype(jnp.float32)
    call = functools.partial(call_cpu, **on_device(case))
    got = jax.jit(lambda scale, **rest: call(scale=scale, **rest))(
        scale=traced["scale"], sliding_window=traced["sliding_window"]
    )
    expected = call(scale=0.3, sliding_window=20)
    np.testing.assert_array_equal(got, expected)


def test_vmap_of_decode_equals_a_loop():
    cases = [make_case([17, 0, 40], seed=seed) for seed in range(3)]
    batch = {
        name: jnp.stack([on_device(case)[name] for case in cases])
        for name in on_device(cases[0])
    }
    got = jax.jit(jax.vmap(lambda arguments: call_cpu(**arguments)))(batch)
    for row, case in zip(got, cases, strict=True):
        expected, _ = run(case, "cpu")
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("queries", [None, prefix_cases.QUERIES])
@pytest.mark.parametrize("heads", [(4, 2), (16, 1)])
def test_prefixes_that_are_read_once_equal_the_oracle(queries, heads):
    case, shared = prefix_cases.group_case(
        prefix_cases.GROUPS,
        prefix_cases.OWN_TOKENS,
        queries=queries,
        heads=heads,
        head_dim=64,
    )
    options = dict(sliding_window=50, logits_soft_cap=2.0)
    call = jax.jit(functools.partial(call_cpu, return_lse=True, **options))
    out, lse = call(**on_device(case), shared_prefix=shared)
    check_result(case, out, lse, TOLERANCES["float32"], LSE_TOLERANCE, **options)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("queries", [None, [1, 20, 1, 9, 2]])
def test_a_planted_fault_breaks_the_tolerance(fault, queries):
    case = make_case([2048, 300, 17, 64, 33], queries, dtype="bfloat16")
    check_fault(case, fault, "cpu", rows=5 if queries is None else 33)


# ---- gradients


@pytest.mark.parametrize("queries", [None, [5, 0, 1, 33, 40]])
@pytest.mark.parametrize("layer", [None, 1])
def test_gradients_equal_those_of_xla(queries, layer):
    case = make_case(
        [40, 0, 17, 33, 70], queries, shared_blocks=2, num_padding=2, head_dim=8
    )
    fixed = on_device(case)
    arrays = {name: fixed.pop(name) for name in ("q", "k_pages", "v_pages")}
    if layer is not None:
        for name in ("k_pages", "v_pages"):
            arrays[name] = jnp.stack([jnp.zeros_like(arrays[name]), arrays[name]])
    arrays["sinks"] = jnp.linspace(-1.0, 1.0, 4)
    weights = jnp.asarray(
        np.random.default_rng(0).standard_normal(case.q.shape), jnp.float32
    )

    def loss(arrays, implementation):
        out, lse = paged_attention(
            **arrays,
            **fixed,
            layer=layer,
            sliding_window=30,
            logits_soft_cap=1.5,
            return_lse=True,
            implementation=implementation,
        )
        return jnp.sum(out * weights) + jnp.sum(jnp.where(jnp.isinf(lse), 0.0, lse))

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, implementation=name)))(arrays)
        for name in ("cpu", "xla")
    )
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(got[name], value, atol=2e-5 * scale, err_msg=name)


def test_gradients_of_shared_prefixes_equal_those_without():
    case, shared = prefix_cases.group_case(
        prefix_cases.GROUPS, prefix_cases.OWN_TOKENS, head_dim=16
    )
    fixed = on_device(case)
    pages = jnp.nan_to_num(fixed.pop("k_pages")), jnp.nan_to_num(fixed.pop("v_pages"))

    def loss(pages, shared):
        return jnp.sum(
            call_cpu(k_pages=pages[0], v_pages=pages[1], **fixed, shared_prefix=shared)
            ** 2
        )

    gradient = jax.jit(jax.grad(loss))
    for got, expected in zip(
        gradient(pages, shared), gradient(pages, None), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-4)


# ---- results are the same bits in every batch, on every number of threads


@pytest.mark.parametrize("options", [{}, dict(sliding_window=100, logits_soft_cap=3.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_chunks(dtype, options):
    contexts, queries = [1500, 70, 3, 129, 600], [40, 70, 1, 64, 1]
    case = make_case(contexts, queries, heads=(6, 2), head_dim=40, dtype=dtype)
    whole, whole_lse = run(case, "cpu", **options)
    for row, (context, count) in enumerate(zip(contexts, queries, strict=True)):
        start = int(case.query_start_loc[row])
        for index in range(0, count, 13):
            length = context - (count - 1 - index)
            alone = dataclasses.replace(
                case,
                q=case.q[start + index][None],
                block_tables=case.block_tables[row : row + 1],
                context_lens=np.array([length], np.int32),
                query_start_loc=None,
            )
            out, lse = run(alone, "cpu", **options)
            np.testing.assert_array_equal(out[0], whole[start + index])
            np.testing.assert_array_equal(lse[0], whole_lse[start + index])


def test_results_do_not_change_from_call_to_call_on_many_threads():
    case = make_case([1500, 900, 70, 2600], heads=(6, 2), head_dim=32)
    arguments = on_device(case)
    expected = np.asarray(attend(**arguments, implementation="cpu"))

    def call(_):
        return np.asarray(attend(**arguments, implementation="cpu"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for out in pool.map(call, range(64)):
            np.testing.assert_array_equal(out, expected)


# ---- what comes from data never leaves the arrays


def test_integers_out_of_range_do_not_crash():
    rng = np.random.default_rng(0)
    extreme = np.array([-(2**31), -1, 0, 1, 5, 10**6, 2**31 - 1])
    case = make_case([20, 33, 7], [4, 20, 3], num_padding=2, head_dim=8)
    arguments = on_device(case)
    call = jax.jit(functools.partial(call_cpu, return_lse=True))
    k_pages = jnp.nan_to_num(arguments["k_pages"])[None]
    arguments |= dict(k_pages=k_pages, v_pages=k_pages)
    for _ in range(200):
        for name in ("block_tables", "context_lens", "query_start_loc"):
            shape = arguments[name].shape
            arguments[name] = jnp.asarray(rng.choice(extreme, shape), jnp.int32)
        out, _ = call(
            **arguments,
            layer=jnp.int32(rng.choice(extreme)),
            sliding_window=jnp.int32(rng.choice(extreme)),
        )
        assert out.shape == case.q.shape


UNSUPPORTED = {
    "q: expected at most 64 heads for each of the 2 key/value heads, got 130": dict(
        q=jnp.ones((2, 130, 8)),
        k_pages=jnp.ones((3, 2, 4, 8)),
        v_pages=jnp.ones((3, 2, 4, 8)),
    ),
    "k_pages: expected float32, bfloat16, float16, .* got int32": dict(
        k_pages=jnp.ones((3, 1, 4, 8), jnp.int32),
        v_pages=jnp.ones((3, 1, 4, 8), jnp.int32),
    ),
    "q: expected float32, bfloat16, float16, got float8_e5m2": dict(
        q=jnp.ones((2, 4, 8), jnp.float8_e5m2)
    ),
    "k_pages, block_tables: expected some blocks": dict(
        block_tables=jnp.zeros((2, 0), jnp.int32)
    ),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_calls_raise_an_error_by_name_and_use_xla_by_default(
    message, monkeypatch
):
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("cpu", "xla"))
    arguments = dict(
        q=jnp.ones((2, 4, 8)),
        k_pages=jnp.ones((3, 1, 4, 8)),
        v_pages=jnp.ones((3, 1, 4, 8)),
        block_tables=jnp.zeros((2, 2), jnp.int32),
        context_lens=jnp.ones(2, jnp.int32),
    )
    call = AttentionCall(arguments["q"], arguments["block_tables"])
    assert choose_backend(None, arguments["k_pages"], call=call).name == "cpu"
    arguments |= UNSUPPORTED[message]
    with pytest.raises(ValueError, match=message):
        call_cpu(**arguments)
    call = AttentionCall(arguments["q"], arguments["block_tables"])
    assert choose_backend(None, arguments["k_pages"], call=call).name == "xla"


def test_the_kernel_itself_checks_shapes_and_dtypes():
    """A call that skips the checks of `paged_attention` ends in an error of XLA."""
    integers, floats = jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32)
    good = dict(
        q=jnp.ones((2, 4, 8)),
        k=jnp.ones((1, 3, 1, 4, 8)),
        v=jnp.ones((1, 3, 1, 4, 8)),
        tables=jnp.zeros((2, 2), jnp.int32),
        context_lens=jnp.ones(2, jnp.int32),
        starts=integers,
        integers=jnp.ones(2, jnp.int32),
        numbers=jnp.ones(2),
        sinks=floats,
        k_scale=floats,
        v_scale=floats,
    )
    out = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    lse = jax.ShapeDtypeStruct((2, 4), jnp.float32)

    def call(**changes):
        function = jax.ffi.ffi_call(library.target("attention"), (out, lse))
        return jax.block_until_ready(function(*(good | changes).values()))

    call()
    wrong = [
        dict(q=jnp.ones((2, 4, 9))),
        dict(q=jnp.ones((3, 4, 8))),
        dict(q=jnp.ones((2, 4, 8), jnp.int32)),
        dict(k=jnp.ones((1, 3, 3, 4, 8))),
        dict(k=jnp.ones((1, 0, 1, 4, 8)), v=jnp.ones((1, 0, 1, 4, 8))),
        dict(v=jnp.ones((1, 2, 1, 4, 8))),
        dict(tables=jnp.zeros((2, 0), jnp.int32)),
        dict(context_lens=jnp.ones(1, jnp.int32)),
        dict(starts=jnp.ones(2, jnp.int32)),
        dict(integers=jnp.ones(1, jnp.int32)),
        dict(numbers=jnp.ones(1)),
        dict(sinks=jnp.ones(3)),
        dict(k_scale=jnp.ones((1, 3, 1, 3)), v_scale=jnp.ones((1, 3, 1, 3))),
    ]
    for changes in wrong:
        with pytest.raises(Exception, match="expected"):
            call(**changes)
