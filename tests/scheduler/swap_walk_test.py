"""Random walks of the scheduler with a host's pool: pages follow their rows.

Beside the scheduler's arrays lie two simulated memories of tokens, the device's and the
host's, written as the engine writes pages. Every token ever written is another number,
so a row that reads back its own history lost nothing on its way to the host and back.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import scheduler
from jpaged.kv import block_manager, swap
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import (
    EMPTY,
    FINISHED,
    NO_REQUEST,
    RUNNING,
    SWAPPED,
    WAITING,
    preemption,
)
from tests.scheduler import walk_test as walks
from tests.support.scheduler_driver import QUICKLY, Driver, plant, share_again

pytestmark = pytest.mark.long

# Room for all, for few, and for hardly anybody.
NUM_SWAP_BLOCKS = {"all": 64, "few": 5, "one": 1}


def jitted_operations() -> types.SimpleNamespace:
    """What a step runs on the device, with what swapping adds."""

    def plan(queue, rows, blocks, host, config):
        queue, rows, blocks, plan = scheduler.schedule(
            queue, rows, blocks, config, host=host
        )
        blocks, host, swapped = swap.swap_blocks(blocks, host, *plan.swaps)
        appended = block_manager.append(blocks, plan.num_tokens)
        return queue, rows, blocks, host, plan, swapped, appended

    def fork(blocks, parents):
        return block_manager.fork(blocks, parents)

    def free(host, seq_indices):
        return block_manager.free(host, seq_indices)

    return types.SimpleNamespace(
        plan=jax.jit(plan, static_argnames="config", compiler_options=QUICKLY),
        fork=jax.jit(fork, compiler_options=QUICKLY),
        free=jax.jit(free, compiler_options=QUICKLY),
    )


OPERATIONS = jitted_operations()


class SwapDriver(Driver):
    """A driver with a host's pool, and a memory for each."""

    def __init__(self, config, operations=OPERATIONS) -> None:
        super().__init__(config, operations)
        self.host = block_manager.init_state(
            num_blocks=config.num_swap_blocks,
            block_size=config.block_size,
            max_seqs=config.max_num_requests,
            max_blocks_per_seq=config.max_blocks_per_seq,
        )
        shape = (config.num_blocks, config.block_size)
        self.memory = np.full(shape, -1, np.int64)
        self.host_memory = np.full((config.num_swap_blocks, shape[1]), -1, np.int64)
        self.num_swap_outs = self.num_swap_ins = self.num_shared = 0

    def step(self) -> dict[int, int]:
        before, status = self.rows, self.queue["status"].copy()
        first = self.first_running()
        queue, rows, blocks, host, plan, swapped, appended = self.operations.plan(
            scheduler.Queue(**self.queue), before, self.blocks, self.host, self.config
        )
        after, appended = appended
        for state in (blocks, host, after):
            assert block_manager.violations(state) == []
        assert bool(appended.ok)
        assert bool(swapped.ok)
        out, into = (np.asarray(seq_indices) for seq_indices in plan.swaps)
        out, into = out[out != NO_REQUEST], into[into != NO_REQUEST]
        assert not len(out) or not len(into)
        if (status == SWAPPED).any():
            assert int(plan.num_admitted) == 0
        assert not set(first) & set(out.tolist())
        self.num_swap_outs += len(out)
        self.num_swap_ins += len(into)
        self._copy(swapped)
        self.blocks, self.host, self.rows = after, host, np.array(rows)
        self.queue = {
            f.name: np.array(getattr(queue, f.name)) for f in dataclasses.fields(queue)
        }
        now = self.queue["status"]
        assert set(np.flatnonzero((status != SWAPPED) & (now == SWAPPED))) == set(out)
        assert set(np.flatnonzero((status == SWAPPED) & (now == RUNNING))) == set(into)
        lost = set(before.tolist()) - set(self.rows.tolist()) - {NO_REQUEST}
        assert len(lost) == int(plan.num_preempted)
        self.num_preempted += len(lost)
        again = lost - set(out.tolist())
        assert all(now[list(again)] == WAITING)
        for seq_index, (source, shared) in share_again(
            again, self.histories, self.queue
        ):
            self.queue["sources"][seq_index] = source
            self.queue["shared_lens"][seq_index] = shared
        planned = self._check_plan(np.asarray(plan.num_tokens))
        # A step with work does something: the engine would say that it stalled.
        if np.isin(status, (WAITING, RUNNING, SWAPPED)).any():
            assert planned or lost or int(plan.num_admitted) or len(into)
        self._write(np.asarray(blocks.context_lens), appended)
        self.check_reads()
        return planned

    def first_running(self) -> list[int]:
        """Who must not lose its blocks: the first, or of samples the first of them."""
        running = np.flatnonzero(self.queue["status"] == RUNNING).tolist()
        if not running:
            return []
        keys = ("priorities", "arrivals")
        first = min(running, key=lambda p: (*(self.queue[k][p] for k in keys), p))
        if not self.queue["is_lockstep"][first]:
            return [first]
        leader = self.queue["leaders"][first]
        return [p for p in running if self.queue["leaders"][p] == leader]

    def _copy(self, swapped) -> None:
        for copies, source, target in (
            (swapped.out, self.memory, self.host_memory),
            (swapped.into, self.host_memory, self.memory),
        ):
            src, dst = np.asarray(copies.src), np.asarray(copies.dst)
            target[dst[dst != NO_BLOCK]] = source[src[src != NO_BLOCK]]

    def _write(self, starts: np.ndarray, appended) -> None:
        src, dst = np.asarray(appended.copy_src), np.asarray(appended.copy_dst)
        is_copy = dst != NO_BLOCK
        self.memory[dst[is_copy]] = self.memory[src[is_copy]]
        self.num_copies += int(is_copy.sum())
        tables, size = np.asarray(self.blocks.block_tables), self.config.block_size
        ends = np.asarray(self.blocks.context_lens)
        for row, seq_index in enumerate(self.rows.tolist()):
            for position in range(int(starts[row]), int(ends[row])):
                token = self.histories[seq_index][position]
                self.memory[tables[row, position // size], position % size] = token

    def check_reads(self) -> None:
        """Rows, here and on the host, hold the beginnings of their histories."""
        pairs = [
            (row, seq_index)
            for row, seq_index in enumerate(self.rows)
            if seq_index >= 0
        ]
        away = np.flatnonzero(self.queue["status"] == SWAPPED)
        held = np.asarray(self.host.context_lens)
        assert not held[self.queue["status"] != SWAPPED].any()
        for state, memory, mine in (
            (self.blocks, self.memory, pairs),
            (
                self.host,
                self.host_memory,
                [(seq_index, seq_index) for seq_index in away],
            ),
        ):
            tables = np.asarray(state.block_tables)
            lens = np.asarray(state.context_lens).tolist()
            for row, seq_index in mine:
                read = memory[tables[row][tables[row] != NO_BLOCK]].reshape(-1)
                history = self.histories[seq_index][: lens[row]]
                assert read[: lens[row]].tolist() == history
        self.num_shared += int((np.asarray(self.host.ref_counts) > 1).sum())

    def end(self, seq_indices: list[int]) -> None:
        away = self.queue["status"] == SWAPPED
        gone = np.zeros(away.shape, bool)
        gone[[seq_index for seq_index in seq_indices if away[seq_index]]] = True
        self.queue["status"][gone] = FINISHED
        self.host = self.operations.free(self.host, gone)
        super().end(seq_indices)


class SwapWalk(walks.Walk):
    """A walk with swapping; without a slow scheduler beside it."""

    def __init__(self, config, operations=OPERATIONS) -> None:
        super().__init__(config)
        self.driver = SwapDriver(config, operations)

    def has_work(self) -> bool:
        going = (WAITING, RUNNING, SWAPPED)
        return bool(np.isin(self.driver.queue["status"], going).any())

    def step(self) -> None:
        self.driver.step()
        self.driver.commit()
        self.release()

    def end(self, seq_indices: list[int]) -> None:
        self.driver.end(seq_indices)
        self.release()

    def finish(self) -> None:
        super().finish()
        assert not np.asarray(self.driver.host.ref_counts).any()
        assert (self.driver.queue["status"] == EMPTY).all()

    def run(self, events) -> int:
        # Somebody who returns takes a step for it, each time that he was sent away.
        self.bound += 400
        return super().run(events)


def config_of(name: str, room: str):
    return dataclasses.replace(
        walks.WALKS[name], preemption="swap", num_swap_blocks=NUM_SWAP_BLOCKS[room]
    )


@pytest.mark.parametrize("room", NUM_SWAP_BLOCKS)
@pytest.mark.parametrize("name", ["smallest", "small", "least_budget"])
@settings(max_examples=4)
@given(events=walks.workloads(), is_eager=st.booleans())
def test_any_workload_ends_and_every_row_reads_its_history(
    name, room, events, is_eager
):
    walk = SwapWalk(config_of(name, room))
    walk.is_eager = is_eager
    walk.run(events)


@pytest.mark.parametrize("room", NUM_SWAP_BLOCKS)
@pytest.mark.parametrize("name", walks.WALKS)
def test_a_crowd_at_full_length_ends_in_any_two_pools(name, room):
    walk = SwapWalk(config_of(name, room))
    walk.run(walks.crowd(np.random.default_rng(0)))
    driver = walk.driver
    assert driver.num_swap_outs == driver.num_swap_ins
    if name == "roomy":
        assert driver.num_preempted == 0
    elif room == "all":
        assert driver.num_swap_outs > 5
    elif room == "one":
        assert driver.num_swap_outs < driver.num_preempted


def walk_all(operations) -> list[SwapWalk]:
    """Few walks, in which each of the faults shows."""
    configs = [config_of("small", "all"), config_of("small", "few")]
    found = []
    for seed in (4, 5, 21, 33):
        for config in configs:
            walk = SwapWalk(config, operations)
            walk.run(walks.random_workload(seed))
            found.append(walk)
    return found


def test_the_walks_have_all_that_can_happen():
    drivers = [walk.driver for walk in walk_all(OPERATIONS)]
    assert sum(driver.num_swap_outs for driver in drivers) > 10
    assert sum(driver.num_preempted - driver.num_swap_outs for driver in drivers) > 2
    assert sum(driver.num_shared for driver in drivers) > 5


def as_if_waiting(back, queue, rows, swaps, *others):
    """Who is not brought back waits like others."""
    queue, rows, swaps = back(queue, rows, swaps, *others)
    status = jnp.where(queue.status == SWAPPED, WAITING, queue.status)
    return dataclasses.replace(queue, status=status), rows, swaps


def room_for_all(leaving, device, host, dropped, ranks, is_same):
    """The host is thought to have room for everybody."""
    return dropped


def free_of_charge(demand, host, seq_indices):
    """Who comes back is thought to take no blocks."""
    return demand(host, seq_indices) * 0


FAULTS = {
    "swapped ones that are admitted": (preemption, "bring_back", as_if_waiting),
    "a host with room for all": (swap, "leaving", room_for_all),
    "blocks that are not asked for": (swap, "demand", free_of_charge),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_walks_find(name, monkeypatch):
    plant(monkeypatch, *FAULTS[name])
    with pytest.raises(AssertionError):
        walk_all(jitted_operations())
