"""Engine system: the engine itself, with a cost model instead of the decoder.

Pipeline: requests -> [scheduler, block manager, prefix cache] -> step load.

The scheduler, the block manager, the prefix cache, preemption and the request table are
those of `jpaged.engine`; nothing is written a second time. Two things differ: outputs
have the lengths of the workload, and tokens are synthetic (`synthetic_tokens`).

Shape symbols: R sequence indices of the request table, S batch rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import engine, policies, scheduler
from jpaged.arithmetic import floor_div
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine import algorithms, events, iteration, request_table
from jpaged.engine import state as engine_state
from jpaged.engine.iteration import ScheduledStep
from jpaged.engine.request_table import RequestTable
from jpaged.engine.state import EngineState
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.scheduler import EMPTY, FINISHED, RUNNING
from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.systems import engine_submissions, synthetic_tokens
from jpaged.simulator.systems.base import (
    NO_REQUEST_NUMBER,
    SimulatedRequest,
    StepProgress,
    System,
    Usage,
)
from jpaged.simulator.workloads.workload import Workload


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineSystemState:
    """The engine's state, and the request of each sequence."""

    engine: EngineState
    requests: jax.Array  # i32[R], number in the workload, NO_REQUEST_NUMBER if empty


@dataclasses.dataclass(frozen=True)
class EngineSystem:
    """The engine under `config`, as a `System`.

    Attributes:
      config: as for `jpaged.engine`; with a `max_beam_width` if the workload has beams.
      kinds: the pairs (num_samples, beam_width) that requests may have; a beam_width of
        0 is sampling.
      content_size: prompt tokens that an id of `SimulatedRequest.content` represents.
      beam_concentration: exponent of the next token's Zipf distribution, from which
        beams choose. The higher it is, the more often all beams continue the best one.

    Raises:
      ValueError: the config speculates or keeps prefixes, or it does not allow a kind.
    """

    config: EngineConfig
    kinds: tuple[tuple[int, int], ...] = ((1, 0),)
    content_size: int = 1
    beam_concentration: float = 2.0

    def __post_init__(self) -> None:
        if self.config.speculation is not None:
            raise ValueError(
                "config.speculation: expected None, as no cost model predicts which "
                f"guessed tokens are accepted, got {self.config.speculation}"
            )
        if self.config.max_num_prefixes:
            raise ValueError(
                "config.max_num_prefixes: expected 0, as workloads do not pin "
                f"prefixes, got {self.config.max_num_prefixes}; use "
                "enable_prefix_caching"
            )
        engine_submissions.templates(self.config, self.kinds)

    @property
    def num_slots(self) -> int:
        """KV slots of the pool, in tokens."""
        return self.config.num_blocks * self.config.block_size

    def program(self, others: Sequence[System]) -> EngineSystem:
        """Return the engine under a config that can run all given configs.

        The configs may differ in the parameters of policies, the watermark, the
        number of batch rows, the tokens of a step and the size of a prompt's chunk.

        Raises:
          ValueError: they differ in anything else.
        """
        configs = [
            one.config for one in (self, *others) if isinstance(one, EngineSystem)
        ]
        limits = {
            name: max(getattr(config, name) for config in configs)
            for name in ("max_num_seqs", "max_num_batched_tokens")
        }
        program = self._without_params(limits, self.config)
        for other in others:
            is_engine = isinstance(other, EngineSystem)
            if not is_engine or (other._without_params(limits, self.config) != program):
                raise ValueError(
                    "systems: expected engines that differ in parameters of policies, "
                    "watermark, max_num_seqs, max_num_batched_tokens and "
                    f"max_prompt_chunk only, got {self!r:.1000} and {other!r:.1000}"
                )
        return program

    def _without_params(
        self, limits: dict[str, int], first: EngineConfig
    ) -> EngineSystem:
        """Reset what a program of several configs reads from its state.

        Parameters of policies become those of the `first` config, if there are as many.
        """
        config = dataclasses.replace(
            self.config, watermark=0.0, max_prompt_chunk=None, **limits
        )
        for kind in policies.KINDS:
            name = kind.parameters
            own, parameters = getattr(config, name), getattr(first, name)
            if len(own) == len(parameters):
                config = dataclasses.replace(config, **{name: parameters})
        return dataclasses.replace(self, config=config)

    def enter(self, state: EngineSystemState) -> EngineSystemState:
        """Set the scheduler parameters of this config; see `System.enter`."""
        inner = dataclasses.replace(
            state.engine, scheduler_params=self.config.scheduler_params
        )
        return dataclasses.replace(state, engine=inner)

    def check(self, workload: Workload) -> None:
        """Raise ValueError for a request that the engine rejects.

        Only the longest request of each kind is checked: longer requests need more.
        """
        pairs = np.stack([workload.num_samples, workload.beam_widths], axis=1)
        unknown = np.flatnonzero(
            [tuple(pair) not in self.kinds for pair in pairs.tolist()]
        )
        if unknown.size:
            index = int(unknown[0])
            raise ValueError(
                f"workload: expected requests of the kinds (num_samples, beam_width) "
                f"{list(self.kinds)}, got {tuple(pairs[index].tolist())} at index "
                f"{index}; give EngineSystem its kinds"
            )
        totals = workload.prompt_lens.astype(np.int64) + workload.output_lens
        for kind in self.kinds:
            mine = np.flatnonzero(np.all(pairs == kind, axis=1))
            if mine.size:
                index = int(mine[np.argmax(totals[mine])])
                self._check_request(workload, index, kind)
        if workload.contents is not None and workload.content_size != self.content_size:
            raise ValueError(
                f"workload.content_size: expected {self.content_size}, as the "
                f"system's, got {workload.content_size}"
            )

    def _check_request(
        self, workload: Workload, index: int, kind: tuple[int, int]
    ) -> None:
        prompt_len = int(workload.prompt_lens[index])
        output_len = int(workload.output_lens[index])
        params = engine_submissions.request_params(kind, output_len)
        limit = self.config.max_model_len
        try:
            if prompt_len + output_len > limit:
                raise ValueError(
                    f"expected at most max_model_len ({limit}) tokens, prompt and "
                    f"output, got {prompt_len + output_len}"
                )
            engine.check_request(self.config, range(prompt_len), params)
        except ValueError as error:
            raise ValueError(
                f"workload: the request at index {index} can never run: {error}"
            ) from None

    def counters(self, state: EngineSystemState) -> dict[str, int]:
        """Return the engine's own counters; see `jpaged.engine.Counters`."""
        found = dataclasses.asdict(state.engine.counters)
        return {
            name: int(value)
            for name, value in found.items()
            if name.startswith("num_") and value is not None
        }

    def init(self) -> EngineSystemState:
        """Return an engine without requests and without pages."""
        shape = (self.config.max_num_requests,)
        state = engine_state.init(None, self.config)
        numbers = jnp.full(shape, NO_REQUEST_NUMBER, jnp.int32)
        return EngineSystemState(state, numbers)

    def submit(
        self, state: EngineSystemState, request: SimulatedRequest
    ) -> tuple[EngineSystemState, jax.Array]:
        """Insert the sequences of a request into the table; see `System.submit`."""
        status = state.engine.requests.queue.status
        template, seq_indices, ok = engine_submissions.find_entries(
            self.config, self.kinds, request, status
        )

        def insert(state: EngineSystemState) -> EngineSystemState:
            new = engine_submissions.complete_submission(
                self.config, template, request, seq_indices, self.content_size
            )
            inner = dataclasses.replace(
                state.engine,
                requests=request_table.insert_sequences(state.engine.requests, new),
                states=algorithms.insert_states(state.engine.states, new),
            )
            requests = state.requests.at[seq_indices].set(request.number, mode="drop")
            return EngineSystemState(inner, requests)

        return when(ok, insert, state), ok

    def has_work(self, state: EngineSystemState) -> jax.Array:
        """Return bool[]: a sequence waits or runs, and the engine has not stalled."""
        return engine.has_work(state.engine)

    def at_time(
        self, state: EngineSystemState, milliseconds: jax.Array
    ) -> EngineSystemState:
        """Set the clock that policies see; see `System.at_time`."""
        if state.engine.clock is None:
            return state
        inner = dataclasses.replace(state.engine, clock=milliseconds)
        return dataclasses.replace(state, engine=inner)

    def begin_step(
        self, state: EngineSystemState
    ) -> tuple[tuple[EngineSystemState, ScheduledStep], StepLoad, Usage]:
        """Run the engine's step up to the decoder; see `System.begin_step`."""
        inner, scheduled = iteration.begin_step(state.engine, self.config)
        state = dataclasses.replace(state, engine=inner)
        return (state, scheduled), self._load(inner, scheduled), self._usage(inner)

    def _load(self, state: EngineState, scheduled: ScheduledStep) -> StepLoad:
        # Of several cache groups, a block stores the layers of one.
        size, number = self.config.block_size, len(self.config.group_windows)
        num_copies = jnp.sum(scheduled.appended.copy_dst != NO_BLOCK, dtype=jnp.int32)
        num_moved = jnp.int32(0)
        if scheduled.swapped is not None:
            num_moved = (
                scheduled.swapped.out.num_blocks + scheduled.swapped.into.num_blocks
            )
        num_copied, num_swapped = num_copies * size, num_moved * size
        if number > 1:
            num_copied, num_swapped = (
                floor_div(tokens, number) for tokens in (num_copied, num_swapped)
            )
        is_last = synthetic_tokens.computes_last_token(state, scheduled)
        return StepLoad(
            query_lens=scheduled.plan.num_tokens,
            context_lens=state.blocks.context_lens,
            num_logits=jnp.sum(is_last, dtype=jnp.int32),
            num_copied_tokens=num_copied,
            num_swapped_tokens=num_swapped,
            num_swap_copies=num_moved,
        )

    def _usage(self, state: EngineState) -> Usage:
        size, queue = self.config.block_size, state.requests.queue
        used, stored, saved = events.occupancy(state.blocks)
        seq_indices = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
        is_leader = queue.leaders == seq_indices
        # The free slots of a row's last block are filled later, unless the row ends
        # before.
        limits = scheduler.row_values(state.requests.params.token_limits, state.rows)
        lens = state.blocks.context_lens
        unfilled = jnp.where(lens > 0, -lens % size, 0)
        # The last token of a sequence is never stored, as no token follows it.
        remaining = jnp.maximum(limits - 1 - lens, 0)
        reservation = jnp.sum(jnp.minimum(unfilled, remaining))
        if (number := len(self.config.group_windows)) > 1:
            reservation *= number
        spare = used * size - stored
        reservation = jnp.minimum(reservation, spare)
        return Usage(
            num_requests=jnp.sum((queue.status == RUNNING) & is_leader),
            num_waiting=jnp.sum((queue.status == scheduler.WAITING) & is_leader),
            token_states=stored,
            reservation=reservation,
            internal=spare - reservation,
            external=jnp.int32(0),
            free=self.num_slots - used * size,
            num_blocks=used,
            num_saved_blocks=saved,
        )

    def end_step(
        self, scheduled: tuple[EngineSystemState, ScheduledStep]
    ) -> tuple[EngineSystemState, StepProgress]:
        """Append the step's tokens and release ended requests; see `System`."""
        before, inner = scheduled
        step = before.engine.counters.num_steps
        sampled = synthetic_tokens.sample_tokens(
            before.engine, inner, self.config, self.beam_concentration
        )
        state = iteration.end_step(before.engine, inner, sampled)
        queue = state.requests.queue
        has_first = state.requests.first_steps == step
        has_first &= queue.leaders == jnp.arange(queue.leaders.shape[0])
        progress = StepProgress(
            requests=before.requests,
            has_first=has_first,
            has_ended=jnp.zeros_like(has_first),
        )

        def release(
            carry: tuple[EngineSystemState, StepProgress],
        ) -> tuple[EngineSystemState, StepProgress]:
            served, progress = carry
            has_ended, is_released = _ended_requests(served.engine.requests)
            requests = jnp.where(is_released, NO_REQUEST_NUMBER, served.requests)
            inner = engine.release(served.engine, is_released)
            progress = progress._replace(has_ended=has_ended)
            return EngineSystemState(inner, requests), progress

        return when(
            jnp.any(queue.status == FINISHED),
            release,
            (EngineSystemState(state, before.requests), progress),
        )


def _ended_requests(table: RequestTable) -> tuple[jax.Array, jax.Array]:
    """Find requests whose sequences have all finished.

    Returns:
      bool[R], the sequence is the first of such a request; and bool[R], it belongs to
      such a request.
    """
    queue = table.queue
    is_live = (queue.status != FINISHED) & (queue.status != EMPTY)
    num_live = jnp.zeros_like(queue.leaders)
    num_live = num_live.at[queue.leaders].add(is_live.astype(jnp.int32))
    has_ended = (queue.status == FINISHED) & (num_live[queue.leaders] == 0)
    own = jnp.arange(queue.leaders.shape[0], dtype=jnp.int32)
    return has_ended & (queue.leaders == own), has_ended
