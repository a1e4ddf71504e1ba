"""Optimum: what no policy can pass, as lines to measure others by.

Beside the road: host code on traces and workloads.
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
from jpaged.simulator.costs.load import CostModel, Load
from jpaged.simulator.simulate import Outcome, sweep
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload

_NEVER = np.iinfo(np.int64).max
MOST_ORDERED = 7  # requests: 5,040 orders
_SIDE_BY_SIDE = 720  # simulations of one program


def belady_hits(prompts: Sequence[Sequence[int]], capacity: int) -> np.ndarray:
    """The most blocks of each prompt that can be known when it comes, i64[R].

    Requests come one after the other. A block is known if an earlier prompt had it and
    it was kept since; between two requests at most `capacity` blocks are kept. What is
    wanted again last goes first, and of a path its tail, so that what is kept is always
    whole beginnings. No choice of what to keep gives more blocks in all: keeping a
    block from one use to the next is an interval, `capacity` intervals overlap at most,
    and dropping the one that ends last leaves the most (Belady 1966).

    Args:
      prompts: of each its blocks' ids; equal ids behind equal beginnings are one block.
      capacity: blocks, 0 or more.

    Raises:
      ValueError: the capacity is negative.
    """
    if capacity < 0:
        raise ValueError(f"capacity: expected at least 0, got {capacity}")
    prompts = _paths(prompts)
    next_uses = _next_uses(prompts)
    kept: dict[int, int] = {}  # block: its next use
    heap: list[tuple[int, int, int]] = []  # the last used first, of those the deepest
    hits = np.zeros(len(prompts), np.int64)
    for number, (prompt, uses) in enumerate(zip(prompts, next_uses, strict=True)):
        # What is kept are beginnings, so all known blocks of the prompt lead it.
        hits[number] = sum(block in kept for block in prompt)
        for depth, (block, use) in enumerate(zip(prompt, uses, strict=True)):
            kept.pop(block, None)
            if use != _NEVER:
                kept[block] = use
                heapq.heappush(heap, (-use, -depth, block))
        while len(kept) > capacity:
            use, _, block = heapq.heappop(heap)
            if kept.get(block) == -use:  # else it has been used since, or dropped
                del kept[block]
    return hits


def alone_seconds(workload: Workload, cost_model: CostModel) -> np.ndarray:
    """The least time from each request's arrival to its last token, f64[N].

    The machine has nothing else to do, the prompt enters in one step, and one sequence
    of the request counts. No schedule is faster where a step's time does not fall when
    more is put into it, which holds for every cost model here. Of prompts that share
    contents only the last token counts: the rest may be cached.

    Args:
      workload: requests.
      cost_model: seconds of a step.
    """
    longest = int(np.max(workload.prompt_lens + workload.output_lens))

    def seconds(query_len: jax.Array, context_len: jax.Array) -> jax.Array:
        none = jnp.int32(0)
        return cost_model(
            Load(query_len[None], context_len[None], jnp.int32(1), none, none, none)
        )

    evaluate = jax.jit(jax.vmap(seconds))
    lens = jnp.arange(1, longest + 1, dtype=jnp.int32)
    decode = np.asarray(evaluate(jnp.ones_like(lens), lens), np.float64)
    prompt = decode
    if workload.contents is None:
        prompt = np.asarray(evaluate(lens, lens), np.float64)
    # The first token comes with the prompt; token i > 1 attends to prompt + i - 1.
    until = np.concatenate([[0.0], np.cumsum(decode)])
    ends = workload.prompt_lens + workload.output_lens - 1
    return prompt[workload.prompt_lens - 1] + until[ends] - until[workload.prompt_lens]


def best_order(
    system: EngineSystem, workload: Workload, cost_model: CostModel
) -> tuple[tuple[int, ...], Outcome]:
    """The order of admission with the least mean normalised latency, and its outcome.

    All orders are simulated. A policy is an order of those that wait, and what fits is
    admitted: no policy that keeps to one order batches this engine's requests better.

    Args:
      system: the engine, whose own policy is left out.
      workload: at most `MOST_ORDERED` requests.
      cost_model: seconds of a step.

    Returns:
      The requests' numbers, who comes first at the front, and what came of it.

    Raises:
      ValueError: more requests; or as `simulate`.
    """
    count = len(workload)
    if count > MOST_ORDERED:
        raise ValueError(
            f"workload: expected at most {MOST_ORDERED} requests, for all orders are "
            f"tried, got {count}"
        )
    orders = list(itertools.permutations(range(count)))
    found: list[Outcome] = []
    for first in range(0, len(orders), _SIDE_BY_SIDE):
        some = [_in_order(system, one) for one in orders[first : first + _SIDE_BY_SIDE]]
        found += sweep(some, workload, cost_model)
    means = [np.mean(outcome.normalized_latencies) for outcome in found]
    best = int(np.argmin(means))
    return orders[best], found[best]


def _in_order(system: EngineSystem, order: Sequence[int]) -> EngineSystem:
    turns = tuple(np.argsort(order).astype(float).tolist())
    config = dataclasses.replace(
        system.config, policy=_by_turn, policy_parameters=turns
    )
    return dataclasses.replace(system, config=config)


def _by_turn(waiting: Waiting) -> jax.Array:
    """A policy: each request's turn is the parameter of its number."""
    turns = waiting.parameters
    return turns[jnp.clip(waiting.arrivals, 0, turns.shape[0] - 1)]


def _paths(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts with a number for each block and all before it."""
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
    """Of each block of each prompt the number of the next prompt that has it."""
    coming: dict[int, int] = {}
    found = []
    for number in reversed(range(len(prompts))):
        prompt = prompts[number]
        found.append([coming.get(block, _NEVER) for block in prompt])
        coming.update(dict.fromkeys(prompt, number))
    return found[::-1]
