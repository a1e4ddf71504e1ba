"""The TPU's kernels on pages of 8 bits, in TPU interpret mode.

Attention is compared with the float64 oracle on the dequantised values, and page
updates with numpy, bit for bit. As in `tpu_kernel_test`, uninitialised memory is NaN.
So are the scales of slots that belong to no sequence, the padding of a block's scales,
and the numbers of such slots if the dtype has a NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jpaged import attention, engine
from jpaged.attention import kv_cache
from jpaged.config import EngineConfig
from jpaged.models import ModelConfig, init_model
from jpaged.pages import tuned
from jpaged.pages.quantised import quantise
from jpaged.pallas.tpu import key_tiles as tpu_key_tiles
from jpaged.pallas.tpu import pages as tpu_pages
from jpaged.pallas.tpu import windows as tpu_windows
from jpaged.params import SamplingParams
from tests.pallas.tpu_kernel_test import LSE_TOLERANCE, SINKS, SMALL, TINY
from tests.support.attention import oracle
from tests.support.attention.oracle import relative_errors
from tests.support.attention.quantised_cases import KERNEL_TOLERANCES, quantised_case

pytestmark = pytest.mark.long

NAN = {"uint8": 0x7F, "float8_e4m3fn": np.nan, "int8": 127}


@pytest.fixture(autouse=True)
def _interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    use_tiles(monkeypatch, SMALL)


def use_tiles(monkeypatch, sizes) -> None:
    tiles = tuned.tiles

    def of_this(implementation, *args):
        return sizes if implementation == "mosaic_tpu" else tiles(implementation, *args)

    monkeypatch.setattr(tuned, "tiles", of_this)


def stored(arguments):
    """Return the arguments as TPUs store them, with NaN where nothing must be read."""
    out = dict(arguments)
    for name in ("k", "v"):
        scale = np.asarray(arguments[f"{name}_scale"])
        pages = np.array(arguments[f"{name}_pages"])
        pages[np.isnan(scale)] = NAN[pages.dtype.name]
        width = [(0, 0)] * 3 + [(0, -pages.shape[-1] % 128)]
        out[f"{name}_pages"] = jnp.asarray(np.pad(pages, width))
        width = [(0, 0)] * 2 + [(0, -scale.shape[-1] % 128)]
        scale = np.pad(scale, width, constant_values=np.nan)
        out[f"{name}_scale"] = jnp.asarray(scale)
    return out


def run(arguments, **options):
    # A new function for each call, so that no program with other tiles is used.
    call = functools.partial(
        attention.paged_attention,
        implementation="mosaic_tpu",
        return_lse=True,
        **options,
    )
    return jax.jit(call)(**arguments)


def check(arguments, case, **options) -> None:
    device = dict(options)
    if "sinks" in options:
        device["sinks"] = jnp.asarray(options["sinks"])
    out, lse = run(stored(arguments), **device)
    tolerance = KERNEL_TOLERANCES[case.q.dtype.name]
    oracle.check_result(case, out, lse, tolerance, LSE_TOLERANCE, **options)


# heads, head_dim, block_size, dtypes of pages and of q, options
SHAPES = {
    "one_head_each": ((4, 4), 64, 16, "int8", "float32", {}),
    "groups_of_4": ((8, 2), 128, 32, "int8", "bfloat16", {}),
    "one_key": ((16, 1), 256, 64, "uint8", "bfloat16", {"sliding_window": 50}),
    "blocks_of_128": ((4, 2), 128, 128, "uint8", "float32", {"logits_soft_cap": 2.0}),
    "scales_of_8_heads": ((8, 8), 128, 16, "float8_e4m3fn", "float32", {}),
    "everything": (
        (14, 2),
        64,
        32,
        "int8",
        "float32",
        dict(sinks=SINKS, sliding_window=17, logits_soft_cap=2.0, scale=0.2),
    ),
}


def case_of(name, contexts, queries=None, **more):
    heads, head_dim, size, dtype, q_dtype, options = SHAPES[name]
    sizes = dict(heads=heads, head_dim=head_dim, block_size=size)
    made = quantised_case(
        contexts, queries, dtype=dtype, q_dtype=q_dtype, **sizes, **more
    )
    return *made, options


@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_oracle_at_every_length(name, small_tiles):
    size = SHAPES[name][2]
    lengths = [0, 1, size - 1, size, size + 1, 0, 2 * size + 5]
    arguments, case, options = case_of(name, lengths)
    check(arguments, case, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_decode_rows_and_empty_rows_equal_the_oracle(name, small_tiles):
    size = SHAPES[name][2]
    #          decode, chunk after context, empty, fresh prompt, decodes, chunk
    contexts = [47, size + 9, 0, 17, size, 40, 1, 50]
    queries = [1, 9, 0, 17, 1, 0, 1, 21]
    arguments, case, options = case_of(name, contexts, queries, num_padding=5)
    case.q[50:] = np.nan
    arguments["q"] = jnp.asarray(case.q)
    check(arguments, case, **options)


@pytest.mark.parametrize("name", ["scales_of_8_heads", "blocks_of_128"])
def test_default_tiles_equal_the_oracle(name):
    arguments, case, options = case_of(name, [540, 0, 33], [40, 0, 1])
    check(arguments, case, **options)
    check(*case_of(name, [540, 0, 33], shared_blocks=2)[:2], **options)


def test_a_traced_layer_equals_that_layer_alone_with_scales_of_any_width(small_tiles):
    arguments, _, _ = case_of("one_head_each", [5, 33, 0, 32], [1, 20, 0, 3])
    want, _ = run(stored(arguments), sliding_window=9)
    pools = {
        name: jnp.stack([jnp.zeros_like(array), array])
        for name, array in stored(arguments).items()
        if name[2:] in ("pages", "scale")
    }
    options = dict(layer=jnp.int32(1), sliding_window=jnp.int32(9))
    narrow = {name: pools[name][..., :16] for name in ("k_scale", "v_scale")}
    for scales in ({}, narrow):
        got, _ = run(arguments | pools | scales, **options)
        np.testing.assert_array_equal(got, want)
    for implementation in ("xla", "reference"):
        got = attention.paged_attention(
            **arguments | pools, **options, implementation=implementation
        )
        assert (
            relative_errors(got, np.asarray(want)).max() < KERNEL_TOLERANCES["float32"]
        )


def test_the_output_is_nan_if_a_visible_number_or_scale_is():
    arguments, case, _ = case_of("one_key", [70, 9])
    block = case.block_tables[0, 0]
    for name, value in (("v_pages", 0x7F), ("v_scale", jnp.nan), ("k_scale", jnp.nan)):
        changed = dict(arguments)
        changed[name] = arguments[name].at[block, 0, 63].set(value)
        out, _ = run(stored(arguments) | {name: stored(changed)[name]})
        assert np.isnan(np.asarray(out[0], np.float64)).any()
        assert np.isfinite(np.asarray(out[1], np.float64)).all()


# ---- planted faults: each shows in every row


def no_key_scales(monkeypatch):
    scales_of = tpu_key_tiles.KeyTiles.scales_of

    def fault(self, head):
        key, value = scales_of(self, head)
        return jnp.ones_like(key), value

    monkeypatch.setattr(tpu_key_tiles.KeyTiles, "scales_of", fault)


def scales_of_the_head_before(monkeypatch):
    scales_of = tpu_key_tiles.KeyTiles.scales_of
    monkeypatch.setattr(
        tpu_key_tiles.KeyTiles,
        "scales_of",
        lambda self, head: scales_of(self, (head + 1) % self.plan.pass_heads),
    )


def scales_of_the_next_lane(monkeypatch):
    side_by_side = tpu_key_tiles._side_by_side
    monkeypatch.setattr(
        tpu_key_tiles,
        "_side_by_side",
        lambda *args: jnp.roll(side_by_side(*args), 1, axis=1),
    )


def scales_of_another_block(monkeypatch):
    side_by_side = tpu_key_tiles._side_by_side
    monkeypatch.setattr(
        tpu_key_tiles,
        "_side_by_side",
        lambda scales, *args: side_by_side(scales[::-1], *args),
    )


FAULTS = (
    no_key_scales,
    scales_of_the_head_before,
    scales_of_the_next_lane,
    scales_of_another_block,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_exceeds_the_tolerance(fault, monkeypatch):
    arguments, case, _ = case_of("groups_of_4", [96, 64], [3, 1])
    # Full blocks, so that the faults change numbers and not only produce NaN.
    use_tiles(monkeypatch, dataclasses.replace(SMALL, tokens=64))
    fault(monkeypatch)
    got, _ = run(stored(arguments))
    want, _ = oracle.attention(case)
    errors = relative_errors(got, want).max(axis=-1)
    assert not (errors < 5 * KERNEL_TOLERANCES["bfloat16"]).any()


# ---- write_kv, copy_blocks: bit for bit


def some_pools(dtype: str, *shape: int, scale_width: int):
    """Return pages and scales of random bits, some of them NaN."""
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 256, shape, np.uint8) for _ in "kv"]
    scales = [rng.standard_normal((*shape[:-2], scale_width)) for _ in "kv"]
    pools = [*(page.view(jnp.dtype(dtype)) for page in pages)]
    return pools + [scale.astype(np.float32) for scale in scales]


def updated(function, pools, *rest, **options):
    call = functools.partial(function, implementation="mosaic_tpu", **options)
    k_pages, v_pages, k_scale, v_scale = map(jnp.asarray, pools)
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    return jax.jit(call)(k_pages, v_pages, *map(jnp.asarray, rest), **scales)


def assert_bitwise(got, want) -> None:
    for result, array in zip(got, want, strict=True):
        assert result.dtype == array.dtype
        assert np.asarray(result).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("block_size", "width", "chunk_bytes", "dtype"),
    [
        (16, 128, 2**20, "int8"),
        (16, 128, 2**20, "uint8"),
        (16, 128, 2**20, "float8_e4m3fn"),
        (64, 128, 8192, "uint8"),
        (32, 32, 1, "float8_e4m3fn"),
    ],
)
def test_write_kv_writes_exactly_the_named_slots(
    block_size, width, chunk_bytes, dtype, monkeypatch
):
    monkeypatch.setattr(tpu_windows, "_CHUNK_BYTES", chunk_bytes)
    pools = some_pools(dtype, 2, 6, 2, block_size, 128, scale_width=width)
    rng = np.random.default_rng(1)
    new = [rng.standard_normal((40, 2, 128)).astype(np.float32) for _ in "kv"]
    end = 6 * block_size
    # A chunk of a prompt across two blocks, single tokens, and skipped slots.
    chunk = range(2 * block_size - 10, 2 * block_size + 20)
    slots = [end - 1, -1, 7, 0, -9, end, 70, *chunk, 71, 1, 2**31 - 1]
    got = updated(
        attention.write_kv, pools, *new, np.array(slots, np.int32), layer=jnp.int32(1)
    )
    for i, values in enumerate(new):
        numbers, scale = map(
            np.asarray, jax.jit(quantise, static_argnums=1)(values, dtype)
        )
        for token, slot in enumerate(slots):
            if 0 <= slot < end:
                place = (1, slot // block_size, slice(None), slot % block_size)
                pools[i][place] = numbers[token]
                pools[2 + i][place] = scale[token]
    assert_bitwise(got, pools)


def test_scales_in_the_next_lane_fail_the_comparison(monkeypatch):
    put = tpu_pages._ScaleWindow.put

    def fault(self, buffer, new, loop, scratch):
        def shifted(one, start):
            return loop(lambda token, slot, result: one(token, slot + 1, result), start)

        put(self, buffer, new, shifted, scratch)

    monkeypatch.setattr(tpu_pages._ScaleWindow, "put", fault)
    with pytest.raises(AssertionError):
        test_write_kv_writes_exactly_the_named_slots(64, 128, 1, "int8", monkeypatch)


def test_write_kv_pads_small_heads():
    pools = some_pools("int8", 2, 1, 32, 128, scale_width=128)
    new = np.random.default_rng(1).standard_normal((1, 1, 64)).astype(np.float32)
    got = updated(attention.write_kv, pools, new, new, np.array([33], np.int32))
    numbers, scale = map(np.asarray, quantise(jnp.asarray(new), "int8"))
    for i in (0, 1):
        pools[i][1, 0, 1] = np.pad(numbers[0, 0], (0, 64))
        pools[2 + i][1, 0, 1] = scale[0, 0]
    assert_bitwise(got, pools)


@pytest.mark.parametrize(
    ("layer", "dtype"), [(None, "int8"), (1, "uint8"), (1, "float8_e4m3fn")]
)
def test_copy_blocks_copies_exactly_the_named_blocks_and_scales(layer, dtype):
    pools = some_pools(dtype, 2, 8, 2, 16, 128, scale_width=128)
    src, dst = np.array([[3, -1, 0, 3, 5, -1], [1, 2, 7, 6, -1, -1]], np.int32)
    got = updated(attention.copy_blocks, pools, src, dst, layer=layer)
    for array in pools:
        for one in array if layer is None else array[layer : layer + 1]:
            for source, target in ((3, 1), (0, 7), (3, 6)):
                one[target] = one[source]
    assert_bitwise(got, pools)


# ---- unsupported calls

WRONG = {
    r"block_size of 16, 32, 64 or a multiple of 128 for pages of int8, got 48": {
        "block_size": 48
    },
    r"block_size of a multiple of 16, got 8": {"block_size": 8},
    r"1, 2, 4 or a multiple of 8 key/value heads .* of int8, got 6": {"heads": (6, 6)},
}


@pytest.mark.parametrize("message", WRONG)
def test_an_unsupported_call_raises_and_names_another_backend(message):
    sizes = dict(heads=(4, 2), head_dim=128, block_size=16) | WRONG[message]
    arguments, _ = quantised_case([5, 9], dtype="int8", **sizes)
    with pytest.raises(
        ValueError, match=r"cannot serve this \('xla' can\): .*" + message
    ):
        run(arguments)


def test_the_scales_of_a_block_are_as_wide_as_a_memory_tile():
    sizes = dict(num_layers=3, num_kv_heads=2, head_dim=64)
    sizes["implementation"] = "mosaic_tpu"
    for block_size, width in ((16, 128), (64, 128), (256, 256)):
        sizes["block_size"] = block_size
        cache = kv_cache.init_kv_cache(num_blocks=5, dtype="fp8", **sizes)
        assert cache.k_pages.shape == (3, 5, 2, block_size, 128)
        assert cache.k_scale.shape == (3, 5, 2, width)
        size = kv_cache.bytes_per_block(dtype="fp8", **sizes)
        assert size == 2 * 3 * 2 * (block_size * 128 + 4 * width)
        assert 5 * size == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    sizes["block_size"] = 48
    with pytest.raises(ValueError, match="expected a block_size of 16, 32, 64 or"):
        kv_cache.init_kv_cache(num_blocks=5, dtype="fp8", **sizes)


# ---- in the engine


def test_an_engine_generates_the_same_tokens_as_with_xla():
    model = init_model(ModelConfig.from_hf(TINY))
    prompts = [[1, 2, 3], list(range(5, 40)), [7] * 17]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    found = []
    for implementation in ("mosaic_tpu", "xla"):
        config = EngineConfig(
            num_blocks=12,
            max_num_seqs=2,
            max_model_len=64,
            max_num_batched_tokens=16,
            max_num_requests=8,
            attention=implementation,
        )
        state = engine.init(model, config, kv_dtype="int8")
        state, _ = engine.submit(state, prompts, params)
        state = engine.run(model, state)
        found.append([result.token_ids for result in engine.collect(state)])
        is_tpu = implementation == "mosaic_tpu"
        assert state.cache.k_scale.shape[-1] == (128 if is_tpu else 16)
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0]] == [4, 4, 4]
