"""Attention: every implementation against the float64 oracle, and exact page updates.

In all cases tables are shuffled, their unused entries are garbage, and every slot and
block that no sequence owns holds NaN (see `attention_oracle.make_case`).
"""

import dataclasses
import functools

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case, make_case, relative_errors

from jpaged import attention
from jpaged.attention import merge_states, paged_attention

# Those that run everywhere; `tpu_kernel_test` has the TPU's.
IMPLEMENTATIONS = ("reference", "xla")

# Of each query's and head's output vector, against the oracle on the stored values.
# float32 sums of up to 2048 products err by 1e-6; float16 rounds the softmax weights
# and the output by 2**-11 each, bfloat16 by 2**-8, and random errors add in quadrature.
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

# heads, head_dim, block_size, dtype, options; groups of 1 to 16 heads.
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


def lengths_around(block_size: int) -> list[int]:
    return [257, 0, 1, block_size - 1, block_size, block_size + 1, 2048, 3 * block_size]


def many_lengths(block_size: int) -> list[int]:
    """More rows than the product serves in one group, of mixed lengths."""
    return [*lengths_around(block_size)[:6], *range(0, 150, 8)]


def make_sinks(num_heads: int) -> np.ndarray:
    return np.linspace(-2.0, 3.0, num_heads).astype(np.float32)


def resolve(options: dict, num_heads: int) -> dict:
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = make_sinks(num_heads)
    return options


def on_device(case: Case) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, attention_oracle.arrays(case))


def run(case: Case, implementation: str, **options):
    if "sinks" in options:
        options["sinks"] = jnp.asarray(options["sinks"])
    return attend(
        **on_device(case), implementation=implementation, return_lse=True, **options
    )


def check(case: Case, implementation: str, **options) -> None:
    out, lse = run(case, implementation, **options)
    want_out, want_lse = attention_oracle.attention(case, **options)
    assert out.dtype == case.q.dtype
    assert lse.dtype == jnp.float32
    # `not <` and not `>`, which NaN would pass.
    worst = relative_errors(out, want_out).max()
    assert worst < TOLERANCES[case.q.dtype.name]
    np.testing.assert_allclose(lse, want_lse, atol=LSE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_oracle_at_every_length(name, implementation):
    heads, head_dim, block_size, dtype, options = SHAPES[name]
    case = make_case(
        lengths_around(block_size),
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    check(case, implementation, **resolve(options, heads[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_ragged_equals_the_oracle_on_chunks_decodes_and_empty_rows(
    name, implementation
):
    heads, head_dim, block_size, dtype, options = SHAPES[name]
    size = block_size
    #          decode, chunk after context, empty, fresh prompt, decode, empty, 1, chunk
    contexts = [257, 2 * size + 9, 0, size + 1, size, 40, 1, 70]
    queries = [1, 9, 0, size + 1, 1, 0, 1, 37]
    case = make_case(
        contexts,
        queries,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        num_padding=5,
    )
    check(case, implementation, **resolve(options, heads[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_rows_of_mixed_lengths_equal_the_oracle(implementation):
    check(make_case(many_lengths(16)), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 40])
def test_many_rows_that_share_their_first_blocks_equal_the_oracle(
    implementation, window
):
    case = make_case(many_lengths(16), shared_blocks=4, seed=1)
    check(case, implementation, sliding_window=window)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_decodes_beside_long_chunks_equal_the_oracle(implementation):
    contexts = [2048, 300, *range(1, 38, 2), 64, 0]
    queries = [5, 300, *[1] * 19, 64, 0]
    check(make_case(contexts, queries, heads=(2, 1), num_padding=1), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_queries_give_zeros_whatever_they_hold(implementation):
    case = make_case([20, 3], [4, 1], num_padding=6)
    case.q[5:] = np.nan
    out, lse = run(case, implementation)
    assert (np.asarray(out[5:]) == 0).all()
    assert np.isneginf(lse[5:]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [None, [0, 0, 0]])
def test_a_step_of_empty_rows_gives_zeros(queries, implementation):
    case = make_case([0, 0, 0], queries, num_padding=4)
    out, lse = run(case, implementation)
    assert (np.asarray(out) == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_a_stacked_pool_equals_that_layer_alone(implementation):
    case = make_case([5, 33, 0, 16], [1, 20, 0, 3])
    stacked = np.stack([np.full_like(case.k_pages, np.nan)] * 3)
    k_pages, v_pages = stacked, stacked.copy()
    k_pages[1], v_pages[1] = case.k_pages, case.v_pages
    arguments = on_device(case) | {
        "k_pages": jnp.asarray(k_pages),
        "v_pages": jnp.asarray(v_pages),
    }
    want, _ = run(case, implementation)
    for layer in (1, jnp.int32(1)):  # a Python number and a traced one
        got = jax.jit(functools.partial(paged_attention, implementation=implementation))
        np.testing.assert_array_equal(got(**arguments, layer=layer), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_of_decode_equals_a_loop(implementation):
    cases = [make_case([17, 0, 40], seed=seed) for seed in range(3)]
    batch = {
        name: jnp.stack([on_device(case)[name] for case in cases])
        for name in on_device(cases[0])
    }
    call = functools.partial(paged_attention, implementation=implementation)
    got = jax.jit(jax.vmap(lambda arguments: call(**arguments)))(batch)
    for row, case in zip(got, cases, strict=True):
        want, _ = attention_oracle.attention(case)
        assert relative_errors(row, want).max() < TOLERANCES["float32"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_queries_read_bfloat16_pages(implementation):
    case = make_case([40, 7], dtype="bfloat16")
    case = dataclasses.replace(case, q=case.q.astype(np.float32))
    out, _ = run(case, implementation)
    want, _ = attention_oracle.attention(case)
    assert out.dtype == jnp.float32
    assert relative_errors(out, want).max() < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_ladder_worked_by_hand(implementation):
    # One head of one number, blocks of two tokens, table [1, 0]: tokens 0, 1 in block
    # 1 and token 2 in block 0. Keys log 1, log 2, log 5; values 8, 4, 2; query 1.
    keys, values = np.log([5.0, 9.0, 1.0, 2.0]), [2.0, np.nan, 8.0, 4.0]
    case = Case(
        q=np.ones((1, 1, 1), np.float32),
        k_pages=np.array(keys, np.float32).reshape(2, 1, 2, 1),
        v_pages=np.array(values, np.float32).reshape(2, 1, 2, 1),
        block_tables=np.array([[1, 0]], np.int32),
        context_lens=np.zeros(1, np.int32),
    )

    def at(length, **options):
        step = dataclasses.replace(case, context_lens=np.array([length], np.int32))
        out, lse = run(step, implementation, **options)
        return [float(out[0, 0, 0]), float(np.exp(lse[0, 0]))]

    close = functools.partial(pytest.approx, rel=1e-5)
    assert at(0) == [0.0, 0.0]
    assert at(1) == close([8.0, 1.0])  # weights 1
    assert at(2) == close([16 / 3, 3.0])  # (1 * 8 + 2 * 4) / (1 + 2)
    assert at(3) == close([26 / 8, 8.0])  # (1 * 8 + 2 * 4 + 5 * 2) / (1 + 2 + 5)
    assert at(3, sliding_window=2) == close([18 / 7, 7.0])  # without the first
    assert at(3, sliding_window=1) == close([2.0, 5.0])
    # scale 2 squares the weights: (1 * 8 + 4 * 4 + 25 * 2) / (1 + 4 + 25)
    assert at(3, scale=2.0) == close([74 / 30, 30.0])
    # a sink of log 2 only adds to the denominator: 26 / (8 + 2)
    sink = np.log([2.0]).astype(np.float32)
    assert at(3, sinks=sink) == close([2.6, 10.0])
    assert at(0, sinks=sink) == [0.0, 0.0]
    # every score is about c * tanh(score / c) = c * tanh(huge): equal weights
    assert at(3, scale=1e6, logits_soft_cap=1e-3)[0] == close(14 / 3, rel=1e-3)


def half_masses(case: Case, cut: int) -> tuple[Case, Case]:
    """The first `cut` tokens of each row, and the rest, as two decode cases."""
    block_size = case.k_pages.shape[2]
    assert cut % block_size == 0
    head = np.minimum(case.context_lens, cut)
    tail = case.context_lens - head
    columns = cut // block_size
    return (
        dataclasses.replace(case, context_lens=head),
        dataclasses.replace(
            case, context_lens=tail, block_tables=case.block_tables[:, columns:]
        ),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_states_equal_attention_over_the_union(dtype, implementation):
    case = make_case([0, 5, 32, 33, 100], dtype=dtype)
    first, second = half_masses(case, 32)
    merged, lse = jax.jit(merge_states)(
        *run(first, implementation), *run(second, implementation)
    )
    want, want_lse = attention_oracle.attention(case)
    assert merged.dtype == case.q.dtype
    # The halves were rounded to bfloat16 before, hence twice.
    assert relative_errors(merged, want).max() < 2 * TOLERANCES[dtype]
    np.testing.assert_allclose(lse, want_lse, atol=LSE_TOLERANCE, rtol=0)


def one_key_less(case: Case) -> Case:
    return dataclasses.replace(case, context_lens=case.context_lens - 1)


def keys_for_values(case: Case) -> Case:
    return dataclasses.replace(case, v_pages=case.k_pages)


def one_wrong_block(case: Case) -> Case:
    tables = case.block_tables.copy()
    tables[:, 0] = np.roll(tables[:, 0], 1)
    return dataclasses.replace(case, block_tables=tables)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "fault", [one_key_less, keys_for_values, one_wrong_block, "no_scale"]
)
@pytest.mark.parametrize("queries", [None, [1, 20, 1, 9, 2]])
def test_a_planted_fault_breaks_the_tolerance(fault, dtype, queries):
    case = make_case([2048, 300, 17, 64, 33], queries, dtype=dtype)
    options = {"scale": 1.0} if fault == "no_scale" else {}
    faulty = case if fault == "no_scale" else fault(case)
    got, _ = run(faulty, "xla", **options)
    want, _ = attention_oracle.attention(case)
    # In every row, so no length of context hides it.
    errors = relative_errors(got, want).max(axis=-1)
    assert (errors > 2 * TOLERANCES[dtype])[: 5 if queries is None else 33].all()


def decode_arguments(context: int, width: int, num_rows: int = 4) -> dict:
    case = make_case([context] * num_rows, spare_columns=0)
    tables = np.full((num_rows, width), -1, np.int32)
    tables[:, : case.block_tables.shape[1]] = case.block_tables
    return on_device(dataclasses.replace(case, block_tables=tables))


def test_memory_of_decode_does_not_follow_the_tables_width():
    def temporaries(width: int) -> int:
        arguments = decode_arguments(16, width)
        lowered = attend.lower(**arguments, implementation="xla")
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # A temporary of one byte for each slot of a table would be 4 rows * 16 * width;
    # copies of the tables themselves, 4 rows * 4 bytes * width, are allowed twice.
    width = 4096
    assert temporaries(width) - temporaries(16) <= 2 * 4 * 4 * width + 4096


def products_run(monkeypatch, arguments: dict) -> int:
    """Matrix products that the compiled program executes, as it tells by callbacks."""
    count = 0
    einsum = jnp.einsum

    def increase():
        nonlocal count
        count += 1

    def counting(*args, **kwargs):
        jax.debug.callback(increase)
        return einsum(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(jnp, "einsum", counting)
        # A partial is another function to jax: what was compiled before is not used.
        call = jax.jit(functools.partial(paged_attention, implementation="xla"))
        jax.block_until_ready(call(**arguments))
        jax.effects_barrier()
    return count


def test_work_of_decode_follows_the_contexts_and_not_the_tables(monkeypatch):
    count = functools.partial(products_run, monkeypatch)
    short = count(decode_arguments(16, 8))
    assert short > 0
    assert count(decode_arguments(16, 512)) == short
    assert count(decode_arguments(2048, 512)) >= 8 * short


def test_work_of_ragged_follows_the_contexts_and_not_the_tables(monkeypatch):
    def count(context: int, width: int) -> int:
        arguments = decode_arguments(context, width, num_rows=2)
        arguments["q"] = jnp.ones((5, 4, 16), jnp.float32)
        arguments["query_start_loc"] = jnp.array([0, 1, 5], jnp.int32)
        return products_run(monkeypatch, arguments)

    short = count(16, 8)
    assert short > 0
    assert count(16, 512) == short
    assert count(2048, 512) >= 4 * short


# ---- write_kv, copy_blocks: bitwise


def some_pages(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(attention_oracle.DTYPES[dtype])


def assert_bitwise(got: jax.Array, want: np.ndarray) -> None:
    got = np.asarray(got)
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_write_kv_writes_exactly_the_named_slots(dtype, layer):
    shape = (6, 2, 4, 8) if layer is None else (3, 6, 2, 4, 8)
    k_pages, v_pages = (some_pages(*shape, seed=s, dtype=dtype) for s in (0, 1))
    k, v = (some_pages(7, 2, 8, seed=s, dtype=dtype) for s in (2, 3))
    k[0, 0, 0] = -0.0
    slots = [23, -1, 0, 5, -7, 24, 9]  # 24 is past the pool
    got = jax.jit(attention.write_kv, static_argnames="layer")(
        *map(jnp.asarray, (k_pages, v_pages, k, v)),
        jnp.array(slots, jnp.int32),
        layer=layer,
    )
    for pages, values, result in zip((k_pages, v_pages), (k, v), got, strict=True):
        one = pages if layer is None else pages[layer]
        for token, slot in enumerate(slots):
            if 0 <= slot < 24:
                for head in range(2):
                    one[slot // 4, head, slot % 4] = values[token, head]
        assert_bitwise(result, pages)


def test_write_kv_casts_to_the_pages():
    pages = jnp.zeros((2, 1, 2, 3), jnp.bfloat16)
    values = some_pages(1, 1, 3)
    written = jnp.asarray(values)
    k_pages, _ = attention.write_kv(
        pages, pages, written, written, jnp.array([3], jnp.int32)
    )
    assert_bitwise(k_pages[1, 0, 1], values[0, 0].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", [None, 1, "all"])
def test_copy_blocks_copies_exactly_the_named_blocks(dtype, layer):
    shape = (8, 2, 4, 6) if layer is None else (3, 8, 2, 4, 6)
    k_pages, v_pages = (some_pages(*shape, seed=s, dtype=dtype) for s in (0, 1))
    src, dst = [3, -1, 0, 3, 5, -1], [1, 2, 7, 6, -1, -1]
    got = jax.jit(attention.copy_blocks, static_argnames="layer")(
        jnp.asarray(k_pages),
        jnp.asarray(v_pages),
        jnp.array(src, jnp.int32),
        jnp.array(dst, jnp.int32),
        layer=None if layer == "all" else layer,
    )
    for pages, result in zip((k_pages, v_pages), got, strict=True):
        layers = pages if layer == "all" else [pages if layer is None else pages[layer]]
        for one in layers:
            for source, target in ((3, 1), (0, 7), (3, 6)):
                one[target] = one[source]
        assert_bitwise(result, pages)


# ---- arguments that do not fit together


def fitting() -> dict[str, jax.Array]:
    return on_device(make_case([5, 9]))


def integers(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


WRONG = {
    "implementation: expected None or one of": {"implementation": "cuda"},
    "k_scale: expected None beside pages of float32": {"k_scale": jnp.ones(1)},
    "v_scale: expected None beside pages of float32": {"v_scale": jnp.ones(1)},
    "shared_prefix: expected True, or what": {"shared_prefix": integers(1)},
    r"k_pages: expected rank 4 \[N, K, P, D\]": {"k_pages": jnp.ones((2, 2, 3, 4, 5))},
    r"k_pages: expected rank 5 .* with layer=": {"layer": 0},
    r"v_pages: expected float32\[.*\] like k_pages": {
        "v_pages": jnp.ones((1, 2, 3, 4))
    },
    "q: expected floating": {"q": integers(2, 4, 16)},
    "q: expected head_dim 16 as in k_pages, got 8": {"q": jnp.ones((2, 4, 8))},
    "q: expected a number of heads that is a multiple": {"q": jnp.ones((2, 3, 16))},
    "q: expected one query for each of the 2 rows": {"q": jnp.ones((3, 4, 16))},
    "block_tables: expected integers of rank 2": {"block_tables": integers(2)},
    r"context_lens: expected integers of rank 1, got float32\[2\]": {
        "context_lens": jnp.ones(2)
    },
    r"context_lens: expected shape \(2,\)": {"context_lens": integers(3)},
    r"query_start_loc: expected shape \(3,\), got \(2,\)": {
        "query_start_loc": integers(2)
    },
    r"sinks: expected shape \(4,\), got \(2,\)": {"sinks": jnp.ones(2)},
    "sliding_window: expected at least 1, got 0": {"sliding_window": 0},
    "logits_soft_cap: expected above 0, got 0": {"logits_soft_cap": 0.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_that_do_not_fit_raise_with_what_was_wanted_and_got(message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**(fitting() | WRONG[message]))


def test_page_updates_that_do_not_fit_raise():
    pages, k, slots = jnp.zeros((3, 2, 4, 8)), jnp.zeros((5, 2, 8)), integers(5)
    with pytest.raises(ValueError, match=r"v: expected shape \(5, 2, 8\)"):
        attention.write_kv(pages, pages, k, k[:, :1], slots)
    with pytest.raises(ValueError, match=r"k: expected shape \(4, 2, 8\)"):
        attention.write_kv(pages, pages, k, k, slots[:4])
    with pytest.raises(ValueError, match="slot_mapping: expected integers of rank 1"):
        attention.write_kv(pages, pages, k, k, jnp.zeros(5))
    with pytest.raises(ValueError, match="k_pages: expected rank 5"):
        attention.write_kv(pages, pages, k, k, slots, layer=0)
    with pytest.raises(ValueError, match=r"dst: expected shape \(5,\) like src"):
        attention.copy_blocks(pages, pages, slots, slots[:2])
    with pytest.raises(ValueError, match="src: expected integers"):
        attention.copy_blocks(pages, pages, jnp.zeros(5), slots)
    with pytest.raises(ValueError, match="k_pages: expected rank 5"):
        attention.copy_blocks(pages, pages, slots, slots, layer=1)
