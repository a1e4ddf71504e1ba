"""Parts of retention, each against a slow version in Python or NumPy."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpaged
from jpaged import block_manager, engine, retention
from jpaged.config import EngineConfig, Speculation
from jpaged.kv import prefix_cache
from jpaged.kv.drops import drop_blocks, init_drops
from jpaged.kv.prefix_table import NOT_CACHED
from jpaged.pages.operands import AttentionOperands, Pools
from jpaged.retention.method import example_row
from jpaged.xla import block_statistics
from tests.support import retention_model as model


def example(**parameters):
    method = retention.random(**parameters)
    return example_row(method)


def test_the_highest_blocks_stay_and_the_last_one_is_always_among_them():
    row = example(max_tokens=12)  # 3 blocks of 4, out of 6
    scores = jnp.array([2.0, jnp.nan, 5.0, 2.0, -jnp.inf, 0.0, 9.0, 9.0])
    keeps = retention.keep_highest(scores, row)
    assert np.flatnonzero(keeps).tolist() == [2, 3, 5]  # of equal ones the later
    row = example(max_tokens=3)
    assert np.flatnonzero(retention.keep_highest(scores, row)).tolist() == [5]
    row = example(max_tokens=64)
    assert np.flatnonzero(retention.keep_highest(scores, row))[:6].tolist() == [
        *range(6)
    ]


def test_decision_points_are_those_of_the_slow_version():
    settings = [(0, 0), (1, 0), (5, 0), (16, 3), (0, 4), (-1, 3)]
    method = retention.random()
    for every, prompt_every in settings:
        values = np.array(method.values())
        values[method.names.index("every")] = every
        values[method.names.index("prompt_every")] = prompt_every
        for prompt_len in (1, 7, 12):
            expected = [
                c
                for c in range(1, 40)
                if every >= 0 and model.is_decision(c, prompt_len, every, prompt_every)
            ]
            computed = jnp.arange(40)
            rows = jnp.broadcast_to(jnp.asarray(values), (40, values.size))
            lens = jnp.full((40,), prompt_len)
            found = retention.is_decision(method, rows, lens, computed)
            assert np.flatnonzero(found).tolist() == expected
            after = retention.next_decision(method, rows, lens, computed)
            for c in range(30):
                later = [point for point in expected if point > c]
                want = later[0] if later else retention.NEVER
                assert later == [] or int(after[c]) == want
                assert later != [] or int(after[c]) >= 40


def test_dropped_blocks_lose_one_reference_and_gaps_are_closed():
    rng = np.random.default_rng(0)
    state = block_manager.init_state(
        num_blocks=40, block_size=3, max_seqs=4, max_blocks_per_seq=8
    )
    state = dataclasses.replace(state, drops=init_drops(4, 8, True))
    append, fork = jax.jit(block_manager.append), jax.jit(block_manager.fork)
    state, _ = append(state, jnp.array([14, 6, 0, 0]))
    state = fork(state, jnp.array([0, 1, 0, 0]))  # three rows share blocks
    for _ in range(6):
        state, appended = append(state, jnp.asarray(rng.integers(0, 3, size=4)))
        assert bool(appended.ok)
        statistic = jnp.asarray(rng.random((4, 8)), jnp.float32)
        drops = dataclasses.replace(state.drops, statistic=statistic)
        state = dataclasses.replace(state, drops=drops)
        lens = np.asarray(state.context_lens)
        tables = [
            [block for block in row if block >= 0]
            for row in np.asarray(state.block_tables).tolist()
        ]
        keeps = rng.random((4, 8)) < 0.7
        for row, table in enumerate(tables):
            keeps[row, len(table) - 1] = True
        after = jax.jit(drop_blocks)(state, jnp.asarray(keeps))
        assert block_manager.violations(after) == []
        for row, table in enumerate(tables):
            left = [i for i in range(len(table)) if keeps[row, i]]
            mine = np.asarray(after.block_tables)[row, : len(left)]
            assert mine.tolist() == [table[i] for i in left]
            gone = 3 * (len(table) - len(left))
            assert int(after.context_lens[row]) == lens[row] - gone
            before = int(state.drops.dropped[row])
            assert int(after.drops.dropped[row]) == before + gone
            np.testing.assert_array_equal(
                np.asarray(after.drops.statistic)[row, : len(left)],
                np.asarray(statistic)[row, left],
            )
        state = after
    state = fork(state, jnp.array([2, -1, 2, 3]))
    assert state.drops.dropped[0] == state.drops.dropped[2]
    assert state.drops.dropped[1] == 0


def test_nodes_without_a_parent_are_forgotten():
    rng = np.random.default_rng(1)
    cache = prefix_cache.init_prefix_cache(30, 2)
    parents = np.full(30, NOT_CACHED, np.int64)
    for block in range(20):  # parents come before their children
        parents[block] = rng.choice([30, *range(block)])
    gone = np.isin(np.arange(30), [1, 5, 8])
    parents[gone] = NOT_CACHED
    expected = parents.copy()
    for block in range(20):
        parent = expected[block]
        if parent not in (30, NOT_CACHED) and expected[parent] == NOT_CACHED:
            expected[block] = NOT_CACHED
    cache = dataclasses.replace(cache, parents=jnp.asarray(parents, jnp.int32))
    found = prefix_cache.forget_orphans(cache).parents
    assert (expected != parents).any()
    np.testing.assert_array_equal(found, expected)


def slow_mass(q, keys, tables, lens, starts, first, scale, cap):
    """The attention of each block, f64[S, M], and log-sum-exps f64[T, H]."""
    num_heads, groups = q.shape[1], q.shape[1] // keys.shape[1]
    block_size = keys.shape[2]
    mass, lse = np.zeros(tables.shape), np.zeros(q.shape[:2])
    for row, table in enumerate(tables):
        for t in range(starts[row], starts[row + 1]):
            seen = lens[row] - (starts[row + 1] - 1 - t)
            for head in range(num_heads):
                mine = keys[table, head // groups].reshape(-1, q.shape[-1])[:seen]
                scores = cap * np.tanh(mine @ q[t, head] * scale / cap)
                lse[t, head] = np.log(np.exp(scores).sum())
                if seen - 1 < first[row]:
                    continue
                weights = np.exp(scores - lse[t, head])
                for token, weight in enumerate(weights):
                    mass[row, token // block_size] += weight / num_heads
    return mass, lse


@pytest.mark.parametrize("is_decode", [True, False])
def test_attention_of_blocks_is_that_of_a_slow_version(is_decode):
    rng = np.random.default_rng(2)
    tables = rng.permutation(20)[:15].reshape(3, 5)
    lens = np.array([17, 0, 9])
    starts = np.array([0, 1, 2, 3] if is_decode else [0, 6, 6, 10])
    first = np.array([12, 0, 0] if not is_decode else [3, 0, 9])
    q = rng.normal(size=(starts[-1], 4, 8))
    keys = rng.normal(size=(2, 20, 2, 4, 8))
    if is_decode:
        starts_of_rows = np.array([0, 1, 1, 2])  # the empty row has no query
        used = q[[0, 2]]
    else:
        starts_of_rows, used = starts, q
    args = (tables, lens, starts_of_rows, first, 0.3, 20.0)
    expected, lse = slow_mass(used, keys[1], *args)
    full = np.zeros(q.shape[:2])
    full[[0, 2] if is_decode else slice(None)] = lse
    pages = jnp.asarray(keys, jnp.float32)
    operands = AttentionOperands(
        jnp.asarray(q, jnp.float32),
        Pools(pages, pages),
        jnp.asarray(tables, jnp.int32),
        jnp.asarray(lens, jnp.int32),
        None if is_decode else jnp.asarray(starts, jnp.int32),
        scale=0.3,
        logits_soft_cap=20.0,
        layer=1,
    )
    found = block_statistics.attention_mass(
        operands, jnp.asarray(full, jnp.float32), jnp.asarray(first, jnp.int32)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    queries = 1 if is_decode else 5 + 4
    np.testing.assert_allclose(np.asarray(found).sum(), queries, rtol=1e-5)


CONFIG = dict(num_blocks=8, max_num_seqs=2, max_model_len=32, block_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(speculation=Speculation()), "retention: expected None with speculation"),
        (dict(batch_invariant=True), "retention: expected a method without a stat"),
        (dict(retention="tova"), "retention: expected None or a retention.Retention"),
        (
            dict(retention=retention.quest(8), cascade=True),
            "cascade: expected the default",
        ),
        (
            dict(retention=retention.quest(8), preemption="swap", num_swap_blocks=4),
            "preemption: expected the default",
        ),
    ],
)
def test_combinations_that_are_not_supported_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**CONFIG | dict(retention=retention.tova(8)) | changes)


@pytest.mark.parametrize(
    ("sizes", "method", "message"),
    [
        (dict(windows=(None, 8), latent=None), "random", "sliding windows"),
        (dict(windows=(None,), latent=1), "tova", "a method without a statistic"),
    ],
)
def test_models_that_a_method_cannot_serve_are_refused(sizes, method, message):
    config = EngineConfig(**CONFIG, retention=retention.METHODS[method]())
    decoder = types.SimpleNamespace(config=types.SimpleNamespace(**sizes))
    with pytest.raises(ValueError, match=message):
        engine.init(decoder, config)
    with pytest.raises(ValueError, match="retention: expected None on a mesh"):
        engine.init(decoder, config, mesh=jpaged.make_mesh())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: retention.find("h2o"), "retention: expected None, a retention.Ret"),
        (lambda: retention.tova(0), "max_tokens: expected an integer from 1"),
        (lambda: retention.tova(2.5), "max_tokens: expected an integer from 1"),
        (lambda: retention.tova("8"), "max_tokens: expected a finite number"),
        (lambda: retention.random(every=-1), "every: expected an integer from 0"),
        (
            lambda: retention.Retention(lambda row: row.noise, statistic="entropy"),
            "statistic: expected one of",
        ),
        (
            lambda: retention.Retention(
                lambda row: row.noise.sum(), select=retention.keep_positive
            ),
            r"score, select: expected numbers \[M\]",
        ),
        (lambda: retention.Retention(7), "score: expected a function"),
        (
            lambda: retention.Retention(lambda row: row.noise * row.parameters["x"]),
            "parameters: expected a default for 'x'",
        ),
        (
            lambda: retention.Retention(lambda row: row.noise if row.noise[0] else 0),
            "that jax.jit can trace",
        ),
        (lambda: retention.random().values({"keep": 3}), "expected names among"),
        (lambda: retention.random().values([3]), "expected 'off' or a dict"),
        (lambda: retention.quest().values({"every": 3}), r"expected no \['every'\]"),
    ],
)
def test_what_is_wrong_with_a_method_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
