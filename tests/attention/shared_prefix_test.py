"""Shared prefixes: groups found in block tables, and attention that reads them once.

The tables are those of random trees: rows share their first blocks with other rows.
Groups are compared with sets built in Python, attention with the float64 oracle.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.attention import paged_attention
from jpaged.kv import shared_prefix
from jpaged.kv.shared_prefix import (
    SharedPrefix,
    find_shared_prefix,
    num_tokens_read,
    sharing_threshold,
)
from jpaged.pages.operands import AttentionOperands, Pools
from jpaged.xla import cascade, online_softmax
from tests.support.attention import oracle
from tests.support.attention.oracle import Case, relative_errors
from tests.support.attention.prefix_cases import filled_case

pytestmark = pytest.mark.long

BLOCK_SIZE = 8
# As in `attention_test`.
TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-3}
EVERYTHING = dict(min_prefix_tokens=1, min_saved_tokens=1)
WIDTH = 14


def tree_case(seed: int, *, num_rows: int = 12, dtype: str = "float32", queries=None):
    """Return rows that share some first blocks with an earlier row, then differ."""
    rng = np.random.default_rng(seed)
    blocks = iter(rng.permutation(num_rows * WIDTH).tolist())
    own: list[list[int]] = []
    lens = []
    for row in range(num_rows):
        num_blocks = int(rng.integers(0, WIDTH))
        start: list[int] = []
        if row and rng.random() < 0.8:
            other = own[int(rng.integers(0, row))]
            start = other[: int(rng.integers(0, len(other) + 1))][:num_blocks]
        own.append(start + [next(blocks) for _ in range(num_blocks - len(start))])
        # A shared last block is full, or written by its last owner alone.
        spare = int(rng.integers(0, BLOCK_SIZE))
        lens.append(max(0, num_blocks * BLOCK_SIZE - spare))
    return filled_case(
        own,
        lens,
        rng=rng,
        width=WIDTH,
        num_blocks=num_rows * WIDTH,
        queries=queries,
        heads=(4, 2),
        head_dim=8,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )


def on_device(case: Case) -> dict[str, jax.Array]:
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return {k: jnp.asarray(v) for k, v in fields.items() if v is not None}


@functools.partial(jax.jit, static_argnames=("min_prefix_tokens", "min_saved_tokens"))
def groups_of(block_tables, context_lens, **least):
    return find_shared_prefix(block_tables, context_lens, BLOCK_SIZE, **least)


def groups(case: Case, **least) -> SharedPrefix:
    tables, lens = jnp.asarray(case.block_tables), jnp.asarray(case.context_lens)
    return groups_of(tables, lens, **(EVERYTHING | least))


def common_blocks(case: Case, one: int, other: int) -> int:
    """Return the leading blocks that two rows share, without those of last tokens."""
    most = min(
        max(int(case.context_lens[r]) - 1, 0) // BLOCK_SIZE for r in (one, other)
    )
    pairs = itertools.takewhile(
        lambda column: (
            case.block_tables[one, column] == case.block_tables[other, column]
        ),
        range(most),
    )
    return len(list(pairs))


def expected_groups(case: Case) -> dict[frozenset[int], int]:
    """Return groups by the rule: each row chooses the prefix that saves most reads."""
    num_rows = len(case.context_lens)
    choices: dict[int, tuple[int, ...]] = {}
    for row in range(num_rows):
        most = max(int(case.context_lens[row]) - 1, 0) // BLOCK_SIZE
        best = (0, 0)
        for depth in range(1, most + 1):
            others = sum(
                common_blocks(case, row, other) >= depth
                for other in range(num_rows)
                if other != row
            )
            # Of equal products the longer prefix, which has fewer rows.
            best = max(best, (others * depth, depth))
        if best[0]:
            choices[row] = tuple(case.block_tables[row, : best[1]].tolist())
    found: dict[tuple[int, ...], set[int]] = {}
    for row, prefix in choices.items():
        found.setdefault(prefix, set()).add(row)
    return {frozenset(s): len(b) for b, s in found.items() if len(s) > 1}


@pytest.mark.parametrize("seed", range(8))
def test_groups_of_random_trees_follow_the_rule(seed):
    case = tree_case(seed)
    found = groups(case)
    leaders, depths = (
        np.asarray(x).tolist() for x in (found.leaders, found.num_blocks)
    )
    members: dict[int, set[int]] = {}
    for row, leader in enumerate(leaders):
        if depths[row]:
            members.setdefault(leader, set()).add(row)
        else:
            assert leader == row
    got = {frozenset(rows): depths[leader] for leader, rows in members.items()}
    assert got == expected_groups(case)
    total, read = num_tokens_read(found, jnp.asarray(case.context_lens), BLOCK_SIZE)
    assert int(total) == case.context_lens.sum()
    saved = sum((len(rows) - 1) * depth for rows, depth in got.items()) * BLOCK_SIZE
    assert int(total) - int(read) == saved


def test_small_groups_and_short_prefixes_are_ignored():
    case = tree_case(3, num_rows=16)
    expected = expected_groups(case)
    assert expected
    tokens, saved = 2 * BLOCK_SIZE, 4 * BLOCK_SIZE
    found = groups(case, min_prefix_tokens=tokens, min_saved_tokens=saved)
    kept = {
        row
        for members, depth in expected.items()
        for row in members
        if depth * BLOCK_SIZE >= tokens
        and (len(members) - 1) * depth * BLOCK_SIZE >= saved
    }
    assert set(np.flatnonzero(found.num_blocks).tolist()) == kept


def test_thresholds_depend_on_the_device(monkeypatch):
    assert sharing_threshold("cpu").measured
    assert sharing_threshold("TPU v5 lite").device == "TPU"
    for kind in ("NVIDIA H200", "TPU v6 lite", "something else"):
        # Thresholds from arithmetic are higher than the measured one.
        assert sharing_threshold(kind).saved > sharing_threshold("cpu").saved
        assert not sharing_threshold(kind).measured
    tables = jnp.tile(jnp.arange(300, dtype=jnp.int32), (3, 1))
    lens = jnp.full(3, 300 * BLOCK_SIZE, jnp.int32)
    assert find_shared_prefix(tables, lens, BLOCK_SIZE).num_blocks.tolist() == [299] * 3
    # 4784 tokens would be saved.
    monkeypatch.setattr(
        shared_prefix,
        "SHARING_THRESHOLDS",
        [sharing_threshold("TPU v5 lite")._replace(device="")],
    )
    assert find_shared_prefix(tables, lens, BLOCK_SIZE).num_blocks.tolist() == [0] * 3


attend = jax.jit(
    paged_attention, static_argnames=("sliding_window", "logits_soft_cap", "return_lse")
)


def errors(case: Case, shared, **options) -> float:
    call = options | {
        name: jnp.asarray(value) for name, value in options.items() if name == "sinks"
    }
    out, lse = attend(**on_device(case), shared_prefix=shared, return_lse=True, **call)
    expected, expected_lse = oracle.attention(case, **options)
    assert out.dtype == case.q.dtype
    finite = ~np.isneginf(expected_lse)
    assert (np.isneginf(np.asarray(lse)) == ~finite).all()
    np.testing.assert_allclose(np.asarray(lse)[finite], expected_lse[finite], atol=1e-4)
    return relative_errors(out, expected).max()


SINKS = np.linspace(-2, 3, 4).astype(np.float32)
OPTIONS = [{}, {"sliding_window": 40}, {"sinks": SINKS, "logits_soft_cap": 2.0}]
CHUNKS = [1, 1, 5, 1, 1, 1, 20, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "sinks and cap"])
@pytest.mark.parametrize("queries", [None, CHUNKS], ids=["decode", "chunks"])
def test_random_trees_equal_the_oracle(queries, options):
    shared_rows = 0
    for seed in range(3):
        case = tree_case(seed, queries=queries)
        shared = groups(case)
        shared_rows += int((np.asarray(shared.num_blocks) > 0).sum())
        assert errors(case, shared, **options) < TOLERANCES["float32"]
    assert shared_rows > 9


def test_more_rows_than_a_tile_equal_the_oracle():
    case = tree_case(1, num_rows=40)
    assert errors(case, groups(case)) < TOLERANCES["float32"]


def test_bfloat16_errors_are_those_of_plain_attention():
    case = tree_case(1, num_rows=40, dtype="bfloat16")
    # Both round weights and outputs by 2**-9 in the same places.
    assert errors(case, groups(case)) < 1.25 * errors(case, None)


def test_layers_groups_found_by_attention_and_no_groups_give_the_same_output():
    case = tree_case(2)
    arguments = on_device(case)
    expected = attend(**arguments)
    for flag in (True, False):
        got = jax.jit(functools.partial(paged_attention, shared_prefix=flag))
        np.testing.assert_allclose(got(**arguments), expected, atol=1e-5)
    for shared in (groups(case), groups(case, min_saved_tokens=10**6)):
        got = attend(**arguments, shared_prefix=shared)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for name in ("k_pages", "v_pages"):
        arguments[name] = jnp.stack([arguments[name] * 0, arguments[name]])
    got = attend(**arguments, shared_prefix=groups(case), layer=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def one_block_too_many(shared: SharedPrefix) -> SharedPrefix:
    more = jnp.where(shared.num_blocks > 0, shared.num_blocks + 1, 0)
    return dataclasses.replace(shared, num_blocks=more)


def wrong_leaders(shared: SharedPrefix) -> SharedPrefix:
    return dataclasses.replace(shared, leaders=jnp.roll(shared.leaders, 1))


def same_group_twice(merge, out_a, lse_a, out_b, lse_b):
    return merge(*merge(out_a, lse_a, out_b, lse_b), out_b, lse_b)


def test_planted_faults_break_the_tolerance(monkeypatch):
    case = tree_case(1, num_rows=16)
    shared = groups(case)
    expected, _ = oracle.attention(case)

    def worst(shared) -> float:
        options = dict(shared_prefix=shared, implementation="xla")
        call = jax.jit(functools.partial(paged_attention, **options))
        return relative_errors(call(**on_device(case)), expected).max()

    assert worst(shared) < TOLERANCES["float32"]
    for fault in (one_block_too_many, wrong_leaders):
        assert not worst(fault(shared)) < 2 * TOLERANCES["bfloat16"]
    from jpaged.xla import attention as xla_attention

    fault = functools.partial(same_group_twice, online_softmax.merge_states)
    monkeypatch.setattr(xla_attention, "merge_states", fault)
    assert not worst(shared) < 2 * TOLERANCES["bfloat16"]


def test_a_prefix_is_read_once_for_all_rows_of_a_tile(monkeypatch):
    """Callbacks in the program count the blocks that 16 rows gather."""
    count = 0
    gather = online_softmax.pages.gather

    def counting(pools, columns):
        def add():
            nonlocal count
            count += columns.size

        jax.debug.callback(add)
        return gather(pools, columns)

    monkeypatch.setattr(online_softmax.pages, "gather", counting)
    tables = np.tile(np.arange(64, dtype=np.int32), (16, 1))
    tables[:, 63] = np.arange(100, 116)
    pages = jnp.ones((120, 1, BLOCK_SIZE, 8))
    q, lens = jnp.ones((16, 1, 8)), jnp.full(16, 64 * BLOCK_SIZE, jnp.int32)
    read = []
    for shared in (None, groups_of(jnp.asarray(tables), lens, **EVERYTHING)):
        count = 0
        options = dict(shared_prefix=shared, implementation="xla")
        call = jax.jit(functools.partial(paged_attention, **options))
        jax.block_until_ready(call(q, pages, pages, jnp.asarray(tables), lens))
        jax.effects_barrier()
        read.append(count)
    # 64 blocks of each row, against 63 shared blocks and at most a tile of 8 per row.
    assert read[0] >= 16 * 64
    assert read[1] <= 64 + 16 * 8


def test_gradients_are_the_same_with_and_without_groups():
    case = tree_case(4)
    fixed = on_device(case)
    arrays = {name: fixed.pop(name) for name in ("q", "k_pages", "v_pages")}

    def loss(arrays, shared):
        out = paged_attention(**arrays, **fixed, shared_prefix=shared)
        return jnp.sum(out**2)

    gradient = jax.jit(jax.grad(loss))
    expected, got = gradient(arrays, None), gradient(arrays, groups(case))
    for name in arrays:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-4)


def test_invalid_groups_raise_an_error():
    case = tree_case(0)
    arguments = on_device(case)
    few = SharedPrefix(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32))
    for wrong in (few, jnp.zeros(12, jnp.int32), 3):
        with pytest.raises(ValueError, match="shared_prefix: expected True, or the"):
            paged_attention(**arguments, shared_prefix=wrong)


def test_rows_whose_window_begins_inside_the_prefix_read_alone():
    shared = SharedPrefix(jnp.zeros(3, jnp.int32), jnp.full(3, 2, jnp.int32))
    lens = jnp.array([20, 40, 30], jnp.int32)
    tables = jnp.tile(jnp.arange(5, dtype=jnp.int32), (3, 1))
    pages = jnp.zeros((5, 1, BLOCK_SIZE, 1))
    operands = AttentionOperands(
        jnp.zeros((3, 1, 1)),
        Pools(pages, pages),
        tables,
        lens,
        sliding_window=32,
        shared_prefix=shared,
    )
    parts = cascade.split_prefixes(operands)
    assert parts.own_lens.tolist() == [4, 40, 14]
    assert parts.sizes.tolist() == [2, 0, 0]
    assert parts.own_tables[:, 0].tolist() == [2, 0, 2]
