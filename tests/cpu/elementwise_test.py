"""Norms and gates in C++: float64 numpy, exact invariance to rows, invalid calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jpaged.cpu import calls, layers, library
from jpaged.models import layer_kernels
from tests.support.cpu_kernels import needs_compiler

pytestmark = [
    pytest.mark.long,
    needs_compiler,
]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"silu": lambda x: x * scipy.special.expit(x), "gelu_tanh": gelu_tanh}


# Sizes around a vector and a part of work; 9,000 numbers in a row are more than a part.
@pytest.mark.parametrize("size", [1, 5, 16, 37, 768, 9000])
def test_rms_norm_equals_float64(size):
    for rows in (1, 3, 40):
        x, weight = normal(rows, size) * 30, normal(size, seed=1)
        wide = x.astype(np.float64)
        root = np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
        got = calls.rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5)
        # A factor and two products: each within half a unit in the last place.
        np.testing.assert_allclose(got, wide / root * weight, rtol=1e-6)
        alone = calls.rms_norm(jnp.asarray(x[-1:]), jnp.asarray(weight), 1e-5)
        np.testing.assert_array_equal(got[-1:], alone)


@pytest.mark.parametrize("name", calls.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 1000), (2, 3, 5)])
def test_gates_equal_float64(name, shape):
    gate, up = normal(*shape) * 5, normal(*shape, seed=1)
    got = calls.gated(jnp.asarray(gate), jnp.asarray(up), name)
    expected = ACTIVATIONS[name](gate.astype(np.float64)) * up
    # For negative x, gelu subtracts numbers near 1: 1e-6 is rounding.
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=2e-6)
    alone = calls.gated(jnp.asarray(gate[-1:]), jnp.asarray(up[-1:]), name)
    np.testing.assert_array_equal(got[-1:], alone)


def test_extreme_and_undefined_numbers_are_those_of_jax():
    gate = np.array([0, -0.0, 1e-30, 90, -90, 1e38, -1e38, np.inf, np.nan], np.float32)
    ones = jnp.ones(gate.shape)
    got = calls.gated(jnp.asarray(gate), ones, "silu")
    np.testing.assert_allclose(got, jax.nn.silu(gate), rtol=1e-5, atol=1e-30)
    rows = jnp.asarray([[0.0, 0.0], [np.nan, 1.0], [3.0, 4.0]])
    got = calls.rms_norm(rows, jnp.ones(2), 0.5)
    np.testing.assert_array_equal(got[0], [0.0, 0.0])
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[2]).all()


def test_other_dtypes_and_activations_are_left_to_xla():
    x, weight = jnp.ones((2, 4), jnp.bfloat16), jnp.ones(4, jnp.bfloat16)
    assert layers.rms_norm(x, weight, 1e-5) is None
    assert layers.gated(x, x, "silu") is None
    assert layers.gated(jnp.ones(4), jnp.ones(4), "relu") is None


def test_invalid_calls_raise_before_a_kernel_runs():
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"x, weight: expected shapes \[M, E\]"):
        calls.rms_norm(x, jnp.ones(3), 1e-5)
    with pytest.raises(ValueError, match="rms_norm: expected float32, got float16"):
        calls.rms_norm(x.astype(jnp.float16), jnp.ones(4), 1e-5)
    with pytest.raises(ValueError, match="gate, up: expected one shape"):
        calls.gated(x, x[:1], "silu")
    with pytest.raises(ValueError, match=r"activation: expected one of .* got 'relu'"):
        calls.gated(x, x, "relu")
    # The kernels check again: an address must never leave its array.
    out = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    wrong = jax.ffi.ffi_call(library.target("rms_norm"), out)
    with pytest.raises(Exception, match="rms_norm: expected shapes"):
        wrong(x, jnp.ones(3), eps=np.float32(1e-5))
    wrong = jax.ffi.ffi_call(library.target("gated"), out)
    with pytest.raises(Exception, match="gated: expected one shape"):
        wrong(x, jnp.ones((2, 3)), activation=np.int64(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_gives_the_same_with_and_without_the_kernels(dtype):
    x, up = (jnp.asarray(normal(5, 64, seed=seed), dtype) for seed in (0, 1))
    weight = jnp.asarray(normal(64, seed=2), dtype)

    def run() -> tuple[jax.Array, jax.Array]:
        normed = layer_kernels.rms_norm(x, weight, 1e-5)
        return normed, layer_kernels.gated(normed, up, "silu")

    with layer_kernels.serving("cpu"):
        served = run()
    for a, b in zip(served, run(), strict=True):
        assert a.dtype == b.dtype == x.dtype
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-6, atol=1e-6
        )
