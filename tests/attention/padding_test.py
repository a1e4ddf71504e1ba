"""Conventions of other kernels: padded query_start_loc, and pages of float8_e5m2."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpaged.attention import paged_attention, write_kv
from tests.support.cpu_kernels import needs_compiler

RNG = np.random.default_rng(0)
PAGES = [jnp.asarray(RNG.standard_normal((6, 2, 16, 32)), jnp.float32) for _ in "kv"]
TABLES = jnp.array([[0, 1], [2, 3], [4, 5], [0, 0]])
LENS = jnp.array([20, 9, 30, 0])
Q = jnp.asarray(RNG.standard_normal((9, 4, 32)), jnp.float32)


@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        "reference",
        pytest.param(
            "cpu",
            marks=needs_compiler,
        ),
    ],
)
def test_zeros_after_the_last_sequence_mean_no_queries(implementation):
    def attend(starts):
        return paged_attention(
            *(Q, PAGES[0], PAGES[1], TABLES, LENS),
            query_start_loc=jnp.array(starts),
            return_lse=True,
            implementation=implementation,
        )

    for padded, plain in (
        ([0, 4, 7, 0, 0], [0, 4, 7, 7, 7]),
        ([0, 4, 5, 9, 0], [0, 4, 5, 9, 9]),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ):
        for got, want in zip(attend(padded), attend(plain), strict=True):
            np.testing.assert_array_equal(got, want)
    out, _ = attend([0, 4, 7, 0, 0])
    assert not out[7:].any()
    assert out[:7].any(axis=(1, 2)).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_e5m2_pages_have_scales_or_none(implementation):
    narrow = [pages.astype(jnp.float8_e5m2) for pages in PAGES]
    scales = [jnp.asarray(RNG.uniform(0.5, 2, (6, 2, 16)), jnp.float32) for _ in "kv"]

    def attend(k, v, **more):
        q, lens = Q[:3], LENS[:3]
        return paged_attention(
            q, k, v, TABLES[:3], lens, implementation=implementation, **more
        )

    wide = [pages.astype(jnp.float32) for pages in narrow]
    np.testing.assert_allclose(attend(*narrow), attend(*wide), rtol=2e-6, atol=2e-6)
    got = attend(*narrow, k_scale=scales[0], v_scale=scales[1])
    scaled = [x * scale[..., None] for x, scale in zip(wide, scales, strict=True)]
    np.testing.assert_allclose(got, attend(*scaled), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"both k_scale and v_scale .* or neither"):
        attend(*narrow, k_scale=scales[0])


def test_e5m2_pages_are_written_with_the_scales_of_each_vector():
    pages = jnp.zeros((2, 2, 16, 32), jnp.float8_e5m2)
    new = jnp.asarray(100 * RNG.standard_normal((3, 2, 32)), jnp.float32)
    slots, ones = jnp.array([0, 17, -1]), jnp.ones((2, 2, 16), jnp.float32)
    k, _ = write_kv(pages, pages, new, new, slots, implementation="xla")
    want = np.asarray(new).astype(ml_dtypes.float8_e5m2)
    np.testing.assert_array_equal(np.asarray(k)[1, :, 1], want[1])
    k, _, k_scale, _ = write_kv(
        *(pages, pages, new, new, slots),
        k_scale=ones,
        v_scale=ones,
        implementation="xla",
    )
    largest = np.abs(np.asarray(new)).max(-1)
    np.testing.assert_allclose(k_scale[0, :, 0], largest[0] / 57344, rtol=1e-6)
    back = np.asarray(k)[0, :, 0].astype(np.float32) * np.asarray(k_scale)[0, :, :1]
    # Two bits of mantissa: half of 2 ** -2 of each number.
    np.testing.assert_allclose(back, new[0], rtol=0.126, atol=1e-3)
