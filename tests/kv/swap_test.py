"""Swapping, compared with two slow block managers that exchange Python lists of pages.

`block_manager_model.Checked` runs the device's arrays and the host's. So after every
move, both pools are recounted and compared with the model page by page, and every row
reads back its own tokens from the copied pages.
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
# Fewer blocks than the rows can fill, so that some moves are refused.
HOST = dict(num_blocks=7, max_seqs=6, **SIZES)
OPERATIONS = block_manager_model.jitted_operations()
STAYS = -1


def jitted_moves() -> types.SimpleNamespace:
    """Both directions, as new functions, so that a planted fault is compiled."""
    return types.SimpleNamespace(
        out=jax.jit(functools.partial(swap.swap_out_rows)),
        into=jax.jit(functools.partial(swap.swap_in_rows)),
    )


MOVES = jitted_moves()


def i32(values) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


class Pools:
    """Two pools with their models and memories, and the moves between them."""

    def __init__(self, moves=MOVES, host=HOST) -> None:
        self.moves = moves
        self.device = Checked(OPERATIONS, **DEVICE)
        self.host = Checked(OPERATIONS, **host)
        self.num_moved = self.num_refused = 0

    def swap_out(self, seq_indices: list[int]) -> bool:
        """Move row s to the host's row `seq_indices[s]`."""
        found = self.moves.out(self.device.state, self.host.state, i32(seq_indices))
        pairs = [
            (row, seq_index)
            for row, seq_index in enumerate(seq_indices)
            if seq_index >= 0
        ]
        return self._check(self.device, self.host, found[0], found[1], found, pairs)

    def swap_in(self, seq_indices: list[int], kept: list[bool] | None = None) -> bool:
        """Move the host's row `seq_indices[s]` to row s."""
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
            used = np.asarray(found[2].dst)
            assert not np.array(kept)[used[used != NO_BLOCK]].any()
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
        # Each page is copied once, and pairs come first.
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
    """After any sequence of operations and moves, both pools are consistent."""

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

    @stateful.rule(order=st.permutations(range(6)), moved=st.integers(0, 15))
    def swap_out(self, order: list[int], moved: int) -> None:
        seq_indices = [order[s] if moved >> s & 1 else STAYS for s in range(4)]
        self.pools.swap_out(seq_indices)

    @stateful.rule(order=st.permutations(range(6)), moved=st.integers(0, 15))
    def swap_in(self, order: list[int], moved: int) -> None:
        seq_indices = [order[s] if moved >> s & 1 else STAYS for s in range(4)]
        self.pools.swap_in(seq_indices)

    @stateful.rule(order=st.permutations(range(6)), kept=st.integers(0, 511))
    def swap_in_with_kept_blocks(self, order: list[int], kept: int) -> None:
        self.pools.swap_in(order[:4], [bool(kept >> b & 1) for b in range(9)])

    @stateful.rule(rows=st.lists(st.booleans(), min_size=6, max_size=6))
    def free_on_the_host(self, rows: list[bool]) -> None:
        self.pools.host.free(rows)

    def teardown(self) -> None:
        self.pools.device.free([True] * 4)
        self.pools.host.free([True] * 6)
        assert not np.asarray(self.pools.device.state.ref_counts).any()
        assert not np.asarray(self.pools.host.state.ref_counts).any()


TestSwap = SwapMachine.TestCase
TestSwap.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def walk(pools: Pools, seed: int, num_steps: int = 60) -> None:
    """Mix steps as an engine does: shared prefixes are swapped out and in."""
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
                empty = np.setdiff1d(np.arange(6), away)[:4].tolist()
                is_moved = rng.random(4) < 0.5
                seq_indices = [
                    empty.pop() if moved and length and empty else STAYS
                    for moved, length in zip(is_moved, lengths, strict=True)
                ]
                pools.swap_out(seq_indices)
            case 4:
                todo = rng.permutation(away).tolist()
                seq_indices = [
                    todo.pop() if todo and not length and rng.random() < 0.8 else STAYS
                    for length in lengths
                ]
                pools.swap_in(seq_indices)


def test_walks_swap_in_both_directions_and_some_moves_are_refused():
    pools = Pools()
    for seed in range(8):
        walk(pools, seed)
    assert pools.num_moved > 60
    assert pools.num_refused > 5
    assert pools.device.num_copies > 5


def test_shared_blocks_are_copied_once_and_stay_shared():
    pools = Pools()
    pools.device.append([7, 0, 0, 0])  # 3 blocks, the last with one token
    pools.device.fork([0, 0, 0, -1])
    pools.device.append([1, 0, 0, 0])  # row 0 differs from here on
    assert pools.swap_out([5, 0, 3, STAYS])
    assert pools.num_moved == 4  # 3 tables of 3 blocks
    counts = np.asarray(pools.host.state.ref_counts)
    assert sorted(counts.tolist()) == [0, 0, 0, 1, 2, 3, 3]
    assert pools.swap_in([3, STAYS, 5, 0])
    assert sorted(np.asarray(pools.device.state.ref_counts).tolist())[-4:] == [
        *(1, 2, 3, 3)
    ]
    # Copy-on-write works as before.
    pools.device.append([1, 0, 0, 1])
    assert pools.device.num_copies == 2


def test_a_row_that_stays_keeps_the_blocks_that_it_shared():
    pools = Pools()
    pools.device.append([6, 0, 0, 0])
    pools.device.fork([0, 0, -1, -1])
    assert pools.swap_out([STAYS, 2, STAYS, STAYS])
    assert np.asarray(pools.device.state.ref_counts)[:2].tolist() == [1, 1]
    assert pools.swap_in([STAYS, STAYS, 2, STAYS])
    # It no longer shares these blocks with the row that stayed.
    assert sorted(np.asarray(pools.device.state.ref_counts).tolist())[-4:] == [1] * 4


def test_a_move_that_does_not_fit_changes_nothing():
    pools = Pools(host=HOST | dict(num_blocks=3))
    pools.device.append([9, 4, 0, 0])
    assert not pools.swap_out([0, 1, STAYS, STAYS])
    assert pools.swap_out([0, STAYS, STAYS, STAYS])
    assert not pools.swap_in([STAYS, 0, STAYS, STAYS])  # row 1 is in use
    assert pools.swap_in([STAYS, STAYS, 0, STAYS])


def test_rows_without_blocks_can_be_moved():
    pools = Pools()
    assert pools.swap_out([0, 1, 2, 3])
    assert pools.num_moved == 0


def test_states_of_different_sizes_raise():
    device = block_manager.init_state(**DEVICE)
    for name, value in (("block_size", 4), ("max_blocks_per_seq", 5)):
        host = block_manager.init_state(**HOST | {name: value})
        with pytest.raises(ValueError, match=f"host: expected .*{name}.*got {value}"):
            swap.swap_out_rows(device, host, i32([0, 1, 2, 3]))


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
def test_pages_are_swapped_out_and_in_for_every_layer(dtype):
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


def test_without_pairs_no_page_changes():
    cache, device = random_cache(7, 0, compat.DEVICE_MEMORY)
    host_cache, _ = random_cache(5, 1, compat.HOST_MEMORY)
    none = i32([NO_BLOCK] * 3)
    cache = jax.jit(kv_cache.swap_in_pages)(cache, host_cache, none, none)
    assert np.asarray(cache.k_pages).tobytes() == device[0].tobytes()


def test_a_loop_of_swaps_copies_neither_pool():
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
    def all_blocks(is_chosen, size, first_true=swap._first_true):
        return first_true(jnp.ones_like(is_chosen), size)

    def free_nothing(state, rows, free=block_manager.free):
        return free(state, jnp.zeros_like(rows))

    def shorter(state, is_selected, rows, select_rows=swap._select_rows):
        tables, lens = select_rows(state, is_selected, rows)
        return tables, jnp.maximum(lens - 1, 0)

    def all_rows(state, is_selected, rows, select_rows=swap._select_rows):
        return select_rows(state, jnp.ones_like(is_selected), rows)

    return {
        "blocks in use are copied": (swap, "_first_true", all_blocks),
        "moved rows keep their blocks": (block_manager, "free", free_nothing),
        "a token is lost": (swap, "_select_rows", shorter),
        "rows that stay are moved": (swap, "_select_rows", all_rows),
    }


@pytest.mark.parametrize("name", faults())
def test_a_planted_fault_is_found(name, monkeypatch):
    monkeypatch.setattr(*faults()[name])
    pools = Pools(jitted_moves())
    with pytest.raises(AssertionError):
        walk(pools, 0, num_steps=120)
