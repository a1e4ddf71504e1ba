"""Cases of attention and of page updates, and their checks, for any backend.

`attention_test` runs them on CPUs, `gpu_test` on a real GPU. In all cases tables are
shuffled, their unused entries are garbage, and every slot and block that no sequence
owns holds NaN (see `oracle.make_case`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import attention
from jpaged.attention import paged_attention
from tests.support.attention import oracle
from tests.support.attention.oracle import Case, make_case, relative_errors

# Relative error of each query's and head's output vector, against the oracle on the
# stored values. float32 sums of up to 2048 products err by 1e-6; float16 rounds the
# softmax weights and the output by 2**-11 each, bfloat16 by 2**-8, and random errors
# add in quadrature.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
# Log-sum-exps are float32 sums over exact products of the stored values, of size 10.
LSE_TOLERANCE = 1e-4
STATIC = (
    "scale",
    "sliding_window",
    "logits_soft_cap",
    "return_lse",
    "implementation",
)
attend = jax.jit(paged_attention, static_argnames=STATIC)

# (heads, kv heads), head_dim, block_size, dtype, options; groups of 1 to 16 heads.
SHAPES = {
    "one_group": ((8, 8), 64, 16, "float32", {}),
    "groups_of_4": ((32, 8), 128, 16, "bfloat16", {}),
    "groups_of_7": ((28, 4), 128, 64, "float16", {}),
    "tokens_as_blocks": ((14, 2), 64, 1, "float32", {"sliding_window": 1}),
    "groups_of_16": ((16, 1), 17, 16, "float32", {"logits_soft_cap": 5.0}),
    "window_of_a_block": ((4, 4), 80, 64, "float32", {"sliding_window": 64}),
    "window_300": ((14, 2), 64, 16, "float16", {"sliding_window": 300}),
    "sinks": ((8, 2), 33, 16, "float32", {"sinks": True}),
    "scaled": ((8, 2), 64, 3, "float32", {"scale": 0.31}),
    "everything": (
        (14, 2),
        128,
        16,
        "bfloat16",
        dict(sinks=True, sliding_window=300, logits_soft_cap=2.0, scale=0.2),
    ),
}
# Shapes that both GPU kernels support, and heads of 256, for `gpu_test`.
GPU_SHAPES = SHAPES | {
    "one_group_64": ((8, 8), 64, 32, "bfloat16", {}),
    "groups_of_4_blocks_of_128": ((32, 8), 128, 128, "bfloat16", {}),
    "groups_of_7_window_of_1": ((28, 4), 128, 32, "bfloat16", {"sliding_window": 1}),
    "groups_of_16_float16": ((16, 1), 64, 64, "float16", {"logits_soft_cap": 5.0}),
    "heads_of_256": ((8, 4), 256, 16, "bfloat16", {"sliding_window": 64}),
}


def lengths_around(block_size: int) -> list[int]:
    return [257, 0, 1, block_size - 1, block_size, block_size + 1, 2048, 3 * block_size]


def many_lengths(block_size: int) -> list[int]:
    """Return mixed lengths of more rows than one group of a product has."""
    return [*lengths_around(block_size)[:6], *range(0, 150, 8)]


def make_sinks(num_heads: int) -> np.ndarray:
    return np.linspace(-2.0, 3.0, num_heads).astype(np.float32)


def resolve(options: dict, num_heads: int) -> dict:
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = make_sinks(num_heads)
    return options


def on_device(case: Case) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, oracle.arrays(case))


def run(case: Case, implementation: str, **options):
    if "sinks" in options:
        options["sinks"] = jnp.asarray(options["sinks"])
    return attend(
        **on_device(case), implementation=implementation, return_lse=True, **options
    )


def check(case: Case, implementation: str, **options) -> None:
    out, lse = run(case, implementation, **options)
    expected_out, expected_lse = oracle.attention(case, **options)
    assert out.dtype == case.q.dtype
    assert lse.dtype == jnp.float32
    # An error that is NaN fails `<`.
    worst = relative_errors(out, expected_out).max()
    assert worst < TOLERANCES[case.q.dtype.name]
    np.testing.assert_allclose(lse, expected_lse, atol=LSE_TOLERANCE, rtol=0)


def case_of(name: str, contexts: list[int], queries=None, **more) -> tuple[Case, dict]:
    """Return a case of the named shape, and its options."""
    heads, head_dim, block_size, dtype, options = GPU_SHAPES[name]
    sizes = dict(heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    return make_case(contexts, queries, **sizes, **more), resolve(options, heads[0])


def decode_case(name: str) -> tuple[Case, dict]:
    return case_of(name, lengths_around(GPU_SHAPES[name][2]))


def ragged_case(name: str) -> tuple[Case, dict]:
    size = GPU_SHAPES[name][2]
    # Decode row, chunk after context, empty row, whole prompt, decode row, row without
    # queries, decode row, chunk.
    contexts = [257, 2 * size + 9, 0, size + 1, size, 40, 1, 70]
    queries = [1, 9, 0, size + 1, 1, 0, 1, 37]
    return case_of(name, contexts, queries, num_padding=5)


def one_key_less(case: Case) -> Case:
    return dataclasses.replace(case, context_lens=case.context_lens - 1)


def keys_for_values(case: Case) -> Case:
    return dataclasses.replace(case, v_pages=case.k_pages)


def one_wrong_block(case: Case) -> Case:
    tables = case.block_tables.copy()
    tables[:, 0] = np.roll(tables[:, 0], 1)
    return dataclasses.replace(case, block_tables=tables)


FAULTS = (one_key_less, keys_for_values, one_wrong_block, "no_scale")


def check_fault(case: Case, fault, implementation: str, rows: int) -> None:
    """Check that a fault shows in each of the first rows of q, at every context."""
    options = {"scale": 1.0} if fault == "no_scale" else {}
    faulty = case if fault == "no_scale" else fault(case)
    got, _ = run(faulty, implementation, **options)
    expected, _ = oracle.attention(case)
    errors = relative_errors(got, expected).max(axis=-1)
    assert (errors > 2 * TOLERANCES[case.q.dtype.name])[:rows].all()


# ---- write_kv and copy_blocks, compared bit by bit


def some_pages(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(oracle.DTYPES[dtype])


def assert_bitwise(got: jax.Array, expected: np.ndarray) -> None:
    got = np.asarray(got)
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()


def check_writes(dtype: str, layer: int | None, implementation: str | None) -> None:
    """Check that `write_kv` writes exactly the named slots."""
    shape = (6, 2, 4, 16) if layer is None else (3, 6, 2, 4, 16)
    k_pages, v_pages = (some_pages(*shape, seed=s, dtype=dtype) for s in (0, 1))
    k, v = (some_pages(7, 2, 16, seed=s, dtype=dtype) for s in (2, 3))
    k[0, 0, 0] = -0.0
    slots = [23, -1, 0, 5, -7, 24, 9]  # 24 is past the pool
    call = jax.jit(attention.write_kv, static_argnames=("layer", "implementation"))
    got = call(
        *map(jnp.asarray, (k_pages, v_pages, k, v)),
        jnp.array(slots, jnp.int32),
        layer=layer,
        implementation=implementation,
    )
    for pages, values, result in zip((k_pages, v_pages), (k, v), got, strict=True):
        one = pages if layer is None else pages[layer]
        for token, slot in enumerate(slots):
            if 0 <= slot < 24:
                for head in range(2):
                    one[slot // 4, head, slot % 4] = values[token, head]
        assert_bitwise(result, pages)


def check_copies(
    dtype: str, layer: int | str | None, implementation: str | None
) -> None:
    """Check that `copy_blocks` copies exactly the named blocks, or in "all" layers."""
    shape = (8, 2, 4, 16) if layer is None else (3, 8, 2, 4, 16)
    k_pages, v_pages = (some_pages(*shape, seed=s, dtype=dtype) for s in (0, 1))
    src, dst = [3, -1, 0, 3, 5, -1], [1, 2, 7, 6, -1, -1]
    call = jax.jit(attention.copy_blocks, static_argnames=("layer", "implementation"))
    got = call(
        *map(jnp.asarray, (k_pages, v_pages)),
        *(jnp.array(pairs, jnp.int32) for pairs in (src, dst)),
        layer=None if layer == "all" else layer,
        implementation=implementation,
    )
    for pages, result in zip((k_pages, v_pages), got, strict=True):
        layers = pages if layer == "all" else [pages if layer is None else pages[layer]]
        for one in layers:
            for source, target in ((3, 1), (0, 7), (3, 6)):
                one[target] = one[source]
        assert_bitwise(result, pages)


def check_in_place(implementation: str | None, dtype: str = "bfloat16") -> None:
    """Check that writes and copies update donated pools in their own memory."""
    shape, numbers = (2, 256, 2, 16, 64), jnp.arange(8, dtype=jnp.int32)
    k = jnp.ones((8, *shape[2:3], shape[4]), dtype)
    calls = {
        "write_kv": (attention.write_kv, (k, k, 3 * numbers)),
        "copy_blocks": (attention.copy_blocks, (numbers, numbers + 8)),
    }
    for name, (call, rest) in calls.items():
        pools = [jnp.zeros(shape, dtype) for _ in range(2)]
        addresses = {pool.unsafe_buffer_pointer() for pool in pools}
        call = functools.partial(call, layer=1, implementation=implementation)
        compiled = jax.jit(call, donate_argnums=(0, 1)).lower(*pools, *rest).compile()
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < pools[0].nbytes // 8, name
        after = compiled(*pools, *rest)
        assert {pool.unsafe_buffer_pointer() for pool in after} == addresses, name
