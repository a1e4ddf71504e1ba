"""Calls of Triton kernels from JAX, by jax-triton, on any version of it that serves.

Place on the road: triton.attention, triton.pages -> [triton.launch] -> jax-triton.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import jax

Kernel = str  # a name in `triton.kernels`


def launch(
    name: Kernel,
    grid: tuple[int, ...],
    arrays: Sequence[jax.Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    *,
    aliases: dict[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    **static: Any,
) -> list[jax.Array]:
    """The outputs of a kernel that takes `arrays`, then its outputs, then `static`.

    `aliases` says which array's memory becomes which output; all outputs or none.

    Raises:
      ImportError: jax-triton is missing, or this process has no CUDA.
    """
    jax_triton = _jax_triton()
    kernel = getattr(importlib.import_module("jpaged.triton.kernels"), name)
    options: dict[str, Any] = dict(
        kernel=kernel, grid=grid, num_warps=num_warps, num_stages=num_stages, **static
    )
    arrays, out_shapes = list(arrays), list(out_shapes)
    if "out_shape" in inspect.signature(jax_triton.triton_call).parameters:
        options |= dict(out_shape=out_shapes, input_output_aliases=aliases)
        return jax_triton.triton_call(*arrays, **options)
    # From 0.4 on an array that becomes an output is one parameter, which is the
    # output's. The kernels never read the other one: any array may stand there.
    if aliases:
        pools = [arrays[index] for index in aliases]
        for index in aliases:
            arrays[index] = arrays[0]
        first = len(arrays)
        arrays += pools
        numbers = range(first, first + len(pools))
        options["input_output_aliases"] = dict(zip(numbers, aliases.values()))  # noqa: B905
    return jax_triton.triton_call(*arrays, out_type=out_shapes, **options)


def _jax_triton() -> Any:
    try:
        return importlib.import_module("jax_triton")
    except ImportError as error:
        raise ImportError(
            "implementation: 'triton' needs jax-triton and a jax with CUDA; got "
            f"{type(error).__name__}: {error}. Run: pip install "
            "'jpaged[cuda,triton]', or choose implementation='xla'"
        ) from error
