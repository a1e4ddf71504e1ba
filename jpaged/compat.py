"""Differences between jax versions and backends, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import compute_on

Carry = TypeVar("Carry")

# Where an array lies, for `jax.device_put`. Every backend has both; `import jax.memory`
# fails on some versions, the attribute is there on all.
DEVICE_MEMORY, HOST_MEMORY = jax.memory.Space.Device, jax.memory.Space.Host


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


def ordered(index: jax.Array, after: jax.Array) -> jax.Array:
    """`index`, i32, made to depend on `after`, i32 above the least number there is.

    Where a loop reads an array that is then written at `index`, XLA keeps a copy of the
    whole array for the loop, unless it sees that the loop comes first.
    """
    least = jnp.iinfo(jnp.int32).min
    return index + jnp.where(jnp.min(after) == least, 1, 0)


def rewrites_on_update(dtype: jnp.dtype, platform: str) -> bool:
    """Whether writing a slice of a donated array takes as long as writing all of it.

    So for bfloat16 on CPUs before jax 0.12, where XLA updates it by way of float32.
    """
    is_slow = platform == "cpu" and jax.__version_info__ < (0, 12)
    return is_slow and dtype == jnp.bfloat16


def zeros(shape: Sequence[int], dtype: str, memory: Any) -> jax.Array:
    """Zeros on the device or in the host's pinned memory, and nowhere else on the way.

    Made on a TPU and then sent to the host, they would need as much memory there first.
    """
    if memory == DEVICE_MEMORY:
        return jnp.zeros(shape, dtype)
    # What was `compute_on2` is `compute_on` on jax 0.12, the context manager is gone.
    compute: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)
    make = compute(
        lambda: jnp.zeros(shape, dtype),
        compute_type="device_host",
        out_memory_spaces=memory,
    )
    return make()


def load_from_gpu_memory(ref: Any) -> jax.Array:
    """What a reference in a Mosaic GPU kernel refers to, in registers, by plain loads.

    Before jax 0.12 the index is an argument; none, of a reference that has its own.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, optimized=False)
