"""Checks of policies: names, parameters, and functions, on examples. Host only.

Pipeline: config -> [checks] -> a policy that a program can call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.policies import admission, budget, eviction, preemption
from jpaged.policies.views import (
    NO_DEADLINE,
    CachedBlocks,
    Requests,
    Rows,
)

_SIZE = 8
# Columns that the request table has only if a policy reads them.
ATTRIBUTES = ("max_tokens", "ages", "times_left", "users", "user_tokens")


def _named(module: Any, *names: str) -> dict[str, Callable[[Any], jax.Array]]:
    return {name: getattr(module, name) for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """One of the four decisions."""

    argument: str  # of `LLM` and `EngineConfig`, with the name or the function
    parameters: str  # the argument with its parameters
    view: str  # class of the function's argument
    policies: dict[str, Callable[[Any], jax.Array]]
    # Names of policies with parameters, and the numbers of them that are possible.
    takes: dict[str, range]

    @property
    def default(self) -> str:
        """Name of the default policy, which the scheduler has built in."""
        return next(iter(self.policies))


ADMISSION = Kind(
    "policy",
    "policy_parameters",
    "Requests",
    _named(
        admission,
        *("fcfs", "priority", "shortest_prompt", "longest_prefix", "weighted"),
        *("shortest_job", "earliest_deadline", "feedback", "fair_share"),
    ),
    {"weighted": range(6, 7), "feedback": range(33)},
)
PREEMPTION = Kind(
    "preemption_policy",
    "preemption_parameters",
    "Requests",
    _named(
        preemption,
        *("latest", "least_computed", "longest_job", "latest_deadline"),
        *("largest_share", "feedback"),
    ),
    {"feedback": range(33)},
)
EVICTION = Kind(
    "eviction_policy",
    "eviction_parameters",
    "CachedBlocks",
    _named(eviction, "lru", "fifo", "lfu", "gdsf"),
    {"gdsf": range(2)},
)
BUDGET = Kind(
    "budget_policy",
    "budget_parameters",
    "Rows",
    _named(
        budget,
        *("decode_first", "prefill_first", "chunked", "fair_split", "deadline_first"),
    ),
    {"chunked": range(2)},
)
KINDS = (ADMISSION, PREEMPTION, EVICTION, BUDGET)


def find(kind: Kind, policy: str | Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the policy with a name; a function is returned unchanged.

    Raises:
      ValueError: neither a known name nor a function.
    """
    if callable(policy):
        return policy
    if not isinstance(policy, str) or policy not in kind.policies:
        raise ValueError(
            f"{kind.argument}: expected one of {tuple(kind.policies)} or a function of "
            f"policies.{kind.view}, got {policy!r}"
        )
    return kind.policies[policy]


@functools.lru_cache
def check(
    kind: Kind, policy: str | Callable[[Any], Any], parameters: tuple[float, ...] = ()
) -> None:
    """Check that a policy exists, and evaluate and trace it on an example.

    Raises:
      ValueError: the name is unknown, there are other parameters than it takes, or the
        function raises, cannot be traced, or does not return one real number (not NaN)
        for each element; of a budget policy, one integer.
    """
    function = find(kind, policy)
    if isinstance(policy, str):
        takes = kind.takes.get(policy, range(1))
        if policy == "weighted":
            admission.weighted(_example(kind, parameters))
        elif len(parameters) not in takes:
            most = f"at most {takes[-1]}" if takes[-1] else "none"
            raise ValueError(
                f"{kind.parameters}: expected {most} for the policy {policy!r}, got "
                f"{parameters}"
            )
        return
    # A config may also be created while a step is traced.
    with jax.ensure_compile_time_eval():
        example = _example(kind, parameters)
        shown = jax.tree.map(lambda x: np.asarray(x).tolist(), example)
        try:
            found = function(example)
        except IndexError as error:
            raise ValueError(
                f"{kind.parameters}: expected as many as the policy reads, got "
                f"{len(parameters)} ({error})"
            ) from None
        except Exception as error:
            raise ValueError(
                f"{kind.argument}: expected a function of policies.{kind.view}, got "
                f"{type(error).__name__} ({error}) for the example {shown}"
            ) from error
        _check_result(kind, found, shown)
        try:
            jax.eval_shape(function, _traced(example))
        except Exception as error:
            raise ValueError(
                f"{kind.argument}: expected a function that jax.jit can trace, got "
                f"{type(error).__name__} ({str(error).splitlines()[0]}); use jnp.where "
                "in place of `if`, and no numpy"
            ) from error


def _check_result(kind: Kind, found: Any, shown: Any) -> None:
    is_budget = kind is BUDGET
    what = "an integer" if is_budget else "a real number"
    each = {"Requests": "sequence", "Rows": "row", "CachedBlocks": "block"}[kind.view]
    shape, dtype = None, type(found).__name__
    if jax.tree_util.all_leaves([found]):  # no tuple of arrays
        try:
            shape, dtype = jnp.shape(found), jnp.result_type(found)
        except TypeError:
            pass
    is_number = shape is not None and (
        jnp.issubdtype(dtype, jnp.integer)
        or (jnp.issubdtype(dtype, jnp.floating) and not is_budget)
    )
    if shape != (_SIZE,) or not is_number:
        raise ValueError(
            f"{kind.argument}: expected {what} for each {each}, of shape {(_SIZE,)} "
            f"for the example, got {dtype} of shape {shape}; the example is {shown}"
        )
    if np.isnan(np.asarray(found, np.float64)).any():
        raise ValueError(
            f"{kind.argument}: expected numbers, got NaN among "
            f"{np.asarray(found).tolist()} for the example {shown}"
        )


@functools.lru_cache
def columns_read(
    kind: Kind, policy: str | Callable[[Any], Any], parameters: tuple[float, ...] = ()
) -> frozenset[str]:
    """Return the columns of `Requests` that a policy's result depends on."""
    if policy == "weighted":
        weights = zip(admission.WEIGHTED, parameters, strict=True)
        return frozenset(name for name, weight in weights if weight != 0.0)
    with jax.ensure_compile_time_eval():
        example = _traced(_example(kind, parameters))
    if isinstance(example, CachedBlocks):
        return frozenset()
    is_rows = isinstance(example, Rows)
    requests = example.requests if is_rows else example

    def call(requests: Requests) -> jax.Array:
        view = example._replace(requests=requests) if is_rows else requests
        return find(kind, policy)(view)

    jaxpr = jax.make_jaxpr(call)(requests).jaxpr
    used = {id(value) for equation in jaxpr.eqns for value in equation.invars}
    used |= {id(value) for value in jaxpr.outvars}
    names = zip(Requests._fields, jaxpr.invars, strict=True)
    return frozenset(name for name, value in names if id(value) in used)


def _traced(example: Any) -> Any:
    """Return the example with parameters that JAX traces, as those of a config."""
    return jax.tree.map(jnp.asarray, example)


def _example(kind: Kind, parameters: tuple[float, ...]) -> Any:
    """Return an example with zeros, which reveals divisions by a length or a count."""
    number = jnp.arange(_SIZE, dtype=jnp.int32)
    # NumPy, unlike JAX, raises IndexError for an index after the last element.
    array: Any = np.asarray(parameters, np.float32)
    if kind is EVICTION:
        return CachedBlocks(
            last_used=number,
            inserted=number // 2,
            num_uses=number,
            depths=number % 4,
            floors=number / 2,
            now=jnp.int32(_SIZE - 1),
            block_size=16,
            parameters=array,
        )
    requests = Requests(
        arrivals=number,
        priorities=number - 4,
        prompt_lens=number + 1,
        num_tokens=number + 2,
        cached_lens=number,
        num_preemptions=number % 2,
        leaders=number // 2 * 2,
        is_waiting=number > 3,
        is_running=number <= 3,
        max_tokens=number + 1,
        ages=number * 100,
        times_left=jnp.where(number % 3 == 0, NO_DEADLINE, (number - 3) * 100),
        users=number % 3 - 1,
        user_tokens=number % 3 * 10,
        parameters=array,
    )
    if kind is not BUDGET:
        return requests
    return Rows(
        remaining=number,
        is_decode=number == 1,
        ranks=number,
        budget=jnp.int32(16),
        requests=requests._replace(parameters=jnp.zeros((0,), jnp.float32)),
        parameters=array,
    )


__all__ = [
    "ADMISSION",
    "ATTRIBUTES",
    "BUDGET",
    "EVICTION",
    "KINDS",
    "PREEMPTION",
    "Kind",
    "check",
    "columns_read",
    "find",
]
