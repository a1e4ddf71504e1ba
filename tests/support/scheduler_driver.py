"""The scheduler with the engine's bookkeeping around it, without a model.

The driver does what the engine does around `schedule`: it appends the planned tokens.
If a sequence has computed all its known tokens, it gets one more token or ends. Every
token is a different number, so sequences only have tokens in common that one of them
got from the other.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import scheduler
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.engine import limits
from jpaged.kv import block_manager
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import EMPTY, FINISHED, NO_REQUEST, RETAINED, RUNNING, WAITING

QUICKLY = {"xla_backend_optimization_level": 0}  # compile quickly
BEFORE_ALL = np.iinfo(np.int32).min
NO_FAULT = -1


class Fault(NamedTuple):
    """A planted fault: `change(original, *args)` in place of a module's function."""

    module: Any
    name: str
    change: Callable


def planted(faults: Sequence[Fault], number: jax.Array) -> contextlib.ExitStack:
    """While a program is traced, plant faults of which `number` selects one.

    So one program has all faults, and no fault costs a compilation of its own.
    """
    stack = contextlib.ExitStack()
    for module, name in dict.fromkeys((fault.module, fault.name) for fault in faults):
        original = getattr(module, name)
        changes = {
            index: fault.change
            for index, fault in enumerate(faults)
            if (fault.module, fault.name) == (module, name)
        }
        selected = functools.partial(_select, original, changes, number)
        imported = [m for n, m in sys.modules.items() if n.startswith("jpaged.sched")]
        for one in {id(one): one for one in [module, *imported]}.values():
            if getattr(one, name, None) is original:
                stack.enter_context(mock.patch.object(one, name, selected))
    return stack


def _select(original, changes: dict[int, Callable], number: jax.Array, *args):
    result = original(*args)
    for index, change in changes.items():
        result = jax.tree.map(
            lambda right, wrong, index=index: jnp.where(number == index, wrong, right),
            result,
            change(original, *args),
        )
    return result


def program_config(config: EngineConfig) -> EngineConfig:
    """The config that a program is compiled for: the settings are its arguments."""
    return dataclasses.replace(
        config, max_num_seqs=4, max_num_batched_tokens=64, watermark=0.0
    )


def jitted_operations(faults: Sequence[Fault] = ()) -> types.SimpleNamespace:
    """The device operations of a step, compiled once for all walks."""

    def plan(queue, rows, blocks, settings, fault, config):
        with planted(faults, fault):
            queue, rows, blocks, plan = scheduler.schedule(
                queue, rows, blocks, config, scheduler_params=settings
            )
        return queue, rows, blocks, plan, block_manager.append(blocks, plan.num_tokens)

    return types.SimpleNamespace(
        plan=jax.jit(plan, static_argnames="config", compiler_options=QUICKLY),
        fork=jax.jit(block_manager.fork, compiler_options=QUICKLY),
    )


OPERATIONS = jitted_operations()


@dataclasses.dataclass(frozen=True)
class RequestSpec:
    """Lengths and kind of a request, with an output length for each sequence."""

    prompt: int
    outputs: tuple[int, ...]  # tokens that each sequence generates before it ends
    priority: int = 0
    is_lockstep: bool = False
    # For lockstep requests: at each decision, random rows continue from other rows, and
    # so many sequences are RETAINED and never run.
    moves: bool = False
    num_retained: int = 0
    # The first `shared` tokens of the prompt are those of this pinned prefix.
    prefix: int = NO_REQUEST
    shared: int = 0


class Driver:
    """A queue, rows and blocks, with the steps of an engine."""

    def __init__(
        self, config: EngineConfig, operations=OPERATIONS, fault: int = NO_FAULT
    ) -> None:
        self.config, self.operations = config, operations
        self.program = program_config(config)
        self.arguments = (config.scheduler_params, np.int32(fault))
        empty = scheduler.init_queue(config.max_num_requests)
        self.queue = {
            field.name: np.array(getattr(empty, field.name))
            for field in dataclasses.fields(empty)
            if getattr(empty, field.name) is not None
        }
        seq_indices = range(config.max_num_requests)
        self.histories: list[list[int]] = [[] for _ in seq_indices]
        self.outputs = [0 for _ in seq_indices]
        self.is_prefix = [False for _ in seq_indices]
        self.moves = [False for _ in seq_indices]
        self.rows = np.full(self.program.num_rows, NO_REQUEST, np.int32)
        self.blocks = block_manager.init_state(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_seqs=self.program.num_rows,
            max_blocks_per_seq=config.max_blocks_per_seq,
        )
        self.num_arrived = self.num_preempted = self.num_copies = 0
        self.new_token = itertools.count()
        self.rng = np.random.default_rng(0)

    # ---- new requests

    def submit(self, *requests: RequestSpec) -> list[list[int]]:
        """Submit requests; return the sequence indices of each."""
        return [self._submit(params) for params in requests]

    def _submit(self, params: RequestSpec) -> list[int]:
        count = len(params.outputs) + params.num_retained
        mine = np.flatnonzero(self.queue["status"] == EMPTY)[:count].tolist()
        assert len(mine) == count
        known = self.histories[params.prefix][: params.shared] if params.shared else []
        prompt = known + [next(self.new_token) for _ in range(params.prompt)]
        prompt = prompt[: params.prompt]
        by_priority = self.config.policy == "priority"
        for number, seq_index in enumerate(mine):
            is_row = number < len(params.outputs)
            # Its own index if it maps no blocks.
            source, shared = (mine[0], params.prompt - 1) if number else (seq_index, 0)
            if number == 0 and params.shared:
                source, shared = params.prefix, min(params.shared, params.prompt - 1)
            if shared == 0 or not is_row:
                source, shared = seq_index, 0
            self._put(
                seq_index,
                prompt,
                status=WAITING if is_row else RETAINED,
                priorities=params.priority if by_priority else 0,
                leaders=mine[0],
                sources=source,
                shared_lens=shared,
                is_lockstep=params.is_lockstep,
                has_ended=not is_row,
            )
            self.outputs[seq_index] = params.outputs[number] if is_row else 0
            self.moves[seq_index] = params.moves
        self.num_arrived += 1
        return mine

    def pin(self, length: int) -> int:
        """Submit a prefix that is computed and then RETAINED; return its index."""
        seq_index = int(np.flatnonzero(self.queue["status"] == EMPTY)[0])
        tokens = [next(self.new_token) for _ in range(length)]
        self._put(
            seq_index,
            tokens,
            status=WAITING,
            priorities=BEFORE_ALL,
            leaders=seq_index,
            sources=seq_index,
            shared_lens=0,
            is_lockstep=False,
            has_ended=False,
        )
        self.is_prefix[seq_index] = True
        self.num_arrived += 1
        return seq_index

    def _put(self, seq_index: int, tokens: list[int], **values: int) -> None:
        values |= dict(
            arrivals=self.num_arrived,
            prompt_lens=len(tokens),
            num_tokens=len(tokens),
            num_preemptions=0,
            num_cached=0,
        )
        assert set(values) == set(self.queue)
        for name, value in values.items():
            self.queue[name][seq_index] = value
        self.histories[seq_index] = list(tokens)
        self.is_prefix[seq_index] = False

    # ---- which requests the engine's `submit` and `pin` accept

    def most_blocks(self, params: RequestSpec) -> int:
        rows = len(params.outputs) if params.is_lockstep else 1
        limit = params.prompt + max(params.outputs)
        return limits.most_blocks(self.config, params.prompt, limit, rows)

    def num_pinned_blocks(self) -> int:
        size, status = self.config.block_size, self.queue["status"]
        pinned = [p for p in np.flatnonzero(status != EMPTY) if self.is_prefix[p]]
        return sum(cdiv(len(self.histories[p]), size) for p in pinned)

    def is_accepted(self, params: RequestSpec) -> bool:
        if params.prompt + max(params.outputs) > self.config.max_model_len:
            return False
        if params.is_lockstep and len(params.outputs) > self.config.max_num_seqs:
            return False
        free = self.config.num_blocks - self.num_pinned_blocks()
        return self.most_blocks(params) <= free

    def can_pin(self, length: int, unfinished: list[RequestSpec]) -> bool:
        """Whether a prefix of this length fits, with the unfinished requests."""
        status = self.queue["status"]
        num_pinned = sum(self.is_prefix[p] for p in np.flatnonzero(status != EMPTY))
        pinned = self.num_pinned_blocks() + cdiv(length, self.config.block_size)
        most = max([1, *map(self.most_blocks, unfinished)])
        has_row = num_pinned < self.config.max_num_prefixes and (status == EMPTY).any()
        return bool(has_row) and pinned + most <= self.config.num_blocks

    # ---- a step

    def step(self) -> dict[int, int]:
        """Schedule and append; return the tokens of each sequence in the step."""
        before = self.rows
        queue, rows, blocks, plan, (after, appended) = self.operations.plan(
            scheduler.Queue(**self.queue),
            self.rows,
            self.blocks,
            *self.arguments,
            config=self.program,
        )
        assert block_manager.violations(blocks) == []
        assert block_manager.violations(after) == []
        assert bool(appended.ok)
        self.blocks, self.rows = after, np.array(rows)
        self.num_copies += int((np.asarray(appended.copy_dst) != NO_BLOCK).sum())
        self.num_preempted += int(plan.num_preempted)
        self.queue = {name: np.array(getattr(queue, name)) for name in self.queue}
        lost = set(before.tolist()) - set(self.rows.tolist()) - {NO_REQUEST}
        assert len(lost) == int(plan.num_preempted)
        assert all(self.queue["status"][list(lost)] == WAITING)
        self._set_new_sources(lost)
        return self._check_plan(np.asarray(plan.num_tokens))

    def _set_new_sources(self, lost: set[int]) -> None:
        """Set the sources of sequences that lost their blocks and are recomputed."""
        new = new_sources(lost, self.histories, self.queue)
        for seq_index, (source, shared) in new.items():
            self.queue["sources"][seq_index] = source
            self.queue["shared_lens"][seq_index] = shared

    def _check_plan(self, planned: np.ndarray) -> dict[int, int]:
        """Check what is true of every plan; return each sequence's tokens."""
        config, queue = self.config, self.queue
        used = self.rows[self.rows != NO_REQUEST]
        status = queue["status"][used]
        assert len(set(used.tolist())) == len(used)
        assert int(planned.sum()) <= config.max_num_batched_tokens
        assert (planned > 0).sum() <= config.max_num_seqs
        assert (status == RUNNING).sum() <= config.max_num_seqs
        assert set(used[status == RUNNING]) == set(
            np.flatnonzero(queue["status"] == RUNNING)
        )
        assert (planned[self.rows == NO_REQUEST] == 0).all()
        lengths = np.asarray(self.blocks.context_lens)
        for row, seq_index in enumerate(self.rows.tolist()):
            if seq_index == NO_REQUEST:
                continue
            assert lengths[row] <= queue["num_tokens"][seq_index]
            if queue["status"][seq_index] == RETAINED:
                assert planned[row] == 0
                assert lengths[row] == len(self.histories[seq_index])
            if queue["has_ended"][seq_index]:
                assert planned[row] == lengths[row] == 0
        return {int(self.rows[r]): int(planned[r]) for r in np.flatnonzero(planned)}

    def commit(self) -> None:
        """Sequences with all tokens computed get one more, or end, or are RETAINED."""
        queue, row_of = self.queue, self._row_of()
        lengths = np.asarray(self.blocks.context_lens)
        done = [
            seq_index
            for seq_index, row in row_of.items()
            if queue["status"][seq_index] == RUNNING
            and not queue["has_ended"][seq_index]
            and lengths[row] == queue["num_tokens"][seq_index]
        ]
        parents = list(range(len(self.rows)))
        for seq_index in done:
            if self.is_prefix[seq_index]:
                queue["status"][seq_index] = RETAINED
            elif not queue["is_lockstep"][seq_index] and self._extend(seq_index):
                queue["status"][seq_index] = FINISHED
        in_step = [seq_index for seq_index in done if queue["is_lockstep"][seq_index]]
        for leader in sorted(
            {int(queue["leaders"][seq_index]) for seq_index in in_step}
        ):
            self._decide(leader, set(in_step), row_of, parents)
        self._settle(parents)

    def _row_of(self) -> dict[int, int]:
        seq_indices = enumerate(self.rows.tolist())
        return {
            seq_index: row for row, seq_index in seq_indices if seq_index != NO_REQUEST
        }

    def _extend(self, seq_index: int) -> bool:
        """Give a sequence one token; return whether it ends with it."""
        queue, history = self.queue, self.histories[seq_index]
        history.append(next(self.new_token))
        queue["num_tokens"][seq_index] = len(history)
        num_generated = len(history) - queue["prompt_lens"][seq_index]
        queue["has_ended"][seq_index] = num_generated >= self.outputs[seq_index]
        return bool(queue["has_ended"][seq_index])

    def _decide(self, leader, in_step, row_of, parents) -> None:
        """Give each row of a lockstep request one token; all tokens are computed."""
        queue = self.queue
        mine = np.flatnonzero(queue["leaders"] == leader)
        mine = [int(p) for p in mine if queue["status"][p] in (RUNNING, RETAINED)]
        members = [p for p in mine if queue["status"][p] == RUNNING]
        assert {p for p in members if not queue["has_ended"][p]} <= in_step
        before = {p: (list(self.histories[p]), queue["has_ended"][p]) for p in members}
        for seq_index in members:
            parent = seq_index
            if self.moves[seq_index] and self.rng.random() < 0.4:
                parent = int(self.rng.choice(members))
            self.histories[seq_index] = list(before[parent][0])
            queue["has_ended"][seq_index] = before[parent][1]
            queue["num_tokens"][seq_index] = len(self.histories[seq_index])
            if not queue["has_ended"][seq_index]:
                self._extend(seq_index)
            has_ended = queue["has_ended"][seq_index]
            parents[row_of[seq_index]] = NO_BLOCK if has_ended else row_of[parent]
        if queue["has_ended"][members].all():
            queue["status"][mine] = FINISHED

    def _settle(self, parents: list[int]) -> None:
        for row, seq_index in enumerate(self.rows.tolist()):
            if seq_index != NO_REQUEST and self.queue["status"][seq_index] == FINISHED:
                parents[row] = NO_BLOCK
                self.rows[row] = NO_REQUEST
        self.parents = parents
        self.blocks = self.operations.fork(self.blocks, np.array(parents, np.int32))

    def go(self) -> dict[int, int]:
        planned = self.step()
        self.commit()
        return planned

    def finish(self) -> int:
        """Step until nothing waits or runs; return the number of steps."""
        for number in itertools.count():
            if not np.isin(self.queue["status"], (WAITING, RUNNING)).any():
                return number
            assert number < 1000
            self.go()
        raise AssertionError

    # ---- requests end

    def end(self, seq_indices: list[int]) -> None:
        """End live sequences, as `engine.end` does."""
        for seq_index in seq_indices:
            if self.queue["status"][seq_index] in (WAITING, RUNNING, RETAINED):
                self.queue["status"][seq_index] = FINISHED
        self._settle(list(range(len(self.rows))))

    def release(self, *, is_eager: bool = False) -> None:
        """Empty the entries of finished requests, as `engine.release` does.

        With `is_eager`, also those of single finished sequences.
        """
        queue = self.queue
        live = np.isin(queue["status"], (WAITING, RUNNING, RETAINED))
        unfinished = set() if is_eager else set(queue["leaders"][live].tolist())
        finished = np.flatnonzero(queue["status"] == FINISHED).tolist()
        released = {
            seq_index
            for seq_index in finished
            if queue["leaders"][seq_index] not in unfinished
        }
        for seq_index in range(len(queue["status"])):
            if seq_index in released:
                queue["status"][seq_index] = EMPTY
            if queue["leaders"][seq_index] in released:
                queue["leaders"][seq_index] = seq_index
            if queue["sources"][seq_index] in released:
                queue["sources"][seq_index] = seq_index
                queue["shared_lens"][seq_index] = 0

    # ---- observations

    def running(self) -> set[int]:
        return set(np.flatnonzero(self.queue["status"] == RUNNING).tolist())

    def status(self, count: int) -> list[int]:
        return self.queue["status"][:count].tolist()

    def length(self, seq_index: int) -> int:
        """Number of tokens that a running sequence has computed."""
        return int(np.asarray(self.blocks.context_lens)[self._row_of()[seq_index]])

    def table(self, seq_index: int) -> list[int]:
        """Blocks of a running sequence."""
        table = np.asarray(self.blocks.block_tables)[self._row_of()[seq_index]]
        return table[table != NO_BLOCK].tolist()

    def num_free(self) -> int:
        return int((np.asarray(self.blocks.ref_counts) == 0).sum())


def new_sources(lost, histories, queue) -> dict[int, tuple[int, int]]:
    """For sequences that lost their blocks: (source, tokens to map).

    Only sequences after the first of their request get a new source. It is found by
    comparing token by token.
    """
    found = {}
    for seq_index in sorted(lost):
        leader = queue["leaders"][seq_index]
        before = [
            p for p in sorted(lost) if p < seq_index and queue["leaders"][p] == leader
        ]
        if not before:
            continue
        source, most = int(queue["sources"][seq_index]), 0
        for other in before:
            mine, theirs = histories[seq_index][:-1], histories[other][:-1]
            pairs = zip(mine, theirs, strict=False)
            equal = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            common = len(list(equal))
            if common > most and not queue["has_ended"][other]:
                source, most = other, common
        found[seq_index] = (source, most)
    return found
