"""Random walks of the scheduler, compared in each step with a slow one in Python.

Requests of all kinds arrive, wait, are preempted, and end or are ended, in small pools.
The two must make the same decision in every step, and every walk must end within a
bound of steps.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from jpaged.scheduler import EMPTY, NO_REQUEST, RETAINED, RUNNING, WAITING, queue, step
from tests.support.scheduler_driver import (
    NO_FAULT,
    Driver,
    Fault,
    RequestSpec,
    jitted_operations,
)
from tests.support.scheduler_model import SlowScheduler

CONFIG = EngineConfig(
    num_blocks=8,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=10,
    max_num_requests=16,
    max_num_prefixes=2,
    watermark=0.0,
)
# The smallest pool that is accepted (8 blocks of 4 for 32 tokens), and larger ones.
WALKS = {
    "smallest": CONFIG,
    "small": dataclasses.replace(CONFIG, num_blocks=11, watermark=0.1),
    "least_budget": dataclasses.replace(
        CONFIG, num_blocks=10, max_num_batched_tokens=4, policy="priority"
    ),
    "wide_blocks": dataclasses.replace(
        CONFIG, num_blocks=4, block_size=16, max_num_batched_tokens=40
    ),
    "roomy": dataclasses.replace(CONFIG, num_blocks=40, watermark=0.2),
}


@dataclasses.dataclass(frozen=True)
class Event:
    """An action of a user after a number of steps."""

    step: int
    does: RequestSpec | str  # submit a request, or "pin", "unpin" or "end" one
    number: int = 0  # tokens to pin or share, or which request or prefix to end
    shares: int = 0  # for a request: it shares the prefix pinned so many pins ago


class Walk:
    """One walk of the driver and the slow scheduler, with checks in every step."""

    def __init__(self, config: EngineConfig, *operations) -> None:
        self.driver = Driver(config, *operations)
        self.slow = SlowScheduler(config)
        self.is_eager = False
        self.unfinished: dict[int, tuple[RequestSpec, list[int]]] = {}
        self.pinned: list[int] = []
        self.num_arrived = self.num_overtakers = 0
        self.bound = 1
        self.num_withheld = self.num_pinned = 0

    def run(self, events: list[Event]) -> int:
        """Run all events and steps until nothing is left; return the step count."""
        todo = sorted(events, key=lambda event: event.step)
        number = 0
        while todo or self.has_work():
            while todo and todo[0].step <= number and self.handle(todo[0]):
                todo.pop(0)
            self.step()
            number += 1
            last = max([event.step for event in events], default=0)
            assert number <= last + self.bound * (1 + self.num_overtakers)
        self.finish()
        return number

    def has_work(self) -> bool:
        return bool(np.isin(self.driver.queue["status"], (WAITING, RUNNING)).any())

    # ---- events

    def handle(self, event: Event) -> bool:
        """Do it if it is accepted; return False if it must wait for a free entry."""
        driver = self.driver
        match event.does:
            case RequestSpec() as params:
                return self.submit(params, event)
            case "pin":
                unfinished = [params for params, _ in self.unfinished.values()]
                if driver.can_pin(event.number, unfinished):
                    self.pinned.append(driver.pin(event.number))
                    self.bound += event.number + 1
                    self.num_overtakers += 1
                    self.num_pinned += 1
            case "unpin" if self.pinned:
                seq_index = self.pinned.pop(event.number % len(self.pinned))
                self.end([seq_index])
            case "end" if self.unfinished:
                name = sorted(self.unfinished)[event.number % len(self.unfinished)]
                self.end(self.unfinished[name][1])
        return True

    def submit(self, params: RequestSpec, event: Event) -> bool:
        driver = self.driver
        if event.shares and self.pinned:
            seq_index = self.pinned[-event.shares % len(self.pinned)]
            shared = min(event.number, len(driver.histories[seq_index]))
            params = dataclasses.replace(params, prefix=seq_index, shared=shared)
        # The longest outputs that the pool accepts are the hardest case.
        while not driver.is_accepted(params):
            outputs = tuple(min(n, max(params.outputs) - 1) for n in params.outputs)
            if max(outputs) < 1:
                return True
            params = dataclasses.replace(params, outputs=outputs)
        table_size = len(params.outputs) + params.num_retained
        if (driver.queue["status"] == EMPTY).sum() < table_size:
            return False
        (seq_indices,) = driver.submit(params)
        self.unfinished[self.num_arrived] = (params, seq_indices)
        self.num_arrived += 1
        self.num_overtakers += driver.config.policy == "priority"
        tokens = len(params.outputs) * params.prompt + sum(params.outputs)
        if params.moves:
            tokens = len(params.outputs) * (params.prompt + max(params.outputs))
        self.bound += tokens + len(params.outputs)
        return True

    def end(self, seq_indices: list[int]) -> None:
        self.driver.end(seq_indices)
        self.slow.blocks.fork(self.driver.parents)
        self.release()

    def release(self) -> None:
        self.driver.release(is_eager=self.is_eager)
        status = self.driver.queue["status"]
        for name, (params, seq_indices) in list(self.unfinished.items()):
            live = [p for p in seq_indices if status[p] != EMPTY]
            self.unfinished[name] = (params, live)
            if not live:
                del self.unfinished[name]

    # ---- steps

    def step(self) -> None:
        driver, slow = self.driver, self.slow
        queue = {name: column.copy() for name, column in driver.queue.items()}
        plan = slow.step(queue, driver.rows.tolist())
        first = self.first()
        had_work = self.has_work()
        before = driver.num_preempted
        planned = driver.step()

        assert driver.rows.tolist() == plan.rows
        tokens = zip(plan.rows, plan.tokens, strict=True)
        assert planned == {seq_index: count for seq_index, count in tokens if count}
        assert driver.num_preempted - before == plan.num_preempted
        for name, column in driver.queue.items():
            if name not in ("sources", "shared_lens"):  # the driver changes them
                np.testing.assert_array_equal(column, queue[name], err_msg=name)
        assert slow.blocks.append([[0] * n for n in plan.tokens])
        lengths = [len(history) for history in slow.blocks.histories]
        assert np.asarray(driver.blocks.context_lens).tolist() == lengths
        assert driver.num_free() == slow.blocks.num_free()
        # Progress: each step with work has tokens, or gives a row to a new sequence.
        assert bool(planned or plan.num_admitted) == had_work
        assert set(first) <= driver.running()
        assert not first or any(planned.get(seq_index) for seq_index in first)
        self.num_withheld += sum(
            int(driver.queue["num_tokens"][p] - driver.length(p) == 1)
            for p in driver.running()
            if driver.queue["is_lockstep"][p] and not driver.queue["has_ended"][p]
        )

        driver.commit()
        slow.blocks.fork(driver.parents)
        self.release()

    def first(self) -> list[int]:
        """Sequences that must not be preempted, and of which one gets a token."""
        requests = self.slow.requests(sorted(self.driver.running()))
        if not requests:
            return []
        is_lockstep = self.driver.queue["is_lockstep"][requests[0][0]]
        return requests[0] if is_lockstep else requests[0][:1]

    def finish(self) -> None:
        """Check that only pinned prefixes are left, and end them."""
        driver = self.driver
        assert driver.num_free() == driver.config.num_blocks - len(
            {block for seq_index in self.pinned for block in driver.table(seq_index)}
        )
        self.end(list(self.pinned))
        assert driver.num_free() == driver.config.num_blocks
        assert (driver.rows == NO_REQUEST).all()
        assert (driver.queue["status"] == EMPTY).all()


def workload(integer: Callable[[int, int], int]) -> list[Event]:
    """A user's events in a walk; `integer(first, last)` chooses a number."""

    def choose(*choices):
        return choices[integer(0, len(choices) - 1)]

    events = []
    for _ in range(integer(1, 9)):
        step, number = integer(0, 20), integer(1, 31)
        does = choose("ask", "ask", "ask", "ask", "ask", "pin", "pin", "unpin", "end")
        if does != "ask":
            events.append(Event(step, does, number))
            continue
        prompt = integer(1, choose(3, 31))
        most = 32 - prompt
        count = choose(1, 1, 2, 3, 4, 5)
        is_lockstep = 1 < count < 5 and choose(True, False)
        params = RequestSpec(
            prompt,
            tuple(choose(most, integer(1, most)) for _ in range(count)),
            priority=integer(0, 2),
            is_lockstep=is_lockstep,
            moves=is_lockstep and choose(True, False),
            num_retained=integer(0, 2) if is_lockstep else 0,
        )
        events.append(Event(step, params, number, shares=integer(0, 2)))
    return events


@st.composite
def workloads(draw) -> list[Event]:
    return workload(lambda first, last: draw(st.integers(first, last)))


def random_workload(seed: int) -> list[Event]:
    rng = np.random.default_rng(seed)
    return workload(lambda first, last: int(rng.integers(first, last + 1)))


@pytest.mark.parametrize("name", WALKS)
@settings(max_examples=4)
@given(events=workloads(), is_eager=st.booleans())
def test_any_workload_ends_and_every_step_equals_the_slow_scheduler(
    name, events, is_eager
):
    walk = Walk(WALKS[name])
    walk.is_eager = is_eager
    walk.run(events)


def crowd(rng: np.random.Generator) -> list[Event]:
    """Requests of full length at the same time.

    Lockstep requests whose rows differ from the start, samples, and some requests that
    share a prefix.
    """
    events = [Event(0, "pin", 6)]
    for number in range(8):
        prompt = int(rng.integers(1, 8))
        count = int(rng.integers(1, 5))
        is_lockstep = number % 2 == 0 and count > 1
        params = RequestSpec(prompt, (32 - prompt,) * count, is_lockstep=is_lockstep)
        events.append(Event(number // 4, params, number=6, shares=number % 3))
    return events


@pytest.mark.parametrize("name", WALKS)
def test_many_full_length_requests_end_in_any_pool(name):
    walk = Walk(WALKS[name])
    walk.run(crowd(np.random.default_rng(0)))
    assert walk.num_withheld > 0
    assert walk.driver.num_copies > 5
    assert (walk.driver.num_preempted > 5) == (name != "roomy")


# ---- planted faults that the walks must find


def no_lockstep(hold, queue, rows, blocks, remaining):
    """Each lockstep row computes its last token as soon as it can."""
    return remaining


def map_one_token(map_sources, queue, rows, blocks):
    """New rows map only one token."""
    lens = jnp.minimum(queue.shared_lens, 1)
    return map_sources(dataclasses.replace(queue, shared_lens=lens), rows, blocks)


def count_shared_blocks(exclusive, state, order):
    """A preempted row's shared blocks count as free."""
    return cdiv(state.context_lens, state.block_size)


def order_by_row(ranks, queue, rows, scores=None):
    """The order is the order of rows, not of requests."""
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where(rows == NO_REQUEST, index + rows.shape[0], index)


def retained_not_first(ranks, queue, rows, scores=None):
    """Pinned prefixes are ordered like other requests, not before all."""
    status = jnp.where(queue.status == RETAINED, RUNNING, queue.status)
    priorities = jnp.where(queue.status == RETAINED, 1, queue.priorities)
    seen = dataclasses.replace(queue, status=status, priorities=priorities)
    return ranks(seen, rows)


def any_source(mapped, queue):
    """Tokens are also mapped from sources that have ended."""
    own = jnp.arange(queue.sources.size)
    return jnp.where(queue.sources != own, queue.shared_lens, 0)


def separate_rows(same, queue, rows):
    """Each row counts as a separate request."""
    return jnp.eye(rows.shape[0], dtype=jnp.bool_) & (rows != NO_REQUEST)[:, None]


def ended_rows_run(idle, queue, rows):
    """Rows that have ended continue to compute."""
    has_ended = jnp.zeros_like(queue.has_ended)
    return idle(dataclasses.replace(queue, has_ended=has_ended), rows)


def all_free_blocks(spare, queue, rows, blocks, needed, settings):
    """Blocks that running rows will need are given to new requests."""
    return block_manager.num_free_blocks(blocks)


FAULTS = {
    "lockstep rows do not wait": Fault(step, "_hold_lockstep", no_lockstep),
    "rows map one token": Fault(step, "_map_sources", map_one_token),
    "shared blocks count as free": Fault(
        block_manager, "exclusive_blocks", count_shared_blocks
    ),
    "rows have another order": Fault(queue, "ranks", order_by_row),
    "prefixes come after others": Fault(queue, "ranks", retained_not_first),
    "ended sources are mapped": Fault(queue, "mapped_tokens", any_source),
    "rows are preempted one by one": Fault(queue, "same_request", separate_rows),
    "ended rows run": Fault(queue, "idle_rows", ended_rows_run),
    "needed blocks are given away": Fault(queue, "spare_blocks", all_free_blocks),
}


@pytest.fixture(scope="module")
def faulty_operations():
    """One program with all faults, of which an argument selects one."""
    return jitted_operations(list(FAULTS.values()))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, faulty_operations):
    with pytest.raises(AssertionError):
        short_walks(faulty_operations, list(FAULTS).index(name))


def test_the_walks_that_find_faults_have_all_kinds_of_events(faulty_operations):
    walks = short_walks(faulty_operations, NO_FAULT)
    assert sum(walk.driver.num_preempted for walk in walks) > 10
    assert sum(walk.driver.num_copies for walk in walks) > 10
    assert sum(walk.num_withheld for walk in walks) > 4
    assert sum(walk.num_pinned for walk in walks) > 1


def short_walks(operations, fault: int) -> list[Walk]:
    """A few short walks, which find each of the faults."""
    seeds = (4, 5, 21)
    walks = [Walk(WALKS["small"], operations, fault) for _ in seeds]
    for seed, walk in zip(seeds, walks, strict=True):
        walk.run(random_workload(seed))
    return walks
