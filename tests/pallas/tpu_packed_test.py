"""Packed pages on TPUs, with several tokens per row of 128, in TPU interpret mode.

Attention is compared with the float64 oracle, and page updates with numpy, bit for bit.
As in `tpu_kernel_test`, uninitialised memory is NaN, and so is every slot that must not
be read. Here such a slot shares its row with slots that must be read.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jpaged import attention
from jpaged.attention import backends, kv_cache
from jpaged.attention.backends import MOSAIC_TPU, XLA
from jpaged.pages import tuned
from jpaged.pallas.tpu import key_tiles as tpu_key_tiles
from jpaged.pallas.tpu import packed as tpu_packed
from jpaged.pallas.tpu.plan import TpuTiles
from tests.pallas.tpu_kernel_test import (
    LSE_TOLERANCE,
    SINKS,
    TOLERANCES,
    check,
    run,
    some,
    stored,
)
from tests.support.attention import oracle
from tests.support.attention.oracle import make_case, relative_errors

pytestmark = pytest.mark.long

# Tiles of 16 tokens, where heads are 64, so that few tokens need several.
SMALL = TpuTiles(query_rows=32, tokens=8, kv_heads=2)


@pytest.fixture(autouse=True)
def _interpreted_with_small_tiles(monkeypatch):
    tiles = tuned.tiles

    def of_this(implementation, *args):
        return SMALL if implementation == "mosaic_tpu" else tiles(implementation, *args)

    monkeypatch.setattr(tuned, "tiles", of_this)
    with pltpu.force_tpu_interpret_mode():
        yield


# heads, head_dim, block_size, dtype, options
SHAPES = {
    "two_in_a_row": ((14, 2), 64, 16, "bfloat16", {}),
    "blocks_of_128": ((4, 4), 64, 128, "float32", {"sliding_window": 50}),
    "four_in_a_row": (
        (14, 2),
        32,
        16,
        "float32",
        dict(sinks=SINKS, sliding_window=17, logits_soft_cap=2.0, scale=0.2),
    ),
    "eight_in_a_row": ((6, 3), 16, 32, "bfloat16", {"logits_soft_cap": 2.0}),
}


def case_of(name, contexts, queries=None, **more):
    heads, head_dim, size, dtype, options = SHAPES[name]
    sizes = dict(heads=heads, head_dim=head_dim, block_size=size, dtype=dtype)
    return make_case(contexts, queries, **sizes, **more), options


@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_oracle_at_every_length(name):
    size = SHAPES[name][2]
    # With lengths from 0 to 9, each token of a row is the last one of some sequence.
    case, options = case_of(name, [*range(10), size, size + 1, 2 * size + 5])
    check(case, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_decode_rows_and_empty_rows_equal_the_oracle(name):
    size = SHAPES[name][2]
    #          decode, chunk after context, empty, fresh prompt, decodes, chunk
    contexts = [47, size + 9, 0, 17, size, 40, 1, 91]
    queries = [1, 9, 0, 17, 1, 0, 1, 21]
    case, options = case_of(name, contexts, queries, num_padding=5)
    case.q[50:] = np.nan
    check(case, **options)


def with_nan_before(case, window):
    """Return the case with NaN in all tokens before the rows' windows."""
    k_pages, v_pages = case.k_pages.copy(), case.v_pages.copy()
    size = k_pages.shape[2]
    for row, length in enumerate(case.context_lens):
        for position in range(length - window):
            block = case.block_tables[row, position // size]
            k_pages[block, :, position % size] = np.nan
            v_pages[block, :, position % size] = np.nan
    return dataclasses.replace(case, k_pages=k_pages, v_pages=v_pages)


@pytest.mark.parametrize("name", ["two_in_a_row", "eight_in_a_row"])
def test_tokens_before_the_window_are_not_read(name):
    case, options = case_of(name, [40, 41, 55])
    check(with_nan_before(case, 9), sliding_window=9, **options)


@pytest.mark.parametrize("fault", ["keys_of_neighbours", "tokens_of_rows", "maxima"])
def test_a_planted_fault_exceeds_the_tolerance(fault, monkeypatch):
    case, _ = case_of("two_in_a_row", [33, 51])
    if fault == "keys_of_neighbours":
        clear = tpu_key_tiles.KeyTiles.clear_unseen

        def values_alone(tiles, *args):
            clear(dataclasses.replace(tiles, keys=tiles.values), *args)

        monkeypatch.setattr(tpu_key_tiles.KeyTiles, "clear_unseen", values_alone)
    elif fault == "tokens_of_rows":
        monkeypatch.setattr(tpu_packed, "token_of_query_row", lambda row, _: row * 0)
    else:
        monkeypatch.setattr(tpu_packed, "_over_copies", lambda x, *_: x)
    got, _ = run(stored(case))
    want, _ = oracle.attention(case)
    errors = relative_errors(got, want)
    assert not (errors < TOLERANCES["bfloat16"]).all(axis=1).any()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_backends_read_packed_pages(implementation):
    case, options = case_of("four_in_a_row", [5, 33, 0], [1, 20, 0])
    arrays = oracle.arrays(stored(case))
    sinks = jnp.asarray(options["sinks"])
    out, lse = attention.paged_attention(
        **jax.tree.map(jnp.asarray, arrays),
        **options | {"sinks": sinks},
        implementation=implementation,
        return_lse=True,
    )
    tolerances = (TOLERANCES["float32"], LSE_TOLERANCE)
    oracle.check_result(case, out, lse, *tolerances, **options)


# ---- write_kv, copy_blocks: bit for bit


def called(function, implementation, **options):
    call = functools.partial(function, implementation=implementation, **options)
    return jax.jit(call)


@pytest.mark.parametrize(
    ("implementation", "head_dim", "block_size", "dtype", "is_packed"),
    [
        ("mosaic_tpu", 64, 16, "bfloat16", True),
        ("mosaic_tpu", 64, 48, "float32", True),
        ("mosaic_tpu", 32, 16, "float32", False),
        ("mosaic_tpu", 16, 64, "bfloat16", True),
        ("xla", 32, 16, "bfloat16", True),
    ],
)
def test_write_kv_writes_exactly_the_named_slots(
    implementation, head_dim, block_size, dtype, is_packed
):
    num_slots = 6 * block_size
    shape = (2, 6, 3, block_size, head_dim)
    pages = [some(*shape, seed=s, dtype=dtype) for s in (0, 1)]
    new = [some(40, 3, head_dim, seed=s, dtype=dtype) for s in (2, 3)]
    new[0][0, 0, 0] = -0.0
    # A chunk of a prompt across two blocks, single tokens, neighbours, skipped slots.
    slots = [
        num_slots - 1,
        -1,
        7,
        3,
        -9,
        num_slots,
        6,
        *range(20, 50),
        90,
        0,
        2**31 - 1,
    ]
    rows = block_size * head_dim // 128
    given = [x.reshape(2, 6, 3, rows, 128) if is_packed else x for x in pages]
    got = called(attention.write_kv, implementation)(
        *map(jnp.asarray, (*given, *new, np.array(slots, np.int32))), layer=jnp.int32(1)
    )
    for want, before, values, result in zip(pages, given, new, got, strict=True):
        for token, slot in enumerate(slots):
            if 0 <= slot < num_slots:
                want[1, slot // block_size, :, slot % block_size] = values[token]
        assert result.shape == before.shape
        assert np.asarray(result).tobytes() == want.tobytes()


@pytest.mark.parametrize("shape", [(8, 128), (2, 128), (16, 64)])
def test_copy_blocks_copies_exactly_the_named_blocks(shape):
    pages = [some(2, 8, 2, *shape, seed=s, dtype="bfloat16") for s in (0, 1)]
    src, dst = [3, -1, 0, 3, 5, -1], [1, 2, 7, 6, -1, -1]
    got = called(attention.copy_blocks, "mosaic_tpu")(
        *map(jnp.asarray, pages), jnp.array(src), jnp.array(dst)
    )
    for want, result in zip(pages, got, strict=True):
        for source, target in ((3, 1), (0, 7), (3, 6)):
            want[:, target] = want[:, source]
        assert np.asarray(result).tobytes() == want.tobytes()


# ---- how pages are stored, and which backend reads them


def test_plain_pages_are_read_if_the_backend_is_named():
    case, _ = case_of("two_in_a_row", [5, 33, 0], [1, 20, 0])
    out, lse = run(case)
    tolerances = (TOLERANCES["bfloat16"], LSE_TOLERANCE)
    oracle.check_result(case, out, lse, *tolerances)


def test_the_best_on_a_tpu_serves_packed_pages_and_leaves_others_to_xla(monkeypatch):
    monkeypatch.setattr(backends, "preferred", lambda: [MOSAIC_TPU, XLA])
    packed = jax.ShapeDtypeStruct((9, 2, 8, 128), jnp.bfloat16)
    plain = jax.ShapeDtypeStruct((9, 2, 16, 64), jnp.bfloat16)
    for head_dim in (64, None):  # None: whole blocks
        choose = functools.partial(backends.choose_backend, None, head_dim=head_dim)
        assert choose(packed) is MOSAIC_TPU
        assert choose(plain) is XLA
    # The same pages with heads of 128 are blocks of 8.
    assert backends.choose_backend(None, packed, head_dim=128) is XLA


# (head_dim, block_size, dtype): the last axes of pages on a TPU
STORED = {
    (64, 16, "bfloat16"): (8, 128),
    (32, 16, "float32"): (4, 128),
    (16, 16, "bfloat16"): (2, 128),
    (64, 48, "bfloat16"): (24, 128),
    (128, 16, "bfloat16"): (16, 128),
    (80, 16, "bfloat16"): (16, 128),
    (8, 16, "float32"): (16, 128),
    (64, 16, "float16"): (16, 128),  # no kernel supports it
    (64, 16, "int8"): (16, 128),
    # Blocks are not whole memory tiles.
    (32, 48, "bfloat16"): (48, 32),
    (64, 8, "bfloat16"): (8, 64),
}


@pytest.mark.parametrize("page", STORED)
def test_bytes_per_block_are_those_of_the_stored_cache(page):
    head_dim, block_size, dtype = page
    sizes = dict(num_layers=3, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    sizes |= dict(block_size=block_size, implementation="mosaic_tpu")
    cache = kv_cache.init_kv_cache(num_blocks=5, **sizes)
    assert cache.k_pages.shape == (3, 5, 2, *STORED[page])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert size == 5 * kv_cache.bytes_per_block(**sizes)
