"""Prefix cache: slow model, hand-computed cases and planted faults."""

import dataclasses
import functools
import inspect
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from jpaged.kv import (
    block_manager,
    prefix_cache,
    prefix_checks,
    prefix_eviction,
    prefix_table,
)
from jpaged.kv.block_manager import NO_BLOCK
from tests.support import prefix_cache_model as model
from tests.support.prefix_cache_model import Checked, L, M, N, P, S, i32, walk

ROOT = N  # the parent of a sequence's first block
RUN = model.operations()
EQUAL_HASHES = ("hash_keys(parents, chunks) & mask", "0 * hash_keys(parents, chunks)")


@functools.cache
def one_bucket():
    """The operations with the same hash for every key: the table stores 8 nodes."""
    return model.operations(mutant(EQUAL_HASHES))


def mutant(*changes: tuple[str, str]) -> types.ModuleType:
    """`prefix_cache` and its modules with changed source; each text occurs once."""
    modules = (prefix_table, prefix_checks, prefix_eviction, prefix_cache)
    sources = [inspect.getsource(one) for one in modules]
    for old, new in changes:
        count = sum(source.count(old) for source in sources)
        assert count == 1, f"{old!r} occurs {count} times"
        sources = [source.replace(old, new) for source in sources]
    names = ("table", "checks", "eviction", "cache")
    for name, source in zip(names, sources, strict=True):
        module = types.ModuleType(f"mutant_prefix_{name}")
        sys.modules[module.__name__] = module  # for imports and dataclasses
        source = source.replace("from jpaged.kv.prefix_", "from mutant_prefix_")
        exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


# Comparison with the slow model.


class PrefixCacheMachine(stateful.RuleBasedStateMachine):
    """After any sequence of operations, arrays, model and memory are equal."""

    rows = st.integers(0, S - 1)
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=L)
    per_row = st.lists(st.integers(0, 1), min_size=S, max_size=S)

    def __init__(self) -> None:
        super().__init__()
        self.checked = Checked(RUN)

    @stateful.rule(row=rows, prompt=prompts)
    def start(self, row: int, prompt: list[int]) -> None:
        self.checked.start(row, prompt)

    @stateful.rule(prompt=prompts)
    def start_everywhere(self, prompt: list[int]) -> None:
        for row in range(S):
            self.checked.start(row, prompt)

    @stateful.rule(tokens=per_row, commits=st.booleans())
    def decode(self, tokens: list[int], commits: bool) -> None:
        self.checked.decode(tokens)
        if commits:
            self.checked.commit()

    @stateful.rule()
    def commit(self) -> None:
        self.checked.commit()

    @stateful.rule()
    def tick(self) -> None:
        self.checked.tick()

    @stateful.rule(
        parents=st.lists(st.integers(-1, S - 1), min_size=S, max_size=S),
    )
    def fork(self, parents: list[int]) -> None:
        self.checked.fork(parents)

    @stateful.rule(row=rows)
    def free(self, row: int) -> None:
        self.checked.free([row])

    @stateful.rule(row=rows, length=st.integers(0, L))
    def truncate(self, row: int, length: int) -> None:
        self.checked.truncate(row, length)

    @stateful.rule(num_needed=st.integers(-1, N + 2))
    def evict(self, num_needed: int) -> None:
        self.checked.evict(num_needed)

    @stateful.rule(prompt=prompts, limit=st.integers(0, L))
    def match(self, prompt: list[int], limit: int) -> None:
        self.checked.match(prompt, limit)


PrefixCacheMachine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None
)
TestAnySequence = PrefixCacheMachine.TestCase


def test_a_long_walk_with_all_kinds_of_events_equals_the_model():
    checked = walk(Checked(RUN), 250, seed=3)
    assert checked.num_hits > 5
    assert checked.num_evicted > 20
    assert checked.num_replaced > 3
    assert checked.num_copies > 1


def test_with_equal_hashes_results_stay_exact_and_only_nodes_are_refused():
    """One bucket with 8 ways stores all nodes: a hash alone never decides."""
    checked = walk(Checked(one_bucket(), max_nodes=8), 250, seed=3)
    assert checked.num_hits > 5
    assert checked.num_refused > 3


# Hand-computed cases.


def prompts_in_rows(*prompts: list[int], num_blocks: int = N):
    """An empty cache, and blocks in which each row has computed its own prompt."""
    blocks = block_manager.init_state(
        num_blocks=num_blocks, block_size=P, max_seqs=S, max_blocks_per_seq=M
    )
    lens = [len(prompt) for prompt in prompts] + [0] * (S - len(prompts))
    blocks, _ = block_manager.append(blocks, i32(*lens))
    rows = [prompt + [0] * (L - len(prompt)) for prompt in prompts]
    tokens = i32(*itertools.chain(*rows), *[0] * (L * (S - len(prompts))))
    return prefix_cache.init_prefix_cache(num_blocks, P), blocks, tokens.reshape(S, L)


def test_rows_with_the_same_prompt_share_the_blocks_of_the_lowest_row():
    cache, blocks, tokens = prompts_in_rows(
        [1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 8]
    )
    assert blocks.block_tables.tolist() == [
        [0, 1, 2, -1],
        [3, 4, 5, -1],
        [6, 7, -1, -1],
    ]
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    assert blocks.block_tables.tolist() == [
        [0, 1, 2, -1],
        [0, 1, 5, -1],
        [0, 7, -1, -1],
    ]
    assert blocks.ref_counts.tolist() == [3, 2, 1, 0, 0, 1, 0, 1] + [0] * (N - 8)
    nodes = {0: (ROOT, [1, 2]), 1: (0, [3, 4]), 7: (0, [7, 8])}
    assert np.flatnonzero(prefix_cache.is_cached(cache)).tolist() == list(nodes)
    for block, (parent, key) in nodes.items():
        assert int(cache.parents[block]) == parent
        assert cache.tokens[block].tolist() == key


def test_the_same_tokens_under_another_parent_are_a_different_node():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4], [3, 4, 1, 2], [1, 2, 1, 2])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    assert int(prefix_cache.is_cached(cache).sum()) == 5
    rows = jnp.array([[3, 4, 3, 4, 0, 0, 0, 0], [1, 2, 1, 2, 1, 2, 0, 0], [0] * L])
    _, lens = RUN.match(cache, rows, i32(8, 8, 8))
    assert lens.tolist() == [2, 4, 0]


def test_least_recently_used_nodes_are_evicted_first_and_children_before_parents():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4, 5, 6], [7, 8, 9, 9])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    blocks = RUN.fork(blocks, i32(0, NO_BLOCK, NO_BLOCK))
    cache = RUN.touch(cache, blocks.ref_counts, 2)  # only row 0 is in use
    blocks = RUN.fork(blocks, i32(*[NO_BLOCK] * S))
    left = []
    for num_needed in range(N - 5, N + 1):
        cache = RUN.evict(cache, blocks.ref_counts, num_needed)
        left.append(np.flatnonzero(prefix_cache.is_cached(cache)).tolist())
    assert left == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2], [0, 1], [0], []]


def test_scores_of_any_sign_and_nan_order_the_eviction():
    _, blocks, tokens = prompts_in_rows([1, 2], [3, 4], [5, 6])
    cache = prefix_cache.init_prefix_cache(N, P, counts_uses=True)
    cache, blocks = prefix_cache.insert(cache, blocks, tokens, 1)
    unused = jnp.zeros_like(blocks.ref_counts)
    for first_three in ([2.0, jnp.nan, 1.0], [3.0, -1e-3, 0.5], [5.0, -jnp.inf, -2.0]):
        scores = jnp.zeros(N).at[:3].set(jnp.array(first_three))
        eviction = prefix_cache.Eviction(
            lambda view, scores=scores: scores, jnp.zeros(0), jnp.int32(2)
        )
        left = []
        for num_needed in (N - 3, N - 2, N - 1):
            after = prefix_cache.evict(cache, unused, num_needed, eviction)
            left.append(np.flatnonzero(prefix_cache.is_cached(after)).tolist())
        assert left == [[0, 1, 2], [0, 2], [0]]


def test_nodes_in_use_are_never_evicted():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4], [5, 6])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    blocks = RUN.fork(blocks, i32(0, NO_BLOCK, NO_BLOCK))
    cache = RUN.evict(cache, blocks.ref_counts, 10 * N)
    assert np.flatnonzero(prefix_cache.is_cached(cache)).tolist() == [0, 1]


def test_seq_indices_select_each_rows_tokens_from_a_larger_table():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4], [5, 6, 7, 8])
    table = jnp.concatenate([jnp.full((2, L), -5, jnp.int32), tokens[::-1]])
    seq_indices = i32(4, 3, 2)
    selected = RUN.insert(cache, blocks, table, 1, seq_indices)
    direct = RUN.insert(cache, blocks, tokens, 1)
    jax.tree.map(np.testing.assert_array_equal, selected, direct)
    _, lens = RUN.match(direct[0], table, i32(8, 8), i32(3, 0))
    assert lens.tolist() == [4, 0]


def test_a_match_has_whole_blocks_within_the_limit_and_the_tokens():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4, 5, 6, 7, 8])
    cache, _ = RUN.insert(cache, blocks, tokens, 1)
    same = jnp.tile(tokens[:1], (S, 1))
    for limit, found in [(-1, 0), (0, 0), (1, 0), (2, 2), (3, 2), (7, 6), (99, 8)]:
        _, lens = RUN.match(cache, same, i32(*[limit] * S))
        assert lens.tolist() == [found] * S
    paths, lens = RUN.match(cache, tokens[:, :5], i32(9, 9, 9))
    assert (paths.shape, lens.tolist()) == ((S, 3), [4, 0, 0])


def test_only_blocks_within_the_given_tokens_are_inserted():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4, 5, 6])
    cache, _ = RUN.insert(cache, blocks, tokens[:, :5], 1)
    assert int(prefix_cache.is_cached(cache).sum()) == 2


def test_vmap_equals_separate_calls():
    batches = ([[1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]], [[9]])
    cases = [prompts_in_rows(*prompts) for prompts in batches]

    def play(cache, blocks, tokens):
        cache, blocks = prefix_cache.insert(cache, blocks, tokens, 1)
        before = prefix_cache.match(cache, tokens, blocks.context_lens)
        blocks = block_manager.fork(blocks, i32(*[NO_BLOCK] * S))
        cache = prefix_cache.evict(cache, blocks.ref_counts, N - 1)
        return cache, blocks, before, prefix_cache.match(cache, tokens, i32(9, 9, 9))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    together = jax.jit(jax.vmap(play))(*stacked)
    single = jax.jit(play)
    alone = [single(*case) for case in cases]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(np.testing.assert_array_equal, together, expected)
    assert alone[1][2][1].tolist() == [4, 6, 0]
    assert alone[1][3][1].tolist() == [2, 2, 0]


def test_hashes_of_similar_keys_are_spread():
    """4096 keys that differ in few bits fill buckets like random numbers."""
    keys = [[a, b, c] for a, b, c in itertools.product(range(16), repeat=3)]
    hashes = np.asarray(prefix_table.hash_keys(i32(*range(4096)), jnp.array(keys)))
    for shift in (0, 10, 20):
        _, counts = np.unique((hashes >> shift) % 4096, return_counts=True)
        assert abs(len(counts) / 4096 - (1 - np.exp(-1))) < 0.03
        assert counts.max() <= 8
    assert len(np.unique(hashes)) == 4096
    reordered = prefix_table.hash_keys(i32(1, 1), jnp.array([[3, 4], [4, 3]]))
    assert reordered[0] != reordered[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), "num_blocks: expected at least 1, got 0"),
        ((4, -1), "block_size: expected at least 1, got -1"),
        ((2**28, 1), "num_blocks: expected at most"),
    ],
)
def test_invalid_sizes_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        prefix_cache.init_prefix_cache(*sizes)


# The tests must find each planted fault.


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            ("is_hit_SW &= jnp.all(keys_SWP == chunks[:, None, :], axis=2)", ""),
            id="tokens are not compared",
        ),
        pytest.param(
            (
                "is_hit_SW = _lookup(cache.parents, entries_SW, NOT_CACHED) "
                "== parents[:, None]",
                "is_hit_SW = _lookup(cache.parents, entries_SW, NOT_CACHED) >= 0",
            ),
            id="parents are not compared",
        ),
        pytest.param(
            ("-cache.depths, -numbers", "cache.depths, -numbers"),
            id="parents are evicted before children",
        ),
        pytest.param(
            ("(cache.last_used, -cache", "(-cache.last_used, -cache"),
            id="the most recently used is evicted first",
        ),
        pytest.param(
            ("is_cached(cache) & (ref_counts == 0)", "is_cached(cache)"),
            id="nodes in use are evicted",
        ),
        pytest.param(
            ("& ~jnp.any(is_rival_SS, axis=1)", ""),
            id="two rows insert the same key",
        ),
        pytest.param(("own, -1), nodes", "own, 0), nodes"), id="duplicates are kept"),
        pytest.param(
            ("jnp.where(is_more, middle + 1, low)", "jnp.where(is_more, high, low)"),
            id="blocks after a row's nodes are not inserted",
        ),
        pytest.param(
            ("jnp.argmax(is_empty_SW", "0 * jnp.argmax(is_empty_SW"),
            id="a way in use is overwritten",
        ),
        pytest.param(
            ("block_size)\n    paths", "block_size) + 1\n    paths"),
            id="one block too many is matched",
        ),
    ],
)
def test_a_planted_fault_is_found(change):
    assert is_fault_found(model.operations(mutant(change, EQUAL_HASHES)))


def test_the_walks_that_find_faults_find_none_without_one():
    assert not is_fault_found(one_bucket())


def is_fault_found(run) -> bool:
    try:
        for seed in range(3):
            walk(Checked(run, max_nodes=8), 100, seed)
    except AssertionError:
        return True
    return False


def write_inside_a_node(run) -> None:
    """Cut a row inside a node that only it uses, and write another token there."""
    checked = Checked(run)
    checked.start(0, [1, 0, 1, 0])
    checked.commit()
    checked.truncate(0, 3)
    checked.append({0: [1]})
    assert checked.num_copies == 1


def test_a_row_that_is_cut_inside_a_node_copies_it_before_it_writes():
    write_inside_a_node(RUN)
    careless = model.jitted(model.append_carelessly)
    with pytest.raises(AssertionError):
        write_inside_a_node(types.SimpleNamespace(**vars(RUN) | {"append": careless}))


def test_violations_describe_each_inconsistency():
    cache, blocks, tokens = prompts_in_rows([1, 2, 3, 4, 5, 6], [7, 8, 9, 9])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    assert prefix_cache.violations(cache, blocks, tokens) == []

    def found(values=tokens, **fields) -> str:
        changed = {
            name: getattr(cache, name).at[at].set(value)
            for name, (at, value) in fields.items()
        }
        wrong = dataclasses.replace(cache, **changed)
        return " ".join(prefix_cache.violations(wrong, blocks, values))

    assert "parent 0 is not a node" in found(parents=(0, -1))
    assert "row 0: node 1 is not on a path" in found(parents=(0, -1))
    assert "block 1: used after its parent 0" in found(last_used=(0, 0))
    assert "block 2: expected depth 2, got 1" in found(depths=(2, 1))
    assert "block 3: has the same key as block 0" in found(tokens=(3, i32(1, 2)))
    assert "block 1: is not in the table at way" in found(ways=(1, 0))
    assert "not in its bucket" in found(tokens=(2, i32(5, 7)))
    assert "row 1: node 4 has other tokens" in found(tokens.at[1, 2].set(0))


def test_forget_removes_a_node_and_its_descendants_only():
    blocks = block_manager.init_state(
        num_blocks=N, block_size=P, max_seqs=S, max_blocks_per_seq=M
    )
    lengths = jnp.minimum(jnp.full((S,), 3 * P, jnp.int32), L)
    blocks, _ = block_manager.append(blocks, lengths)
    tokens = np.zeros((S, L), np.int32)
    tokens[1:, P : 2 * P] = 1  # after the first block, the others differ from row 0
    cache, blocks = RUN.insert(
        prefix_cache.init_prefix_cache(N, P), blocks, jnp.asarray(tokens), i32(0)
    )
    first, *descendants = np.asarray(blocks.block_tables)[0, : int(lengths[0]) // P]
    other = np.asarray(blocks.block_tables)[1, 1]
    forget = model.jitted(prefix_cache.forget)
    after = forget(cache, i32(descendants[0], NO_BLOCK))
    known = np.asarray(prefix_cache.is_cached(after))
    assert not known[descendants].any()
    assert known[[first, other]].all()
    num_before = np.asarray(prefix_cache.is_cached(cache)).sum()
    assert known.sum() == num_before - len(descendants)
    assert prefix_cache.violations(after, blocks) == []
    unchanged = forget(cache, i32(NO_BLOCK, NO_BLOCK))
    np.testing.assert_array_equal(unchanged.parents, cache.parents)
