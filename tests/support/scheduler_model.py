"""Slow scheduler: the same rules for Python lists and `SlowBlockManager`'s pages.

It does not compute how many rows fit: it removes rows until the rest fits.
"""

import copy
import dataclasses
import itertools

import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import BEFORE_ALL, NO_REQUEST, RETAINED, RUNNING, WAITING
from tests.support import block_manager_model


@dataclasses.dataclass
class SlowPlan:
    """Decision of the slow scheduler, which also changes the queue and its pages."""

    rows: list[int]
    tokens: list[int]
    num_preempted: int = 0
    num_admitted: int = 0


class SlowScheduler:
    """Makes one decision after the other, in the order of the requests."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = block_manager_model.SlowBlockManager(
            config.num_blocks,
            config.block_size,
            config.num_rows,
            config.max_blocks_per_seq,
        )

    def step(self, queue: dict[str, np.ndarray], rows: list[int]) -> SlowPlan:
        self.queue, self.rows = queue, list(rows)
        remaining = self.map_sources()
        self.hold_lockstep(remaining)
        tokens = self.split_budget(remaining)
        plan = SlowPlan(self.rows, tokens)
        needed = self.demand(tokens)
        if sum(needed) > self.blocks.num_free():
            self.preempt(plan, needed)
        else:
            self.admit(plan, needed)
        return plan

    # ---- the current state

    def rank(self, seq_index: int) -> tuple[int, int, int]:
        return (
            self.queue["priorities"][seq_index],
            self.queue["arrivals"][seq_index],
            seq_index,
        )

    def live(self) -> list[int]:
        """Rows of running sequences, in order."""
        used = [
            row for row, seq_index in enumerate(self.rows) if seq_index != NO_REQUEST
        ]
        used = [r for r in used if self.queue["status"][self.rows[r]] == RUNNING]
        return sorted(used, key=lambda row: self.rank(self.rows[row]))

    def requests(self, seq_indices: list[int]) -> list[list[int]]:
        """The sequence indices in order, grouped by request."""
        seq_indices = sorted(seq_indices, key=self.rank)
        groups = itertools.groupby(
            seq_indices, key=lambda p: int(self.queue["leaders"][p])
        )
        return [list(group) for _, group in groups]

    def known(self, seq_index: int) -> int:
        """Tokens that a sequence has to have computed."""
        ended = self.queue["has_ended"][seq_index]
        return 0 if ended else int(self.queue["num_tokens"][seq_index])

    def mapped(self, seq_index: int) -> int:
        source = int(self.queue["sources"][seq_index])
        if source == seq_index:
            return 0
        is_available = self.queue["status"][source] in (RUNNING, RETAINED)
        if self.queue["status"][source] == WAITING:
            # The source is admitted with the same request, or before all others.
            is_available = (
                self.queue["arrivals"][source] == self.queue["arrivals"][seq_index]
            )
            is_available |= self.queue["priorities"][source] == BEFORE_ALL
        return int(self.queue["shared_lens"][seq_index]) if is_available else 0

    def num_blocks(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.config.block_size)

    def demand(self, tokens: list[int]) -> list[int]:
        """Blocks that each row would need in a pool of unlimited size."""
        trial = copy.deepcopy(self.blocks)
        trial.num_blocks += 10_000
        before = [len(table) for table in trial.tables]
        assert trial.append([[0] * n for n in tokens])
        grown = [len(t) - n for t, n in zip(trial.tables, before, strict=True)]
        return [n + (row in trial.copied_rows) for row, n in enumerate(grown)]

    # ---- tokens of each row

    def map_sources(self) -> dict[int, int]:
        """New rows map their source's pages; return the tokens left to compute."""
        remaining, blocks = {}, self.blocks
        for row in self.live():
            seq_index = self.rows[row]
            have = len(blocks.histories[row])
            remaining[row] = max(self.known(seq_index) - have, 0)
            source = int(self.queue["sources"][seq_index])
            shared = int(self.queue["shared_lens"][seq_index])
            is_new = remaining[row] and not have and shared and source != seq_index
            if not is_new or source not in self.rows:
                continue
            remaining[row] = 0
            # A source comes earlier in the order, and may just have mapped its own.
            parent = self.rows.index(source)
            if len(blocks.histories[parent]) >= shared:
                own = range(len(self.rows))
                blocks.fork([parent if r == row else r for r in own])
                blocks.truncate([shared if r == row else -1 for r in own])
                remaining[row] = self.known(seq_index) - shared
        return remaining

    def hold_lockstep(self, remaining: dict[int, int]) -> None:
        """Lockstep rows wait with their last token while one has more tokens left."""
        for request in self.requests([self.rows[row] for row in remaining]):
            rows = [self.rows.index(seq_index) for seq_index in request]
            if not self.queue["is_lockstep"][request[0]]:
                continue
            left = [
                self.known(seq_index) - len(self.blocks.histories[row])
                for row, seq_index in zip(rows, request, strict=True)
            ]
            if max(left) > 1:
                remaining.update({row: max(remaining[row] - 1, 0) for row in rows})

    def split_budget(self, remaining: dict[int, int]) -> list[int]:
        tokens = [int(remaining.get(row) == 1) for row in range(len(self.rows))]
        budget = self.config.max_num_batched_tokens - sum(tokens)
        for row in self.live():
            if remaining[row] > 1:
                tokens[row] = min(budget, remaining[row])
                budget -= tokens[row]
        return tokens

    # ---- preemption

    def preempt(self, plan: SlowPlan, needed: list[int]) -> None:
        """Preempt the last request until the rest fits; of the first, its samples."""

        def fits() -> bool:
            # The demand of the others is the one before the preemption.
            left = sum(needed[row] for row in self.live())
            return left <= self.blocks.num_free()

        while not fits():
            *others, last = self.requests([self.rows[row] for row in self.live()])
            if not others and self.queue["is_lockstep"][last[0]]:
                return
            if not others:
                last = last[1:][-1:]
            if not last:
                return
            for seq_index in last:
                row = self.rows.index(seq_index)
                self.queue["status"][seq_index] = WAITING
                self.queue["num_preemptions"][seq_index] += 1
                self.rows[row], plan.tokens[row] = NO_REQUEST, 0
                own = range(len(self.rows))
                self.blocks.fork([NO_BLOCK if r == row else r for r in own])
                plan.num_preempted += 1

    # ---- admission

    def admit(self, plan: SlowPlan, needed: list[int]) -> None:
        budget = self.config.max_num_batched_tokens - sum(plan.tokens)
        free = self.spare_blocks(needed)
        empty = [
            row for row, seq_index in enumerate(self.rows) if seq_index == NO_REQUEST
        ]
        num_running = len(self.live())
        empty = empty[: max(self.config.max_num_seqs - num_running, 0)]
        running = {int(self.queue["leaders"][self.rows[row]]) for row in self.live()}
        waiting = np.flatnonzero(self.queue["status"] == WAITING).tolist()
        for number, request in enumerate(self.requests(waiting)):
            costs = [
                self.num_blocks(self.known(seq_index))
                - self.mapped(seq_index) // self.config.block_size
                for seq_index in request
            ]
            costs = [max(cost, 0) for cost in costs]
            if budget <= 0:
                return
            together = len(request)
            if together > len(empty) or sum(costs) > free:
                # If no other request runs, as many samples as fit are admitted.
                leader = int(self.queue["leaders"][request[0]])
                if (
                    number
                    or running - {leader}
                    or self.queue["is_lockstep"][request[0]]
                ):
                    return
                sums = list(itertools.accumulate(costs))
                together = sum(total <= free for total in sums)
                together = min(together, len(empty))
            for seq_index, cost in zip(
                request[:together], costs[:together], strict=True
            ):
                row = empty.pop(0)
                self.rows[row] = seq_index
                is_new = self.queue["num_preemptions"][seq_index] == 0
                if is_new and self.queue["leaders"][seq_index] == seq_index:
                    self.queue["num_cached"][seq_index] += self.mapped(seq_index)
                self.queue["status"][seq_index] = RUNNING
                wants = self.known(seq_index) - bool(
                    self.queue["is_lockstep"][seq_index]
                )
                wants = 0 if self.mapped(seq_index) else max(wants, 0)
                plan.tokens[row] = max(min(budget, wants), 0)
                budget -= wants
                free -= cost
                plan.num_admitted += 1
            if together < len(request):
                return

    def spare_blocks(self, needed: list[int]) -> int:
        """Free blocks without the running rows' demand and the watermark."""
        free = self.blocks.num_free()
        for row in self.live():
            seq_index = self.rows[row]
            used = len(self.blocks.tables[row])
            mapped = self.mapped(seq_index) // self.config.block_size
            left = self.num_blocks(self.known(seq_index)) - max(used, mapped)
            free -= max(left, needed[row])
        watermark = int(self.config.watermark * self.config.num_blocks)
        return free - (watermark if self.live() else 0)
