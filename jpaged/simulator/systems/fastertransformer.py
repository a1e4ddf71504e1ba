"""FasterTransformer: static batches that run to completion.

Pipeline: requests -> [fastertransformer] -> step load -> cost model.
Source: Kwon et al. 2023, section 6.1, and its artifact.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.systems.base import Usage
from jpaged.simulator.systems.baseline_system import (
    BaselineState,
    BaselineSystem,
    StepCapacity,
    baseline_entry,
    check_system_sizes,
)
from jpaged.simulator.systems.request_slots import RequestSlots, slots_load


@dataclasses.dataclass(frozen=True)
class FasterTransformer(BaselineSystem):
    """Batches that run to completion.

    When no request runs, the earliest waiting requests become a batch, as many as have
    a row of `max_len` KV slots. The first step computes all prompts, padded to the
    longest one. In every later step each row computes a token, also the rows that are
    finished, until the last one is finished. Then all answers are returned together
    and the next batch starts.

    Attributes:
      num_slots: KV slots of the memory; those beyond the last whole row are lost.
      max_len: most tokens of a sequence, prompt and output.
      max_num_seqs: most sequences of a batch.
      max_seqs_per_request: most samples or beams of a request.

    Raises:
      ValueError: a size is below 1, or a sequence of `max_len` tokens does not fit.
    """

    num_slots: int
    max_len: int = 2048
    max_num_seqs: int = 256
    max_seqs_per_request: int = 1

    def __post_init__(self) -> None:
        check_system_sizes(self)

    @property
    def _max_step_tokens(self) -> int:
        """All prompts of a batch are computed in one step: only memory is a limit."""
        return self.num_slots

    def _admit(self, state: BaselineState, capacity: StepCapacity) -> BaselineState:
        """Admit a new batch, but only when no request runs."""
        none = jax.tree.map(jnp.zeros_like, capacity)
        is_over = ~jnp.any(state.slots.is_taken)
        capacity = jax.tree.map(lambda a, b: jnp.where(is_over, a, b), capacity, none)
        return super()._admit(state, capacity)

    def _load(self, state: BaselineState) -> StepLoad:
        now = state.slots
        copied = self._num_copied(state)
        load = slots_load(self._without_padding(now), self.max_seqs_per_request, copied)
        longest = jnp.max(jnp.where(now.is_taken, now.jobs.prompt_len, 0))
        # All rows of a batch compute their prompts in the same step.
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
        """Count free slots as external while requests wait for the batch to end."""
        state = dataclasses.replace(state, slots=self._without_padding(state.slots))
        return super()._usage(state, is_stuck | (state.waiting.count > 0))

    def _has_ended(self, is_taken: jax.Array, is_done: jax.Array) -> jax.Array:
        return is_taken & jnp.all(is_done | ~is_taken)

    def _without_padding(self, now: RequestSlots) -> RequestSlots:
        """Limit the generated tokens of finished rows to their output length."""
        generated = jnp.minimum(now.num_generated, now.jobs.output_len)
        return dataclasses.replace(now, num_generated=generated)


ENTRIES = (baseline_entry("fastertransformer", FasterTransformer),)
