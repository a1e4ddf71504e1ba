"""Policies: which waiting request is admitted first, as pure scoring functions.

Pipeline: request table -> scheduler (calls the policy) -> block manager. A policy
returns a score for each waiting sequence. The smallest score is admitted first; equal
scores are admitted by arrival. A policy does not decide which sequences keep their
memory when blocks run out, because then a run might never end (see `scheduler`).

    def longest_job_first(waiting: Waiting) -> jax.Array:
        return -waiting.prompt_lens

    llm = LLM(model, policy=longest_job_first)

Shape symbols: R sequences of the request table, P policy parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Waiting(NamedTuple):
    """Input of a policy: one column for each sequence of the request table.

    Scores of sequences that are not waiting are ignored. For a request with several
    sequences, the score of the first one is used. `LLM` also passes the requests that
    wait on the host until the table has space, one element for each, followed by
    padding.
    """

    arrivals: jax.Array  # i32[R], rank of arrival
    priorities: jax.Array  # i32[R], the request's priority; smaller is admitted first
    prompt_lens: jax.Array  # i32[R], tokens
    num_tokens: jax.Array  # i32[R], prompt and tokens generated before a preemption
    cached_lens: jax.Array  # i32[R], those of them that are now in the prefix cache
    num_preemptions: jax.Array  # i32[R]
    parameters: jax.Array  # f32[P], the config's `policy_parameters`


Policy = Callable[[Waiting], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SchedulerParams:
    """The scheduler's settings that are not shapes, as arrays: `vmap` sweeps them.

    `EngineConfig.scheduler_params` is the only source of their initial values.
    """

    parameters: jax.Array  # f32[P], of the policy
    num_watermark_blocks: jax.Array  # i32[], blocks that admission leaves free
    max_num_seqs: jax.Array  # i32[], sequences that run at the same time
    max_num_batched_tokens: jax.Array  # i32[], tokens of one step
    max_prompt_chunk: jax.Array  # i32[], tokens of one prompt in one step

    def limited_to(self, limits: SchedulerParams) -> SchedulerParams:
        """Return these settings with at most the limits' rows, tokens and chunks."""
        return dataclasses.replace(
            self,
            max_num_seqs=jnp.minimum(self.max_num_seqs, limits.max_num_seqs),
            max_num_batched_tokens=jnp.minimum(
                self.max_num_batched_tokens, limits.max_num_batched_tokens
            ),
            max_prompt_chunk=jnp.minimum(
                self.max_prompt_chunk, limits.max_prompt_chunk
            ),
        )


def fcfs(waiting: Waiting) -> jax.Array:
    """First come, first served (paper section 4.5)."""
    return jnp.zeros_like(waiting.arrivals)


def priority(waiting: Waiting) -> jax.Array:
    """Smallest request priority first; it also decides which requests keep memory."""
    return waiting.priorities


def shortest_prompt(waiting: Waiting) -> jax.Array:
    """Shortest prompt first."""
    return waiting.prompt_lens


def longest_prefix(waiting: Waiting) -> jax.Array:
    """Longest cached prefix first.

    It can starve a request without a cached prefix for as long as others arrive.

    Source: Zheng et al. 2024, SGLang, section 3 (cache-aware scheduling).
    """
    return -waiting.cached_lens


# The summands of `weighted`, in the order of its parameters.
WEIGHTED = Waiting._fields[:-1]


def weighted(waiting: Waiting) -> jax.Array:
    """Weighted sum of all columns, with one parameter per column in `WEIGHTED`.

    The other policies are special cases: all weights 0 is `fcfs`. With a weight on
    `arrivals`, a waiting request eventually precedes all later requests.
    """
    if waiting.parameters.shape != (len(WEIGHTED),):
        raise ValueError(
            f"policy_parameters: expected {len(WEIGHTED)} weights for 'weighted', of "
            f"{', '.join(WEIGHTED)}, got {waiting.parameters.shape[0]}"
        )
    columns = jnp.stack(waiting[: len(WEIGHTED)]).astype(jnp.float32)
    return jnp.sum(columns * waiting.parameters[:, None], axis=0)


POLICIES: dict[str, Policy] = {
    function.__name__: function
    for function in (fcfs, priority, shortest_prompt, longest_prefix, weighted)
}


def find_policy(policy: str | Policy) -> Policy:
    """Return the policy with a name; a function is returned unchanged.

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
def check_policy(policy: str | Policy, parameters: tuple[float, ...] = ()) -> None:
    """Check that a policy exists, and evaluate a function on an example.

    Raises:
      ValueError: the name is unknown, parameters are given to a policy without any, or
        the function does not return one real number (not NaN) per sequence.
    """
    function = find_policy(policy)
    if isinstance(policy, str) and policy != "weighted":
        if parameters:
            raise ValueError(
                f"policy_parameters: expected none for the policy {policy!r}, got "
                f"{parameters}; 'weighted' and functions of your own read them"
            )
        return
    # A config may also be created while a step is traced.
    with jax.ensure_compile_time_eval():
        example = _example(parameters)
        try:
            scores = function(example)
        except IndexError as error:
            raise ValueError(
                f"policy_parameters: expected as many as the policy reads, got "
                f"{len(parameters)} ({error})"
            ) from None
    shape, dtype = jnp.shape(scores), jnp.result_type(scores)
    if shape != example.arrivals.shape or not (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    ):
        raise ValueError(
            "policy: expected a real number for each sequence, of shape "
            f"{example.arrivals.shape} for the example, got {dtype} of shape {shape}"
        )
    if np.isnan(np.asarray(scores, np.float64)).any():
        raise ValueError(
            f"policy: expected numbers, got NaN among {np.asarray(scores).tolist()} "
            f"for the example {jax.tree.map(lambda x: x.tolist(), example)}"
        )


def reads_cached_lens(policy: str | Policy, parameters: tuple[float, ...]) -> bool:
    """Whether a policy's scores depend on `Waiting.cached_lens`."""
    if policy == "weighted":
        return parameters[WEIGHTED.index("cached_lens")] != 0.0
    example = _example(parameters)

    def scores(cached_lens: jax.Array) -> jax.Array:
        return find_policy(policy)(example._replace(cached_lens=cached_lens))

    jaxpr = jax.make_jaxpr(scores)(example.cached_lens).jaxpr
    (column,) = jaxpr.invars
    used = [value for equation in jaxpr.eqns for value in equation.invars]
    return any(value is column for value in [*used, *jaxpr.outvars])


def _example(parameters: tuple[float, ...]) -> Waiting:
    """Return an example with zeros, which reveals divisions by a length or a count."""
    number = jnp.arange(8, dtype=jnp.int32)
    # NumPy, unlike JAX, raises IndexError for an index after the last element.
    array: Any = np.asarray(parameters, np.float32)
    return Waiting(
        arrivals=number,
        priorities=number - 4,
        prompt_lens=number + 1,
        num_tokens=number + 2,
        cached_lens=number,
        num_preemptions=number % 2,
        parameters=array,
    )
