"""Registry records of the engine: `vllm`, and `radix` with another policy.

Pipeline: names and options in flags -> [engine_entries] -> engine system.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpaged.config import EngineConfig
from jpaged.kv.cache_groups import choose_groups
from jpaged.policies import BUDGET, EVICTION, PREEMPTION
from jpaged.simulator.options import Option
from jpaged.simulator.systems.base import System, SystemEntry
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload

# The flags with which the authors ran their engine (artifact of Kwon et al. 2023).
PAPER_BLOCK_SIZE = 16
PAPER_MAX_BATCHED_TOKENS = 2560

OPTIONS = (
    Option("block_size", "int", "Tokens of a block; default: 16.", minimum=1),
    Option(
        "prefix_caching", "bool", "Prefix cache; default: if prompts share prefixes."
    ),
    Option(
        "preemption",
        "str",
        "What preemption does with blocks; default: recompute.",
        choices=("recompute", "swap"),
    ),
    Option("policy", "str", "Which request is admitted first; default: fcfs."),
    Option("policy_parameters", "floats", "Weights of the policy 'weighted'."),
    *(
        option
        for kind in (PREEMPTION, EVICTION, BUDGET)
        for option in (
            Option(
                kind.argument,
                "str",
                f"One of {', '.join(kind.policies)}; default: {kind.default}.",
            ),
            Option(kind.parameters, "floats", f"Parameters of the {kind.argument}."),
        )
    ),
)


def make_engine_system(
    workload: Workload,
    num_slots: int,
    *,
    block_size: int = PAPER_BLOCK_SIZE,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = PAPER_MAX_BATCHED_TOKENS,
    max_model_len: int | None = None,
    max_num_requests: int | None = None,
    layer_windows: Sequence[int | None] = (None,),
    **config: Any,
) -> EngineSystem:
    """Return the engine with a memory of `num_slots` tokens, sized for a workload.

    Args:
      workload: its kinds of requests and its longest request decide the shapes.
      num_slots: tokens whose keys and values fit into the memory, rounded down to whole
        blocks.
      block_size, max_num_seqs, max_num_batched_tokens: as for `EngineConfig`.
      max_model_len: None: the next power of two that holds the longest request, so that
        few shapes are compiled.
      max_num_requests: size of the request table. None: twice the batch rows, and
        space for one more request.
      layer_windows: tokens that a query of each layer of the model sees; None: all.
        They determine the cache groups. `num_slots` and `num_swap_blocks` are those of
        one group of all layers.
      **config: further fields of `EngineConfig`.

    Raises:
      ValueError: as `EngineConfig`; or not one block fits.
    """
    pairs = np.stack([workload.num_samples, workload.beam_widths], axis=1)
    kinds = tuple(
        (int(samples), int(width)) for samples, width in np.unique(pairs, axis=0)
    )
    widest = max(width for _, width in kinds)
    # A beam search keeps its finished beams too.
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
    groups = choose_groups(layer_windows, max_model_len)
    layers = len(layer_windows)
    if "num_swap_blocks" in config:
        swapped = config["num_swap_blocks"] * layers // groups.num_layers
        config["num_swap_blocks"] = swapped
    return EngineSystem(
        EngineConfig(
            num_blocks=num_slots * layers // (block_size * groups.num_layers),
            group_windows=groups.windows,
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


def _config_fields(
    workload: Workload,
    num_slots: int,
    *,
    block_size: int = PAPER_BLOCK_SIZE,
    prefix_caching: bool | None = None,
    preemption: str = "recompute",
    **chosen: Any,
) -> dict[str, Any]:
    """Convert values of `OPTIONS` to keywords of `make_engine_system`."""
    del workload
    fields: dict[str, Any] = {"block_size": block_size, "preemption": preemption}
    if preemption == "swap":
        fields["num_swap_blocks"] = num_slots // block_size
    for name, value in chosen.items():  # policies and their parameters
        if name.endswith("_parameters"):
            value = tuple(value)
        if value not in (None, ()):
            fields[name] = value
    if prefix_caching is not None:
        fields["enable_prefix_caching"] = prefix_caching
    return fields


def _vllm_fields(workload: Workload, num_slots: int, **options: Any) -> dict[str, Any]:
    """Use the prefix cache by default where prompts share contents."""
    if options.get("prefix_caching") is None:
        options["prefix_caching"] = workload.contents is not None
    return _config_fields(workload, num_slots, **options)


def _make_radix(workload: Workload, num_slots: int, **fields: Any) -> System:
    """Return RadixAttention's order: the longest cached prefix is admitted first."""
    fields = {"policy": "longest_prefix", "enable_prefix_caching": True} | fields
    return make_engine_system(workload, num_slots, **fields)


def _max_request_len(num_slots: int, num_beams: int, options: Mapping[str, Any]) -> int:
    """The memory must hold one sequence, or all beams of one request."""
    block_size = options.get("block_size", PAPER_BLOCK_SIZE)
    return num_slots // block_size // num_beams * block_size


ENTRIES = (
    SystemEntry(
        "vllm",
        make_engine_system,
        _max_request_len,
        is_engine=True,
        options=OPTIONS,
        keywords=_vllm_fields,
    ),
    SystemEntry(
        "radix",
        _make_radix,
        _max_request_len,
        is_engine=True,
        options=OPTIONS,
        keywords=_config_fields,
    ),
)
