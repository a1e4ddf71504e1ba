"""Places: requests that wait in a ring, and those that run, for simple systems.

Place on the road: requests -> [waiting, places] -> load.

The sequences of a request are alike to the last token: they have its prompt and its
output length, and run in lockstep. So a place holds a request, with what it has
generated.

Letters: Q requests that can wait, P places, B sequences of one request at most.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.simulator.costs.load import Load
from jpaged.simulator.systems.base import NOBODY, Request
from jpaged.simulator.workloads.workload import Workload


class Job(NamedTuple):
    """What these systems keep of a request; scalars, or arrays of many."""

    request: jax.Array  # i32, its number in the workload, NOBODY: an empty place
    prompt_len: jax.Array  # i32
    output_len: jax.Array  # i32
    num_seqs: jax.Array  # i32, samples or beams
    is_beam: jax.Array  # bool

    @classmethod
    def of(cls, request: Request) -> Job:
        """The job that a request is."""
        return cls(
            request.number,
            request.prompt_len,
            request.output_len,
            jnp.maximum(request.num_samples, request.beam_width),
            request.beam_width > 0,
        )

    @classmethod
    def all_of(cls, workload: Workload) -> Job:
        """The jobs of all requests, arrays [N]."""
        return cls(
            jnp.arange(len(workload), dtype=jnp.int32),
            jnp.asarray(workload.prompt_lens),
            jnp.asarray(workload.output_lens),
            jnp.asarray(np.maximum(workload.num_samples, workload.beam_widths)),
            jnp.asarray(workload.beam_widths > 0),
        )

    @classmethod
    def nobody(cls, count: int) -> Job:
        """`count` times none."""
        zeros = jnp.zeros(count, jnp.int32)
        nobody = jnp.full(count, NOBODY, jnp.int32)
        return cls(nobody, zeros, zeros, zeros, jnp.zeros(count, jnp.bool_))

    @property
    def total_len(self) -> jax.Array:
        """Prompt and output, i32."""
        return self.prompt_len + self.output_len


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Waiting:
    """A line, first come first served."""

    jobs: Job  # of arrays [Q]
    head: jax.Array  # i32[], of the first, counted from the start of time
    tail: jax.Array  # i32[], behind the last

    @classmethod
    def none(cls, capacity: int) -> Waiting:
        """An empty line."""
        return cls(Job.nobody(capacity), jnp.int32(0), jnp.int32(0))

    @property
    def count(self) -> jax.Array:
        """Requests that wait, i32[]."""
        return self.tail - self.head

    def first(self) -> Job:
        """The one that came first; NOBODY where none waits."""
        at = self.head % self.jobs.request.size
        job = jax.tree.map(lambda part: part[at], self.jobs)
        return job._replace(request=jnp.where(self.count > 0, job.request, NOBODY))

    def without_first(self) -> Waiting:
        """The line when the first has gone."""
        return dataclasses.replace(self, head=self.head + 1)

    def push(self, job: Job) -> tuple[Waiting, jax.Array]:
        """The line with the job at its end, and True; or as it was, being full."""
        capacity = self.jobs.request.size
        ok = self.count < capacity
        at = jnp.where(ok, self.tail % capacity, capacity)
        jobs = jax.tree.map(
            lambda part, one: part.at[at].set(one, mode="drop"), self.jobs, job
        )
        return Waiting(jobs, self.head, self.tail + ok.astype(jnp.int32)), ok


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Who runs."""

    jobs: Job  # of arrays [P]
    num_generated: jax.Array  # i32[P], tokens of each of its sequences

    @classmethod
    def empty(cls, count: int) -> Places:
        """`count` empty places."""
        return cls(Job.nobody(count), jnp.zeros(count, jnp.int32))

    @property
    def is_taken(self) -> jax.Array:
        """bool[P]: somebody is there."""
        return self.jobs.request != NOBODY

    def put(self, job: Job, place: jax.Array) -> Places:
        """The places with the job at `place`; nothing generated yet."""
        jobs = jax.tree.map(lambda part, one: part.at[place].set(one), self.jobs, job)
        return Places(jobs, self.num_generated.at[place].set(0))

    def without(self, gone: jax.Array) -> Places:
        """The places, empty where bool[P] `gone` holds."""
        request = jnp.where(gone, NOBODY, self.jobs.request)
        return dataclasses.replace(self, jobs=self.jobs._replace(request=request))


def rows(
    places: Places, max_seqs_per_request: int, num_copied_tokens: jax.Array
) -> Load:
    """The load of a step in which all who are there take part, S = P * B.

    A request's first row computes its prompt, and the others get it as a copy; from
    then on each row computes a token in every step.
    """
    jobs = places.jobs
    is_prompt = places.num_generated == 0
    is_taken = places.is_taken
    query = jnp.where(is_prompt, jobs.prompt_len, 1)
    context = jobs.prompt_len + places.num_generated
    num_rows = jnp.where(is_taken, jnp.where(is_prompt, 1, jobs.num_seqs), 0)
    takes_part = jnp.arange(max_seqs_per_request)[None] < num_rows[:, None]
    zero = jnp.int32(0)
    return Load(
        query_lens=jnp.where(takes_part, query[:, None], 0).reshape(-1),
        context_lens=jnp.where(takes_part, context[:, None], 0).reshape(-1),
        num_logits=jnp.sum(num_rows, dtype=jnp.int32),
        num_copied_tokens=num_copied_tokens,
        num_swapped_tokens=zero,
        num_swap_copies=zero,
    )


def token_states(places: Places) -> jax.Array:
    """Slots of each request with keys and values in this step, i32[P].

    In the step of the prompt only the first of its sequences has it.
    """
    jobs = places.jobs
    num_seqs = jnp.where(places.num_generated == 0, 1, jobs.num_seqs)
    context = jobs.prompt_len + places.num_generated
    return jnp.where(places.is_taken, num_seqs * context, 0)


def check_positive(**sizes: int) -> None:
    """Raises a ValueError that names a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: wanted at least 1, got {size}")


def check_workload(
    workload: Workload, needs: np.ndarray, num_slots: int, max_len: int, max_seqs: int
) -> None:
    """Raises a ValueError for the first request that could never be served.

    Args:
      workload: the requests.
      needs: i64[N], slots that each would take.
      num_slots: slots there are.
      max_len: tokens that a sequence may have, prompt and output.
      max_seqs: sequences that a request may have.
    """
    totals = workload.prompt_lens.astype(np.int64) + workload.output_lens
    num_seqs = np.maximum(workload.num_samples, workload.beam_widths)
    for what, values, most, mend in [
        ("tokens, prompt and output", totals, max_len, f"limited({max_len})"),
        ("sequences", num_seqs, max_seqs, "max_seqs_per_request"),
        ("slots", needs, num_slots, "num_slots"),
    ]:
        wrong = np.flatnonzero(values > most)
        if wrong.size:
            raise ValueError(
                f"workload: wanted at most {most} {what} per request, got "
                f"{values[wrong[0]]} for request {wrong[0]}; mend it with {mend}"
            )
