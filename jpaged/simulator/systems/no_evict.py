"""No eviction: paged memory, all that a request may ever need reserved at admission.

Place on the road: workload -> [no_evict] -> load -> cost model -> clock.

The rule of TensorRT-LLM's default scheduler, GUARANTEED_NO_EVICT: blocks need not lie
side by side, but a request is admitted only if its longest possible output fits beside
those of all who run, so that nobody is ever preempted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.simulator.systems import places
from jpaged.simulator.systems.baseline_system import (
    BaselineState,
    BaselineSystem,
    check_sizes,
)
from jpaged.simulator.systems.places import Job
from jpaged.simulator.workloads.workload import Workload


@dataclasses.dataclass(frozen=True)
class NoEvict(BaselineSystem):
    """First come, first served; blocks for prompt and output limit, none preempted.

    Each sequence has blocks of its own, prompt included.

    Attributes:
      num_slots: of the memory; what is no whole block is lost.
      output_limit: tokens that every request says it may generate; None: it says what
        it will, which no user can.
      block_size: tokens of a block.
      max_len: tokens that a sequence may have, prompt and output.
      max_num_seqs: sequences that run at a time, at most.
      max_num_batched_tokens: of a step, prompts included.
      max_seqs_per_request: samples or beams that a request may have.

    Raises:
      ValueError: a size is below 1, or no sequence of max_len fits.
    """

    num_slots: int
    output_limit: int | None = None
    block_size: int = 16
    max_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2560
    max_seqs_per_request: int = 1

    def __post_init__(self):
        places.check_positive(block_size=self.block_size)
        if self.output_limit is not None:
            places.check_positive(output_limit=self.output_limit)
        check_sizes(self)

    @property
    def _piece(self) -> int:
        return self.block_size

    def _sizes(self, jobs: Job) -> tuple[jax.Array, jax.Array]:
        limit = self.output_limit
        outputs = jobs.output_len if limit is None else jnp.int32(limit)
        most = jnp.minimum(jobs.prompt_len + outputs, self.max_len)
        blocks = cdiv(most, self.block_size)
        return blocks * self.block_size, blocks * self.block_size

    def _fits_memory(self, state: BaselineState, job: Job) -> jax.Array:
        running = state.places.jobs
        _, held = self._sizes(running)
        in_use = jnp.where(state.places.is_taken, running.num_seqs * held, 0)
        _, wanted = self._sizes(job)
        return jnp.sum(in_use) + job.num_seqs * wanted <= self._num_usable

    def check(self, workload: Workload) -> None:
        """Raises a ValueError for a request that could never be served."""
        limit = self.output_limit
        longer = np.flatnonzero(workload.output_lens > (limit or self.max_len))
        if longer.size:
            raise ValueError(
                f"output_limit: wanted at least every output_lens, got {limit}, but "
                f"{workload.output_lens[longer[0]]} at index {longer[0]}"
            )
        jobs = Job.all_of(workload)
        num_seqs = np.asarray(jobs.num_seqs)
        needs = num_seqs.astype(np.int64) * np.asarray(self._sizes(jobs)[1])
        has_rows = num_seqs <= self.max_num_seqs
        needs = np.where(has_rows, needs, np.maximum(needs, self.num_slots + 1))
        places.check_workload(
            workload, needs, self._num_usable, self.max_len, self.max_seqs_per_request
        )
