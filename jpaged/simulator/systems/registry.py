"""Systems by name, ready for a workload and a memory.

Place on the road: names in flags -> [systems] -> system.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jpaged.config import EngineConfig
from jpaged.simulator.systems.base import System
from jpaged.simulator.systems.baselines import Contiguous, FasterTransformer, Orca
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.systems.no_evict import NoEvict
from jpaged.simulator.workloads.workload import Workload

# The authors' engine flags (artifact of Kwon et al. 2023).
PAPER_BLOCK_SIZE = 16
PAPER_MAX_BATCHED_TOKENS = 2560


def engine_system(
    workload: Workload,
    num_slots: int,
    *,
    block_size: int = PAPER_BLOCK_SIZE,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = PAPER_MAX_BATCHED_TOKENS,
    max_model_len: int | None = None,
    max_num_requests: int | None = None,
    **config: Any,
) -> EngineSystem:
    """The engine with a memory of `num_slots` tokens, and room for the workload.

    Args:
      workload: its kinds of requests and its longest one decide the shapes.
      num_slots: tokens whose keys and values fit; whole blocks of them count.
      block_size, max_num_seqs, max_num_batched_tokens: as for `EngineConfig`.
      max_model_len: None: the next power of two that holds the longest request, so that
        few shapes compile.
      max_num_requests: None: twice the rows, and whole requests more.
      config: further fields of `EngineConfig`.

    Raises:
      ValueError: as `EngineConfig`; or not one block fits.
    """
    kinds = np.unique(
        np.stack([workload.num_samples, workload.beam_widths], axis=1), axis=0
    )
    kinds = tuple((int(samples), int(width)) for samples, width in kinds)
    widest = max(width for _, width in kinds)
    # A beam search holds its finished beams besides.
    most = max(2 * width if width else samples for samples, width in kinds)
    totals = workload.prompt_lens.astype(np.int64) + workload.output_lens
    if max_model_len is None:
        max_model_len = 1 << max(math.ceil(math.log2(int(np.max(totals)))), 4)
    if num_slots < block_size:
        raise ValueError(
            f"num_slots: expected at least block_size ({block_size}), got {num_slots}"
        )
    if max_num_requests is None:
        max_num_requests = 2 * max_num_seqs * (2 if widest else 1) + most
    return EngineSystem(
        EngineConfig(
            num_blocks=num_slots // block_size,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
            max_model_len=max_model_len,
            max_num_requests=max_num_requests,
            max_num_stop_ids=1,
            max_beam_width=widest,
            **config,
        ),
        kinds=kinds,
        content_size=workload.content_size,
    )


def _radix(workload: Workload, num_slots: int, **sizes: Any) -> System:
    """RadixAttention's order: who has the longest cached prefix comes first."""
    sizes = {"policy": "longest_prefix", "enable_prefix_caching": True} | sizes
    return engine_system(workload, num_slots, **sizes)


def _baseline(kind: Callable[..., System], **fixed: Any):
    def build(workload: Workload, num_slots: int, *, max_num_seqs: int = 256) -> System:
        most = np.maximum(workload.num_samples, workload.beam_widths)
        return kind(
            num_slots,
            max_num_seqs=max_num_seqs,
            max_seqs_per_request=int(np.max(most)),
            **fixed,
        )

    return build


# Each takes the workload and the slots; `max_num_seqs` by keyword, and the engine's
# whatever `engine_system` takes.
SYSTEMS: dict[str, Callable[..., System]] = {
    "vllm": engine_system,
    "radix": _radix,
    "orca_max": _baseline(Orca, reserve="max"),
    "orca_pow2": _baseline(Orca, reserve="pow2"),
    "orca_oracle": _baseline(Orca, reserve="oracle"),
    "fastertransformer": _baseline(FasterTransformer),
    "contiguous": _baseline(Contiguous),
    "no_evict": _baseline(NoEvict),
}
ENGINES = ("vllm", "radix")  # those that are the engine


def find_system(name: str, workload: Workload, num_slots: int, **sizes: Any) -> System:
    """The system of that name.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name](workload, num_slots, **sizes)
