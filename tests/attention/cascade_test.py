"""Cascade attention: which blocks each row reads, and the same output.

The attention inside is the reference here; the kernels' own tests have the same cases.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.arithmetic import cdiv
from jpaged.attention import cascade
from jpaged.attention.cascade import make_cascade_plan, num_members
from jpaged.attention.reference import REFERENCE
from jpaged.kv.shared_prefix import SharedPrefix
from jpaged.pages.backend import CascadeOptions
from jpaged.pages.operands import AttentionOperands, Pools
from tests.support.attention import oracle
from tests.support.attention.oracle import check_result, relative_errors
from tests.support.attention.prefix_cases import GROUPS, OWN_TOKENS, QUERIES, group_case

# As in `attention_test`.
TOLERANCE, LSE_TOLERANCE = 1e-5, 1e-4
BLOCK_SIZE = 4


def some_groups(rng: np.random.Generator, num_rows: int):
    """Return leaders, shared blocks, queries and lengths of rows in random groups."""
    group = rng.integers(0, rng.integers(1, num_rows + 1), num_rows)
    leaders = np.array([np.flatnonzero(group == one)[0] for one in group])
    blocks = rng.integers(0, 4, num_rows)[leaders]
    queries = rng.choice([0, 1, 1, 1, 1, 3], num_rows)
    own = rng.integers(1, 9, num_rows)
    return leaders, blocks, queries, blocks * BLOCK_SIZE + own


@functools.partial(jax.jit, static_argnames="num_members")
def plan_of(shared, tables, lens, starts, num_members):
    pages = jnp.zeros((1, 1, BLOCK_SIZE, 1))
    operands = AttentionOperands(
        jnp.zeros((1, 1, 1)),
        Pools(pages, pages),
        tables,
        lens,
        starts,
        sliding_window=14,
        shared_prefix=shared,
    )
    return make_cascade_plan(operands, num_members=num_members)


@pytest.mark.parametrize("num_rows", [2, 3, 7, 16])
def test_every_row_reads_each_of_its_blocks_once_in_a_virtual_row_or_alone(num_rows):
    rng = np.random.default_rng(num_rows)
    together = 0
    for _ in range(12):
        leaders, blocks, queries, lens = some_groups(rng, num_rows)
        tables = np.arange(num_rows * 8).reshape(num_rows, 8)
        starts = np.cumsum([0, *queries])
        size = min(int(rng.integers(2, 6)), num_rows)
        arrays = (
            jnp.asarray(x, jnp.int32) for x in (leaders, blocks, tables, lens, starts)
        )
        one, two, *rest = arrays
        plan = jax.tree.map(
            np.asarray,
            plan_of(
                SharedPrefix(one, two),
                *rest,
                num_members=size,
            ),
        )
        joins = (blocks > 0) & (queries == 1) & (lens <= 14)
        joins &= np.array([(joins & (leaders == one)).sum() > 1 for one in leaders])
        together += int(joins.sum())
        indices = plan.member_index[joins].tolist()
        assert len(set(indices)) == len(indices)
        assert (plan.member_index[~joins] == plan.members.size).all()
        used = {index // size for index in indices}
        # As few as possible: each group's rows divided by R, rounded up.
        counts = [int((joins & (leaders == one)).sum()) for one in set(leaders)]
        assert len(used) == sum(cdiv(n, size) for n in counts)
        assert (
            plan.lens[[v for v in range(len(plan.lens)) if v not in used]] == 0
        ).all()
        for row in range(num_rows):
            read = blocks[row] if joins[row] else 0
            assert plan.own_lens[row] == lens[row] - read * BLOCK_SIZE
            assert plan.own_tables[row, 0] == tables[row, read]
            if not joins[row]:
                continue
            virtual, slot = divmod(plan.member_index[row], size)
            assert plan.members[virtual, slot] == row
            assert plan.lens[virtual] == read * BLOCK_SIZE
            reader = plan.tables[virtual, 0] // 8
            assert joins[reader]
            assert leaders[reader] == leaders[row]
    assert together > 0


def test_number_of_rows_that_fill_a_tile():
    assert num_members(32, 8, 100) == 16
    assert num_members(32, 8, 5) == 5
    assert num_members(64, 2, 100) == 2
    assert num_members(71, 1, 100) == 0


def attend(case, shared, *, seen=None, **options):
    """Cascade attention around the reference; `seen` gets the lengths of its calls."""

    def plain(operands, **more):
        if seen is not None:
            lens = operands.context_lens
            jax.debug.callback(lambda lens: seen.append(lens.tolist()), lens)
        return REFERENCE.attend(operands, **more)

    arrays = jax.tree.map(jnp.asarray, oracle.arrays(case))
    pools = Pools(arrays.pop("k_pages"), arrays.pop("v_pages"))
    scale = case.q.shape[-1] ** -0.5
    operands = AttentionOperands(
        pools=pools, shared_prefix=shared, scale=scale, **arrays, **options
    )
    options = CascadeOptions(branches=True)
    found = jax.jit(lambda operands: cascade.attend(plain, operands, options))(operands)
    jax.effects_barrier()
    return found


SINKS = np.linspace(-2.0, 3.0, 4).astype(np.float32)
OPTIONS = {
    "plain": {},
    "everything": dict(sliding_window=50, logits_soft_cap=2.0, sinks=SINKS),
}
small_case = functools.partial(group_case, GROUPS, OWN_TOKENS, head_dim=8)


@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "chunks"])
@pytest.mark.parametrize("name", OPTIONS)
def test_groups_of_any_size_equal_the_oracle(name, queries, monkeypatch):
    monkeypatch.setattr(cascade, "TILE_ROWS", 6)  # three members with two heads each
    case, shared = small_case(queries=queries)
    options = OPTIONS[name]
    device = {k: jnp.asarray(v) if k == "sinks" else v for k, v in options.items()}
    out, lse = attend(case, shared, **device)
    check_result(case, out, lse, TOLERANCE, LSE_TOLERANCE, **options)


def test_shared_blocks_are_read_once_and_unshared_steps_read_no_prefix():
    case, shared = small_case()
    seen = []
    attend(case, shared, seen=seen)
    # Prefixes of 32 tokens (two rows), 16 (five) and 48 (seven), then unused rows.
    expected = [32, 16, 48, *[0] * 5]
    assert sorted(seen, key=len) == [expected, OWN_TOKENS]
    unshared = dataclasses.replace(shared, num_blocks=shared.num_blocks * 0)
    seen = []
    attend(case, unshared, seen=seen)
    assert seen == [case.context_lens.tolist()]


def test_rows_read_alone_if_one_row_fills_a_tile(monkeypatch):
    monkeypatch.setattr(cascade, "TILE_ROWS", 3)
    case, shared = small_case()
    seen = []
    out, lse = attend(case, shared, seen=seen)
    assert seen == [case.context_lens.tolist()]
    check_result(case, out, lse, TOLERANCE, LSE_TOLERANCE)


def next_member(plan):
    index = jnp.minimum(plan.member_index + 1, plan.members.size)
    return plan._replace(member_index=index)


def prefix_twice(plan):
    return plan._replace(own_lens=plan.own_lens + 1)


def other_tables(plan):
    return plan._replace(tables=jnp.roll(plan.tables, 1, axis=0))


@pytest.mark.parametrize("fault", [next_member, prefix_twice, other_tables])
def test_a_planted_fault_breaks_the_tolerance(fault, monkeypatch):
    case, shared = small_case()
    make = cascade.make_cascade_plan
    monkeypatch.setattr(
        cascade, "make_cascade_plan", lambda *a, **k: fault(make(*a, **k))
    )
    out, _ = attend(case, shared)
    expected, _ = oracle.attention(case)
    assert not (relative_errors(out, expected) < 1e-2).all()
