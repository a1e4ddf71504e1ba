"""Policies: which waiting request is admitted first, as pure scoring functions.

Place on the road: scheduler asks. A policy maps what is known of the waiting sequences
to a score, and the smallest is first; requests with equal scores go by arrival. It has
no say in who keeps memory when blocks run out, or a run might never end (`scheduler`).

    def longest_job_first(waiting: Waiting) -> jax.Array:
        return -waiting.prompt_lens

    llm = LLM(model, policy=longest_job_first)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Waiting(NamedTuple):
    """What a policy sees, a column for each place of the request table.

    The scores of places that do not wait are not read. Of the sequences of one request
    the first one's score counts.
    """

    arrivals: jax.Array  # i32[R], rank of arrival
    priorities: jax.Array  # i32[R], the request's own, smaller is sooner
    prompt_lens: jax.Array  # i32[R], tokens
    num_tokens: jax.Array  # i32[R], prompt and what was generated before a preemption
    cached_lens: jax.Array  # i32[R], tokens of it that the prefix cache has now
    num_preemptions: jax.Array  # i32[R]
    parameters: jax.Array  # f32[P], the config's `policy_parameters`


Policy = Callable[[Waiting], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SchedulerParams:
    """The scheduler's numbers that are no shapes, as arrays: `vmap` sweeps them."""

    parameters: jax.Array  # f32[P], of the policy
    num_watermark_blocks: jax.Array  # i32[], that admission leaves free
    max_num_seqs: jax.Array  # i32[], sequences that run at the same time
    max_num_batched_tokens: jax.Array  # i32[], of one step
    max_prompt_chunk: jax.Array  # i32[], tokens of one prompt in one step


def fcfs(waiting: Waiting) -> jax.Array:
    """First come, first served (paper section 4.5)."""
    return jnp.zeros_like(waiting.arrivals)


def priority(waiting: Waiting) -> jax.Array:
    """The request's own priority, smaller first; it also decides who keeps memory."""
    return waiting.priorities


def shortest_prompt(waiting: Waiting) -> jax.Array:
    """The shortest prompt first."""
    return waiting.prompt_lens


def longest_prefix(waiting: Waiting) -> jax.Array:
    """The longest cached prefix first.

    Source: Zheng et al. 2024, SGLang, section 3 (cache-aware scheduling). It may starve
    a request of which nothing is cached for as long as others come.
    """
    return -waiting.cached_lens


# What `weighted` adds up, in the order of its parameters.
WEIGHTED = Waiting._fields[:-1]


def weighted(waiting: Waiting) -> jax.Array:
    """The sum of all that is known, each times its parameter, in the order `WEIGHTED`.

    The other policies are points among its own: no weights are `fcfs`. A weight on
    `arrivals` lets those who wait rise until nobody overtakes them.
    """
    if waiting.parameters.shape != (len(WEIGHTED),):
        raise ValueError(
            f"policy_parameters: wanted {len(WEIGHTED)} weights for 'weighted', of "
            f"{', '.join(WEIGHTED)}, got {waiting.parameters.shape[0]}"
        )
    columns = jnp.stack(waiting[: len(WEIGHTED)]).astype(jnp.float32)
    return jnp.sum(columns * waiting.parameters[:, None], axis=0)


POLICIES: dict[str, Policy] = {
    function.__name__: function
    for function in (fcfs, priority, shortest_prompt, longest_prefix, weighted)
}


def find(policy: str | Policy) -> Policy:
    """The policy of a name, or the function itself.

    Raises:
      ValueError: neither a known name nor a function.
    """
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(
            f"policy: expected one of {tuple(POLICIES)} or a function of "
            f"policies.Waiting, got {policy!r}"
        )
    return POLICIES[policy]


@functools.lru_cache
def check(policy: str | Policy, parameters: tuple[float, ...] = ()) -> None:
    """Raises ValueError as `find` does, and where an example shows a function wrong.

    It has to give a real number, and not NaN, for each place.
    """
    function = find(policy)
    if isinstance(policy, str) and policy != "weighted":
        if parameters:
            raise ValueError(
                f"policy_parameters: wanted none for the policy {policy!r}, got "
                f"{parameters}; 'weighted' and functions of your own read them"
            )
        return
    # A config may be made anew while a step is traced.
    with jax.ensure_compile_time_eval():
        number = jnp.arange(8, dtype=jnp.int32)
        # Zeros among them: a policy that divides by a length or a count shows itself.
        example = Waiting(
            number,
            number - 4,
            number + 1,
            number + 2,
            number,
            number % 2,
            # Of numpy, which refuses a place behind the last.
            np.asarray(parameters, np.float32),
        )
        try:
            scores = function(example)
        except IndexError as error:
            raise ValueError(
                f"policy_parameters: the policy reads more than the {len(parameters)} "
                f"that it is given ({error})"
            ) from None
    shape, dtype = jnp.shape(scores), jnp.result_type(scores)
    if shape != number.shape or not (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    ):
        raise ValueError(
            "policy: expected a real number for each place, of shape "
            f"{number.shape} for the example, got {dtype} of shape {shape}"
        )
    if np.isnan(np.asarray(scores, np.float64)).any():
        raise ValueError(
            f"policy: expected numbers, got NaN among {np.asarray(scores).tolist()} "
            f"for the example {jax.tree.map(lambda x: x.tolist(), example)}"
        )
