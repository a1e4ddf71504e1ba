"""No eviction: paged memory, with all blocks of a request reserved at admission.

Pipeline: requests -> [no_evict] -> step load -> cost model.

This is the rule of TensorRT-LLM's default scheduler, GUARANTEED_NO_EVICT. Blocks need
not be contiguous, but a request is admitted only if its longest possible output fits
beside those of all running requests. No request is ever preempted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.simulator.systems.baseline_system import (
    BaselineState,
    BaselineSystem,
    baseline_entry,
    check_positive,
    check_system_sizes,
)
from jpaged.simulator.systems.request_slots import BaselineRequest
from jpaged.simulator.workloads.workload import Workload


@dataclasses.dataclass(frozen=True)
class NoEvict(BaselineSystem):
    """First come, first served; blocks for prompt and output limit, no preemption.

    Each sequence has its own blocks, prompt included.

    Attributes:
      num_slots: KV slots of the memory; those beyond the last whole block are lost.
      output_limit: tokens that every request declares as its longest output. None:
        the true output length, which no real user knows in advance.
      block_size: tokens of a block.
      max_len: most tokens of a sequence, prompt and output.
      max_num_seqs: most running sequences.
      max_num_batched_tokens: most tokens of a step, prompts included.
      max_seqs_per_request: most samples or beams of a request.

    Raises:
      ValueError: a size is below 1, or a sequence of `max_len` tokens does not fit.
    """

    num_slots: int
    output_limit: int | None = None
    block_size: int = 16
    max_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2560
    max_seqs_per_request: int = 1

    def __post_init__(self) -> None:
        check_positive(block_size=self.block_size)
        if self.output_limit is not None:
            check_positive(output_limit=self.output_limit)
        check_system_sizes(self)

    @property
    def _allocation_unit(self) -> int:
        return self.block_size

    def _sizes(self, jobs: BaselineRequest) -> tuple[jax.Array, jax.Array]:
        limit = self.output_limit
        outputs = jobs.output_len if limit is None else jnp.int32(limit)
        most = jnp.minimum(jobs.prompt_len + outputs, self.max_len)
        blocks = cdiv(most, self.block_size)
        return blocks * self.block_size, blocks * self.block_size

    def _fits_memory(self, state: BaselineState, job: BaselineRequest) -> jax.Array:
        running = state.slots.jobs
        _, reserved = self._sizes(running)
        in_use = jnp.where(state.slots.is_taken, running.num_seqs * reserved, 0)
        _, needed = self._sizes(job)
        return jnp.sum(in_use) + job.num_seqs * needed <= self._num_usable

    def check(self, workload: Workload) -> None:
        """Raise ValueError for a request that can never be served."""
        limit = self.output_limit
        longer = np.flatnonzero(workload.output_lens > (limit or self.max_len))
        if longer.size:
            raise ValueError(
                f"output_limit: expected at least every output_lens, got {limit}, but "
                f"{workload.output_lens[longer[0]]} at index {longer[0]}"
            )
        jobs = BaselineRequest.all_of(workload)
        num_seqs = np.asarray(jobs.num_seqs)
        needs = num_seqs.astype(np.int64) * np.asarray(self._sizes(jobs)[1])
        fits = num_seqs <= self.max_num_seqs
        needs = np.where(fits, needs, np.maximum(needs, self.num_slots + 1))
        self._check_needs(workload, needs, self._num_usable)


ENTRIES = (baseline_entry("no_evict", NoEvict),)
