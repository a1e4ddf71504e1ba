"""Optimum: bounds that no policy can exceed, for comparison with policies.

Outside the pipeline: host code on traces and workloads.

Shape symbols: R prompts, N requests.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.policies import Waiting
from jpaged.simulator.costs.load import CostModel, StepLoad
from jpaged.simulator.simulate import Outcome, sweep
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload

_NEVER = np.iinfo(np.int64).max
MOST_ORDERED = 7  # requests: 5,040 orders
_SIMULATIONS_PER_CALL = 720  # simulations of one program


def belady_hits(prompts: Sequence[Sequence[int]], capacity: int) -> np.ndarray:
    """Count the blocks of each prompt that an optimal prefix cache finds.

    Requests arrive one after the other. A block is found if an earlier prompt had it
    and the cache has kept it since. Between two requests the cache keeps at most
    `capacity` blocks. It evicts the block whose next use is last, and of one path the
    block at its end, so that the cache always holds whole prefixes.

    No other eviction finds more blocks in total: keeping a block from one use to the
    next is an interval, at most `capacity` intervals overlap, and dropping the interval
    that ends last leaves the most of them (Belady 1966).

    Args:
      prompts: ids of the blocks of each prompt. Equal ids after equal prefixes are the
        same block.
      capacity: blocks, 0 or more.

    Returns:
      i64[R], found blocks of each prompt.

    Raises:
      ValueError: the capacity is negative.
    """
    if capacity < 0:
        raise ValueError(f"capacity: expected at least 0, got {capacity}")
    prompts = _paths(prompts)
    next_uses = _next_uses(prompts)
    kept: dict[int, int] = {}  # block: its next use
    heap: list[tuple[int, int, int]] = []  # the last next use first, then the deepest
    hits = np.zeros(len(prompts), np.int64)
    for number, (prompt, uses) in enumerate(zip(prompts, next_uses, strict=True)):
        # The cache holds whole prefixes, so the known blocks of a prompt come first.
        hits[number] = sum(block in kept for block in prompt)
        for depth, (block, use) in enumerate(zip(prompt, uses, strict=True)):
            kept.pop(block, None)
            if use != _NEVER:
                kept[block] = use
                heapq.heappush(heap, (-use, -depth, block))
        while len(kept) > capacity:
            use, _, block = heapq.heappop(heap)
            if kept.get(block) == -use:  # otherwise an outdated entry
                del kept[block]
    return hits


def alone_seconds(workload: Workload, cost_model: CostModel) -> np.ndarray:
    """Compute the least time from each request's arrival to its last token.

    The request runs alone, its prompt is computed in one step, and only one of its
    sequences counts. No schedule is faster as long as a step with more work never takes
    less time, which holds for every cost model here. If prompts share contents, only
    their last token counts, since the rest may be cached.

    Args:
      workload: the requests.
      cost_model: seconds of a step.

    Returns:
      f64[N], seconds.
    """
    longest = int(np.max(workload.prompt_lens + workload.output_lens))

    def seconds(query_len: jax.Array, context_len: jax.Array) -> jax.Array:
        none = jnp.int32(0)
        return cost_model(
            StepLoad(query_len[None], context_len[None], jnp.int32(1), none, none, none)
        )

    evaluate = jax.jit(jax.vmap(seconds))
    lens = jnp.arange(1, longest + 1, dtype=jnp.int32)
    decode = np.asarray(evaluate(jnp.ones_like(lens), lens), np.float64)
    prompt = decode
    if workload.contents is None:
        prompt = np.asarray(evaluate(lens, lens), np.float64)
    # The prompt's step gives the first token; token i > 1 attends to prompt + i - 1.
    until = np.concatenate([[0.0], np.cumsum(decode)])
    ends = workload.prompt_lens + workload.output_lens - 1
    return prompt[workload.prompt_lens - 1] + until[ends] - until[workload.prompt_lens]


def best_order(
    system: EngineSystem, workload: Workload, cost_model: CostModel
) -> tuple[tuple[int, ...], Outcome]:
    """Find the order of admission with the least mean normalised latency.

    All orders are simulated. A policy orders the waiting requests, and the engine
    admits what fits. No policy that keeps to one order batches the requests better.

    Args:
      system: the engine; its own policy is ignored.
      workload: at most `MOST_ORDERED` requests.
      cost_model: seconds of a step.

    Returns:
      The numbers of the requests, the first admitted first, and the result.

    Raises:
      ValueError: the workload has more requests; or as `simulate`.
    """
    count = len(workload)
    if count > MOST_ORDERED:
        raise ValueError(
            f"workload: expected at most {MOST_ORDERED} requests, as all orders are "
            f"simulated, got {count}"
        )
    orders = list(itertools.permutations(range(count)))
    found: list[Outcome] = []
    for first in range(0, len(orders), _SIMULATIONS_PER_CALL):
        some = [
            _in_order(system, one)
            for one in orders[first : first + _SIMULATIONS_PER_CALL]
        ]
        found += sweep(some, workload, cost_model)
    means = [np.mean(outcome.normalized_latencies) for outcome in found]
    best = int(np.argmin(means))
    return orders[best], found[best]


def _in_order(system: EngineSystem, order: Sequence[int]) -> EngineSystem:
    ranks = tuple(np.argsort(order).astype(float).tolist())
    config = dataclasses.replace(
        system.config, policy=_by_rank, policy_parameters=ranks
    )
    return dataclasses.replace(system, config=config)


def _by_rank(waiting: Waiting) -> jax.Array:
    """A policy whose parameters are the ranks of the requests, by number."""
    ranks = waiting.parameters
    return ranks[jnp.clip(waiting.arrivals, 0, ranks.shape[0] - 1)]


def _paths(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Replace each block by a number that represents it and all blocks before it."""
    numbers: dict[tuple[int, int], int] = {}
    found = []
    for prompt in prompts:
        path, parent = [], -1
        for block in prompt:
            parent = numbers.setdefault((parent, block), len(numbers))
            path.append(parent)
        found.append(path)
    return found


def _next_uses(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the number of the next prompt that has the block, for each block."""
    next_use: dict[int, int] = {}
    found = []
    for number in reversed(range(len(prompts))):
        prompt = prompts[number]
        found.append([next_use.get(block, _NEVER) for block in prompt])
        next_use.update(dict.fromkeys(prompt, number))
    return found[::-1]
