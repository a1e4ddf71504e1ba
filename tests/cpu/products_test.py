"""The products in C++: float64 numpy, exact invariance to rows, invalid calls."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.arithmetic import cdiv
from jpaged.cpu import calls, layers, library
from jpaged.models import layer_kernels
from jpaged.models.moe import grouped_matmul
from jpaged.models.quantize import quantize_int8
from tests.support.attention.oracle import relative_errors
from tests.support.cpu_kernels import needs_compiler
from tests.support.models.tiny_llama import tiny_llama

pytestmark = [
    pytest.mark.long,
    needs_compiler,
]
TOLERANCES = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
# Depths and columns that are no multiples of a vector, a panel or a step down.
SHAPES = [(1, 1), (5, 3), (17, 15), (64, 128), (33, 257), (100, 1040), (3, 4100)]


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values).astype(dtype)


def expected(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> np.ndarray:
    out = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    return out if scale is None else out * np.asarray(scale, np.float64)


def int16_steps(x: jax.Array, block: int = 256) -> np.ndarray:
    """Return the unit of each input if every `block` of a row is stored as int16."""
    magnitudes = abs(np.asarray(x, np.float64))
    steps = np.empty_like(magnitudes)
    for k in range(0, x.shape[1], block):
        largest = magnitudes[:, k : k + block].max(axis=1, keepdims=True)
        steps[:, k : k + block] = largest
    return steps / 32767


def error_in_steps(got: jax.Array, x: jax.Array, weight: jax.Array) -> np.ndarray:
    """Return the error of each row, divided by what rounding inputs to int16 causes.

    An input rounded to a multiple of its step has an error of step / sqrt(12) on
    average, and random columns of weights add up the errors of a row's inputs.
    """
    error = np.asarray(got, np.float64) - expected(x, weight, None)
    unit_columns = error / np.linalg.norm(np.asarray(weight, np.float64), axis=0)
    rounding = np.sqrt((int16_steps(x) ** 2).mean(axis=1) / 12)
    return np.sqrt((unit_columns**2).mean(axis=1)) / rounding


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_products_equal_those_of_numpy(dtype, weight_dtype):
    for depth, columns in SHAPES:
        weight = normal(depth, columns, seed=1).astype(weight_dtype)
        for rows in (1, 2, 3, 7, 8, 13, 33):
            x = normal(rows, depth, dtype=dtype)
            out = calls.matmul(x, weight)
            assert out.dtype == x.dtype
            worst = relative_errors(out, expected(x, weight, None)).max()
            assert worst < TOLERANCES[dtype], (depth, columns, rows)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_int8_products_differ_by_less_than_half_a_step_of_each_input(dtype):
    for depth, columns in (*SHAPES, (257, 31), (511, 129)):
        weight, scale = quantize_int8(normal(depth, columns, seed=1))
        for rows in (1, 2, 3, 7, 8, 13, 33):
            x = normal(rows, depth, dtype=dtype)
            exact = expected(x, weight, scale)
            sizes = abs(np.asarray(weight, np.float64)) * np.asarray(scale)
            bound = int16_steps(x) / 2 @ sizes + TOLERANCES[dtype] * abs(exact)
            # Float32 rounds four times in each block (conversion, unit, factor, sum),
            # and the scale once.
            num_roundings = 4 * cdiv(depth, 256) + 1
            bound += num_roundings * 2.0**-24 * (abs(np.asarray(x, np.float64)) @ sizes)
            out = calls.matmul(x, weight, scale)
            assert out.dtype == x.dtype
            error = abs(np.asarray(out, np.float64) - exact)
            assert (error <= bound).all(), (depth, columns, rows)


INT8_SHAPES = [(1, 70), (2, 64), (255, 100), (257, 131), (600, 160), (1024, 65)]


def test_int8_products_use_15_bits_of_the_inputs():
    for depth, columns in INT8_SHAPES:
        weight = quantize_int8(normal(depth, columns, seed=1))[0]
        for rows in (1, 2, 3, 5, 8, 12, 13, 31, 40):
            x = normal(rows, depth)
            out = calls.matmul(x, weight)
            # At most sqrt(3) if all inputs are rounded by half a step; 0.2 is for the
            # finite number of columns.
            assert error_in_steps(out, x, weight).max() < 3**0.5 + 0.2
            if depth > 2:  # 11 bits of the inputs break the bound in every row
                half = x.astype(jnp.float16)
                wrong = jnp.asarray(expected(half, weight, None))
                assert error_in_steps(wrong, x, weight).min() > 3**0.5 + 0.2


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_sums_of_the_largest_int8_numbers_do_not_overflow(rows):
    for number in (-128, 127):
        weight = jnp.full((700, 33), number, jnp.int8)
        out = calls.matmul(jnp.full((rows, 700), -3.0), weight)
        np.testing.assert_allclose(out, -3.0 * 700 * number, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-110, 100])
def test_int8_products_scale_with_the_inputs(exponent):
    weight, scale = quantize_int8(normal(300, 40, seed=1))
    x = normal(5, 300)
    out = calls.matmul(x * 2.0**exponent, weight, scale)
    np.testing.assert_array_equal(out, calls.matmul(x, weight, scale) * 2.0**exponent)


@pytest.mark.parametrize("problem", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_numbers_and_nan_stay_in_their_row(problem, dtype):
    x = normal(9, 600, dtype=dtype)
    bad = x.at[4, 300].set(problem)
    for weight in (normal(600, 70, seed=1).astype(dtype), jnp.ones((600, 70), "int8")):
        out, clean = calls.matmul(bad, weight), calls.matmul(x, weight)
        others = np.arange(9) != 4
        np.testing.assert_array_equal(out[others], clean[others])
        if weight.dtype == jnp.int8:
            assert np.isnan(np.asarray(out[4], np.float32)).all()
        else:
            ours = np.asarray(out[4], np.float32)
            theirs = problem * np.asarray(weight[300], np.float32)
            np.testing.assert_array_equal(ours, theirs)
    tiny = calls.matmul(jnp.zeros((2, 600), dtype), jnp.ones((600, 70), "int8"))
    np.testing.assert_array_equal(tiny, np.zeros((2, 70)))


def test_bfloat16_products_have_float32_sums():
    # Sums of these integers are exact in float32; only the result is rounded.
    rng = np.random.default_rng(0)
    for depth, columns in INT8_SHAPES:
        weight = rng.integers(-200, 201, size=(depth, columns))
        for rows in (1, 2, 3, 5, 8, 12, 13, 31, 40):
            x = rng.integers(-16, 17, size=(rows, depth))
            out = calls.matmul(*(jnp.asarray(a, jnp.bfloat16) for a in (x, weight)))
            exact = jnp.asarray(x @ weight, jnp.float32).astype(jnp.bfloat16)
            np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("int8", "float32"),
        ("int8", "bfloat16"),
    ],
)
def test_a_row_has_the_same_bits_in_every_batch(dtype, x_dtype):
    weight, scale = normal(601, 200, seed=1), None
    if dtype == "int8":
        weight, scale = quantize_int8(weight)
    weight, x = weight.astype(dtype), normal(70, 601, dtype=x_dtype)
    together = np.asarray(calls.matmul(x, weight, scale))
    for start, end in ((0, 1), (69, 70), (3, 5), (3, 8), (10, 23), (20, 52), (6, 70)):
        some = calls.matmul(x[start:end], weight, scale)
        np.testing.assert_array_equal(some, together[start:end])


def test_no_rows_columns_or_depth():
    for rows, depth, columns in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        out = calls.matmul(jnp.ones((rows, depth)), jnp.ones((depth, columns)))
        np.testing.assert_array_equal(out, np.zeros((rows, columns)))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [2, 0, 0, 0]])
def test_groups_of_rows_equal_the_loop_of_xla(counts, is_int8):
    x, weight, scale = normal(9, 40), normal(4, 40, 70, seed=1), None
    if is_int8:
        weight, scale = quantize_int8(weight)
    numbers = jnp.asarray(counts, jnp.int32)
    out = calls.grouped_matmul(x, weight, scale, numbers)
    loop = grouped_matmul(x, weight, numbers)
    if scale is not None:
        loop = loop * scale[np.repeat(np.arange(5), [*counts, 9 - sum(counts)]) % 4]
    used = sum(counts)
    # int8: an input has an error of at most max|x| / 65,534, about 5e-5, and a sum of
    # 40 of them with weights of about 1 at most 2e-3.
    atol = 2e-3 if is_int8 else 1e-4
    np.testing.assert_allclose(out[:used], loop[:used], rtol=1e-4, atol=atol)
    assert not out[used:].any()


@pytest.mark.parametrize("counts", [[-5, 3, 100], [2**31 - 1] * 3, [-(2**31)] * 3])
def test_counts_from_data_are_limited_to_the_rows(counts):
    x, weight = normal(4, 8), normal(3, 8, 16, seed=1)
    out = calls.grouped_matmul(x, weight, None, jnp.asarray(counts, jnp.int32))
    limited, start = np.zeros((4, 16)), 0
    for index, count in enumerate(np.clip(counts, 0, 4)):
        end = min(start + count, 4)
        limited[start:end] = expected(x[start:end], weight[index], None)
        start = end
    np.testing.assert_allclose(out, limited, rtol=1e-4, atol=1e-4)


def test_invalid_shapes_and_dtypes_raise_before_a_kernel_runs():
    x, weight, counts = normal(2, 4), normal(4, 3), jnp.ones(5, jnp.int32)
    experts = normal(5, 4, 3)
    for arguments, message in (
        ((x, normal(5, 3)), r"x, weight: expected shapes \[M, K\] and \[K, N\]"),
        ((x[0], weight), "x, weight: expected shapes"),
        ((x.astype(jnp.int32), weight), "x: expected dtype float32"),
        ((x, weight.astype(jnp.int32)), "weight: expected dtype float32"),
        ((x, weight, jnp.ones(4)), r"scale: expected float32 \(3,\), got"),
        ((x, weight, jnp.ones(3, jnp.bfloat16)), "scale: expected float32"),
    ):
        with pytest.raises(ValueError, match=message):
            calls.matmul(*arguments)
    for arguments, message in (
        ((x, experts[0], None, counts), r"expected shapes \[T, K\] and \[X, K, N\]"),
        ((x, experts, None, counts[:4]), r"counts: expected shape \(5,\), got \(4,\)"),
        ((x, experts, jnp.ones(3), counts), r"scale: expected float32 \(5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            calls.grouped_matmul(*arguments)


def test_the_kernels_check_shapes_and_dtypes_themselves():
    x, weight, none = normal(2, 4), normal(4, 3), jnp.zeros(0)

    def call(name, out, *arguments):
        function = jax.ffi.ffi_call(library.target(name), out)
        return jax.block_until_ready(function(*arguments))

    out = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    wrong = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    integers = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    call("matmul", out, x, weight, none)
    for arguments in (
        (wrong, x, weight, none),
        (integers, x, weight, none),
        (out, x, normal(5, 3), none),
        (out, x, weight, jnp.ones(4)),
        (out, x, weight.astype(jnp.int32), none),
    ):
        with pytest.raises(Exception, match="matmul: expected"):
            call("matmul", *arguments)
    experts, counts = normal(5, 4, 3), jnp.ones(5, jnp.int32)
    for arguments in (
        (out, x, experts, none.reshape(0, 0), counts[:3]),
        (wrong, x, experts, none.reshape(0, 0), counts),
        (out, x, experts, jnp.ones((5, 2)), counts),
    ):
        with pytest.raises(Exception, match="grouped_matmul: expected"):
            call("grouped_matmul", *arguments)


def test_many_rows_are_left_to_xla():
    weight = normal(8, 8)
    for dtype in layers.MAX_ROWS:
        most = layers.max_rows(dtype)
        narrow = weight.astype(dtype)
        assert layers.matmuls(normal(most, 8), [narrow], [None]) is not None
        assert layers.matmuls(normal(most + 1, 8), [narrow], [None]) is None
    assert layers.matmuls(jnp.ones((2, 8), jnp.int32), [weight], [None]) is None
    both = [weight, weight.astype(jnp.bfloat16)]
    assert layers.matmuls(normal(2, 8), both, [None, None]) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 8, 17])
def test_several_matrices_in_one_call_have_the_bits_of_single_calls(rows, dtype):
    # Widths that end inside of a panel, so that strips begin and end in all of them.
    widths = (3, 200, 64, 1, 130)
    x = normal(rows, 37)
    weights = [(normal(37, n) * 20).astype(dtype) for n in widths]
    scales = [abs(normal(n)) if dtype == "int8" else None for n in widths]
    together = calls.matmuls(x, weights, scales)
    for out, weight, scale in zip(together, weights, scales, strict=True):
        np.testing.assert_array_equal(out, calls.matmul(x, weight, scale))
    with pytest.raises(ValueError, match="weights: expected one dtype, got"):
        calls.matmuls(x, [weights[0], weights[1].astype(jnp.float16)], scales[:2])


def test_the_model_uses_the_kernels_inside_of_serving_only():
    model, tokens = tiny_llama(), jnp.array([[3, 5, 7]])
    text = {}

    def program(name: str) -> None:
        text[name] = jax.jit(lambda tokens: model(tokens)).lower(tokens).as_text()

    with layer_kernels.serving("cpu"):
        program("inside")
        other = threading.Thread(target=program, args=("other thread",))
        other.start()
        other.join()
        with layer_kernels.serving("xla"):
            program("xla")
        served = model(tokens)
    program("after")
    found = {name for name, each in text.items() if "jpaged_matmul" in each}
    assert found == {"inside"}
    np.testing.assert_allclose(served, model(tokens), rtol=1e-4, atol=1e-4)


def test_vmap_of_products_equals_a_loop():
    x, weight = normal(3, 2, 8), normal(8, 5, seed=1)
    got = jax.vmap(lambda x: calls.matmul(x, weight))(x)
    for row in range(3):
        np.testing.assert_array_equal(got[row], calls.matmul(x[row], weight))
