"""Random walks of the scheduler, each step beside a slow one in Python lists.

Requests of all kinds arrive, wait, are preempted, end or are ended in small pools; the
two must decide alike in every step, and every walk must end within a bound of steps.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_driver import OPERATIONS, Asked, Driver, jitted_operations
from scheduler_model import SlowScheduler

from jpaged import block_manager, scheduler
from jpaged.block_manager import NO_BLOCK
from jpaged.config import EngineConfig
from jpaged.scheduler import EMPTY, FINISHED, NO_REQUEST, RUNNING, WAITING

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
    does: Asked | str  # a request; "pin", "unpin" or "end" a request
    number: int = 0  # tokens to pin or share, or which of them to end
    shares: int = 0  # of a request: begins like the prefix pinned so many before


class Walk:
    """One walk: the driver and the slow scheduler, and what must hold of them."""

    def __init__(self, config: EngineConfig, operations=OPERATIONS) -> None:
        self.driver = Driver(config, operations)
        self.slow = SlowScheduler(config)
        self.is_eager = False
        self.going: dict[int, tuple[Asked, list[int]]] = {}
        self.pinned: list[int] = []
        self.num_arrived = self.num_overtakers = 0
        self.bound = 1
        self.num_withheld = 0

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
            case Asked() as asked:
                return self.submit(asked, event)
            case "pin":
                going = [asked for asked, _ in self.going.values()]
                if driver.may_pin(event.number, going):
                    self.pinned.append(driver.pin(event.number))
                    self.bound += event.number + 1
                    self.num_overtakers += 1
            case "unpin" if self.pinned:
                place = self.pinned.pop(event.number % len(self.pinned))
                self.end([place])
            case "end" if self.going:
                name = sorted(self.going)[event.number % len(self.going)]
                self.end(self.going[name][1])
        return True

    def submit(self, asked: Asked, event: Event) -> bool:
        driver = self.driver
        if event.shares and self.pinned:
            place = self.pinned[-event.shares % len(self.pinned)]
            shared = min(event.number, len(driver.histories[place]))
            asked = dataclasses.replace(asked, prefix=place, shared=shared)
        # As long as the pool allows: the hardest that is let in.
        while not driver.is_legal(asked):
            outputs = tuple(min(n, max(asked.outputs) - 1) for n in asked.outputs)
            if max(outputs) < 1:
                return True
            asked = dataclasses.replace(asked, outputs=outputs)
        num_places = len(asked.outputs) + asked.num_held
        if (driver.queue["status"] == EMPTY).sum() < num_places:
            return False
        (places,) = driver.submit(asked)
        self.going[self.num_arrived] = (asked, places)
        self.num_arrived += 1
        self.num_overtakers += driver.config.policy == "priority"
        tokens = len(asked.outputs) * asked.prompt + sum(asked.outputs)
        if asked.moves:
            tokens = len(asked.outputs) * (asked.prompt + max(asked.outputs))
        self.bound += tokens + len(asked.outputs)
        return True

    def end(self, places: list[int]) -> None:
        self.driver.end(places)
        self.settle_slow()
        self.release()

    def release(self) -> None:
        self.driver.release(is_eager=self.is_eager)
        status = self.driver.queue["status"]
        for name, (asked, places) in list(self.going.items()):
            self.going[name] = (asked, [p for p in places if status[p] != EMPTY])
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
        assert planned == {place: count for place, count in tokens if count}
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
        assert not first or any(planned.get(place) for place in first)
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

    def settle_slow(self) -> None:
        self.slow.blocks.fork(self.driver.parents)

    def finish(self) -> None:
        """Only what is pinned is left, and goes."""
        driver = self.driver
        assert driver.num_free() == driver.config.num_blocks - len(
            {block for place in self.pinned for block in driver.table(place)}
        )
        self.end(list(self.pinned))
        assert driver.num_free() == driver.config.num_blocks
        assert (driver.rows == NO_REQUEST).all()
        assert (driver.queue["status"] == EMPTY).all()


@st.composite
def histories(draw) -> list[Event]:
    """What a user does in a walk."""
    found = []
    for _ in range(draw(st.integers(1, 9))):
        step = draw(st.integers(0, 20))
        number = draw(st.integers(1, 31))
        does = draw(st.sampled_from(["ask"] * 6 + ["pin", "pin", "unpin", "end"]))
        if does != "ask":
            found.append(Event(step, does, number))
            continue
        prompt = draw(st.integers(1, 31))
        most = 32 - prompt
        count = draw(st.sampled_from([1, 1, 2, 3, 4, 5]))
        is_lockstep = draw(st.booleans()) and 1 < count < 5
        length = st.one_of(st.just(most), st.integers(1, most))
        asked = Asked(
            prompt,
            tuple(draw(length) for _ in range(count)),
            priority=draw(st.integers(0, 2)),
            is_lockstep=is_lockstep,
            moves=is_lockstep and draw(st.booleans()),
            num_held=draw(st.integers(0, 2)) if is_lockstep else 0,
        )
        found.append(Event(step, asked, number, shares=draw(st.integers(0, 2))))
    return found


@pytest.mark.parametrize("name", WALKS)
@settings(max_examples=15)
@given(events=histories(), is_eager=st.booleans())
def test_any_workload_ends_and_every_step_follows_the_slow_scheduler(
    name, events, is_eager
):
    walk = Walk(WALKS[name])
    walk.is_eager = is_eager
    walk.run(events)
