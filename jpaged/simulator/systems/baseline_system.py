"""Baseline system: what the baselines have in common.

Pipeline: requests -> [waiting queue, request slots, memory] -> step load -> cost model.

A step admits the waiting requests that fit, in order of arrival. It computes one token
for each running sequence, or the prompt of a new request, and releases the finished
requests. `orca`, `contiguous`, `fastertransformer` and `no_evict` are the systems.

Shape symbols: P request slots, B most sequences of one request, N requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.systems import buddy
from jpaged.simulator.systems.base import (
    NO_REQUEST_NUMBER,
    SimulatedRequest,
    StepProgress,
    System,
    SystemEntry,
    Usage,
)
from jpaged.simulator.systems.buddy import NO_CHUNK, BuddyState
from jpaged.simulator.systems.request_slots import (
    BaselineRequest,
    RequestSlots,
    WaitingQueue,
    num_token_states,
    slots_load,
)
from jpaged.simulator.workloads.workload import Workload

PAPER_MAX_SEQ_LEN = 2048  # tokens of a baseline's longest sequence in the paper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BaselineState:
    """Waiting and running requests, and their memory."""

    waiting: WaitingQueue
    slots: RequestSlots
    chunks: jax.Array  # i32[P, B], first unit of each sequence's chunk; Orca's only
    memory: BuddyState  # Orca's; one unit, unused, in the other systems
    num_steps: jax.Array  # i32[]


class StepCapacity(NamedTuple):
    """What can still be added to a step, i32[] each."""

    num_request_slots: jax.Array
    num_seqs: jax.Array
    num_tokens: jax.Array


class BaselineSystem:
    """First come, first served, without preemption.

    The defaults allocate a row of `max_len` KV slots for each sequence. Subclasses
    override which requests are admitted, how much memory they get and when they end.
    """

    num_slots: int
    max_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_seqs_per_request: int

    def program(self, others: Sequence[System]) -> BaselineSystem:
        """Return this system; see `System.program`.

        Raises:
          ValueError: another system differs from this one.
        """
        for other in others:
            if other != self:
                raise ValueError(
                    "systems: expected the same baseline for all, as a sweep cannot "
                    f"change its settings, got {self!r} and {other!r:.1000}"
                )
        return self

    def enter(self, state: BaselineState) -> BaselineState:
        """Return the state unchanged; see `System.enter`."""
        return state

    def counters(self, state: BaselineState) -> dict[str, int]:
        """Return no counters: baselines never preempt."""
        del state
        return {}

    def init(self) -> BaselineState:
        """Return the state without requests."""
        num_request_slots = self._num_request_slots
        return BaselineState(
            waiting=WaitingQueue.empty(num_request_slots),
            slots=RequestSlots.empty(num_request_slots),
            chunks=jnp.full(
                (num_request_slots, self.max_seqs_per_request), NO_CHUNK, jnp.int32
            ),
            memory=self._empty_memory(),
            num_steps=jnp.int32(0),
        )

    def submit(
        self, state: BaselineState, request: SimulatedRequest
    ) -> tuple[BaselineState, jax.Array]:
        """Append to the waiting queue, which holds as many requests as can run."""
        waiting, ok = state.waiting.push(BaselineRequest.of(request))
        return dataclasses.replace(state, waiting=waiting), ok

    def has_work(self, state: BaselineState) -> jax.Array:
        """Return bool[]: a request waits or runs."""
        return (state.waiting.count > 0) | jnp.any(state.slots.is_taken)

    def at_time(self, state: BaselineState, milliseconds: jax.Array) -> BaselineState:
        """Return the state unchanged; see `System.at_time`."""
        del milliseconds
        return state

    def begin_step(self, state: BaselineState) -> tuple[BaselineState, StepLoad, Usage]:
        """Admit requests; see `System.begin_step`."""
        taken = state.slots.is_taken
        num_tokens = jnp.sum(jnp.where(taken, state.slots.jobs.num_seqs, 0))
        num_requests = jnp.sum(taken, dtype=jnp.int32)
        capacity = StepCapacity(
            num_request_slots=self._num_request_slots - num_requests,
            num_seqs=jnp.int32(self.max_num_seqs) - num_tokens,
            num_tokens=jnp.int32(self._max_step_tokens) - num_tokens,
        )
        state = self._admit(state, capacity)
        fits_memory = self._fits_memory(state, state.waiting.first())
        is_stuck = (state.waiting.count > 0) & ~fits_memory
        load = self._load(state)
        return state, load, self._usage(state, is_stuck)

    def end_step(self, scheduled: BaselineState) -> tuple[BaselineState, StepProgress]:
        """Count the generated tokens and release ended requests; see `System`."""
        now = scheduled.slots
        is_taken = now.is_taken
        generated = now.num_generated + is_taken.astype(jnp.int32)
        is_done = is_taken & (generated >= now.jobs.output_len)
        has_ended = self._has_ended(is_taken, is_done)
        progress = StepProgress(
            requests=now.jobs.request,
            has_first=is_taken & (generated == 1),
            has_ended=has_ended,
        )
        state = dataclasses.replace(
            scheduled,
            slots=RequestSlots(now.jobs, generated),
            num_steps=scheduled.num_steps + 1,
        )
        state = self._release_memory(state, has_ended)
        remaining = state.slots.without(has_ended)
        return dataclasses.replace(state, slots=remaining), progress

    def _admit(self, state: BaselineState, capacity: StepCapacity) -> BaselineState:
        """Admit requests in order of arrival, up to the first that does not fit."""

        def fits(carry: tuple[BaselineState, StepCapacity]) -> jax.Array:
            state, capacity = carry
            job = state.waiting.first()
            fits_step = (
                (capacity.num_request_slots > 0)
                & (capacity.num_seqs >= job.num_seqs)
                & (capacity.num_tokens >= job.prompt_len)
            )
            has_request = job.request != NO_REQUEST_NUMBER
            return has_request & fits_step & self._fits_memory(state, job)

        def admit_first(
            carry: tuple[BaselineState, StepCapacity],
        ) -> tuple[BaselineState, StepCapacity]:
            state, capacity = carry
            job = state.waiting.first()
            index = jnp.argmin(state.slots.is_taken)
            state = dataclasses.replace(
                self._allocate_memory(state, job, index),
                waiting=state.waiting.without_first(),
                slots=state.slots.put(job, index),
            )
            return state, StepCapacity(
                capacity.num_request_slots - 1,
                capacity.num_seqs - job.num_seqs,
                capacity.num_tokens - job.prompt_len,
            )

        return lax.while_loop(fits, admit_first, (state, capacity))[0]

    def _num_copied(self, state: BaselineState) -> jax.Array:
        """Prompt tokens that are copied for further sequences of a request, i32[].

        The copies are made before the sequences compute their first own token.
        """
        now = state.slots
        begins = now.is_taken & (now.num_generated == 1)
        copies = (now.jobs.num_seqs - 1) * now.jobs.prompt_len
        return jnp.sum(jnp.where(begins, copies, 0), dtype=jnp.int32)

    def _load(self, state: BaselineState) -> StepLoad:
        copied = self._num_copied(state)
        return slots_load(state.slots, self.max_seqs_per_request, copied)

    def _usage(self, state: BaselineState, is_stuck: jax.Array) -> Usage:
        """Use of the memory; `is_stuck`: memory prevents the next admission."""
        jobs, is_taken = state.slots.jobs, state.slots.is_taken
        stored = num_token_states(state.slots)
        final = jobs.num_seqs * jobs.total_len
        needed, chunk = self._sizes(jobs)

        def total(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(is_taken, values, 0), dtype=jnp.int32)

        in_use = total(jobs.num_seqs * chunk)
        lost = jnp.int32(self.num_slots - self._num_usable)
        unused = self.num_slots - in_use - lost
        rounding = total(jobs.num_seqs * (chunk - needed))
        return Usage(
            num_requests=jnp.sum(is_taken, dtype=jnp.int32),
            num_waiting=state.waiting.count,
            token_states=total(stored),
            reservation=total(final - stored),
            internal=total(jobs.num_seqs * needed - final),
            external=rounding + lost + jnp.where(is_stuck, unused, 0),
            free=jnp.where(is_stuck, 0, unused),
            num_blocks=in_use,
            num_saved_blocks=jnp.int32(0),
        )

    # The rest is the default memory: a row of `max_len` KV slots for every sequence.

    @property
    def _max_step_tokens(self) -> int:
        """Most tokens of a step."""
        return self.max_num_batched_tokens

    @property
    def _allocation_unit(self) -> int:
        """KV slots of the smallest allocation."""
        return self.max_len

    @property
    def _num_request_slots(self) -> int:
        return min(self.max_num_seqs, self.num_slots // self._allocation_unit)

    @property
    def _num_usable(self) -> int:
        return self.num_slots // self._allocation_unit * self._allocation_unit

    def _empty_memory(self) -> BuddyState:
        return buddy.init_buddy(1, 1)

    def _fits_memory(self, state: BaselineState, job: BaselineRequest) -> jax.Array:
        jobs = state.slots.jobs
        num_rows = jnp.sum(jnp.where(state.slots.is_taken, jobs.num_seqs, 0))
        return num_rows + job.num_seqs <= self.num_slots // self.max_len

    def _allocate_memory(
        self, state: BaselineState, job: BaselineRequest, index: jax.Array
    ) -> BaselineState:
        """Allocate the memory of a request that the request slot `index` will hold."""
        del job, index
        return state

    def _release_memory(
        self, state: BaselineState, is_released: jax.Array
    ) -> BaselineState:
        """Release the memory of the request slots bool[P] `is_released`."""
        del is_released
        return state

    def _sizes(self, jobs: BaselineRequest) -> tuple[jax.Array, jax.Array]:
        """Return KV slots that a sequence of each request needs, and that it gets."""
        row = jnp.full_like(jobs.prompt_len, self.max_len)
        return row, row

    def _has_ended(self, is_taken: jax.Array, is_done: jax.Array) -> jax.Array:
        """bool[P], the requests whose answers are returned after this step."""
        del is_taken
        return is_done

    def check(self, workload: Workload) -> None:
        """Raise ValueError for a request that can never be served."""
        num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
        needs = num_seqs.astype(np.int64) * self.max_len
        most = min(self._num_usable, self.max_num_seqs * self.max_len)
        self._check_needs(workload, needs, most)

    def _check_needs(
        self, workload: Workload, needs: np.ndarray, num_slots: int
    ) -> None:
        """Raise ValueError for the first request that can never be served.

        Args:
          workload: the requests.
          needs: i64[N], KV slots of each request.
          num_slots: KV slots that one request can have.
        """
        totals = workload.prompt_lens.astype(np.int64) + workload.output_lens
        num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
        max_seqs = self.max_seqs_per_request
        for what, values, most, advice in [
            (
                "tokens, prompt and output",
                totals,
                self.max_len,
                f"limited({self.max_len})",
            ),
            ("sequences", num_seqs, max_seqs, "max_seqs_per_request"),
            ("slots", needs, num_slots, "num_slots"),
        ]:
            wrong = np.flatnonzero(values > most)
            if wrong.size:
                raise ValueError(
                    f"workload: expected at most {most} {what} per request, got "
                    f"{values[wrong[0]]} for request {wrong[0]}; use or change {advice}"
                )


def check_positive(**sizes: int) -> None:
    """Raise ValueError that names a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def check_system_sizes(system: BaselineSystem) -> None:
    """Raise ValueError for sizes with which no request can be served."""
    check_positive(
        num_slots=system.num_slots,
        max_len=system.max_len,
        max_num_seqs=system.max_num_seqs,
        max_num_batched_tokens=system._max_step_tokens,
        max_seqs_per_request=system.max_seqs_per_request,
    )
    if system.num_slots < system.max_len:
        raise ValueError(
            f"num_slots: expected at least max_len ({system.max_len}), got "
            f"{system.num_slots}; lower max_len"
        )
    if system._max_step_tokens < system.max_len:
        raise ValueError(
            f"max_num_batched_tokens: expected at least max_len ({system.max_len}), as "
            f"a prompt is computed in one step, got {system._max_step_tokens}"
        )


def baseline_entry(name: str, kind: Callable[..., System], **fixed: Any) -> SystemEntry:
    """Return the registry record of a baseline.

    Args:
      name: as in flags.
      kind: the class of the system.
      **fixed: arguments of `kind` that distinguish the entry.
    """

    def build(workload: Workload, num_slots: int, *, max_num_seqs: int = 256) -> System:
        num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
        return kind(
            num_slots,
            max_num_seqs=max_num_seqs,
            max_seqs_per_request=int(np.max(num_seqs)),
            **fixed,
        )

    def max_request_len(
        num_slots: int, num_beams: int, options: Mapping[str, Any]
    ) -> int:
        del num_beams, options
        return min(PAPER_MAX_SEQ_LEN, num_slots)

    return SystemEntry(name, build, max_request_len)
