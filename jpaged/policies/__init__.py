"""Policies: the decisions of the scheduler and the prefix cache, as pure functions.

Pipeline: request table, batch rows, prefix cache -> [policies] -> scheduler, eviction.

| argument | function of | returns | decides |
| --- | --- | --- | --- |
| `policy` | `Requests` | scores [R] | who is admitted first: the smallest score |
| `preemption_policy` | `Requests` | scores [R] | who gives back blocks: the largest |
| `eviction_policy` | `CachedBlocks` | scores [N] | which block is evicted: smallest |
| `budget_policy` | `Rows` | tokens [S] | how many tokens each row computes |

`EngineConfig`, `LLM` and the simulator accept each as a name or as a function:

    def longest_prompt_first(requests: Requests) -> jax.Array:
        return -requests.prompt_lens

    llm = LLM(model, policy=longest_prompt_first)

Parameters of a policy are data: numbers that it reads as `parameters`, and that change
without compiling anything. No policy can keep a run from ending (see `scheduler`).
"""

from __future__ import annotations

from jpaged.policies import admission, budget, eviction, preemption
from jpaged.policies.admission import (
    WEIGHTED,
    fcfs,
    longest_prefix,
    priority,
    shortest_prompt,
    weighted,
)
from jpaged.policies.checks import (
    ADMISSION,
    ATTRIBUTES,
    BUDGET,
    EVICTION,
    KINDS,
    PREEMPTION,
    Kind,
    check,
    columns_read,
    find,
)
from jpaged.policies.views import (
    NO_DEADLINE,
    NO_USER,
    YIELD,
    BudgetPolicy,
    CachedBlocks,
    EvictionPolicy,
    Policy,
    Requests,
    Rows,
    SchedulerParams,
)

Waiting = Requests  # the name before preemption policies
POLICIES = ADMISSION.policies

__all__ = [
    "ADMISSION",
    "ATTRIBUTES",
    "BUDGET",
    "EVICTION",
    "KINDS",
    "NO_DEADLINE",
    "NO_USER",
    "POLICIES",
    "PREEMPTION",
    "WEIGHTED",
    "YIELD",
    "BudgetPolicy",
    "CachedBlocks",
    "EvictionPolicy",
    "Kind",
    "Policy",
    "Requests",
    "Rows",
    "SchedulerParams",
    "Waiting",
    "admission",
    "budget",
    "check",
    "columns_read",
    "eviction",
    "fcfs",
    "find",
    "longest_prefix",
    "preemption",
    "priority",
    "shortest_prompt",
    "weighted",
]
