"""Random walks of the scheduler, each step beside a slow one in Python lists.

Requests of all kinds arrive, wait, are preempted, end or are ended in small pools; the
two must decide alike in every step, and every walk must end within a bound of steps.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from jpaged.scheduler import EMPTY, NO_REQUEST, RETAINED, RUNNING, WAITING, queue, step
from tests.support.scheduler_driver import (
    OPERATIONS,
    Driver,
    SequenceParams,
    jitted_operations,
    plant,
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
# The smallest legal pool, 8 blocks of 4 for 32 tokens, a little larger ones, and more.
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
    """Something that a user does once so many steps have been made."""

    step: int
    does: SequenceParams | str  # a request; "pin", "unpin" or "end" a request
    number: int = 0  # tokens to pin or share, or which of them to end
    shares: int = 0  # of a request: begins like the prefix pinned so many before


class Walk:
    """One walk: the driver and the slow scheduler, and what must hold of them."""

    def __init__(self, config: EngineConfig, operations=OPERATIONS) -> None:
        self.driver = Driver(config, operations)
        self.slow = SlowScheduler(config)
        self.is_eager = False
        self.going: dict[int, tuple[SequenceParams, list[int]]] = {}
        self.pinned: list[int] = []
        self.num_arrived = self.num_overtakers = 0
        self.bound = 1
        self.num_withheld = self.num_pinned = 0

    def run(self, events: list[Event]) -> int:
        """All events and steps, until nothing is left to do; the number of steps."""
        todo = sorted(events, key=lambda event: event.step)
        number = 0
        while todo or self.has_work():
            while todo and todo[0].step <= number and self.happens(todo[0]):
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

    def happens(self, event: Event) -> bool:
        """Does it, if it is allowed; False where it has to wait for a place."""
        driver = self.driver
        match event.does:
            case SequenceParams() as params:
                return self.submit(params, event)
            case "pin":
                going = [params for params, _ in self.going.values()]
                if driver.may_pin(event.number, going):
                    self.pinned.append(driver.pin(event.number))
                    self.bound += event.number + 1
                    self.num_overtakers += 1
                    self.num_pinned += 1
            case "unpin" if self.pinned:
                seq_index = self.pinned.pop(event.number % len(self.pinned))
                self.end([seq_index])
            case "end" if self.going:
                name = sorted(self.going)[event.number % len(self.going)]
                self.end(self.going[name][1])
        return True

    def submit(self, params: SequenceParams, event: Event) -> bool:
        driver = self.driver
        if event.shares and self.pinned:
            seq_index = self.pinned[-event.shares % len(self.pinned)]
            shared = min(event.number, len(driver.histories[seq_index]))
            params = dataclasses.replace(params, prefix=seq_index, shared=shared)
        # As long as the pool allows: the hardest that is let in.
        while not driver.is_legal(params):
            outputs = tuple(min(n, max(params.outputs) - 1) for n in params.outputs)
            if max(outputs) < 1:
                return True
            params = dataclasses.replace(params, outputs=outputs)
        table_size = len(params.outputs) + params.num_held
        if (driver.queue["status"] == EMPTY).sum() < table_size:
            return False
        (seq_indices,) = driver.submit(params)
        self.going[self.num_arrived] = (params, seq_indices)
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
        for name, (params, seq_indices) in list(self.going.items()):
            self.going[name] = (params, [p for p in seq_indices if status[p] != EMPTY])
            if not self.going[name][1]:
                del self.going[name]

    # ---- steps

    def step(self) -> None:
        driver, slow = self.driver, self.slow
        queue = {name: column.copy() for name, column in driver.queue.items()}
        made = slow.step(queue, driver.rows.tolist())
        first = self.first()
        had_work = self.has_work()
        before = driver.num_preempted
        planned = driver.step()

        assert driver.rows.tolist() == made.rows
        tokens = zip(made.rows, made.tokens, strict=True)
        assert planned == {seq_index: count for seq_index, count in tokens if count}
        assert driver.num_preempted - before == made.num_preempted
        for name, column in driver.queue.items():
            if name not in ("sources", "shared_lens"):  # the driver's own
                np.testing.assert_array_equal(column, queue[name], err_msg=name)
        assert slow.blocks.append([[0] * n for n in made.tokens])
        lengths = [len(history) for history in slow.blocks.histories]
        assert np.asarray(driver.blocks.context_lens).tolist() == lengths
        assert driver.num_free() == slow.blocks.num_free()
        # Progress: work means tokens, or rows for those who begin without.
        assert bool(planned or made.num_admitted) == had_work
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
        """Who must not be preempted now, and gets a token: one of them at least."""
        requests = self.slow.requests(sorted(self.driver.running()))
        if not requests:
            return []
        is_lockstep = self.driver.queue["is_lockstep"][requests[0][0]]
        return requests[0] if is_lockstep else requests[0][:1]

    def finish(self) -> None:
        """Only what is pinned is left, and goes."""
        driver = self.driver
        assert driver.num_free() == driver.config.num_blocks - len(
            {block for seq_index in self.pinned for block in driver.table(seq_index)}
        )
        self.end(list(self.pinned))
        assert driver.num_free() == driver.config.num_blocks
        assert (driver.rows == NO_REQUEST).all()
        assert (driver.queue["status"] == EMPTY).all()


def workload(integer: Callable[[int, int], int]) -> list[Event]:
    """What a user does in a walk; `integer` chooses from its first to its last."""

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
        params = SequenceParams(
            prompt,
            tuple(choose(most, integer(1, most)) for _ in range(count)),
            priority=integer(0, 2),
            is_lockstep=is_lockstep,
            moves=is_lockstep and choose(True, False),
            num_held=integer(0, 2) if is_lockstep else 0,
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
@settings(max_examples=8)
@given(events=workloads(), is_eager=st.booleans())
def test_any_workload_ends_and_every_step_follows_the_slow_scheduler(
    name, events, is_eager
):
    walk = Walk(WALKS[name])
    walk.is_eager = is_eager
    walk.run(events)


def crowd(rng: np.random.Generator) -> list[Event]:
    """Requests at their full length, all at once: lockstep ones that diverge at once,
    samples, and some that share a prefix."""
    events = [Event(0, "pin", 6)]
    for number in range(8):
        prompt = int(rng.integers(1, 8))
        count = int(rng.integers(1, 5))
        is_lockstep = number % 2 == 0 and count > 1
        params = SequenceParams(prompt, (32 - prompt,) * count, is_lockstep=is_lockstep)
        events.append(Event(number // 4, params, number=6, shares=number % 3))
    return events


@pytest.mark.parametrize("name", WALKS)
def test_a_crowd_at_full_length_ends_in_any_pool(name):
    walk = Walk(WALKS[name])
    walk.run(crowd(np.random.default_rng(0)))
    assert walk.num_withheld > 0
    assert walk.driver.num_copies > 5
    assert (walk.driver.num_preempted > 5) == (name != "roomy")


# ---- and the walks find faults


def no_one_waits(keep, queue, rows, blocks, wanted):
    """Lockstep rows compute their last tokens when each of them can."""
    return wanted


def one_token_mapped(join, queue, rows, blocks):
    """New rows map one token, and wait for no more."""
    lens = jnp.minimum(queue.shared_lens, 1)
    return join(dataclasses.replace(queue, shared_lens=lens), rows, blocks)


def shared_blocks_returned(count, state, order):
    """A row's blocks all come back when it goes, shared or not."""
    return -(-state.context_lens // state.block_size)


def order_of_rows(ranks, queue, rows):
    """The order is that of the rows, not of the requests."""
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where(rows == NO_REQUEST, index + rows.shape[0], index)


def held_by_nobody(ranks, queue, rows):
    """Pinned prefixes come in their order, not before all."""
    status = jnp.where(queue.status == RETAINED, RUNNING, queue.status)
    priorities = jnp.where(queue.status == RETAINED, 1, queue.priorities)
    seen = dataclasses.replace(queue, status=status, priorities=priorities)
    return ranks(seen, rows)


def any_source(mapped, queue, seq_indices, hits=None):
    """Sources that have ended count as well."""
    return jnp.where(
        queue.sources[seq_indices] != seq_indices, queue.shared_lens[seq_indices], 0
    )


def each_alone(same, queue, rows):
    """Each row is a request of its own."""
    return jnp.eye(rows.shape[0], dtype=jnp.bool_) & (rows != NO_REQUEST)[:, None]


def ended_take_part(idle, queue, rows):
    """Rows that have ended compute on."""
    has_ended = jnp.zeros_like(queue.has_ended)
    return idle(dataclasses.replace(queue, has_ended=has_ended), rows)


def no_promises(spare, queue, rows, blocks, needed, config):
    """What running rows will take is given away."""
    return block_manager.num_free_blocks(blocks)


FAULTS = {
    "lockstep rows that do not wait": (step, "_keep_step", no_one_waits),
    "rows that map one token": (step, "_join_sources", one_token_mapped),
    "shared blocks that count as returned": (
        block_manager,
        "exclusive_blocks",
        shared_blocks_returned,
    ),
    "rows in another order": (queue, "ranks", order_of_rows),
    "prefixes behind others": (queue, "ranks", held_by_nobody),
    "sources that have ended": (queue, "mapped_tokens", any_source),
    "rows preempted one by one": (queue, "same_request", each_alone),
    "ended rows that take part": (queue, "idle_rows", ended_take_part),
    "promised blocks given away": (queue, "spare_blocks", no_promises),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_walks_find(name, monkeypatch):
    plant(monkeypatch, *FAULTS[name])
    operations = jitted_operations()
    with pytest.raises(AssertionError):
        _walk_all(operations)


def test_the_walks_in_which_faults_are_found_have_all_that_can_happen():
    walks = _walk_all(OPERATIONS)
    assert sum(walk.driver.num_preempted for walk in walks) > 10
    assert sum(walk.driver.num_copies for walk in walks) > 10
    assert sum(walk.num_withheld for walk in walks) > 4
    assert sum(walk.num_pinned for walk in walks) > 1


def _walk_all(operations) -> list["Walk"]:
    # Few and short ones, in which each of the faults shows.
    seeds = (4, 5, 21)
    walks = [Walk(WALKS["small"], operations) for _ in seeds]
    for seed, walk in zip(seeds, walks, strict=True):
        walk.run(random_workload(seed))
    return walks
