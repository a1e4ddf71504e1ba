"""The scheduler: cases worked by hand, and random walks beside a slow one in Python.

No model runs here. A driver does what the engine does around `schedule`: it appends
the planned tokens and, where a row has computed all that it knows, gives it one more
token or ends it.
"""

import dataclasses
import functools

import block_manager_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jpaged import block_manager, scheduler
from jpaged.block_manager import NO_BLOCK
from jpaged.config import EngineConfig
from jpaged.scheduler import EMPTY, FINISHED, NO_REQUEST, RUNNING, WAITING

CONFIG = EngineConfig(
    num_blocks=16,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=10,
    max_num_requests=12,
    watermark=0.0,
)
schedule = jax.jit(scheduler.schedule, static_argnames="config")
append = jax.jit(functools.partial(block_manager.append))
free = jax.jit(functools.partial(block_manager.free))


@dataclasses.dataclass
class Asked:
    """What is submitted: one request, `num_samples` sequences of it."""

    prompt: int
    outputs: tuple[int, ...]  # tokens that each sample generates before it ends
    priority: int = 0


class Driver:
    """The scheduler with the engine's bookkeeping around it, and no model."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        places = config.max_num_requests
        self.queue = {
            field.name: np.zeros(places, np.int32)
            for field in dataclasses.fields(scheduler.Queue)
        }
        self.queue["leaders"] = np.arange(places, dtype=np.int32)
        self.outputs = np.zeros(places, np.int32)
        self.rows = np.full(config.max_num_seqs, NO_REQUEST, np.int32)
        self.blocks = block_manager.init_state(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_seqs=config.max_num_seqs,
            max_blocks_per_seq=config.max_blocks_per_seq,
        )
        self.num_arrived = self.num_preempted = self.num_copies = 0

    def submit(self, *requests: Asked) -> list[list[int]]:
        places = []
        for asked in requests:
            empty = np.flatnonzero(self.queue["status"] == EMPTY)
            mine = empty[: len(asked.outputs)].tolist()
            priority = asked.priority if self.config.policy == "priority" else 0
            assert len(mine) == len(asked.outputs)
            for place, output in zip(mine, asked.outputs, strict=True):
                values = dict(
                    status=WAITING,
                    arrivals=self.num_arrived,
                    priorities=priority,
                    prompt_lens=asked.prompt,
                    num_tokens=asked.prompt,
                    leaders=mine[0],
                    num_preemptions=0,
                )
                for name, value in values.items():
                    self.queue[name][place] = value
                self.outputs[place] = output
            self.num_arrived += 1
            places.append(mine)
        return places

    def step(self) -> dict[int, int]:
        """Schedules and commits one step; the tokens of each place that took part."""
        device = scheduler.Queue(**{k: jnp.asarray(v) for k, v in self.queue.items()})
        queue, rows, blocks, plan = schedule(
            device, jnp.asarray(self.rows), self.blocks, config=self.config
        )
        assert block_manager.violations(blocks) == []
        self.rows = np.array(rows)
        planned = np.asarray(plan.num_tokens)
        self.blocks, appended = append(blocks, plan.num_tokens)
        assert bool(appended.ok)
        assert block_manager.violations(self.blocks) == []
        self.num_copies += int((np.asarray(appended.copy_dst) != NO_BLOCK).sum())
        self.num_preempted += int(plan.num_preempted)
        self.queue = {
            f.name: np.array(getattr(queue, f.name)) for f in dataclasses.fields(queue)
        }
        assert int(planned.sum()) <= self.config.max_num_batched_tokens
        assert (planned[self.rows == NO_REQUEST] == 0).all()
        return {int(self.rows[r]): int(planned[r]) for r in np.flatnonzero(planned)}

    def commit(self) -> None:
        """Each row whose tokens are all computed gets one more, or ends."""
        lengths = np.asarray(self.blocks.context_lens)
        ended = np.zeros(len(self.rows), bool)
        for row, place in enumerate(self.rows):
            known = self.queue["num_tokens"][place]
            if place == NO_REQUEST or lengths[row] < known:
                continue
            self.queue["num_tokens"][place] += 1
            generated = known + 1 - self.queue["prompt_lens"][place]
            if generated >= self.outputs[place]:
                self.queue["status"][place] = FINISHED
                ended[row] = True
        self.rows[ended] = NO_REQUEST
        self.blocks = free(self.blocks, jnp.asarray(ended))

    def go(self) -> dict[int, int]:
        planned = self.step()
        self.commit()
        return planned

    def running(self) -> set[int]:
        return set(self.rows[self.rows != NO_REQUEST].tolist())

    def release(self) -> None:
        """Finished places are empty again, when no sample of theirs still lives."""
        live = np.isin(self.queue["status"], (WAITING, RUNNING))
        leaders = set(self.queue["leaders"][live].tolist())
        for place in np.flatnonzero(self.queue["status"] == FINISHED).tolist():
            if place not in leaders:
                self.queue["status"][place] = EMPTY


def one(prompt: int, output: int = 5, priority: int = 0) -> Asked:
    return Asked(prompt, (output,), priority)


def test_decodes_come_first_and_prompts_share_the_rest_in_order_of_arrival():
    driver = Driver(CONFIG)
    driver.submit(one(3), one(4))
    assert driver.go() == {0: 3, 1: 4}
    driver.submit(one(6), one(9))
    # 10 tokens: two decodes, the 6 of request 2, and 2 of the 9 of request 3.
    assert driver.go() == {0: 1, 1: 1, 2: 6, 3: 2}
    # Three decodes, and the last 7 of request 3, for which exactly 7 are left.
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 7}
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_long_prompt_takes_several_steps():
    driver = Driver(CONFIG)
    driver.submit(one(25, 2))
    assert [driver.go() for _ in range(4)] == [{0: 10}, {0: 10}, {0: 5}, {0: 1}]
    assert driver.running() == set()


def test_who_does_not_fit_holds_up_all_behind_it():
    driver = Driver(CONFIG)
    # 16 blocks: request 0 takes 6, 1 wants 7 and fits, 2 wants 5 and does not; 3 would.
    driver.submit(one(24), one(28), one(20), one(1))
    driver.go()
    assert driver.running() == {0}  # request 0 used up the budget
    for _ in range(3):
        driver.go()
    assert driver.running() == {0, 1}
    assert driver.queue["status"].tolist()[:4] == [RUNNING, RUNNING, WAITING, WAITING]


def test_no_more_rows_are_given_than_there_are():
    driver = Driver(CONFIG)
    driver.submit(*[one(1, 2)] * 6)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == {4: 1, 5: 1}


def test_the_watermark_stays_free_while_others_run():
    config = dataclasses.replace(CONFIG, watermark=0.5)  # 8 of 16 blocks
    for prompt, is_admitted in ((24, True), (25, False)):
        driver = Driver(config)
        driver.submit(one(4, 9))
        driver.go()
        # 1 block is used and 1 more as good as taken: 14 of 16, of which 8 stay.
        driver.submit(one(prompt))
        driver.go()
        assert driver.running() == ({0, 1} if is_admitted else {0})
    while 0 in driver.running():
        driver.go()
    driver.go()
    assert driver.running() == {1}  # alone it may take all


def test_the_fewest_latest_rows_are_preempted():
    # 6 blocks of 4: three prompts of 8 fill the pool, and each wants a third block.
    config = dataclasses.replace(CONFIG, num_blocks=6, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(one(8), one(8), one(8))
    assert driver.go() == {0: 8, 1: 8, 2: 8}
    # Request 2 gives back 2 blocks, which is what 0 and 1 want.
    assert driver.go() == {0: 1, 1: 1}
    assert driver.queue["status"].tolist()[:3] == [RUNNING, RUNNING, WAITING]
    assert driver.queue["num_preemptions"].tolist()[:3] == [0, 0, 1]
    # It knows 9 tokens, needs 3 blocks, and waits for them: 5 output tokens.
    for _ in range(3):
        assert driver.go() == {0: 1, 1: 1}
    assert driver.go() == {2: 9}
    assert driver.num_preempted == 1


def test_the_first_row_goes_on_when_all_others_must_give_way():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=32)
    driver = Driver(config)
    driver.submit(one(16, 16), one(15, 16))
    driver.go()
    while driver.running() != {0}:
        assert driver.go()[0] == 1
    assert driver.queue["num_preemptions"].tolist()[:2] == [0, 1]
    assert driver.queue["status"][1] == WAITING


def test_priority_admits_the_smaller_first_and_preempts_the_larger():
    config = dataclasses.replace(
        CONFIG, num_blocks=6, max_num_batched_tokens=24, policy="priority"
    )
    driver = Driver(config)
    driver.submit(one(8, priority=2), one(8, priority=0), one(8, priority=1))
    driver.submit(one(4, priority=0))
    assert driver.step() == {1: 8, 3: 4, 2: 8}
    driver.commit()
    # One block is left: 1 and 3 grow, so 2, the last of them, gives way.
    driver.go()
    assert driver.running() == {1, 3}
    assert driver.queue["num_preemptions"].tolist()[:4] == [0, 0, 1, 0]


def test_samples_wait_for_their_leader_and_then_map_its_blocks():
    driver = Driver(CONFIG)
    driver.submit(Asked(14, (5, 5, 5)))
    # 14 tokens in two steps; the samples get rows in the second, and compute nothing.
    assert driver.go() == {0: 10}
    assert driver.running() == {0}
    assert driver.go() == {0: 4}
    assert driver.running() == {0, 1, 2}
    # They take 13 tokens from the leader and compute the 14th: two copies of the last
    # block, and of three owners the last writes in place.
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.num_copies == 2
    tables = np.asarray(driver.blocks.block_tables)[:3]
    assert (tables[:, :3] == tables[0, :3]).all()
    assert len(set(tables[:, 3].tolist())) == 3
    assert np.asarray(driver.blocks.context_lens).tolist() == [15, 14, 14, 0]


def test_a_sample_whose_leader_has_ended_computes_the_prompt_itself():
    driver = Driver(dataclasses.replace(CONFIG, max_num_seqs=1))
    driver.submit(Asked(6, (1, 2)))
    assert driver.go() == {0: 6}
    assert driver.go() == {1: 6}
    assert driver.go() == {1: 1}


def test_a_prompt_of_one_token_has_nothing_to_share():
    driver = Driver(CONFIG)
    driver.submit(Asked(1, (3, 3)))
    assert driver.go() == {0: 1, 1: 1}
    assert driver.num_copies == 0


def test_admission_leaves_room_for_copies_of_shared_blocks():
    config = dataclasses.replace(
        CONFIG, num_blocks=3, block_size=16, max_num_batched_tokens=64
    )
    driver = Driver(config)
    driver.submit(Asked(11, (5, 5)))
    driver.go()
    driver.submit(one(8), one(8))
    # Both samples hold one block, and their next tokens make two of it. So of the two
    # free blocks one is left, for the first of the two requests.
    assert driver.go() == {0: 1, 1: 1, 2: 8}
    assert driver.num_copies == 1


# ---- beside a slow scheduler


class SlowScheduler:
    """The same rules over Python lists, and the lists of `SlowBlockManager`.

    What would fit is not computed but tried out on a copy.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = block_manager_model.SlowBlockManager(
            config.num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_blocks_per_seq,
        )

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def rank(self, queue, place: int) -> tuple[int, int, int]:
        return (queue["priorities"][place], queue["arrivals"][place], place)

    def shared(self, queue, place: int) -> int:
        leader = queue["leaders"][place]
        if leader == place or queue["status"][leader] not in (WAITING, RUNNING):
            return 0
        return int(queue["prompt_lens"][place]) - 1

    def demand(self, tokens: list[int]) -> list[int]:
        """Blocks that each row would take, were the pool without end."""
        trial = self.copied()
        trial.num_blocks += 10_000
        held = [len(table) for table in trial.tables]
        assert trial.append([[0] * n for n in tokens])
        grown = [len(t) - h for t, h in zip(trial.tables, held, strict=True)]
        return [n + (row in trial.copied_rows) for row, n in enumerate(grown)]

    def copied(self) -> block_manager_model.SlowBlockManager:
        blocks = self.blocks
        copied = block_manager_model.SlowBlockManager(
            blocks.num_blocks,
            blocks.block_size,
            blocks.max_seqs,
            blocks.max_blocks_per_seq,
        )
        pages = {id(p): list(p) for table in blocks.tables for p in table}
        copied.tables = [[pages[id(p)] for p in table] for table in blocks.tables]
        copied.histories = [list(history) for history in blocks.histories]
        return copied

    def step(self, queue, rows: list[int]) -> tuple[list[int], list[int], int]:
        """Rows, their tokens, and how many were preempted; changes queue and blocks."""
        config, blocks = self.config, self.blocks
        rows = list(rows)
        live = [row for row, place in enumerate(rows) if place != NO_REQUEST]
        live.sort(key=lambda row: self.rank(queue, rows[row]))

        wanted = dict.fromkeys(range(len(rows)), 0)
        before = [len(history) for history in blocks.histories]
        parents, cuts = list(range(len(rows))), [-1] * len(rows)
        for row in live:
            place = rows[row]
            wanted[row] = int(queue["num_tokens"][place]) - before[row]
            leader = int(queue["leaders"][place])
            prefix = int(queue["prompt_lens"][place]) - 1
            if leader in (place, *([] if leader in rows else [leader])) or not prefix:
                continue
            if before[row] == 0:
                wanted[row] = 0
                if before[rows.index(leader)] >= prefix:
                    parents[row], cuts[row] = rows.index(leader), prefix
                    wanted[row] = int(queue["num_tokens"][place]) - prefix
        blocks.fork(parents)
        blocks.truncate(cuts)

        tokens = [1 if wanted[row] == 1 else 0 for row in range(len(rows))]
        budget = config.max_num_batched_tokens - sum(tokens)
        for row in live:
            if wanted[row] > 1:
                tokens[row] = min(budget, wanted[row])
                budget -= tokens[row]

        needed = self.demand(tokens)
        num_preempted = 0
        if sum(needed) > blocks.num_free():
            # The others' demand is counted as if the last were still there.
            while len(live) > 1 and sum(needed[row] for row in live) > (
                blocks.num_free()
            ):
                row = live.pop()
                queue["status"][rows[row]] = WAITING
                queue["num_preemptions"][rows[row]] += 1
                rows[row], tokens[row] = NO_REQUEST, 0
                parents = [NO_BLOCK if r == row else r for r in range(len(rows))]
                blocks.fork(parents)
                num_preempted += 1
        elif budget > 0:
            self.admit(queue, rows, tokens, needed, budget)
        return rows, tokens, num_preempted

    def admit(self, queue, rows, tokens, needed, budget) -> None:
        config, blocks = self.config, self.blocks
        free = blocks.num_free()
        is_any = any(place != NO_REQUEST for place in rows)
        free -= config.num_watermark_blocks if is_any else 0
        for row, place in enumerate(rows):
            if place == NO_REQUEST:
                continue
            known = self.num_blocks(int(queue["num_tokens"][place]))
            mapped = self.shared(queue, place) // config.block_size
            still = known - max(len(blocks.tables[row]), mapped)
            free -= max(still, needed[row])
        waiting = np.flatnonzero(queue["status"] == WAITING).tolist()
        empty = [row for row, place in enumerate(rows) if place == NO_REQUEST]
        for place in sorted(waiting, key=lambda place: self.rank(queue, place)):
            shared = self.shared(queue, place)
            length = int(queue["num_tokens"][place])
            free -= self.num_blocks(length) - shared // config.block_size
            if free < 0 or not empty or budget <= 0:
                return
            row = empty.pop(0)
            rows[row] = place
            tokens[row] = 0 if shared else min(budget, length)
            budget -= 0 if shared else length
        # Samples are admitted with their leader, before its status changes.


def walk(config: EngineConfig, arrivals: list[tuple[int, Asked]]) -> Driver:
    """Runs all to the end, each step beside the slow scheduler."""
    driver, slow = Driver(config), SlowScheduler(config)
    todo = sorted(arrivals, key=lambda pair: pair[0])
    number = 0
    while todo or driver.running() or (driver.queue["status"] == WAITING).any():
        while todo and todo[0][0] <= number:
            empty = (driver.queue["status"] == EMPTY).sum()
            if empty < len(todo[0][1].outputs):
                break
            driver.submit(todo.pop(0)[1])
        queue = {name: column.copy() for name, column in driver.queue.items()}
        rows, tokens, preempted = slow.step(queue, driver.rows.tolist())
        for place in rows:
            if place != NO_REQUEST:
                queue["status"][place] = RUNNING
        first = min(
            driver.running(), key=lambda p: slow.rank(driver.queue, p), default=None
        )
        had_work = bool(driver.running() or (driver.queue["status"] == WAITING).any())
        before = driver.num_preempted
        planned = driver.step()

        assert driver.rows.tolist() == rows
        got = [planned.get(place, 0) for place in rows]
        assert [
            g if p != NO_REQUEST else 0 for g, p in zip(got, rows, strict=True)
        ] == (tokens)
        assert driver.num_preempted - before == preempted
        for name, column in driver.queue.items():
            np.testing.assert_array_equal(column, queue[name], err_msg=name)
        assert slow.blocks.append([[0] * n for n in tokens])
        lengths = [len(history) for history in slow.blocks.histories]
        assert np.asarray(driver.blocks.context_lens).tolist() == lengths
        free_blocks = int(block_manager.num_free_blocks(driver.blocks))
        assert free_blocks == slow.blocks.num_free()
        # Progress: work means tokens, and the first row is never sent away.
        assert bool(planned) == had_work
        assert first is None or (first in driver.running() and planned.get(first))

        driver.commit()
        ended = driver.rows == NO_REQUEST
        slow.blocks.fork([NO_BLOCK if e else r for r, e in enumerate(ended)])
        driver.release()
        number += 1
        assert number < 3000
    assert int(block_manager.num_free_blocks(driver.blocks)) == config.num_blocks
    return driver


# The smallest legal pool, 8 blocks of 4 for 32 tokens, one a little larger, and more.
WALKS = {
    "smallest": dataclasses.replace(CONFIG, num_blocks=8),
    "small": dataclasses.replace(CONFIG, num_blocks=11, watermark=0.1),
    "least_budget": dataclasses.replace(
        CONFIG, num_blocks=10, max_num_batched_tokens=4, policy="priority"
    ),
    "wide_blocks": dataclasses.replace(
        CONFIG, num_blocks=3, block_size=16, max_num_batched_tokens=40
    ),
    "roomy": dataclasses.replace(CONFIG, num_blocks=40, watermark=0.2),
}


@st.composite
def requests(draw) -> list[tuple[int, Asked]]:
    found = []
    for _ in range(draw(st.integers(1, 9))):
        prompt = draw(st.integers(1, 31))
        most = 32 - prompt
        num_samples = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
        outputs = draw(
            st.lists(st.integers(1, most), min_size=num_samples, max_size=num_samples)
        )
        step = draw(st.integers(0, 20))
        priority = draw(st.integers(0, 2))
        found.append((step, Asked(prompt, tuple(outputs), priority)))
    return found


@pytest.mark.parametrize("name", WALKS)
@settings(max_examples=15)
@given(arrivals=requests())
@example(
    arrivals=[
        (0, Asked(20, (1,))),
        (0, Asked(11, (5, 5))),
        (0, Asked(8, (6, 3, 9))),
        (2, Asked(30, (2,))),
    ]
)
def test_any_workload_ends_and_every_step_follows_the_slow_scheduler(name, arrivals):
    walk(WALKS[name], arrivals)


def test_the_walks_do_preempt_and_copy():
    rng = np.random.default_rng(0)
    arrivals = [
        (int(rng.integers(10)), Asked(int(p), (int(31 - p), 5, 1), 0))
        for p in rng.integers(4, 20, 8)
    ]
    driver = walk(WALKS["small"], arrivals)
    assert driver.num_preempted > 5
    assert driver.num_copies > 5
