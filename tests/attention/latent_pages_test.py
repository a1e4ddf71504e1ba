"""Latent pages: attention without pages of values, whose keys are the values too.

Compared with the same backend and pages of values that are equal to the keys, and with
float64 numpy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.attention import backends, copy_blocks, paged_attention, write_kv
from jpaged.pages.backend import AttentionCall
from tests.support.cpu_kernels import needs_compiler

SERVING = ["reference", "xla", pytest.param("cpu", marks=needs_compiler)]
H, D, P, N = 6, 20, 4, 12
TABLES = jnp.array([[3, 5, 0, 7], [1, 8, -1, -1], [2, -1, -1, -1]], jnp.int32)
LENS = jnp.array([14, 6, 0], jnp.int32)
STARTS = jnp.array([0, 5, 6, 6], jnp.int32)  # five queries, one, none


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pages(seed: int = 1) -> np.ndarray:
    """One layer's pages [N, 1, P, D], NaN where no sequence has a token."""
    found = np.full((N, 1, P, D), np.nan, np.float32)
    for table, length in zip(TABLES.tolist(), LENS.tolist(), strict=True):
        for position in range(length):
            block, offset = table[position // P], position % P
            found[block, 0, offset] = numbers(D, seed=seed * 1000 + 8 * block + offset)
    return found


def naive(q: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """Output f64[H, D] of one query over keys [C, D] that are the values too."""
    scores = q.astype(np.float64) @ keys.T.astype(np.float64) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ keys.astype(np.float64)


def keys_of(row: int, pool: np.ndarray, length: int) -> np.ndarray:
    return pool[np.asarray(TABLES[row]), 0].reshape(-1, D)[:length]


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("num_heads", [H, 130])
def test_decode_and_chunks_equal_naive_attention(name, num_heads):
    # With more than 64 heads, the C++ kernel is called several times.
    pool, scale = pages(), 0.3
    q, given = numbers(6, num_heads, D), jnp.asarray(pool)
    call = functools.partial(paged_attention, implementation=name, scale=scale)
    out = call(jnp.asarray(q), given, None, TABLES, LENS, query_start_loc=STARTS)
    expected = [naive(q[i], keys_of(0, pool, 10 + i), scale) for i in range(5)]
    expected.append(naive(q[5], keys_of(1, pool, 6), scale))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    out, lse = call(jnp.asarray(q[:3]), given, None, TABLES, LENS, return_lse=True)
    np.testing.assert_allclose(
        out[0], naive(q[0], keys_of(0, pool, 14), scale), atol=1e-5
    )
    assert not out[2].any()
    assert np.isneginf(lse[2]).all()


@pytest.mark.parametrize("name", SERVING)
def test_windows_caps_sinks_and_8_bits_equal_those_of_equal_values(name):
    pool, q = jnp.asarray(np.nan_to_num(pages())), jnp.asarray(numbers(3, H, D))
    options = dict(sliding_window=5, logits_soft_cap=2.0, sinks=jnp.asarray(numbers(H)))
    stacked = jnp.stack([pool * 2, pool])
    for extra in (options, {"layer": 1} | options):
        array = stacked if "layer" in extra else pool
        call = functools.partial(paged_attention, implementation=name, **extra)
        want = call(q, array, array, TABLES, LENS)
        np.testing.assert_allclose(call(q, array, None, TABLES, LENS), want, atol=1e-6)
    narrow, scale = jnp.zeros(pool.shape, jnp.int8), jnp.zeros(pool.shape[:-1])
    slots = jnp.arange(N * P, dtype=jnp.int32)
    tokens = pool.reshape(N * P, 1, D)
    write = functools.partial(write_kv, implementation=name)
    narrow, scale = write(narrow, None, tokens, None, slots, k_scale=scale)
    both = dict(k_scale=scale, v_scale=scale)
    want = paged_attention(q, narrow, narrow, TABLES, LENS, **both, implementation=name)
    got = paged_attention(
        q, narrow, None, TABLES, LENS, k_scale=scale, implementation=name
    )
    np.testing.assert_allclose(got, want, atol=1e-6)
    exact = paged_attention(q, pool, None, TABLES, LENS, implementation=name)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_writes_and_copies_change_only_their_slots(name, dtype):
    pool = jnp.zeros((2, N, 1, P, D), dtype)
    tokens = jnp.asarray(numbers(3, 1, D))
    slots = jnp.array([5, -1, 40])
    written = write_kv(pool, None, tokens, None, slots, layer=1, implementation=name)
    assert len(written) == 1
    values = np.asarray(written[0])
    if dtype == "uint16":
        values = values.view(jnp.bfloat16).astype(np.float32)
    expected = np.zeros((2, N, P, D), np.float32)
    expected[1, 1, 1], expected[1, 10, 0] = tokens[0, 0], tokens[2, 0]
    np.testing.assert_allclose(values[:, :, 0], expected, rtol=4e-3)
    (copied,) = copy_blocks(
        written[0], None, jnp.array([1, -1]), jnp.array([4, 2]), implementation=name
    )
    np.testing.assert_array_equal(copied[:, 4], written[0][:, 1])
    np.testing.assert_array_equal(copied[:, :4], written[0][:, :4])


@pytest.mark.parametrize("name", SERVING)
def test_gradients_are_the_sums_of_those_as_keys_and_as_values(name):
    pool, q = jnp.nan_to_num(pages()), jnp.asarray(numbers(6, H, D))

    def loss(q, k, v):
        out = paged_attention(
            q, k, v, TABLES, LENS, query_start_loc=STARTS, implementation=name
        )
        return jnp.sum(out[..., :16] ** 2)

    d_q, d_k, d_v = jax.grad(loss, (0, 1, 2))(q, pool, pool)
    got_q, got = jax.grad(lambda q, k: loss(q, k, None), (0, 1))(q, pool)
    np.testing.assert_allclose(got_q, d_q, atol=1e-5)
    np.testing.assert_allclose(got, d_k + d_v, atol=1e-5)


def test_kernels_without_latent_pages_refuse_them_and_are_never_the_default():
    pool = jnp.zeros((N, 1, 16, 128), jnp.bfloat16)
    q = jnp.zeros((3, H, 128), jnp.bfloat16)
    for name in ("mosaic_gpu", "triton"):
        for call in (
            lambda name=name: paged_attention(
                q, pool, None, TABLES, LENS, implementation=name
            ),
            lambda name=name: write_kv(
                pool, None, q[:, :1], None, LENS, implementation=name
            ),
            lambda name=name: copy_blocks(pool, None, LENS, LENS, implementation=name),
        ):
            with pytest.raises(
                ValueError, match=f"'{name}' cannot serve this .*latent"
            ):
                call()
    call = AttentionCall(q, TABLES)
    chosen = backends.choose_backend(None, pool, call=call, is_latent=True)
    assert chosen.serves_latents


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v": np.zeros((3, 1, D))}, "v: expected None beside these v_pages, got one"),
        ({"v_pages": np.zeros((N, 1, P, D), np.float32)}, "v: expected one beside"),
        ({"v_scale": np.zeros((N, 1, P))}, "v_scale: expected None without v_pages"),
        ({"k": np.zeros((3, 1, D + 1))}, r"k: expected shape \(3, 1, 20\)"),
    ],
)
def test_arguments_that_do_not_fit_raise(arguments, message):
    given = dict(
        k_pages=np.zeros((N, 1, P, D), np.float32),
        v_pages=None,
        k=np.zeros((3, 1, D)),
        v=None,
        slot_mapping=np.zeros(3, jnp.int32),
    )
    with pytest.raises(ValueError, match=message):
        write_kv(**given | arguments, implementation="xla")
