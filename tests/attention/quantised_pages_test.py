"""Quantised pages: writes, reads, and scales that are copied with their blocks.

Attention is compared with the float64 oracle on the dequantised values, which numpy
computes from the numbers and the scales independently for each format.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpaged.attention import copy_blocks, kv_cache, paged_attention, write_kv
from jpaged.pages.quantised import PAGE_DTYPES, page_dtype, quantise
from tests.support.attention import oracle
from tests.support.attention.oracle import relative_errors
from tests.support.attention.quantised_cases import (
    dequantised,
    numpy_of,
    quantised_case,
)

pytestmark = pytest.mark.long

DTYPES = ("int8", "uint8", "float8_e4m3fn")
# Sums are float32 whatever q is; its dtype rounds the output, by 2**-9 in bfloat16.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
LARGEST = {"int8": 127, "uint8": 448, "float8_e4m3fn": 448}
# Half a step of the largest number, or of 3 bits of mantissa.
ROUNDING = {"int8": 0.5 / 127, "uint8": 2.0**-4, "float8_e4m3fn": 2.0**-4}

attend = jax.jit(
    paged_attention,
    static_argnames=("implementation", "sliding_window", "logits_soft_cap"),
)


LENGTHS = [257, 0, 1, 15, 16, 17, 300, 48]
CHUNKS = [257, 0, 1, 9, 1, 1, 5, 0]
GROUPS_OF_4 = dict(heads=(8, 2), head_dim=64)
ODD_SIZES = dict(heads=(3, 3), head_dim=17, block_size=5)
# implementation, dtype of pages and of q, sizes, lengths of the rows' queries
CASES = [
    ("reference", "int8", "float32", GROUPS_OF_4, CHUNKS),
    ("reference", "uint8", "bfloat16", ODD_SIZES, None),
    ("xla", "int8", "float32", GROUPS_OF_4, CHUNKS),
    ("xla", "int8", "bfloat16", GROUPS_OF_4, None),
    ("xla", "uint8", "float32", GROUPS_OF_4, None),
    ("xla", "uint8", "bfloat16", ODD_SIZES, CHUNKS),
    ("xla", "float8_e4m3fn", "float16", ODD_SIZES, None),
]


@pytest.mark.parametrize(("implementation", "dtype", "q_dtype", "sizes", "q"), CASES)
def test_attention_equals_the_oracle_on_the_dequantised_values(
    implementation, dtype, q_dtype, sizes, q
):
    arguments, case = quantised_case(LENGTHS, q, dtype=dtype, q_dtype=q_dtype, **sizes)
    out = attend(**arguments, implementation=implementation)
    expected, _ = oracle.attention(case)
    assert relative_errors(out, expected).max() < TOLERANCES[q_dtype]


def test_scales_work_with_a_window_and_a_soft_cap():
    options = dict(sliding_window=40, logits_soft_cap=3.0)
    arguments, case = quantised_case(LENGTHS, dtype="int8", heads=(4, 2))
    out = attend(**arguments, implementation="xla", **options)
    expected, _ = oracle.attention(case, **options)
    assert relative_errors(out, expected).max() < TOLERANCES["float32"]


def values_scale_of_keys(arguments):
    return arguments | {"v_scale": arguments["k_scale"]}


def scales_of_the_next_token(arguments):
    return arguments | {"v_scale": jnp.roll(arguments["v_scale"], 1, axis=-1)}


def scales_of_the_other_head(arguments):
    return arguments | {"k_scale": jnp.roll(arguments["k_scale"], 1, axis=1)}


@pytest.mark.parametrize(
    "fault", [values_scale_of_keys, scales_of_the_next_token, scales_of_the_other_head]
)
def test_a_planted_fault_breaks_the_tolerance(fault):
    arguments, case = quantised_case([200, 150, 33], dtype="int8", heads=(4, 2))
    out = attend(**fault(arguments), implementation="xla")
    expected, _ = oracle.attention(case)
    errors = relative_errors(out, expected).max(axis=-1)
    assert not (errors < 2 * TOLERANCES["bfloat16"]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_written_token_is_read_back_within_half_a_step_of_its_largest_entry(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((9, 2, 32)).astype(np.float32)
    values *= 10.0 ** rng.uniform(-6, 4, (9, 2, 1)).astype(np.float32)
    values[3, 1] = 0
    numbers, scale = map(numpy_of, quantise(jnp.asarray(values), dtype))
    back = dequantised(numbers, scale)
    largest = np.abs(values).max(axis=-1, keepdims=True)
    if dtype == "int8":
        wrong = np.abs(back - values) > ROUNDING[dtype] * largest * (1 + 1e-5)
    else:  # relative, down to the smallest normal number, 2**-6 of 448
        least = np.maximum(np.abs(values), largest * 2.0**-6 / 448)
        wrong = np.abs(back - values) > ROUNDING[dtype] * least * (1 + 1e-5)
    assert not wrong.any()
    assert (back[3, 1] == 0).all()
    # The largest entry is exact up to float32.
    np.testing.assert_allclose(np.abs(back).max(-1), largest[..., 0], rtol=1e-6)


def test_bits_of_fp8_equal_those_of_ml_dtypes():
    values = jnp.linspace(-3, 5, 64).reshape(2, 32)
    bits, scale = quantise(values, "uint8")
    native, same = quantise(values, "float8_e4m3fn")
    assert native.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(bits, np.asarray(native).view(np.uint8))
    np.testing.assert_array_equal(scale, same)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_visible_in_the_results(dtype, bad):
    numbers, scale = map(numpy_of, quantise(jnp.array([[1.0, bad], [1.0, 2.0]]), dtype))
    back = dequantised(numbers, scale)
    assert np.isnan(back[0]).any()
    assert np.isfinite(back[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [None, 1])
def test_writes_and_copies_include_the_scales(layer, dtype):
    shape = (6, 2, 4, 8) if layer is None else (3, 6, 2, 4, 8)
    pages = jnp.zeros(shape, dtype)
    pools = (pages, pages)
    scales = dict(k_scale=jnp.zeros(shape[:-1]), v_scale=jnp.zeros(shape[:-1]))
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((4, 2, 8)), jnp.float32) for _ in "kv")
    slots = jnp.array([23, -1, 0, 24], jnp.int32)
    pools = jax.jit(functools.partial(write_kv, layer=layer))(
        *pools, k, v, slots, **scales
    )
    scales = dict(zip(("k_scale", "v_scale"), pools[2:], strict=True))
    src, dst = jnp.array([5, -1], jnp.int32), jnp.array([2, 3], jnp.int32)
    copied = jax.jit(functools.partial(copy_blocks, layer=layer))(
        *pools[:2], src, dst, **scales
    )
    for values, at in ((k, 0), (v, 1)):
        numbers, scale = map(numpy_of, (copied[at], copied[at + 2]))
        numbers, scale = (x if layer is None else x[layer] for x in (numbers, scale))
        for token, block, offset in ((0, 5, 3), (0, 2, 3), (2, 0, 0)):
            expected, expected_scale = quantise(values[token], dtype)
            np.testing.assert_array_equal(numbers[block, :, offset], expected)
            np.testing.assert_array_equal(scale[block, :, offset], expected_scale)
        assert (scale != 0).sum() == 3 * 2  # nothing else was written


def test_scales_that_broadcast_give_the_same_result():
    arguments, _ = quantised_case([40, 7], dtype="int8", head_dim=16)
    shape = arguments["k_pages"].shape[:-1]
    for given in (0.25, jnp.float32(0.25), jnp.full((1, shape[1], 1), 0.25)):
        whole = jnp.full(shape, 0.25, jnp.float32)
        got = attend(**arguments | dict(k_scale=given, v_scale=given))
        expected = attend(**arguments | dict(k_scale=whole, v_scale=whole))
        np.testing.assert_array_equal(got, expected)


WRONG = {
    "k_scale: expected one beside pages of int8, got None": {"k_scale": None},
    "v_scale: expected one beside pages of int8, got None": {"v_scale": None},
    r"k_scale: expected floats that broadcast to .* float32\[3\]": {
        "k_scale": jnp.ones(3)
    },
    r"v_scale: expected floats .* got int32\[\]": {"v_scale": jnp.int32(1)},
    r"'mosaic_gpu' cannot serve this \('xla' can\): k_pages: .* got int8": {
        "implementation": "mosaic_gpu"
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_arguments_raise_an_error_that_names_them(message):
    arguments, _ = quantised_case([5, 9], dtype="int8")
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments | WRONG[message])


def test_scales_for_float_pages_and_missing_scales_raise_an_error():
    pages, k, slots = jnp.zeros((3, 2, 4, 8)), jnp.zeros((5, 2, 8)), jnp.arange(5)
    scale = jnp.ones((3, 2, 4))
    scales = dict(k_scale=scale, v_scale=scale)
    with pytest.raises(ValueError, match="k_scale: expected None beside pages of floa"):
        write_kv(pages, pages, k, k, slots, **scales)
    pages = pages.astype(jnp.int8)
    with pytest.raises(ValueError, match=r"k_scale: expected floats of shape \(3, 2, "):
        write_kv(pages, pages, k, k, slots, **scales | dict(k_scale=scale[:1]))
    with pytest.raises(ValueError, match="v_scale: expected one beside"):
        copy_blocks(pages, pages, slots, slots, k_scale=scale)


@pytest.mark.parametrize("name", PAGE_DTYPES)
def test_bytes_per_block_count_numbers_and_scales(name):
    sizes = dict(num_layers=3, num_kv_heads=2, block_size=4, head_dim=32)
    cache = kv_cache.init_kv_cache(num_blocks=5, dtype=name, **sizes)
    leaves = jax.tree.leaves(cache)
    assert [leaf.shape[:3] for leaf in leaves] == [(3, 5, 2)] * 4
    assert cache.k_pages.dtype == page_dtype(name)
    size = kv_cache.bytes_per_block(dtype=name, **sizes)
    assert 5 * size == sum(leaf.nbytes for leaf in leaves)
    assert size == 2 * 3 * 2 * 4 * (32 + 4)


def test_a_cache_of_8_bits_raises_an_error_if_the_backend_does_not_support_it():
    sizes = dict(num_layers=1, num_kv_heads=1, block_size=16, head_dim=128)
    with pytest.raises(ValueError, match=r"'mosaic_gpu' cannot serve .*'xla' can"):
        kv_cache.init_kv_cache(
            num_blocks=2, dtype="int8", implementation="mosaic_gpu", **sizes
        )
