"""Launches of Triton kernels from JAX, with any supported version of jax-triton.

Pipeline: triton.attention, triton.pages -> [triton.launch] -> jax-triton.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import jax


def launch(
    name: str,
    grid: tuple[int, ...],
    arrays: Sequence[jax.Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    *,
    aliases: dict[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    **static: Any,
) -> list[jax.Array]:
    """Launch a kernel of `triton.kernels` and return its outputs.

    Args:
      name: The kernel's name. Its parameters are `arrays`, the outputs, and `static`.
      grid: Number of programs on each axis.
      arrays: The kernel's inputs.
      out_shapes: Shapes and dtypes of the outputs.
      aliases: Maps the index of an input to the index of the output that overwrites its
        memory; it names all outputs, or is None.
      num_warps: Warps per program.
      num_stages: Stages of Triton's pipeline.
      **static: The kernel's static sizes.

    Raises:
      ImportError: jax-triton is not installed, or this process has no CUDA.
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
    # From jax-triton 0.4 on, an input that becomes an output is a single parameter, the
    # output's. The kernels never read the input's parameter: any array can be passed.
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
            "implementation: expected jax-triton and a jax with CUDA for 'triton', got "
            f"{type(error).__name__}: {error}. Run: pip install "
            "'jpaged[cuda,triton]', or choose implementation='xla'"
        ) from error
