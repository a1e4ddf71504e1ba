"""Baselines: the systems that the paper compares with, as `System`s.

Place on the road: requests -> [waiting, places, memory] -> load -> cost model.

`Orca` with three ways to reserve memory, in chunks of a buddy allocator; `Contiguous`,
which has a row of the longest length for every sequence; and `FasterTransformer`, whose
batches run to completion. None preempts, so all are first come, first served, and stop
at the first request that does not fit.

A request's samples or beams have a chunk (or row) each, all or none. The prompt is
computed once and copied for the others before their first own token. A place has all
`num_seqs` of them, which end together, for the workload says how long they are.

Letters: P places, B sequences of one request at most, K orders of chunks.
Source: Kwon et al. 2023, Section 6.1, and its artifact; Yu et al., Orca, OSDI 2022.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.simulator.costs.load import Load
from jpaged.simulator.systems import buddy, places
from jpaged.simulator.systems.base import Usage
from jpaged.simulator.systems.baseline_system import (
    BaselineState,
    BaselineSystem,
    Room,
    check_sizes,
)
from jpaged.simulator.systems.buddy import NO_CHUNK, BuddyState
from jpaged.simulator.systems.places import Job, Places
from jpaged.simulator.workloads.workload import Workload


@dataclasses.dataclass(frozen=True)
class Contiguous(BaselineSystem):
    """A row of `max_len` slots for every sequence, and continuous batching.

    Attributes:
      num_slots: of the memory; what is no whole row is lost.
      max_len: tokens that a sequence may have, prompt and output.
      max_num_seqs: sequences that run at a time, at most.
      max_num_batched_tokens: of a step, prompts included.
      max_seqs_per_request: samples or beams that a request may have.
    """

    num_slots: int
    max_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2560
    max_seqs_per_request: int = 1

    def __post_init__(self):
        check_sizes(self)


@dataclasses.dataclass(frozen=True)
class FasterTransformer(BaselineSystem):
    """Batches that run to completion.

    When nobody runs, the earliest arrivals become a batch, as many as have a row of
    `max_len` slots. Its first step computes all prompts, each padded to the longest.
    From then on all rows compute a token per step, those that have theirs too, until
    the last is done. Only then do all have their answers, and the next batch begins.

    Attributes:
      num_slots: of the memory; what is no whole row is lost.
      max_len: tokens that a sequence may have, prompt and output.
      max_num_seqs: sequences of a batch, at most.
      max_seqs_per_request: samples or beams that a request may have.
    """

    num_slots: int
    max_len: int = 2048
    max_num_seqs: int = 256
    max_seqs_per_request: int = 1

    def __post_init__(self):
        check_sizes(self)

    @property
    def _max_step_tokens(self) -> int:
        """No limit but memory: all prompts of a batch are computed in one step."""
        return self.num_slots

    def _admit(self, state: BaselineState, room: Room) -> tuple[BaselineState, Room]:
        """A new batch, but only when nobody runs."""
        closed = jax.tree.map(jnp.zeros_like, room)
        is_over = ~jnp.any(state.places.is_taken)
        room = jax.tree.map(lambda a, b: jnp.where(is_over, a, b), room, closed)
        return super()._admit(state, room)

    def _load(self, state: BaselineState) -> Load:
        now = state.places
        copied = self._num_copied(state)
        load = places.rows(self._real(now), self.max_seqs_per_request, copied)
        longest = jnp.max(jnp.where(now.is_taken, now.jobs.prompt_len, 0))
        # All rows of a batch have their prompts in the same step.
        is_prompt = jnp.any(now.is_taken & (now.num_generated == 0))
        takes_part = load.query_lens > 0

        def padded(lens: jax.Array) -> jax.Array:
            return jnp.where(is_prompt & takes_part, longest, lens)

        return dataclasses.replace(
            load,
            query_lens=padded(load.query_lens),
            context_lens=padded(load.context_lens),
        )

    def _usage(self, state: BaselineState, is_stuck: jax.Array) -> Usage:
        """Slots that are free while a batch runs are of no use to whoever waits."""
        state = dataclasses.replace(state, places=self._real(state.places))
        return super()._usage(state, is_stuck | (state.waiting.count > 0))

    def _has_ended(self, is_taken: jax.Array, is_done: jax.Array) -> jax.Array:
        return is_taken & jnp.all(is_done | ~is_taken)

    def _real(self, now: Places) -> Places:
        """The places with what rows that are done have really generated."""
        generated = jnp.minimum(now.num_generated, now.jobs.output_len)
        return dataclasses.replace(now, num_generated=generated)


Reserve = Literal["max", "pow2", "oracle"]


@dataclasses.dataclass(frozen=True)
class Orca(BaselineSystem):
    """Iteration-level scheduling, with memory reserved for each request as a whole.

    A request comes in when there are chunks for all its sequences. A chunk has
    min(prompt + estimate, max_len) slots, rounded up to a power of two. The step in
    which it comes computes its prompt, beside the tokens of those who run.

    Beams: after each step, each of a request's W beams continues one of the W, drawn
    alike, with the probability `fork_probability`, and itself otherwise. Whoever is
    continued by several is copied for all but one, the whole chunk. (Which beams
    survive depends on the model and is not known here; the default lets most steps
    fork, as beam search does.)

    Attributes:
      num_slots: of the memory; what is not a multiple of `min_chunk` is lost.
      reserve: the estimate: "max" is `max_len`, "oracle" the true output length, and
        "pow2" the next power of two.
      max_len: tokens that a sequence may have, and the largest chunk, a power of two.
      min_chunk: slots of the smallest chunk, a power of two: the block size.
      max_num_seqs: sequences that run at a time, at most.
      max_num_batched_tokens: of a step, prompts included.
      max_seqs_per_request: samples or beams that a request may have.
      fork_probability: of a beam in a step; 0 copies nothing but prompts.
      seed: of the draws.
    """

    num_slots: int
    reserve: Reserve = "max"
    max_len: int = 2048
    min_chunk: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2560
    max_seqs_per_request: int = 1
    fork_probability: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if self.reserve not in ("max", "pow2", "oracle"):
            raise ValueError(
                f"reserve: wanted max, pow2 or oracle, got {self.reserve!r}"
            )
        for name in ("max_len", "min_chunk"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: wanted a power of two, got {size}")
        if self.min_chunk > self.max_len:
            raise ValueError(
                f"min_chunk: wanted at most max_len, {self.max_len}, got "
                f"{self.min_chunk}"
            )
        if not 0 <= self.fork_probability <= 1:
            raise ValueError(
                f"fork_probability: wanted a probability, got {self.fork_probability}"
            )
        check_sizes(self)

    @property
    def _piece(self) -> int:
        return self.min_chunk

    def _no_memory(self) -> BuddyState:
        num_orders = (self.max_len // self.min_chunk).bit_length()
        return buddy.init_state(self.num_slots // self.min_chunk, num_orders)

    def _needed(self, jobs: Job) -> jax.Array:
        if self.reserve == "max":
            estimate = jnp.full_like(jobs.output_len, self.max_len)
        elif self.reserve == "pow2":
            estimate = 1 << _log2_up(jobs.output_len)
        else:
            estimate = jobs.output_len
        return jnp.minimum(jobs.prompt_len + estimate, self.max_len)

    def _orders(self, jobs: Job) -> jax.Array:
        return _log2_up(cdiv(self._needed(jobs), self.min_chunk))

    def _sizes(self, jobs: Job) -> tuple[jax.Array, jax.Array]:
        return self._needed(jobs), self.min_chunk << self._orders(jobs)

    def _fits_memory(self, state: BaselineState, job: Job) -> jax.Array:
        available = buddy.num_available(state.memory, self._orders(job))
        return available >= job.num_seqs

    def _take(self, state: BaselineState, job: Job, place: jax.Array) -> BaselineState:
        order = self._orders(job)

        def take(number, carry):
            memory, chunks = carry
            memory, begin = buddy.allocate(memory, order)
            return memory, chunks.at[place, number].set(begin)

        carry = (state.memory, state.chunks)
        memory, chunks = lax.fori_loop(0, job.num_seqs, take, carry)
        return dataclasses.replace(state, memory=memory, chunks=chunks)

    def _let_go(self, state: BaselineState, gone: jax.Array) -> BaselineState:
        orders = self._orders(state.places.jobs)

        def release_finished(carry):
            memory, chunks, gone = carry
            place = jnp.argmax(gone)

            def free(number, memory):
                return buddy.free(memory, chunks[place, number], orders[place])

            num_seqs = state.places.jobs.num_seqs[place]
            memory = lax.fori_loop(0, num_seqs, free, memory)
            return memory, chunks.at[place].set(NO_CHUNK), gone.at[place].set(False)

        carry = (state.memory, state.chunks, gone)
        memory, chunks, _ = lax.while_loop(
            lambda carry: jnp.any(carry[2]), release_finished, carry
        )
        return dataclasses.replace(state, memory=memory, chunks=chunks)

    def _num_copied(self, state: BaselineState) -> jax.Array:
        copied = super()._num_copied(state)
        if self.max_seqs_per_request == 1 or not self.fork_probability:
            return copied
        now = state.places
        is_later = now.is_taken & now.jobs.is_beam & (now.num_generated > 1)

        def fork(copied):
            key = jax.random.fold_in(jax.random.key(self.seed), state.num_steps)
            shape = (self._num_places, self.max_seqs_per_request)
            forks = num_forks(key, now.jobs.num_seqs, shape, self.fork_probability)
            _, chunk = self._sizes(now.jobs)
            tokens = jnp.where(is_later, forks * chunk, 0)
            return copied + jnp.sum(tokens, dtype=jnp.int32)

        return when(jnp.any(is_later), fork, copied)

    def check(self, workload: Workload) -> None:
        """Raises a ValueError for a request that could never be served."""
        jobs = Job.all_of(workload)
        num_seqs = np.asarray(jobs.num_seqs)
        orders = self._orders(jobs)
        empty = self._no_memory()
        most = jax.vmap(lambda order: buddy.num_available(empty, order))(orders)
        _, chunk = self._sizes(jobs)
        # Chunks that do not lie side by side are no memory for this request.
        fits = num_seqs <= np.minimum(np.asarray(most), self.max_num_seqs)
        needs = num_seqs.astype(np.int64) * np.asarray(chunk)
        needs = np.where(fits, np.minimum(needs, self.num_slots), needs)
        needs = np.where(fits, needs, np.maximum(needs, self.num_slots + 1))
        places.check_workload(
            workload, needs, self.num_slots, self.max_len, self.max_seqs_per_request
        )


def num_forks(
    key: jax.Array, widths: jax.Array, shape: tuple[int, int], probability: float
) -> jax.Array:
    """Beams whose parent another beam continues as well, but for one each, i32[P].

    Args:
      key: consumed.
      widths: i32[P], beams of each request, at most B.
      shape: (P, B).
      probability: that a beam's parent is drawn, and not itself.
    """
    most = shape[1]
    draw = jax.random.uniform(key, shape)
    own = jnp.arange(most, dtype=jnp.int32)[None]
    # One draw says both whether and whom: its part below `probability` is uniform too.
    scaled = draw / max(probability, 1e-9) * widths[:, None].astype(jnp.float32)
    other = jnp.minimum(jnp.floor(scaled).astype(jnp.int32), widths[:, None] - 1)
    parents = jnp.where(draw < probability, other, own)
    is_beam = own < widths[:, None]
    # [P, B of children, B of parents]
    is_parent = (parents[:, :, None] == own[None]) & is_beam[:, :, None]
    return widths - jnp.sum(jnp.any(is_parent, axis=1), axis=1, dtype=jnp.int32)


def _log2_up(numbers: jax.Array) -> jax.Array:
    """The smallest exponent whose power of two is at least the number (from 1)."""
    return 32 - lax.clz(jnp.maximum(numbers, 1) - 1)
