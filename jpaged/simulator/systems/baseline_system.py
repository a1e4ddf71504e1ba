"""Baseline system: what simple systems have in common, on places and in lockstep.

Place on the road: requests -> [waiting, places, memory] -> load -> cost model.

A step lets in who fits, in order of arrival, computes a token for all who run, or their
prompts, and lets go who is done. `baselines` has the systems.

Letters: P places, B sequences of one request at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.simulator.costs.load import Load
from jpaged.simulator.systems import buddy, places
from jpaged.simulator.systems.base import Progress, Request, System, Usage
from jpaged.simulator.systems.buddy import NO_CHUNK, BuddyState
from jpaged.simulator.systems.places import NOBODY, Job, Places, Waiting
from jpaged.simulator.workloads.workload import Workload


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BaselineState:
    """Who waits, who runs, and where."""

    waiting: Waiting
    places: Places
    chunks: jax.Array  # i32[P, B], unit of each sequence's chunk; Orca's only, else 0
    memory: BuddyState  # Orca's; of one unit in the others, which count rows
    num_steps: jax.Array  # i32[]


class BaselineSystem:
    """First come, first served, nobody preempted; by itself, a row for each sequence.

    Who differs overrides what says who may come in, what that takes, and who goes when.
    """

    num_slots: int
    max_num_seqs: int
    max_seqs_per_request: int

    def program(self, others: Sequence[System]) -> BaselineSystem:
        """Itself, where the others are alike; as `System.program`."""
        for other in others:
            if other != self:
                raise ValueError(
                    "systems: expected the same baseline for all, for nothing of it "
                    f"can be swept, got {self!r} and {other!r:.1000}"
                )
        return self

    def enter(self, state: BaselineState) -> BaselineState:
        """As `System.enter`: as it is."""
        return state

    def counters(self, state: BaselineState) -> dict[str, int]:
        """Nothing beyond what the clock counts: nobody is preempted."""
        del state
        return {}

    def init(self) -> BaselineState:
        """Nobody waits, nobody runs."""
        return BaselineState(
            waiting=Waiting.none(self._num_places),
            places=Places.empty(self._num_places),
            chunks=jnp.full(
                (self._num_places, self.max_seqs_per_request), NO_CHUNK, jnp.int32
            ),
            memory=self._no_memory(),
            num_steps=jnp.int32(0),
        )

    def submit(
        self, state: BaselineState, request: Request
    ) -> tuple[BaselineState, jax.Array]:
        """As `System.submit`; as many can wait as can run."""
        waiting, ok = state.waiting.push(Job.of(request))
        return dataclasses.replace(state, waiting=waiting), ok

    def has_work(self, state: BaselineState) -> jax.Array:
        """As `System.has_work`."""
        return (state.waiting.count > 0) | jnp.any(state.places.is_taken)

    def begin(self, state: BaselineState) -> tuple[BaselineState, Load, Usage]:
        """As `System.begin`."""
        taken = state.places.is_taken
        num_tokens = jnp.sum(jnp.where(taken, state.places.jobs.num_seqs, 0))
        room = Room(
            num_places=self._num_places - jnp.sum(taken, dtype=jnp.int32),
            num_seqs=jnp.int32(self.max_num_seqs) - num_tokens,
            num_tokens=jnp.int32(self._max_step_tokens) - num_tokens,
        )
        state, room = self._admit(state, room)
        fits_memory = self._fits_memory(state, state.waiting.first())
        is_stuck = (state.waiting.count > 0) & ~fits_memory
        load = self._load(state)
        return state, load, self._usage(state, is_stuck)

    def end(self, scheduled: BaselineState) -> tuple[BaselineState, Progress]:
        """As `System.end`."""
        now = scheduled.places
        is_taken = now.is_taken
        generated = now.num_generated + is_taken.astype(jnp.int32)
        is_done = is_taken & (generated >= now.jobs.output_len)
        has_ended = self._has_ended(is_taken, is_done)
        progress = Progress(
            requests=now.jobs.request,
            has_first=is_taken & (generated == 1),
            has_ended=has_ended,
        )
        state = dataclasses.replace(
            scheduled,
            places=Places(now.jobs, generated),
            num_steps=scheduled.num_steps + 1,
        )
        state = self._let_go(state, has_ended)
        left = state.places.without(has_ended)
        return dataclasses.replace(state, places=left), progress

    def _admit(self, state: BaselineState, room: Room) -> tuple[BaselineState, Room]:
        """Who comes in, in order of arrival, up to the first that does not fit."""

        def fits(carry: tuple[BaselineState, Room]) -> jax.Array:
            state, room = carry
            job = state.waiting.first()
            has_room = (
                (room.num_places > 0)
                & (room.num_seqs >= job.num_seqs)
                & (room.num_tokens >= job.prompt_len)
            )
            return (job.request != NOBODY) & has_room & self._fits_memory(state, job)

        def come_in(
            carry: tuple[BaselineState, Room],
        ) -> tuple[BaselineState, Room]:
            state, room = carry
            job = state.waiting.first()
            place = jnp.argmin(state.places.is_taken)
            state = dataclasses.replace(
                self._take(state, job, place),
                waiting=state.waiting.without_first(),
                places=state.places.put(job, place),
            )
            return state, Room(
                room.num_places - 1,
                room.num_seqs - job.num_seqs,
                room.num_tokens - job.prompt_len,
            )

        return lax.while_loop(fits, come_in, (state, room))

    def _num_copied(self, state: BaselineState) -> jax.Array:
        """Tokens that samples copy for their first own one, i32[]."""
        now = state.places
        begins = now.is_taken & (now.num_generated == 1)
        copies = (now.jobs.num_seqs - 1) * now.jobs.prompt_len
        return jnp.sum(jnp.where(begins, copies, 0), dtype=jnp.int32)

    def _load(self, state: BaselineState) -> Load:
        return places.rows(
            state.places, self.max_seqs_per_request, self._num_copied(state)
        )

    def _usage(self, state: BaselineState, is_stuck: jax.Array) -> Usage:
        jobs, is_taken = state.places.jobs, state.places.is_taken
        held = places.token_states(state.places)
        wanted = jobs.num_seqs * jobs.total_len
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
            token_states=total(held),
            reservation=total(wanted - held),
            internal=total(jobs.num_seqs * needed - wanted),
            external=rounding + lost + jnp.where(is_stuck, unused, 0),
            free=jnp.where(is_stuck, 0, unused),
            num_blocks=in_use,
            num_saved_blocks=jnp.int32(0),
        )

    # What follows fits systems that have a row of `max_len` slots for every sequence.

    max_len: int
    max_num_batched_tokens: int

    @property
    def _max_step_tokens(self) -> int:
        """Tokens of a step at most."""
        return self.max_num_batched_tokens

    @property
    def _piece(self) -> int:
        """Slots of the smallest piece of memory that a sequence can have."""
        return self.max_len

    @property
    def _num_places(self) -> int:
        return min(self.max_num_seqs, self.num_slots // self._piece)

    @property
    def _num_usable(self) -> int:
        return self.num_slots // self._piece * self._piece

    def _no_memory(self) -> BuddyState:
        return buddy.init_state(1, 1)

    def _fits_memory(self, state: BaselineState, job: Job) -> jax.Array:
        jobs = state.places.jobs
        num_rows = jnp.sum(jnp.where(state.places.is_taken, jobs.num_seqs, 0))
        return num_rows + job.num_seqs <= self.num_slots // self.max_len

    def _take(self, state: BaselineState, job: Job, place: jax.Array) -> BaselineState:
        del job, place
        return state

    def _let_go(self, state: BaselineState, gone: jax.Array) -> BaselineState:
        del gone
        return state

    def _sizes(self, jobs: Job) -> tuple[jax.Array, jax.Array]:
        """Slots that a sequence of each job asks for, and those that it gets."""
        row = jnp.full_like(jobs.prompt_len, self.max_len)
        return row, row

    def _has_ended(self, is_taken: jax.Array, is_done: jax.Array) -> jax.Array:
        del is_taken
        return is_done

    def check(self, workload: Workload) -> None:
        """Raises a ValueError for a request that could never be served."""
        num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
        needs = num_seqs.astype(np.int64) * self.max_len
        places.check_workload(
            workload,
            needs,
            min(self._num_usable, self.max_num_seqs * self.max_len),
            self.max_len,
            self.max_seqs_per_request,
        )


class Room(NamedTuple):
    """How much may still come into a step, i32[] each."""

    num_places: jax.Array
    num_seqs: jax.Array
    num_tokens: jax.Array


def check_sizes(system: BaselineSystem) -> None:
    """Raises a ValueError for sizes that no request could be served with."""
    places.check_positive(
        num_slots=system.num_slots,
        max_len=system.max_len,
        max_num_seqs=system.max_num_seqs,
        max_num_batched_tokens=system._max_step_tokens,
        max_seqs_per_request=system.max_seqs_per_request,
    )
    if system.num_slots < system.max_len:
        raise ValueError(
            f"num_slots: wanted at least max_len, {system.max_len}, got "
            f"{system.num_slots}; lower max_len"
        )
    if system._max_step_tokens < system.max_len:
        raise ValueError(
            f"max_num_batched_tokens: wanted at least max_len, {system.max_len}, for "
            f"prompts come in as a whole, got {system._max_step_tokens}"
        )
