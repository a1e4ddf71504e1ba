"""Contiguous: continuous batching, with memory of maximum length for every sequence.

Pipeline: requests -> [contiguous] -> step load -> cost model.
"""

from __future__ import annotations

import dataclasses

from jpaged.simulator.systems.baseline_system import (
    BaselineSystem,
    baseline_entry,
    check_system_sizes,
)


@dataclasses.dataclass(frozen=True)
class Contiguous(BaselineSystem):
    """Iteration-level scheduling, with `max_len` KV slots reserved for every sequence.

    Attributes:
      num_slots: KV slots of the memory; those beyond the last whole row are lost.
      max_len: most tokens of a sequence, prompt and output.
      max_num_seqs: most running sequences.
      max_num_batched_tokens: most tokens of a step, prompts included.
      max_seqs_per_request: most samples or beams of a request.

    Raises:
      ValueError: a size is below 1, or a sequence of `max_len` tokens does not fit.
    """

    num_slots: int
    max_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2560
    max_seqs_per_request: int = 1

    def __post_init__(self) -> None:
        check_system_sizes(self)


ENTRIES = (baseline_entry("contiguous", Contiguous),)
