"""Differences between jax versions and backends, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")


def switch_in_place(
    index: jax.Array, branches: Sequence[Callable[[Carry], Carry]], carry: Carry
) -> Carry:
    """`branches[index](carry)`, with large arrays in `carry` updated in place.

    `lax.switch` inside a loop copies what its branches write on the CPU of jax 0.10
    (docs/decisions/branches.md); loops of one trip or none do not, on any version.
    No branch is taken where `index` is out of range.
    """
    for number, branch in enumerate(branches):

        def body(state, branch=branch):
            return jnp.int32(-1), branch(state[1])

        def is_chosen(state, number=number):
            return state[0] == number

        index, carry = lax.while_loop(is_chosen, body, (index, carry))
    return carry


def when(
    predicate: jax.Array, function: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """`function(carry)` where the scalar `predicate` holds, else `carry`; in place."""
    return switch_in_place(jnp.where(predicate, 0, -1), [function], carry)


def rewrites_on_update(dtype: jnp.dtype, platform: str) -> bool:
    """Whether writing a slice of a donated array takes as long as writing all of it.

    So for bfloat16 on CPUs before jax 0.12, where XLA updates it by way of float32.
    """
    is_slow = platform == "cpu" and jax.__version_info__ < (0, 12)
    return is_slow and dtype == jnp.bfloat16
