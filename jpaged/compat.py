"""Differences between jax versions and platforms, in one place."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental import compute_on

Carry = TypeVar("Carry")

# Memory spaces for `jax.device_put`. Every platform has both. `import jax.memory` fails
# on some versions; the attribute exists on all.
DEVICE_MEMORY, HOST_MEMORY = jax.memory.Space.Device, jax.memory.Space.Host


def switch_in_place(
    index: jax.Array, branches: Sequence[Callable[[Carry], Carry]], carry: Carry
) -> Carry:
    """Return `branches[index](carry)`, updating large arrays in `carry` in place.

    On CPUs with jax 0.10, `lax.switch` inside a loop copies the arrays that its
    branches write (docs/decisions/branches.md). Loops with one iteration or none do not
    copy, on any version. If `index` is out of range, `carry` is returned unchanged.
    """
    for number, branch in enumerate(branches):

        def body(
            state: tuple[jax.Array, Carry], branch: Callable[[Carry], Carry] = branch
        ) -> tuple[jax.Array, Carry]:
            return jnp.int32(-1), branch(state[1])

        def is_chosen(
            state: tuple[jax.Array, Carry], number: int = number
        ) -> jax.Array:
            return state[0] == number

        index, carry = lax.while_loop(is_chosen, body, (index, carry))
    return carry


def when(
    predicate: jax.Array, function: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """Return `function(carry)` if the scalar `predicate` is True, else `carry`.

    Large arrays in `carry` are updated in place.
    """
    return switch_in_place(jnp.where(predicate, 0, -1), [function], carry)


def ordered(index: jax.Array, after: jax.Array) -> jax.Array:
    """Return `index`, i32, with a data dependency on `after`.

    If a loop reads an array that is written at `index` later, XLA copies the whole
    array for the loop, unless it sees that the loop runs first. `after` is any i32
    array that the loop returns; its entries must not be the smallest int32.
    """
    least = jnp.iinfo(jnp.int32).min
    return index + jnp.where(jnp.min(after) == least, 1, 0)


def rewrites_on_update(dtype: jnp.dtype, platform: str) -> bool:
    """Return whether writing a slice of a donated array costs as much as all of it.

    True for bfloat16 on CPUs before jax 0.12, where XLA converts the array to float32
    and back.
    """
    is_slow = platform == "cpu" and jax.__version_info__ < (0, 12)
    return is_slow and dtype == jnp.bfloat16


def quick_compilation() -> dict[str, Any]:
    """Return compiler options with which CPU programs compile in half the time.

    They run up to a third slower.
    """
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):  # later versions lack it
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return `jax.jit(function, **options)`, compiled with `quick_compilation` on CPUs.

    For functions of the host that do little work, so that optimising them gains little.
    While JAX traces another function, `function` itself is called.

    Args:
      function: the function.
      **options: of `jax.jit`, except `compiler_options`.
    """

    @functools.cache
    def jitted() -> Callable[..., Any]:
        is_cpu = jax.default_backend() == "cpu"
        quick = quick_compilation() if is_cpu else None
        return jax.jit(function, compiler_options=quick, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        is_traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        return (function if is_traced else jitted())(*args, **kwargs)

    return call


def return_free_memory() -> None:
    """Return freed memory to the system, where the C library does not by itself.

    Compiling leaves many small free parts in the heaps of its threads. With glibc, ten
    engines that are created and closed one after the other keep some 400 MB otherwise.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library or system
        return
    trim(0)


def zeros(shape: Sequence[int], dtype: str, memory: Any) -> jax.Array:
    """Return zeros that are created directly in the device's or host's pinned memory.

    Zeros that are created on a TPU and then sent to the host need the same amount of
    TPU memory first.
    """
    if memory == DEVICE_MEMORY:
        return jnp.zeros(shape, dtype)
    # jax 0.12 renames `compute_on2` to `compute_on` and removes the context manager.
    compute: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)
    make = compute(
        lambda: jnp.zeros(shape, dtype),
        compute_type="device_host",
        out_memory_spaces=memory,
    )
    return make()


def load_from_gpu_memory(ref: Any) -> jax.Array:
    """Load the array of a reference in a Mosaic GPU kernel into registers.

    It uses plain loads. Before jax 0.11, `load` requires an index; the reference has
    its own, so the index is empty.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, optimized=False)
