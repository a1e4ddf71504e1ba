"""Cache groups: layers divided by hand, and random walks that follow every token.

In a walk, a pool in numpy stores the value that each token wrote, through the slots and
copies of the block manager. After every operation, each row finds its own tokens in all
groups, as far back as the next token sees.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.kv import block_manager, cache_groups, prefix_cache
from jpaged.models.shapes import random_config

WINDOWS = ((None, 6), (6,), (None, 3, 9), (1,))
ROWS, WIDTH, SIZE = 4, 8, 4
append = jax.jit(block_manager.append)
append_one = jax.jit(block_manager.append_one)
fork = jax.jit(block_manager.fork)
truncate = jax.jit(block_manager.truncate)
release = jax.jit(cache_groups.release_front)
slots = jax.jit(block_manager.slots)


@pytest.mark.parametrize(
    ("name", "windows", "num_layers"),
    [
        ("mistral-7b", (4096,), 32),
        ("gemma-2-9b", (None, 4096), 21),
        ("gemma-3-1b", (None, *[512] * 6), 4),
        ("gpt-oss-20b", (None, 128), 12),
        ("llama-3-8b", (None,), 32),
    ],
)
def test_groups_of_common_models(name, windows, num_layers):
    config = random_config(name)
    found = cache_groups.layer_groups(config.windows, config.max_length)
    assert (found.windows, found.num_layers) == (windows, num_layers)
    places = list(zip(found.groups, found.indices, strict=True))
    assert len(set(places)) == config.num_layers
    for layer, (group, index) in enumerate(places):
        assert found.windows[group] == config.windows[layer]
        assert index < num_layers


@pytest.mark.parametrize("counts", [(1, 1), (1, 30), (7, 13), (10, 52), (29, 30)])
def test_groups_are_few_and_little_is_unused(counts):
    windows = [None] * counts[0] + [8] * counts[1]
    found = cache_groups.layer_groups(windows, 100)
    assert len(found.windows) <= 8
    if counts != (1, 30):  # there, eight groups cannot be of one layer
        assert len(found.windows) * found.num_layers <= 1.15 * sum(counts)


class Walk:
    """A block manager, with the values that tokens wrote into its slots."""

    def __init__(self, windows, seed):
        self.windows, self.rng = windows, np.random.default_rng(seed)
        self.state = block_manager.init_state(
            num_blocks=40,
            block_size=SIZE,
            max_seqs=ROWS,
            max_blocks_per_seq=WIDTH,
            windows=windows,
        )
        self.pool = np.full((40, SIZE), -1)
        self.rows = [[] for _ in range(ROWS)]

    def write(self, num_tokens):
        for row, count in enumerate(num_tokens):
            start, new = len(self.rows[row]), self.rng.integers(0, 10**6, count)
            self.rows[row] += new.tolist()
            where = slots(
                self.state, jnp.full((16,), row), jnp.arange(start, start + 16)
            )
            for group in np.atleast_2d(where):
                self.pool.reshape(-1)[group[:count]] = new

    def append(self):
        self.state = release(self.state, jnp.zeros((ROWS,), jnp.bool_))
        room = [WIDTH * SIZE - len(row) for row in self.rows]
        num_tokens = np.minimum(self.rng.integers(0, 9, ROWS), room)
        needed = int(block_manager.blocks_needed(self.state, num_tokens).sum())
        free = int(block_manager.num_free_blocks(self.state))
        self.state, appended = append(self.state, jnp.asarray(num_tokens))
        assert bool(appended.ok) == (needed <= free)
        if appended.ok:
            for src, dst in zip(appended.copy_src, appended.copy_dst, strict=True):
                if dst >= 0:
                    self.pool[dst] = self.pool[src]
            assert int(block_manager.num_free_blocks(self.state)) == free - needed
            self.write(num_tokens)

    def append_one(self):
        self.state = release(self.state, jnp.zeros((ROWS,), jnp.bool_))
        rows = self.rng.random(ROWS) < 0.5
        after, ok = append_one(self.state, jnp.asarray(rows))
        if ok:
            self.state = after
            self.write(rows.astype(int))

    def fork(self):
        parents = self.rng.integers(-1, ROWS, ROWS)
        parents = np.where(self.rng.random(ROWS) < 0.6, np.arange(ROWS), parents)
        self.state = fork(self.state, jnp.asarray(parents))
        self.rows = [[] if p < 0 else list(self.rows[p]) for p in parents]

    def reject(self):
        """Append drafts, and take some of them back."""
        before = [len(row) for row in self.rows]
        self.append()
        lens = [
            self.rng.integers(min(start + 1, len(row)), len(row) + 1)
            for start, row in zip(before, self.rows, strict=True)
        ]
        self.state = truncate(self.state, jnp.asarray(lens))
        self.rows = [row[:n] for row, n in zip(self.rows, lens, strict=True)]

    def check(self):
        assert block_manager.violations(self.state) == []
        assert self.state.context_lens.tolist() == [len(row) for row in self.rows]
        tables = np.asarray(
            cache_groups.tables_by_group(self.state.block_tables, len(self.windows))
        )
        for group, window in enumerate(self.windows):
            for row, tokens in enumerate(self.rows):
                first = 0 if window is None else max(0, len(tokens) - window + 1)
                for position in range(first, len(tokens)):
                    block = tables[group, row, position // SIZE]
                    assert self.pool[block, position % SIZE] == tokens[position]


@pytest.mark.parametrize("windows", WINDOWS)
def test_rows_find_their_tokens_in_random_walks(windows):
    for seed in range(2):
        walk = Walk(windows, seed)
        for _ in range(50):
            kind = walk.rng.choice(["append", "append_one", "fork", "reject"])
            getattr(walk, kind)()
            walk.check()


def test_a_block_that_is_released_one_token_too_early_is_found():
    walk = Walk((None, 6), 0)
    walk.state, _ = append(walk.state, jnp.array([13, 0, 0, 0]))
    walk.write([13, 0, 0, 0])
    longer = block_manager.append(walk.state, jnp.array([1, 0, 0, 0]))[0]
    early = release(longer, jnp.zeros((ROWS,), jnp.bool_))
    assert block_manager.violations(early) == []
    early = truncate(early, jnp.array([12, 0, 0, 0]))
    (found,) = block_manager.violations(early)
    assert "row 0, group 1: columns [1] inside the window have no block" in found


def test_the_least_pool_of_a_length_is_what_a_row_uses_at_most():
    for windows, chunk in [((None, 6), 5), ((6,), 1), ((3, 9), 7)]:
        used = 0
        for offset in range(1, chunk + 1):
            walk = Walk(windows, 0)
            steps = [offset] + [chunk] * ((32 - offset) // chunk)
            for count in steps:
                walk.state = release(walk.state, jnp.zeros((ROWS,), jnp.bool_))
                walk.state, _ = append(walk.state, jnp.array([count, 0, 0, 0]))
                used = max(used, int((walk.state.ref_counts > 0).sum()))
        most = cache_groups.blocks_of_length(windows, SIZE, 32, chunk)
        assert used <= most
        assert used >= most - len(windows)
        assert (
            cache_groups.longest_length((None, *windows), SIZE, most + 8, chunk) >= 32
        )


def cached_row(lens, windows=(None, 6)):
    """A row of `lens` tokens whose blocks are cached, and which has finished."""
    state = block_manager.init_state(
        num_blocks=16,
        block_size=SIZE,
        max_seqs=2,
        max_blocks_per_seq=WIDTH,
        windows=windows,
    )
    cache = prefix_cache.init_prefix_cache(16, SIZE, windows=windows)
    tokens = jnp.arange(2 * 32, dtype=jnp.int32).reshape(2, 32) % 32
    for start in range(0, lens, SIZE):
        state = release(state, jnp.zeros((2,), jnp.bool_))
        count = min(SIZE, lens - start)
        state, _ = append(state, jnp.array([count, 0]), prefix_cache.is_cached(cache))
        cache, state = _insert(cache, state, tokens, jnp.int32(start))
    assert prefix_cache.violations(cache, state, tokens) == []
    return cache, fork(state, jnp.array([-1, -1])), tokens


_insert = jax.jit(prefix_cache.insert)
_evict = jax.jit(functools.partial(prefix_cache.evict))


def test_a_hit_needs_only_the_companions_of_the_last_window():
    cache, state, tokens = cached_row(24)
    paths, lens = prefix_cache.match(cache, tokens[:1], jnp.array([31]))
    assert lens.tolist() == [24]
    # All nodes, and the two blocks with the 5 tokens before the next one.
    assert (np.asarray(paths)[0, :8] >= 0).tolist() == [True] * 6 + [False] * 2
    assert (np.asarray(paths)[0, 8:] >= 0).tolist() == [False] * 4 + [True] * 2 + [
        False
    ] * 2
    # Shorter prefixes have theirs too, as long as they are not evicted.
    for most, found in [(23, 20), (8, 8), (3, 0)]:
        _, lens = prefix_cache.match(cache, tokens[:1], jnp.array([most]))
        assert lens.tolist() == [found]
    # Of 12 cached blocks, the companions 0 to 2 were used longest ago: if three more
    # than the free ones are needed, only prefixes that need these lose their hits.
    cache = _evict(cache, state.ref_counts, jnp.int32(4 + 3))
    assert prefix_cache.violations(cache, state, tokens) == []
    hits = [
        int(prefix_cache.match(cache, tokens[:1], jnp.array([most]))[1][0])
        for most in (31, 23, 19, 15, 11, 7)
    ]
    assert hits == [24, 20, 0, 0, 0, 0]


def test_all_windows_evict_a_path_from_its_end():
    cache, state, tokens = cached_row(24, windows=(6,))
    for needed, found in [(10, 24), (11, 20), (14, 8), (16, 0)]:
        cache = _evict(cache, state.ref_counts, jnp.int32(needed))
        assert prefix_cache.violations(cache, state, tokens) == []
        paths, lens = prefix_cache.match(cache, tokens[:1], jnp.array([31]))
        assert lens.tolist() == [found]
        first = max(0, found - 5) // SIZE
        expected = [first <= column < found // SIZE for column in range(8)]
        assert (np.asarray(paths)[0] >= 0).tolist() == expected
