"""The prefix cache against a slow model, hand-worked cases and planted faults."""

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

from jpaged.kv import block_manager, prefix_cache
from jpaged.kv.block_manager import NO_BLOCK
from tests.support import prefix_cache_model as model
from tests.support.prefix_cache_model import Checked, L, M, N, P, S, i32, walk

ROOT = prefix_cache.init_prefix_cache(N, P).parents.size
RUN = model.operations()
EQUAL_HASHES = ("(_hash(parents, chunks) & mask)", "(_hash(parents, chunks) & 0)")


@functools.cache
def one_bucket():
    """The operations where every key has the same hash: a table of 8 places."""
    return model.operations(mutant(EQUAL_HASHES))


def mutant(*changes: tuple[str, str]) -> types.ModuleType:
    """The module with pieces of its source replaced, each of which occurs once."""
    source = inspect.getsource(prefix_cache)
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    module = types.ModuleType("mutant_of_prefix_cache")
    sys.modules[module.__name__] = module  # where dataclasses looks
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


# Against the slow model.


class PrefixCacheMachine(stateful.RuleBasedStateMachine):
    """Any sequence of operations leaves arrays, model and memory alike."""

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


def test_a_long_walk_agrees_and_meets_everything_there_is():
    checked = walk(Checked(RUN), 250, seed=3)
    assert checked.num_hits > 5
    assert checked.num_evicted > 20
    assert checked.num_replaced > 3
    assert checked.num_copies > 1


def test_with_all_hashes_equal_it_stays_exact_and_only_loses_nodes():
    """One bucket of 8 places holds everything: a hash alone never decides."""
    checked = walk(Checked(one_bucket(), max_nodes=8), 250, seed=3)
    assert checked.num_hits > 5
    assert checked.num_refused > 3


# By hand.


def held(*prompts: list[int], num_blocks: int = N):
    """A cache, and blocks in which each row has computed its prompt alone."""
    blocks = block_manager.init_state(
        num_blocks=num_blocks, block_size=P, max_seqs=S, max_blocks_per_seq=M
    )
    lens = [len(prompt) for prompt in prompts] + [0] * (S - len(prompts))
    blocks, _ = block_manager.append(blocks, i32(*lens))
    rows = [prompt + [0] * (L - len(prompt)) for prompt in prompts]
    tokens = i32(*itertools.chain(*rows), *[0] * (L * (S - len(prompts))))
    return prefix_cache.init_prefix_cache(num_blocks, P), blocks, tokens.reshape(S, L)


def test_two_rows_with_one_prompt_end_up_on_the_blocks_of_the_lower_row():
    cache, blocks, tokens = held([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 8])
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


def test_the_same_tokens_under_another_parent_are_another_node():
    cache, blocks, tokens = held([1, 2, 3, 4], [3, 4, 1, 2], [1, 2, 1, 2])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    assert int(prefix_cache.is_cached(cache).sum()) == 5
    rows = jnp.array([[3, 4, 3, 4, 0, 0, 0, 0], [1, 2, 1, 2, 1, 2, 0, 0], [0] * L])
    _, lens = RUN.match(cache, rows, i32(8, 8, 8))
    assert lens.tolist() == [2, 4, 0]


def test_tails_go_before_heads_and_the_least_recently_used_before_both():
    cache, blocks, tokens = held([1, 2, 3, 4, 5, 6], [7, 8, 9, 9])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    blocks = RUN.fork(blocks, i32(0, NO_BLOCK, NO_BLOCK))
    cache = RUN.touch(cache, blocks.ref_counts, 2)  # only row 0 is in use
    blocks = RUN.fork(blocks, i32(*[NO_BLOCK] * S))
    left = []
    for num_needed in range(N - 5, N + 1):
        cache = RUN.evict(cache, blocks.ref_counts, num_needed)
        left.append(np.flatnonzero(prefix_cache.is_cached(cache)).tolist())
    assert left == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2], [0, 1], [0], []]


def test_what_a_row_uses_is_never_evicted():
    cache, blocks, tokens = held([1, 2, 3, 4], [5, 6])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    blocks = RUN.fork(blocks, i32(0, NO_BLOCK, NO_BLOCK))
    cache = RUN.evict(cache, blocks.ref_counts, 10 * N)
    assert np.flatnonzero(prefix_cache.is_cached(cache)).tolist() == [0, 1]


def test_places_pick_each_row_s_tokens_out_of_a_larger_table():
    cache, blocks, tokens = held([1, 2, 3, 4], [5, 6, 7, 8])
    table = jnp.concatenate([jnp.full((2, L), -5, jnp.int32), tokens[::-1]])
    seq_indices = i32(4, 3, 2)
    there = prefix_cache.insert(cache, blocks, table, 1, seq_indices)
    here = RUN.insert(cache, blocks, tokens, 1)
    assert jax.tree.map(jnp.array_equal, there, here) == jax.tree.map(
        lambda _: True, here
    )
    _, lens = prefix_cache.match(here[0], table, i32(8, 8), i32(3, 0))
    assert lens.tolist() == [4, 0]


def test_a_limit_is_floored_to_whole_blocks_and_never_passes_the_tokens():
    cache, blocks, tokens = held([1, 2, 3, 4, 5, 6, 7, 8])
    cache, _ = RUN.insert(cache, blocks, tokens, 1)
    same = jnp.tile(tokens[:1], (S, 1))
    for limit, wanted in [(-1, 0), (0, 0), (1, 0), (2, 2), (3, 2), (7, 6), (99, 8)]:
        _, lens = RUN.match(cache, same, i32(*[limit] * S))
        assert lens.tolist() == [wanted] * S
    paths, lens = prefix_cache.match(cache, tokens[:, :5], i32(9, 9, 9))
    assert (paths.shape, lens.tolist()) == ((S, 3), [4, 0, 0])


def test_a_row_longer_than_the_tokens_given_enters_only_what_is_given():
    cache, blocks, tokens = held([1, 2, 3, 4, 5, 6])
    cache, _ = prefix_cache.insert(cache, blocks, tokens[:, :5], 1)
    assert int(prefix_cache.is_cached(cache).sum()) == 2


def test_vmap_gives_what_each_lane_gives_alone():
    lanes = []
    for prompts in ([[1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]], [[9]]):
        lanes.append(held(*prompts))

    def play(cache, blocks, tokens):
        cache, blocks = prefix_cache.insert(cache, blocks, tokens, 1)
        before = prefix_cache.match(cache, tokens, blocks.context_lens)
        blocks = block_manager.fork(blocks, i32(*[NO_BLOCK] * S))
        cache = prefix_cache.evict(cache, blocks.ref_counts, N - 1)
        return cache, blocks, before, prefix_cache.match(cache, tokens, i32(9, 9, 9))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    together = jax.jit(jax.vmap(play))(*stacked)
    alone = [jax.jit(play)(*lane) for lane in lanes]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    for got, want in zip(*map(jax.tree.leaves, (together, wanted)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert alone[1][2][1].tolist() == [4, 6, 0]
    assert alone[1][3][1].tolist() == [2, 2, 0]


def test_hashes_of_similar_keys_are_spread():
    """4096 keys that differ in few bits fill 4096 buckets about as chance does."""
    keys = [[a, b, c] for a, b, c in itertools.product(range(16), repeat=3)]
    hashes = np.asarray(prefix_cache._hash(i32(*range(4096)), jnp.array(keys)))
    for shift in (0, 10, 20):
        _, counts = np.unique((hashes >> shift) % 4096, return_counts=True)
        assert abs(len(counts) / 4096 - (1 - np.exp(-1))) < 0.03
        assert counts.max() <= 8
    assert len(np.unique(hashes)) == 4096
    swapped = np.asarray(prefix_cache._hash(i32(1, 1), jnp.array([[3, 4], [4, 3]])))
    assert swapped[0] != swapped[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), "num_blocks: expected at least 1, got 0"),
        ((4, -1), "block_size: expected at least 1, got -1"),
        ((2**28, 1), "num_blocks: expected at most"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        prefix_cache.init_prefix_cache(*sizes)


# The tests are tested.


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            ("is_hit_SW &= jnp.all(keys_SWP == chunks[:, None, :], axis=2)", ""),
            id="tokens are not compared",
        ),
        pytest.param(
            (
                "is_hit_SW = _values(cache.parents, entries_SW, NOT_CACHED) "
                "== parents[:, None]",
                "is_hit_SW = _values(cache.parents, entries_SW, NOT_CACHED) >= 0",
            ),
            id="parents are not compared",
        ),
        pytest.param(
            ("-cache.depths, -numbers", "cache.depths, -numbers"),
            id="heads go before tails",
        ),
        pytest.param(
            ("(cache.last_used, -cache", "(-cache.last_used, -cache"),
            id="the latest goes first",
        ),
        pytest.param(
            ("is_cached(cache) & (ref_counts == 0)", "is_cached(cache)"),
            id="used nodes are evicted",
        ),
        pytest.param(
            ("& ~jnp.any(is_rival_SS, axis=1)", ""),
            id="rows enter one key twice",
        ),
        pytest.param(("((own, -1), ", "((own, 0), "), id="duplicates are kept"),
        pytest.param(
            ("jnp.where(is_more, middle + 1, low)", "jnp.where(is_more, high, low)"),
            id="blocks behind a row's nodes are not entered",
        ),
        pytest.param(
            ("jnp.argmax(is_empty_SW", "0 * jnp.argmax(is_empty_SW"),
            id="a way that is taken is overwritten",
        ),
        pytest.param(
            ("// block_size\n    paths", "// block_size + 1\n    paths"),
            id="a block too many is matched",
        ),
    ],
)
def test_a_planted_fault_is_found(change):
    constant = (
        "(_hash(parents, chunks) & mask)",
        "(0 * _hash(parents, chunks) & mask)",
    )
    module = mutant(change, constant)
    assert breaks(model.operations(module), max_nodes=8)


def test_without_a_fault_the_same_walks_agree():
    assert not breaks(one_bucket(), max_nodes=8)


def breaks(run, max_nodes: int | None) -> bool:
    try:
        for seed in range(3):
            walk(Checked(run, max_nodes), 150, seed)
    except AssertionError:
        return True
    return False


def cut_into_a_node(run) -> None:
    """A row that alone holds a node is cut inside it, and writes another token."""
    checked = Checked(run)
    checked.start(0, [1, 0, 1, 0])
    checked.commit()
    checked.truncate(0, 3)
    checked.append({0: [1]})
    assert checked.num_copies == 1


def test_a_row_that_is_cut_inside_a_node_copies_it_before_it_writes():
    cut_into_a_node(RUN)
    with pytest.raises(AssertionError):
        cut_into_a_node(model.operations(append=model.append_carelessly))


def test_violations_name_what_is_wrong():
    cache, blocks, tokens = held([1, 2, 3, 4, 5, 6], [7, 8, 9, 9])
    cache, blocks = RUN.insert(cache, blocks, tokens, 1)
    assert prefix_cache.violations(cache, blocks, tokens) == []

    def found(values=tokens, **fields) -> str:
        changed = {
            name: getattr(cache, name).at[at].set(value)
            for name, (at, value) in fields.items()
        }
        wrong = dataclasses.replace(cache, **changed)
        return " ".join(prefix_cache.violations(wrong, blocks, values))

    assert "its parent 0 is no node" in found(parents=(0, -1))
    assert "row 0: its node 1 is not on a path" in found(parents=(0, -1))
    assert "block 1: used after its parent 0" in found(last_used=(0, 0))
    assert "block 2: depth 1, expected 2" in found(depths=(2, 1))
    assert "block 3: has the key of block 0" in found(tokens=(3, i32(1, 2)))
    assert "block 1: does not stand at its place" in found(ways=(1, 0))
    assert "not in its bucket" in found(tokens=(2, i32(5, 7)))
    assert "row 1: block 4 is for other tokens" in found(tokens.at[1, 2].set(0))


def test_who_is_forgotten_takes_those_behind_along_and_nobody_else():
    blocks = block_manager.init_state(
        num_blocks=N, block_size=P, max_seqs=S, max_blocks_per_seq=M
    )
    lengths = jnp.minimum(jnp.full((S,), 3 * P, jnp.int32), L)
    blocks, _ = block_manager.append(blocks, lengths)
    tokens = np.zeros((S, L), np.int32)
    tokens[1:, P : 2 * P] = 1  # the others leave row 0 after the first block
    cache, blocks = RUN.insert(
        prefix_cache.init_prefix_cache(N, P), blocks, jnp.asarray(tokens), i32(0)
    )
    first, *behind = np.asarray(blocks.block_tables)[0, : int(lengths[0]) // P]
    other = np.asarray(blocks.block_tables)[1, 1]
    gone = prefix_cache.forget(cache, jnp.array([behind[0], NO_BLOCK], jnp.int32))
    known = np.asarray(prefix_cache.is_cached(gone))
    assert not known[behind].any()
    assert known[[first, other]].all()
    assert known.sum() == np.asarray(prefix_cache.is_cached(cache)).sum() - len(behind)
    assert prefix_cache.violations(gone, blocks) == []
    nothing = prefix_cache.forget(cache, jnp.array([NO_BLOCK], jnp.int32))
    np.testing.assert_array_equal(nothing.parents, cache.parents)
