"""The Triton kernels on pages of 8 bits, in Triton's interpreter.

Attention is compared with the float64 oracle on the dequantised values, and page
updates with those of XLA, bit for bit. Slots that belong to no sequence hold fp8's NaN,
or 127, and a scale of NaN. `compile_test` compiles the same kernels.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpaged import attention
from jpaged.attention import kv_cache
from jpaged.pages.quantised import quantise
from jpaged.triton import attention as triton_attention
from jpaged.triton import pages as triton_pages
from tests.support.attention import oracle
from tests.support.attention.oracle import relative_errors
from tests.support.attention.quantised_cases import KERNEL_TOLERANCES, case_of

# Not `importorskip`: `triton_interpreter` sets a variable before it imports triton.
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: extra `gpu-compile`", allow_module_level=True)
from tests.triton.kernel_test import (
    LSE_TOLERANCE,
    SHAPES,
    SMALL,
    ragged_lengths,
    triton_interpreter,
)

pytestmark = pytest.mark.gpu_compile

DTYPES = ("int8", "uint8")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    for module in (triton_attention, triton_pages):
        monkeypatch.setattr(module, "launch", triton_interpreter.launch)
    monkeypatch.setattr(
        triton_attention.triton_tiles, "default_tiles", lambda *_: SMALL
    )


def attend(arguments, **options):
    call = functools.partial(
        attention.paged_attention, implementation="triton", return_lse=True, **options
    )
    return jax.jit(call)(**arguments)


def check(name, contexts, queries=None, *, dtype, **more):
    arguments, case, options = case_of(
        SHAPES[name], contexts, queries, dtype=dtype, **more
    )
    out, lse = attend(arguments, **options)
    tolerance = KERNEL_TOLERANCES[case.q.dtype.name]
    oracle.check_result(case, out, lse, tolerance, LSE_TOLERANCE, **options)


# Both tests run the same kernel, so that each dtype of q meets each dtype of pages.
@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_oracle_at_every_length(name):
    size = SHAPES[name][2]
    check(name, [257, 0, 1, size - 1, size, size + 1], dtype="uint8")


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_decode_rows_and_empty_rows_equal_the_oracle(name):
    check(name, *ragged_lengths(SHAPES[name][2]), num_padding=5, dtype="int8")


def test_a_long_row_is_split_and_blocks_can_be_shared():
    check("groups_of_4", [2048, 100, 300, 5], shared_blocks=4, dtype="uint8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_a_stacked_pool_equals_that_layer_alone(dtype):
    arguments, case, _ = case_of(SHAPES["window"], [5, 33, 0, 16], dtype=dtype)
    for name in ("k_pages", "v_pages", "k_scale", "v_scale"):
        own = arguments[name]
        other = jnp.full_like(own, 127 if own.ndim == 4 else jnp.nan)
        arguments[name] = jnp.stack([other, own, other])
    out, _ = attend(arguments, layer=1)
    want, _ = oracle.attention(case)
    assert relative_errors(out, want).max() < KERNEL_TOLERANCES["float32"]


def test_every_number_of_fp8_is_read_exactly():
    codes = np.arange(256, dtype=np.uint8)
    codes = np.where((codes & 127) == 127, 0, codes).reshape(16, 16)  # all but NaN
    pages = np.full((len(codes), 1, 16, 16), 127, np.uint8)
    pages[:, 0, 0] = codes
    lens = jnp.ones(len(codes), jnp.int32)
    scale = jnp.ones(pages.shape[:-1])
    out = attention.paged_attention(
        jnp.ones((len(codes), 1, 16)),
        *(jnp.asarray(pages), jnp.asarray(pages)),
        jnp.arange(len(codes), dtype=jnp.int32)[:, None],
        lens,
        k_scale=scale,
        v_scale=scale,
        implementation="triton",
    )
    want = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(out[:, 0], want)


def test_pages_of_float8_equal_pages_of_their_bits():
    arguments, *_ = case_of(SHAPES["groups_of_4"], [70, 3], dtype="uint8")
    floats = {
        name: jax.lax.bitcast_convert_type(arguments[name], jnp.float8_e4m3fn)
        for name in ("k_pages", "v_pages")
    }
    got, _ = attend(arguments | floats)
    np.testing.assert_array_equal(got, attend(arguments)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["k", "v"])
def test_an_output_is_nan_if_a_token_that_it_reads_is_not_finite(name, dtype, bad):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 1, 16, 32)).astype(np.float32)
    values[0, 0, 3, 1] = bad
    numbers, scale = quantise(jnp.asarray(values), dtype)
    arguments = {f"{one}_pages": numbers for one in "kv"}
    arguments |= {f"{one}_scale": scale for one in "kv"}
    good, good_scale = quantise(jnp.ones((2, 1, 16, 32)), dtype)
    other = "v" if name == "k" else "k"
    arguments |= {f"{other}_pages": good, f"{other}_scale": good_scale}
    arguments["q"] = jnp.ones((2, 1, 32)) * jnp.asarray([[[1.0]], [[1.0]]])
    arguments["block_tables"] = jnp.asarray([[0], [1]], jnp.int32)
    arguments["context_lens"] = jnp.full(2, 9, jnp.int32)
    out, _ = attend(arguments)
    assert np.isnan(np.asarray(out[0])).all()
    assert np.isfinite(np.asarray(out[1])).all()


def shift_heads(arguments):
    return arguments | {"k_scale": jnp.roll(arguments["k_scale"], 1, axis=1)}


def shift_tokens(arguments):
    return arguments | {"v_scale": jnp.roll(arguments["v_scale"], 1, axis=-1)}


def shift_blocks(arguments):
    return arguments | {"v_scale": jnp.roll(arguments["v_scale"], 1, axis=0)}


def swap_scales(arguments):
    k_scale, v_scale = arguments["k_scale"], arguments["v_scale"]
    return arguments | {"k_scale": v_scale, "v_scale": k_scale}


@pytest.mark.parametrize(
    "fault", [shift_heads, shift_tokens, shift_blocks, swap_scales]
)
def test_a_planted_fault_exceeds_the_tolerance(fault):
    arguments, case, _ = case_of(SHAPES["groups_of_4"], [200, 17], dtype="int8")
    out, _ = attend(fault(arguments))
    want, _ = oracle.attention(case)
    errors = relative_errors(out, want).max(axis=-1)
    assert not (errors < 2 * KERNEL_TOLERANCES["bfloat16"]).any()


def wide(scale):
    """Return scales as TPUs store them: 128 per block, NaN past its last token."""
    padding = [(0, 0)] * (scale.ndim - 1) + [(0, 128 - scale.shape[-1])]
    return jnp.pad(scale, padding, constant_values=jnp.nan)


def test_attention_reads_scales_that_are_further_apart():
    arguments, case, _ = case_of(SHAPES["window"], [70, 3, 0, 16], dtype="int8")
    names = ("q", "k_pages", "v_pages", "block_tables", "context_lens")
    options = dict(sliding_window=None, logits_soft_cap=None, sinks=None)
    out, _ = triton_attention.attend(
        *(arguments[name] for name in names),
        None,
        layer=None,
        scale=case.q.shape[-1] ** -0.5,
        k_scale=wide(arguments["k_scale"]),
        v_scale=wide(arguments["v_scale"]),
        **options,
    )
    want, _ = oracle.attention(case)
    assert relative_errors(out, want).max() < KERNEL_TOLERANCES["float32"]


# ---- page updates


def pools_of(dtype, *shape):
    """Return numbers, and scales by name, of keys and of values."""
    rng = np.random.default_rng(0)
    found = [
        quantise(jnp.asarray(rng.standard_normal(shape), jnp.float32), dtype)
        for _ in "kv"
    ]
    (k_pages, k_scale), (v_pages, v_scale) = found
    return (k_pages, v_pages), dict(k_scale=k_scale, v_scale=v_scale)


def assert_same(got, want):
    assert len(got) == len(want) == 4
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn"])
@pytest.mark.parametrize("layer", [None, 1])
def test_writes_equal_those_of_xla_bit_for_bit(layer, dtype):
    shape = (5, 3, 16, 32) if layer is None else (2, 5, 3, 16, 32)
    pools, scales = pools_of(dtype, *shape)
    rng = np.random.default_rng(1)
    k, v = jnp.asarray(rng.standard_normal((2, 4, 3, 32)), "bfloat16")
    slots = jnp.array([17, -1, 79, 80], jnp.int32)
    want, got = (
        attention.write_kv(
            *(*pools, k, v, slots), layer=layer, implementation=name, **scales
        )
        for name in ("xla", "triton")
    )
    assert_same(got, want)
    changed = [np.any(np.asarray(a) != b) for a, b in zip(got, pools, strict=False)]
    assert all(changed)


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn"])
@pytest.mark.parametrize("layer", [None, 1])
def test_copies_equal_those_of_xla_bit_for_bit(layer, dtype):
    pools, scales = pools_of(dtype, 2, 6, 3, 16, 128)
    src, dst = jnp.array([[0, -1, 2, 3], [4, 1, -1, 5]], jnp.int32)
    want, got = (
        attention.copy_blocks(
            *(*pools, src, dst), layer=layer, implementation=name, **scales
        )
        for name in ("xla", "triton")
    )
    assert_same(got, want)
    np.testing.assert_array_equal(got[2][1, 5], scales["k_scale"][1, 3])


def test_the_kv_cache_stores_fp8_as_bits():
    sizes = dict(num_layers=1, num_kv_heads=1, block_size=16, head_dim=64)
    options = dict(dtype="fp8", implementation="triton")
    cache = kv_cache.init_kv_cache(num_blocks=2, **sizes, **options)
    assert (cache.k_pages.dtype, cache.v_scale.shape) == (jnp.uint8, (1, 2, 1, 16))


def test_updates_write_scales_that_are_further_apart():
    pools, scales = pools_of("int8", 2, 6, 3, 16, 16)
    k, v = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1, 3, 16)))
    slot, src, dst = (jnp.array([one], jnp.int32) for one in (17, 1, 4))
    want = attention.write_kv(*pools, k, v, slot, layer=1, **scales)
    options = dict(k_scale=want[2], v_scale=want[3], implementation="xla")
    want = attention.copy_blocks(*want[:2], src, dst, **options)
    values = zip(*(quantise(x, "int8") for x in (k, v)), strict=True)
    got = (*pools, *map(wide, scales.values()))
    got = triton_pages.write(got, [x for pair in values for x in pair], slot, 1)
    got = triton_pages.copy(got, src, dst, None)
    assert np.isnan(got[2][..., 16:]).all()
    assert_same([*got[:2], *(one[..., :16] for one in got[2:])], want)
