"""Random walks of the scheduler with a host pool: pages follow their rows.

Two simulated memories of tokens, for the device and the host, are written as the engine
writes pages. Every written token is a different number. So a row that reads back its
own history lost nothing when it was swapped out and in.
"""

import dataclasses
import types
from collections.abc import Sequence

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
from tests.support.scheduler_driver import NO_FAULT, QUICKLY, Driver, Fault, planted

pytestmark = pytest.mark.long

# Host pools for all requests, for few, and for almost none.
NUM_SWAP_BLOCKS = {"all": 64, "few": 5, "one": 1}
# Device pools and host pools; each pair is a program.
POOLS = [
    ("smallest", "one"),
    ("small", "all"),
    ("small", "few"),
    ("least_budget", "few"),
    ("wide_blocks", "all"),
]


def jitted_operations(faults: Sequence[Fault] = ()) -> types.SimpleNamespace:
    """The device operations of a step with swapping."""

    def plan(queue, rows, blocks, host, settings, fault, config):
        with planted(faults, fault):
            queue, rows, blocks, plan = scheduler.schedule(
                queue, rows, blocks, config, host=host, scheduler_params=settings
            )
        blocks, host, swapped = swap.swap_blocks(blocks, host, *plan.swaps)
        appended = block_manager.append(blocks, plan.num_tokens)
        return queue, rows, blocks, host, plan, swapped, appended

    return types.SimpleNamespace(
        plan=jax.jit(plan, static_argnames="config", compiler_options=QUICKLY),
        fork=jax.jit(block_manager.fork, compiler_options=QUICKLY),
        free=jax.jit(block_manager.free, compiler_options=QUICKLY),
    )


OPERATIONS = jitted_operations()


class SwapDriver(Driver):
    """A driver with a host pool, and a memory for each pool."""

    def __init__(self, config, operations=OPERATIONS, fault=NO_FAULT) -> None:
        super().__init__(config, operations, fault)
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
            scheduler.Queue(**self.queue),
            before,
            self.blocks,
            self.host,
            *self.arguments,
            config=self.program,
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
        self.queue = {name: np.array(getattr(queue, name)) for name in self.queue}
        now = self.queue["status"]
        assert set(np.flatnonzero((status != SWAPPED) & (now == SWAPPED))) == set(out)
        assert set(np.flatnonzero((status == SWAPPED) & (now == RUNNING))) == set(into)
        lost = set(before.tolist()) - set(self.rows.tolist()) - {NO_REQUEST}
        assert len(lost) == int(plan.num_preempted)
        self.num_preempted += len(lost)
        recomputed = lost - set(out.tolist())
        assert all(now[list(recomputed)] == WAITING)
        self._set_new_sources(recomputed)
        planned = self._check_plan(np.asarray(plan.num_tokens))
        # A step with work makes progress; the engine reports a stall if not.
        if np.isin(status, (WAITING, RUNNING, SWAPPED)).any():
            assert planned or lost or int(plan.num_admitted) or len(into)
        self._write(np.asarray(blocks.context_lens), appended)
        self.check_reads()
        return planned

    def first_running(self) -> list[int]:
        """Sequences that must keep their blocks: the first request, or first sample."""
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
        """Check that rows in both pools store prefixes of their histories."""
        pairs = [
            (row, seq_index)
            for row, seq_index in enumerate(self.rows)
            if seq_index >= 0
        ]
        away = np.flatnonzero(self.queue["status"] == SWAPPED)
        host_lens = np.asarray(self.host.context_lens)
        assert not host_lens[self.queue["status"] != SWAPPED].any()
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
        ended = np.zeros(away.shape, bool)
        ended[[seq_index for seq_index in seq_indices if away[seq_index]]] = True
        self.queue["status"][ended] = FINISHED
        self.host = self.operations.free(self.host, ended)
        super().end(seq_indices)


class SwapWalk(walks.Walk):
    """A walk with swapping, without a comparison with the slow scheduler."""

    def __init__(self, config, *operations) -> None:
        super().__init__(config)
        self.driver = SwapDriver(config, *operations)

    def has_work(self) -> bool:
        unfinished = (WAITING, RUNNING, SWAPPED)
        return bool(np.isin(self.driver.queue["status"], unfinished).any())

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
        # Each swap-in needs one step without tokens for the request.
        self.bound += 400
        return super().run(events)


def config_of(name: str, capacity: str):
    return dataclasses.replace(
        walks.WALKS[name], preemption="swap", num_swap_blocks=NUM_SWAP_BLOCKS[capacity]
    )


@pytest.mark.parametrize(("name", "capacity"), POOLS)
@settings(max_examples=4)
@given(events=walks.workloads(), is_eager=st.booleans())
def test_any_workload_ends_and_every_row_reads_its_history(
    name, capacity, events, is_eager
):
    walk = SwapWalk(config_of(name, capacity))
    walk.is_eager = is_eager
    walk.run(events)


@pytest.mark.parametrize(("name", "capacity"), POOLS)
def test_many_full_length_requests_end_in_any_two_pools(name, capacity):
    walk = SwapWalk(config_of(name, capacity))
    walk.run(walks.crowd(np.random.default_rng(0)))
    driver = walk.driver
    assert driver.num_swap_outs == driver.num_swap_ins
    if capacity == "all":
        assert driver.num_swap_outs > 5
    elif capacity == "one":
        assert driver.num_swap_outs < driver.num_preempted


def short_walks(operations, fault: int) -> list[SwapWalk]:
    """A few short walks, which find each of the faults."""
    found = []
    for seed in (4, 5, 21, 33):
        for capacity in ("all", "few"):
            walk = SwapWalk(config_of("small", capacity), operations, fault)
            walk.run(walks.random_workload(seed))
            found.append(walk)
    return found


def test_the_walks_that_find_faults_have_all_kinds_of_events(faulty_operations):
    drivers = [walk.driver for walk in short_walks(faulty_operations, NO_FAULT)]
    assert sum(driver.num_swap_outs for driver in drivers) > 10
    assert sum(driver.num_preempted - driver.num_swap_outs for driver in drivers) > 2
    assert sum(driver.num_shared for driver in drivers) > 5


def admit_swapped(swap_in_request, queue, rows, swaps, *others):
    """Swapped requests that are not swapped in can be admitted like waiting ones."""
    queue, rows, swaps = swap_in_request(queue, rows, swaps, *others)
    status = jnp.where(queue.status == SWAPPED, WAITING, queue.status)
    return dataclasses.replace(queue, status=status), rows, swaps


def unlimited_host(fits_on_host, device, host, preempted, ranks, is_same):
    """The host pool is assumed to have space for every row."""
    return preempted


def no_demand(demand, host, seq_indices):
    """Swapped-in sequences are assumed to need no blocks."""
    return demand(host, seq_indices) * 0


FAULTS = {
    "swapped requests are admitted": Fault(
        preemption, "swap_in_request", admit_swapped
    ),
    "the host pool is unlimited": Fault(swap, "fits_on_host", unlimited_host),
    "swapped-in blocks are not counted": Fault(swap, "swap_in_demand", no_demand),
}


@pytest.fixture(scope="module")
def faulty_operations():
    """One program per pool with all faults, of which an argument selects one."""
    return jitted_operations(list(FAULTS.values()))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, faulty_operations):
    with pytest.raises(AssertionError):
        short_walks(faulty_operations, list(FAULTS).index(name))
