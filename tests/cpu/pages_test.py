"""Page updates in C++: exact, in place, and safe with any integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.attention import copy_blocks, write_kv
from jpaged.cpu import library
from tests.engine.compiled_program_test import copies_of
from tests.support.attention.cases import (
    TOLERANCES,
    check_copies,
    check_in_place,
    check_writes,
    some_pages,
)
from tests.support.cpu_kernels import needs_compiler

pytestmark = [
    pytest.mark.long,
    needs_compiler,
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_write_kv_writes_exactly_the_named_slots(dtype, layer):
    check_writes(dtype, layer, "cpu")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", [None, 1, "all"])
def test_copy_blocks_copies_exactly_the_named_blocks(dtype, layer):
    check_copies(dtype, layer, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint16"])
def test_donated_pools_are_updated_in_their_own_memory(dtype):
    check_in_place("cpu", dtype)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ["write_kv", "copy_blocks"])
def test_the_compiled_text_of_a_loop_copies_no_pool(name, stacked):
    shape, tokens = (3, 256, 2, 16, 64), jnp.ones((8, 2, 64))

    def update(k_pages, v_pages, slots):
        def body(index, pools):
            options = dict(layer=index if stacked else None, implementation="cpu")
            if name == "copy_blocks":
                return copy_blocks(*pools, slots, slots + 8, **options)
            return write_kv(*pools, tokens, tokens, slots, **options)

        return jax.lax.fori_loop(0, 3, body, (k_pages, v_pages))

    pool = jax.ShapeDtypeStruct(shape[not stacked :], jnp.float32)
    slots = jax.ShapeDtypeStruct((8,), jnp.int32)
    program = jax.jit(update, donate_argnums=(0, 1)).lower(pool, pool, slots).compile()
    assert copies_of(program.as_text(), np.prod(shape[1:])) == []
    assert program.memory_analysis().temp_size_in_bytes < 2**20


def test_more_tokens_than_one_part_of_the_work_are_written():
    k_pages, v_pages = (some_pages(100, 2, 16, 8, seed=s) for s in (0, 1))
    k, v = (some_pages(1200, 2, 8, seed=s) for s in (2, 3))
    slots = np.random.default_rng(0).permutation(1600)[:1200].astype(np.int32)
    arguments = tuple(map(jnp.asarray, (k_pages, v_pages, k, v, slots)))
    got = write_kv(*arguments, implementation="cpu")
    expected = write_kv(*arguments, implementation="xla")
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("width", [4, 128])
def test_writes_and_copies_of_8_bits_equal_those_of_xla(layer, dtype, width):
    shape = (6, 2, 4, 8) if layer is None else (3, 6, 2, 4, 8)
    pages, scale = jnp.zeros(shape, dtype), jnp.zeros((*shape[:-2], width))
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((4, 2, 8)), jnp.float32) for _ in "kv")
    slots = jnp.array([23, -1, 0, 24], jnp.int32)
    src, dst = jnp.array([5, -1, 0], jnp.int32), jnp.array([2, 3, 4], jnp.int32)
    results = []
    for name in ("cpu", "xla"):
        options = dict(layer=layer, implementation=name)
        pools = jax.jit(functools.partial(write_kv, **options))(
            pages, pages, k, v, slots, k_scale=scale, v_scale=scale
        )
        scales = dict(zip(("k_scale", "v_scale"), pools[2:], strict=True))
        copied = jax.jit(functools.partial(copy_blocks, **options))(
            *pools[:2], src, dst, **scales
        )
        results.append((*pools, *copied))
    for got, expected in zip(*results, strict=True):
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes()


def test_integers_out_of_range_do_not_crash_and_write_nothing():
    extreme = [-(2**31), -1, 6 * 4, 10**6, 2**31 - 1]
    pages = jnp.asarray(some_pages(3, 6, 2, 4, 8))
    tokens = jnp.ones((len(extreme), 2, 8))
    numbers = jnp.array(extreme, jnp.int32)
    options = dict(implementation="cpu")
    for layer in (0, 2):
        for written in write_kv(
            pages, pages, tokens, tokens, numbers, layer=layer, **options
        ):
            np.testing.assert_array_equal(written, pages)
    for layer in (-(2**31), -1, 3, 2**31 - 1):
        call = jax.jit(functools.partial(write_kv, **options))
        for written in call(
            pages, pages, tokens, tokens, numbers * 0, layer=jnp.int32(layer)
        ):
            np.testing.assert_array_equal(written, pages)
    for pairs in (
        (numbers, numbers),
        (numbers * 0, numbers),
        (numbers, -1 + 0 * numbers),
    ):
        copied = copy_blocks(pages, pages, *pairs, **options)
        np.testing.assert_array_equal(copied[0], pages)


def test_blocks_that_are_a_source_and_a_destination_are_read_first():
    pages = some_pages(6, 2, 4, 8)
    src, dst = jnp.array([0, 1, 2], jnp.int32), jnp.array([1, 2, 0], jnp.int32)
    copied, _ = copy_blocks(
        jnp.asarray(pages), jnp.asarray(pages), src, dst, implementation="cpu"
    )
    np.testing.assert_array_equal(copied[:3], pages[[2, 0, 1]])


def test_vmap_of_writes_equals_a_loop():
    pages = jnp.asarray(some_pages(2, 6, 2, 4, 8))
    tokens = jnp.asarray(some_pages(2, 3, 2, 8, seed=1))
    slots = jnp.array([[0, 5, 9], [2, 7, 23]], jnp.int32)
    call = functools.partial(write_kv, implementation="cpu")
    got, _ = jax.vmap(call)(pages, pages, tokens, tokens, slots)
    for row in range(2):
        expected, _ = call(pages[row], pages[row], tokens[row], tokens[row], slots[row])
        np.testing.assert_array_equal(got[row], expected)


def test_the_kernels_check_shapes_and_dtypes():
    pages, tokens = jnp.ones((1, 3, 2, 4, 8)), jnp.ones((5, 2, 8))
    slots, layer = jnp.zeros(5, jnp.int32), jnp.zeros(1, jnp.int32)

    def call(target, *arguments, **options):
        pools = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in arguments[:2]]
        function = jax.ffi.ffi_call(library.target(target), pools)
        return jax.block_until_ready(function(*arguments, **options))

    def write(k, where, **options):
        call("write_kv", pages, pages, k, tokens, where, layer, **options)

    write(tokens, slots, block_size=4, stacked=1)
    for k, where, size, stacked in (
        (tokens[:, :1], slots, 4, 1),
        (tokens[..., :7], slots, 4, 1),
        (tokens.astype(jnp.int8), slots, 4, 1),
        (tokens, slots[:4], 4, 1),
        (tokens, slots, 5, 1),
        (tokens, slots, 0, 1),
        (tokens, slots, 4, 0),
        (tokens, slots, 4, 2),
        (tokens, slots, 4, -1),
    ):
        with pytest.raises(Exception, match="write_kv: pages and values do not fit"):
            write(k, where, block_size=size, stacked=stacked)
    for where, stacked in ((slots[:4], 1), (slots, 0), (slots, -1), (slots, 6)):
        with pytest.raises(Exception, match="copy_blocks: pages and pairs do not fit"):
            call("copy_blocks", pages, pages, slots, where, layer, stacked=stacked)


def test_gradients_of_writes_equal_those_of_xla():
    pages = jnp.asarray(some_pages(2, 6, 2, 4, 8))
    tokens = jnp.asarray(some_pages(3, 2, 8, seed=1))
    weights = jnp.asarray(some_pages(2, 6, 2, 4, 8, seed=2))
    slots, layer = jnp.array([0, -1, 9], jnp.int32), jnp.int32(1)

    def loss(pages, tokens, name):
        options = dict(implementation=name)
        pools = write_kv(pages, pages, tokens, tokens, slots, layer=layer, **options)
        return jnp.sum(weights * (pools[0] ** 2 + pools[1]))

    gradients = [
        jax.grad(loss, argnums=(0, 1))(pages, tokens, name) for name in ("cpu", "xla")
    ]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
