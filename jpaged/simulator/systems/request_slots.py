"""Request slots: the waiting queue and the running requests of the baselines.

Pipeline: requests -> [waiting queue, request slots] -> step load.

All sequences of a request have the same prompt and the same output length, and they
run in lockstep. One request slot therefore holds a whole request and the number of
tokens that each of its sequences has generated.

Shape symbols: Q capacity of the waiting queue, P request slots, B most sequences of one
request, N requests of the workload.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.systems.base import NO_REQUEST_NUMBER, SimulatedRequest
from jpaged.simulator.workloads.workload import Workload


class BaselineRequest(NamedTuple):
    """The facts that the baselines store of a request; scalars, or arrays of many."""

    request: jax.Array  # i32, its number in the workload, or NO_REQUEST_NUMBER
    prompt_len: jax.Array  # i32
    output_len: jax.Array  # i32
    num_seqs: jax.Array  # i32, samples or beams
    is_beam: jax.Array  # bool

    @classmethod
    def of(cls, request: SimulatedRequest) -> BaselineRequest:
        """Convert an arriving request."""
        return cls(
            request.number,
            request.prompt_len,
            request.output_len,
            jnp.maximum(request.num_samples, request.beam_width),
            request.beam_width > 0,
        )

    @classmethod
    def all_of(cls, workload: Workload) -> BaselineRequest:
        """Convert all requests of a workload to arrays [N]."""
        return cls(
            jnp.arange(len(workload), dtype=jnp.int32),
            jnp.asarray(workload.prompt_lens),
            jnp.asarray(workload.output_lens),
            jnp.asarray(np.maximum(workload.num_samples, workload.beam_widths)),
            jnp.asarray(workload.beam_widths > 0),
        )

    @classmethod
    def empty(cls, count: int) -> BaselineRequest:
        """Return arrays [count] without requests."""
        zeros = jnp.zeros(count, jnp.int32)
        numbers = jnp.full(count, NO_REQUEST_NUMBER, jnp.int32)
        return cls(numbers, zeros, zeros, zeros, jnp.zeros(count, jnp.bool_))

    @property
    def total_len(self) -> jax.Array:
        """Tokens of prompt and output, i32."""
        return self.prompt_len + self.output_len


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WaitingQueue:
    """A first come, first served queue in a ring buffer."""

    jobs: BaselineRequest  # of arrays [Q]
    head: jax.Array  # i32[], requests that have left the queue since the start
    tail: jax.Array  # i32[], requests that have entered it

    @classmethod
    def empty(cls, capacity: int) -> WaitingQueue:
        """Return an empty queue."""
        return cls(BaselineRequest.empty(capacity), jnp.int32(0), jnp.int32(0))

    @property
    def count(self) -> jax.Array:
        """Number of waiting requests, i32[]."""
        return self.tail - self.head

    def first(self) -> BaselineRequest:
        """Return the earliest request; its number is NO_REQUEST_NUMBER if empty."""
        at = self.head % self.jobs.request.size
        job = jax.tree.map(lambda part: part[at], self.jobs)
        number = jnp.where(self.count > 0, job.request, NO_REQUEST_NUMBER)
        return job._replace(request=number)

    def without_first(self) -> WaitingQueue:
        """Remove the earliest request."""
        return dataclasses.replace(self, head=self.head + 1)

    def push(self, job: BaselineRequest) -> tuple[WaitingQueue, jax.Array]:
        """Append a request.

        Returns:
          The queue, and bool[]: whether it had space. If not, it is unchanged.
        """
        capacity = self.jobs.request.size
        ok = self.count < capacity
        at = jnp.where(ok, self.tail % capacity, capacity)
        jobs = jax.tree.map(
            lambda part, one: part.at[at].set(one, mode="drop"), self.jobs, job
        )
        return WaitingQueue(jobs, self.head, self.tail + ok.astype(jnp.int32)), ok


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestSlots:
    """The running requests."""

    jobs: BaselineRequest  # of arrays [P]
    num_generated: jax.Array  # i32[P], tokens of each sequence

    @classmethod
    def empty(cls, count: int) -> RequestSlots:
        """Return `count` empty request slots."""
        return cls(BaselineRequest.empty(count), jnp.zeros(count, jnp.int32))

    @property
    def is_taken(self) -> jax.Array:
        """bool[P], the request slot holds a request."""
        return self.jobs.request != NO_REQUEST_NUMBER

    def put(self, job: BaselineRequest, index: jax.Array) -> RequestSlots:
        """Store a request, without generated tokens, in the request slot `index`."""
        jobs = jax.tree.map(lambda part, one: part.at[index].set(one), self.jobs, job)
        return RequestSlots(jobs, self.num_generated.at[index].set(0))

    def without(self, is_released: jax.Array) -> RequestSlots:
        """Empty the request slots where bool[P] `is_released` is true."""
        request = jnp.where(is_released, NO_REQUEST_NUMBER, self.jobs.request)
        return dataclasses.replace(self, jobs=self.jobs._replace(request=request))


def slots_load(
    slots: RequestSlots, max_seqs_per_request: int, num_copied_tokens: jax.Array
) -> StepLoad:
    """Compute the load of a step in which every running request takes part.

    In the first step of a request, one row computes the prompt. The other sequences
    receive a copy of it. After that, each sequence computes one token per step.

    Args:
      slots: the running requests.
      max_seqs_per_request: B.
      num_copied_tokens: i32[], tokens whose keys and values are copied in the step.

    Returns:
      The load of P * B rows.
    """
    jobs = slots.jobs
    is_prompt = slots.num_generated == 0
    is_taken = slots.is_taken
    query = jnp.where(is_prompt, jobs.prompt_len, 1)
    context = jobs.prompt_len + slots.num_generated
    num_rows = jnp.where(is_taken, jnp.where(is_prompt, 1, jobs.num_seqs), 0)
    takes_part = jnp.arange(max_seqs_per_request)[None] < num_rows[:, None]
    zero = jnp.int32(0)
    return StepLoad(
        query_lens=jnp.where(takes_part, query[:, None], 0).reshape(-1),
        context_lens=jnp.where(takes_part, context[:, None], 0).reshape(-1),
        num_logits=jnp.sum(num_rows, dtype=jnp.int32),
        num_copied_tokens=num_copied_tokens,
        num_swapped_tokens=zero,
        num_swap_copies=zero,
    )


def num_token_states(slots: RequestSlots) -> jax.Array:
    """Count the KV slots of each request that hold keys and values, i32[P].

    In the step of the prompt, only the first sequence of a request holds it.
    """
    jobs = slots.jobs
    num_seqs = jnp.where(slots.num_generated == 0, 1, jobs.num_seqs)
    context = jobs.prompt_len + slots.num_generated
    return jnp.where(slots.is_taken, num_seqs * context, 0)
