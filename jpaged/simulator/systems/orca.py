"""Orca: iteration-level scheduling, with a chunk of memory reserved per sequence.

Pipeline: requests -> [waiting queue, request slots, buddy allocator] -> step load.

Three ways to estimate the output decide how much memory is reserved. Requests are never
preempted, so admission is first come, first served, and stops at the first request that
does not fit.

Each sample or beam of a request has its own chunk; a request gets all of them or none.
The prompt is computed once, and copied for the other sequences before they compute
their own first token. All `num_seqs` sequences of a request slot end together, since
the workload defines their length.

Shape symbols: P request slots, B most sequences of one request, K orders of chunks.
Source: Kwon et al. 2023, section 6.1, and its artifact; Yu et al., Orca, OSDI 2022.
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
from jpaged.simulator.systems import buddy
from jpaged.simulator.systems.baseline_system import (
    BaselineState,
    BaselineSystem,
    baseline_entry,
    check_system_sizes,
)
from jpaged.simulator.systems.buddy import NO_CHUNK, BuddyState
from jpaged.simulator.systems.request_slots import BaselineRequest
from jpaged.simulator.workloads.workload import Workload

Reserve = Literal["max", "pow2", "oracle"]


@dataclasses.dataclass(frozen=True)
class Orca(BaselineSystem):
    """Iteration-level scheduling, with memory reserved for each request as a whole.

    A request is admitted when there are chunks for all its sequences. A chunk has
    min(prompt + estimate, max_len) KV slots, rounded up to a power of two. The step
    that admits a request computes its prompt, together with the tokens of the running
    requests.

    Beams: after each step, each of the W beams of a request continues a uniformly
    sampled beam of the request with the probability `fork_probability`, and itself
    otherwise. A beam that is continued by several beams is copied for all but one of
    them, the whole chunk. (Which beams survive depends on the model and is unknown
    here. With the default most steps fork, as they do in beam search.)

    Attributes:
      num_slots: KV slots of the memory; those beyond the last multiple of `min_chunk`
        are lost.
      reserve: the estimate of the output: "max" is `max_len`, "oracle" the true output
        length, and "pow2" the next power of two of the true length.
      max_len: most tokens of a sequence, and size of the largest chunk; a power of two.
      min_chunk: KV slots of the smallest chunk, a power of two: the block size.
      max_num_seqs: most running sequences.
      max_num_batched_tokens: most tokens of a step, prompts included.
      max_seqs_per_request: most samples or beams of a request.
      fork_probability: of a beam in a step; with 0 only prompts are copied.
      seed: of the sampled forks.

    Raises:
      ValueError: a value is out of its range, or a sequence of `max_len` tokens does
        not fit.
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

    def __post_init__(self) -> None:
        if self.reserve not in ("max", "pow2", "oracle"):
            raise ValueError(
                f"reserve: expected max, pow2 or oracle, got {self.reserve!r}"
            )
        for name in ("max_len", "min_chunk"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two, got {size}")
        if self.min_chunk > self.max_len:
            raise ValueError(
                f"min_chunk: expected at most max_len ({self.max_len}), got "
                f"{self.min_chunk}"
            )
        if not 0 <= self.fork_probability <= 1:
            raise ValueError(
                f"fork_probability: expected a probability, got {self.fork_probability}"
            )
        check_system_sizes(self)

    @property
    def _allocation_unit(self) -> int:
        return self.min_chunk

    def _empty_memory(self) -> BuddyState:
        num_orders = (self.max_len // self.min_chunk).bit_length()
        return buddy.init_buddy(self.num_slots // self.min_chunk, num_orders)

    def _needed(self, jobs: BaselineRequest) -> jax.Array:
        if self.reserve == "max":
            estimate = jnp.full_like(jobs.output_len, self.max_len)
        elif self.reserve == "pow2":
            estimate = 1 << _ceil_log2(jobs.output_len)
        else:
            estimate = jobs.output_len
        return jnp.minimum(jobs.prompt_len + estimate, self.max_len)

    def _orders(self, jobs: BaselineRequest) -> jax.Array:
        return _ceil_log2(cdiv(self._needed(jobs), self.min_chunk))

    def _sizes(self, jobs: BaselineRequest) -> tuple[jax.Array, jax.Array]:
        return self._needed(jobs), self.min_chunk << self._orders(jobs)

    def _fits_memory(self, state: BaselineState, job: BaselineRequest) -> jax.Array:
        available = buddy.num_available(state.memory, self._orders(job))
        return available >= job.num_seqs

    def _allocate_memory(
        self, state: BaselineState, job: BaselineRequest, index: jax.Array
    ) -> BaselineState:
        order = self._orders(job)

        def allocate(
            number: jax.Array, carry: tuple[BuddyState, jax.Array]
        ) -> tuple[BuddyState, jax.Array]:
            memory, chunks = carry
            memory, begin = buddy.allocate_chunk(memory, order)
            return memory, chunks.at[index, number].set(begin)

        carry = (state.memory, state.chunks)
        memory, chunks = lax.fori_loop(0, job.num_seqs, allocate, carry)
        return dataclasses.replace(state, memory=memory, chunks=chunks)

    def _release_memory(
        self, state: BaselineState, is_released: jax.Array
    ) -> BaselineState:
        orders = self._orders(state.slots.jobs)

        def release_first(
            carry: tuple[BuddyState, jax.Array, jax.Array],
        ) -> tuple[BuddyState, jax.Array, jax.Array]:
            memory, chunks, is_released = carry
            index = jnp.argmax(is_released)

            def free(number: jax.Array, memory: BuddyState) -> BuddyState:
                return buddy.free_chunk(memory, chunks[index, number], orders[index])

            num_seqs = state.slots.jobs.num_seqs[index]
            memory = lax.fori_loop(0, num_seqs, free, memory)
            chunks = chunks.at[index].set(NO_CHUNK)
            return memory, chunks, is_released.at[index].set(False)

        carry = (state.memory, state.chunks, is_released)
        memory, chunks, _ = lax.while_loop(
            lambda carry: jnp.any(carry[2]), release_first, carry
        )
        return dataclasses.replace(state, memory=memory, chunks=chunks)

    def _num_copied(self, state: BaselineState) -> jax.Array:
        copied = super()._num_copied(state)
        if self.max_seqs_per_request == 1 or not self.fork_probability:
            return copied
        now = state.slots
        is_later = now.is_taken & now.jobs.is_beam & (now.num_generated > 1)

        def fork(copied: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(self.seed), state.num_steps)
            shape = (self._num_request_slots, self.max_seqs_per_request)
            forks = num_forks(key, now.jobs.num_seqs, shape, self.fork_probability)
            _, chunk = self._sizes(now.jobs)
            tokens = jnp.where(is_later, forks * chunk, 0)
            return copied + jnp.sum(tokens, dtype=jnp.int32)

        return when(jnp.any(is_later), fork, copied)

    def check(self, workload: Workload) -> None:
        """Raise ValueError for a request that can never be served."""
        jobs = BaselineRequest.all_of(workload)
        num_seqs = np.asarray(jobs.num_seqs)
        orders = self._orders(jobs)
        empty = self._empty_memory()
        most = jax.vmap(lambda order: buddy.num_available(empty, order))(orders)
        _, chunk = self._sizes(jobs)
        # What fits is counted in chunks: smaller chunks that are not buddies are of no
        # use to this request, even if their KV slots suffice.
        fits = num_seqs <= np.minimum(np.asarray(most), self.max_num_seqs)
        needs = num_seqs.astype(np.int64) * np.asarray(chunk)
        needs = np.where(fits, np.minimum(needs, self.num_slots), needs)
        needs = np.where(fits, needs, np.maximum(needs, self.num_slots + 1))
        self._check_needs(workload, needs, self.num_slots)


def num_forks(
    key: jax.Array, widths: jax.Array, shape: tuple[int, int], probability: float
) -> jax.Array:
    """Sample how many beams of each request must be copied after a step.

    A beam continues a parent. If several beams continue the same parent, all but one
    of them need a copy of it.

    Args:
      key: random key; consumed.
      widths: i32[P], beams of each request, at most B.
      shape: (P, B).
      probability: that a beam's parent is sampled; otherwise it is the beam itself.

    Returns:
      i32[P], beams without a parent of their own.
    """
    most = shape[1]
    sample = jax.random.uniform(key, shape)
    own = jnp.arange(most, dtype=jnp.int32)[None]
    # One sample decides both: where it is below `probability`, it is uniform there, and
    # its size selects the parent.
    scaled = sample / max(probability, 1e-9) * widths[:, None].astype(jnp.float32)
    other = jnp.minimum(jnp.floor(scaled).astype(jnp.int32), widths[:, None] - 1)
    parents = jnp.where(sample < probability, other, own)
    is_beam = own < widths[:, None]
    # [P, B of children, B of parents]
    is_parent = (parents[:, :, None] == own[None]) & is_beam[:, :, None]
    return widths - jnp.sum(jnp.any(is_parent, axis=1), axis=1, dtype=jnp.int32)


def _ceil_log2(numbers: jax.Array) -> jax.Array:
    """Return the smallest exponent whose power of two is at least the number (>= 1)."""
    return 32 - lax.clz(jnp.maximum(numbers, 1) - 1)


ENTRIES = tuple(
    baseline_entry(f"orca_{reserve}", Orca, reserve=reserve)
    for reserve in ("max", "pow2", "oracle")
)
