"""Swapping against two slow block managers between which Python lists of pages move.

The device's and the host's arrays are each driven by `block_manager_model.Checked`, so
after every move both pools are counted anew, compared with the model page by page, and
every row reads back what was appended to it, from the pages that were copied.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from jpaged import compat
from jpaged.attention import kv_cache
from jpaged.kv import block_manager, swap
from jpaged.kv.block_manager import NO_BLOCK
from tests.support import block_manager_model
from tests.support.block_manager_model import Checked

SIZES = dict(block_size=3, max_blocks_per_seq=4)
DEVICE = dict(num_blocks=9, max_seqs=4, **SIZES)
# Fewer blocks than rows can fill, so that moves are refused.
HOST = dict(num_blocks=7, max_seqs=6, **SIZES)
OPERATIONS = block_manager_model.jitted_operations()
STAYS = -1


def jitted_moves() -> types.SimpleNamespace:
    """Both directions, compiled anew so that a planted fault is seen."""
    return types.SimpleNamespace(
        out=jax.jit(functools.partial(swap.swap_out)),
        into=jax.jit(functools.partial(swap.swap_in)),
    )


MOVES = jitted_moves()


def i32(values) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


class Pools:
    """Two pools with their models and memories, and moves between them."""

    def __init__(self, moves=MOVES, host=HOST) -> None:
        self.moves = moves
        self.device = Checked(OPERATIONS, **DEVICE)
        self.host = Checked(OPERATIONS, **host)
        self.num_moved = self.num_refused = 0

    def swap_out(self, seq_indices: list[int]) -> bool:
        """Row s goes to the host's row `seq_indices[s]`."""
        found = self.moves.out(self.device.state, self.host.state, i32(seq_indices))
        pairs = [
            (row, seq_index)
            for row, seq_index in enumerate(seq_indices)
            if seq_index >= 0
        ]
        return self._check(self.device, self.host, found[0], found[1], found, pairs)

    def swap_in(self, seq_indices: list[int], kept: list[bool] | None = None) -> bool:
        """Row s becomes what the host's row `seq_indices[s]` is."""
        mask = None if kept is None else jnp.asarray(kept)
        found = self.moves.into(
            self.device.state, self.host.state, i32(seq_indices), mask
        )
        pairs = [
            (seq_index, row)
            for row, seq_index in enumerate(seq_indices)
            if seq_index >= 0
        ]
        num_kept = 0
        if kept is not None:
            is_free = np.asarray(self.device.state.ref_counts) == 0
            num_kept = int((is_free & np.array(kept)).sum())
            taken = np.asarray(found[2].dst)
            assert not np.array(kept)[taken[taken != NO_BLOCK]].any()
        return self._check(
            self.host, self.device, found[1], found[0], found, pairs, num_kept
        )

    def _check(self, source, target, left, entered, found, pairs, num_kept=0) -> bool:
        _, _, copies, ok = found
        src, dst = np.asarray(copies.src), np.asarray(copies.dst)
        pages = {
            id(page): page for row, _ in pairs for page in source.model.tables[row]
        }
        is_open = not any(target.model.histories[row] for _, row in pairs)
        fits = len(pages) <= target.model.num_free() - num_kept
        assert bool(ok) == (is_open and fits)
        if not ok:
            self.num_refused += 1
            assert (src == NO_BLOCK).all()
            assert (dst == NO_BLOCK).all()
            for new, old in ((left, source.state), (entered, target.state)):
                for a, b in zip(
                    jax.tree.leaves(new), jax.tree.leaves(old), strict=True
                ):
                    np.testing.assert_array_equal(a, b)
            return False
        # Each page once, pairs first.
        number = len(pages)
        assert int(copies.num_blocks) == number
        assert (src[:number] >= 0).all()
        assert (src[number:] == NO_BLOCK).all()
        assert (dst[number:] == NO_BLOCK).all()
        assert len(set(dst[:number].tolist())) == number
        target.memory[dst[:number]] = source.memory[src[:number]]
        copied = {key: list(page) for key, page in pages.items()}
        for row, to_row in pairs:
            table = [copied[id(page)] for page in source.model.tables[row]]
            target.model.tables[to_row] = table
            target.model.histories[to_row] = source.model.histories[row]
        for row, _ in pairs:
            source.model.tables[row], source.model.histories[row] = [], []
        source.state, target.state = left, entered
        self.num_moved += number
        self.check()
        return True

    def check(self) -> None:
        self.device.check()
        self.host.check()


class SwapMachine(stateful.RuleBasedStateMachine):
    """Any sequence of steps, forks, frees and moves leaves both pools sound."""

    rows = st.lists(st.integers(-1, 3), min_size=4, max_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools()

    @stateful.rule(tokens=st.lists(st.integers(0, 7), min_size=4, max_size=4))
    def append(self, tokens: list[int]) -> None:
        self.pools.device.append(tokens)

    @stateful.rule(parents=rows)
    def fork(self, parents: list[int]) -> None:
        self.pools.device.fork(parents)

    @stateful.rule(cut=st.lists(st.integers(-1, 9), min_size=4, max_size=4))
    def truncate(self, cut: list[int]) -> None:
        self.pools.device.truncate(cut)

    @stateful.rule(order=st.permutations(range(6)), leaves=st.integers(0, 15))
    def swap_out(self, order: list[int], leaves: int) -> None:
        seq_indices = [order[s] if leaves >> s & 1 else STAYS for s in range(4)]
        self.pools.swap_out(seq_indices)

    @stateful.rule(order=st.permutations(range(6)), enters=st.integers(0, 15))
    def swap_in(self, order: list[int], enters: int) -> None:
        seq_indices = [order[s] if enters >> s & 1 else STAYS for s in range(4)]
        self.pools.swap_in(seq_indices)

    @stateful.rule(order=st.permutations(range(6)), kept=st.integers(0, 511))
    def swap_in_beside_what_is_kept(self, order: list[int], kept: int) -> None:
        self.pools.swap_in(order[:4], [bool(kept >> b & 1) for b in range(9)])

    @stateful.rule(gone=st.lists(st.booleans(), min_size=6, max_size=6))
    def end_on_the_host(self, gone: list[bool]) -> None:
        self.pools.host.free(gone)

    def teardown(self) -> None:
        self.pools.device.free([True] * 4)
        self.pools.host.free([True] * 6)
        assert not np.asarray(self.pools.device.state.ref_counts).any()
        assert not np.asarray(self.pools.host.state.ref_counts).any()


TestSwap = SwapMachine.TestCase
TestSwap.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def walk(pools: Pools, seed: int, num_steps: int = 60) -> None:
    """Steps as an engine mixes them: shared beginnings leave and return."""
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        lengths = np.array([len(h) for h in pools.device.model.histories])
        away = np.flatnonzero([len(h) for h in pools.host.model.histories])
        match rng.integers(5):
            case 0 | 1:
                tokens = np.where(lengths > 0, 1, 0)
                tokens[rng.integers(4)] += rng.integers(5)
                pools.device.append(np.minimum(tokens, 12 - lengths).tolist())
            case 2:
                parent = int(rng.choice(np.flatnonzero(lengths))) if any(lengths) else 0
                pools.device.fork([parent, parent, *rng.integers(-1, 4, 2).tolist()])
                pools.device.append([int(0 < lengths[parent] < 12), 0, 0, 0])
            case 3:
                open_ = np.setdiff1d(np.arange(6), away)[:4].tolist()
                leaves = rng.random(4) < 0.5
                seq_indices = [
                    open_.pop() if leave and length and open_ else STAYS
                    for leave, length in zip(leaves, lengths, strict=True)
                ]
                pools.swap_out(seq_indices)
            case 4:
                todo = rng.permutation(away).tolist()
                seq_indices = [
                    todo.pop() if todo and not length and rng.random() < 0.8 else STAYS
                    for length in lengths
                ]
                pools.swap_in(seq_indices)


def test_walks_move_pages_both_ways_and_some_moves_are_refused():
    pools = Pools()
    for seed in range(8):
        walk(pools, seed)
    assert pools.num_moved > 60
    assert pools.num_refused > 5
    assert pools.device.num_copies > 5


def test_what_rows_share_is_moved_once_and_shared_again():
    pools = Pools()
    pools.device.append([7, 0, 0, 0])  # 3 blocks, the last with one token
    pools.device.fork([0, 0, 0, -1])
    pools.device.append([1, 0, 0, 0])  # row 0 goes its own way from there
    assert pools.swap_out([5, 0, 3, STAYS])
    assert pools.num_moved == 4  # 3 tables of 3 blocks
    counts = np.asarray(pools.host.state.ref_counts)
    assert sorted(counts.tolist()) == [0, 0, 0, 1, 2, 3, 3]
    assert pools.swap_in([3, STAYS, 5, 0])
    assert sorted(np.asarray(pools.device.state.ref_counts).tolist())[-4:] == [
        *(1, 2, 3, 3)
    ]
    # And copied on write as before.
    pools.device.append([1, 0, 0, 1])
    assert pools.device.num_copies == 2


def test_who_stays_keeps_the_blocks_that_it_shared():
    pools = Pools()
    pools.device.append([6, 0, 0, 0])
    pools.device.fork([0, 0, -1, -1])
    assert pools.swap_out([STAYS, 2, STAYS, STAYS])
    assert np.asarray(pools.device.state.ref_counts)[:2].tolist() == [1, 1]
    assert pools.swap_in([STAYS, STAYS, 2, STAYS])
    # What it shared with one that stayed is its own now.
    assert sorted(np.asarray(pools.device.state.ref_counts).tolist())[-4:] == [1] * 4


def test_a_move_that_does_not_fit_changes_nothing():
    pools = Pools(host=HOST | dict(num_blocks=3))
    pools.device.append([9, 4, 0, 0])
    assert not pools.swap_out([0, 1, STAYS, STAYS])
    assert pools.swap_out([0, STAYS, STAYS, STAYS])
    assert not pools.swap_in([STAYS, 0, STAYS, STAYS])  # row 1 is taken
    assert pools.swap_in([STAYS, STAYS, 0, STAYS])


def test_rows_without_blocks_move_as_well():
    pools = Pools()
    assert pools.swap_out([0, 1, 2, 3])
    assert pools.num_moved == 0


def test_states_that_are_not_alike_are_refused():
    device = block_manager.init_state(**DEVICE)
    for name, value in (("block_size", 4), ("max_blocks_per_seq", 5)):
        host = block_manager.init_state(**HOST | {name: value})
        with pytest.raises(ValueError, match=f"{name[:4]}|width.*got {value}"):
            swap.swap_out(device, host, i32([0, 1, 2, 3]))


# Pages.

CACHE = dict(num_layers=3, num_kv_heads=2, block_size=4, head_dim=8)


def random_cache(num_blocks: int, seed: int, memory, dtype="float32"):
    rng = np.random.default_rng(seed)
    shape = kv_cache.init_kv_cache(num_blocks=num_blocks, dtype=dtype, **CACHE)
    arrays = [
        rng.standard_normal(x.shape).astype(x.dtype) for x in jax.tree.leaves(shape)
    ]
    pages = [jax.device_put(array, memory) for array in arrays]
    return kv_cache.KVCache(*pages), [np.array(array) for array in arrays]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_go_to_the_hosts_memory_and_come_back_in_every_layer(dtype):
    cache, device = random_cache(7, 0, compat.DEVICE_MEMORY, dtype)
    host_cache, host = random_cache(5, 1, compat.HOST_MEMORY, dtype)
    src, dst = i32([6, 0, 3, NO_BLOCK]), i32([1, 4, 0, NO_BLOCK])
    move_out = jax.jit(kv_cache.swap_out_pages, donate_argnums=1)
    host_cache = move_out(cache, host_cache, src, dst)
    for got, mine, theirs in zip(
        jax.tree.leaves(host_cache), host, device, strict=True
    ):
        mine[:, [1, 4, 0]] = theirs[:, [6, 0, 3]]
        assert got.sharding.memory_kind == "pinned_host"
        assert np.asarray(got).tobytes() == mine.tobytes()
    move_in = jax.jit(kv_cache.swap_in_pages, donate_argnums=0)
    src, dst = i32([4, 2, NO_BLOCK, NO_BLOCK]), i32([5, 2, NO_BLOCK, NO_BLOCK])
    cache = move_in(cache, host_cache, src, dst)
    for got, mine, theirs in zip(jax.tree.leaves(cache), device, host, strict=True):
        mine[:, [5, 2]] = theirs[:, [4, 2]]
        assert got.sharding.memory_kind == "device"
        assert np.asarray(got).tobytes() == mine.tobytes()


def test_nothing_moves_where_there_are_no_pairs():
    cache, device = random_cache(7, 0, compat.DEVICE_MEMORY)
    host_cache, _ = random_cache(5, 1, compat.HOST_MEMORY)
    none = i32([NO_BLOCK] * 3)
    cache = jax.jit(kv_cache.swap_in_pages)(cache, host_cache, none, none)
    assert np.asarray(cache.k_pages).tobytes() == device[0].tobytes()


def test_a_loop_of_moves_copies_neither_pool():
    cache, _ = random_cache(400, 0, compat.DEVICE_MEMORY)
    host_cache, _ = random_cache(800, 1, compat.HOST_MEMORY)

    def run(cache, host_cache, src, dst):
        def step(i, carry):
            cache, host_cache = carry
            host_cache = kv_cache.swap_out_pages(cache, host_cache, src, dst)
            return kv_cache.swap_in_pages(cache, host_cache, dst, src), host_cache

        return jax.lax.fori_loop(0, 5, step, (cache, host_cache))

    pairs = i32([7, 3]), i32([1, 2])
    compiled = jax.jit(run, donate_argnums=(0, 1)).lower(cache, host_cache, *pairs)
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k_pages.nbytes / 100
    total = sum(x.nbytes for x in jax.tree.leaves((cache, host_cache)))
    assert memory.alias_size_in_bytes == total


# Planted faults.


def faults() -> dict[str, tuple[object, str, object]]:
    def in_order(is_chosen, size, first=swap._first):
        return first(jnp.ones_like(is_chosen), size)

    def keeps(state, rows, free=block_manager.free):
        return free(state, jnp.zeros_like(rows))

    def another_length(state, is_asked, rows, rows_of=swap._rows_of):
        tables, lens = rows_of(state, is_asked, rows)
        return tables, jnp.maximum(lens - 1, 0)

    def all_rows(state, is_asked, rows, rows_of=swap._rows_of):
        return rows_of(state, jnp.ones_like(is_asked), rows)

    return {
        "first blocks, free or not": (swap, "_first", in_order),
        "rows stay where they were": (block_manager, "free", keeps),
        "a token is lost": (swap, "_rows_of", another_length),
        "rows that stay go too": (swap, "_rows_of", all_rows),
    }


@pytest.mark.parametrize("name", faults())
def test_a_planted_fault_is_found(name, monkeypatch):
    monkeypatch.setattr(*faults()[name])
    pools = Pools(jitted_moves())
    with pytest.raises(AssertionError):
        walk(pools, 0, num_steps=120)
