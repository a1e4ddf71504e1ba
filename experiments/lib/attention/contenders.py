"""Contenders: decode attention of one layer, by jpaged and by installed peers.

All get the same inputs and are compared with float64 before they are timed. Each runs
in a separate process (`experiments.bench_attention`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.lib.attention import peers
from experiments.lib.attention.cases import (
    TOLERANCES,
    AttentionCase,
    AttentionShape,
    BuiltContender,
    jax_loop,
    make_case,
    median_seconds,
    relative_error,
)
from jpaged import attention
from jpaged.attention import backends
from jpaged.cpu import huge_pages, library
from jpaged.pages import quantised as quantised_pages


def _paged(implementation: str) -> Callable[[AttentionCase], BuiltContender]:
    """Builds `jpaged.attention.paged_attention` by an implementation."""

    def build(case: AttentionCase) -> BuiltContender:
        shape = case.shape
        page = quantised_pages.page_dtype(shape.kv_dtype or shape.dtype)
        kind = shape.dtype if shape.kv_dtype is None else "float32"
        pools, scales = [], {}
        for name, values in (("k_scale", case.keys), ("v_scale", case.values)):
            pages = jnp.asarray(case.pages(values), kind)
            if shape.kv_dtype is not None:
                pages, scales[name] = quantised_pages.quantise(pages, page)
            pools.append(backends.layout(implementation).store(pages))
        huge_pages.move(jax.block_until_ready(pools))  # as `LLM` does
        lens = jnp.full(shape.rows, shape.context, jnp.int32)

        def attend(
            q: jax.Array,
            k_pages: jax.Array,
            v_pages: jax.Array,
            tables: jax.Array,
            lens: jax.Array,
            scales: dict[str, jax.Array],
        ) -> Any:
            options: dict[str, Any] = {"implementation": implementation, **scales}
            args = (q, k_pages, v_pages, tables, lens)
            return attention.paged_attention(*args, **options)

        q, tables = jnp.asarray(case.q, shape.dtype), jnp.asarray(case.block_tables)
        return jax_loop(attend, q, *pools, tables, lens, scales)

    return build


def missing_modules(*modules: str) -> str | None:
    """Returns None, or a sentence that names the modules that are not installed."""
    missing = [one for one in modules if importlib.util.find_spec(one) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def needs_backend(backend: str, *modules: str) -> str | None:
    """Returns None, or what this process lacks: the backend or a module."""
    if jax.default_backend() != backend:
        return f"needs a {backend.upper()}"
    return missing_modules(*modules)


def needs_cpu_kernels() -> str | None:
    """Returns None, or why this process cannot run the C++ kernels."""
    return needs_backend("cpu") or library.problem()


# For each: how it is built, and why it cannot run on this machine (None: it can).
CONTENDERS: dict[
    str,
    tuple[Callable[[AttentionCase], BuiltContender], Callable[[], str | None]],
] = {
    "reference": (_paged("reference"), lambda: None),
    "xla": (_paged("xla"), lambda: None),
    "cpu": (_paged("cpu"), needs_cpu_kernels),
    "mosaic_tpu": (_paged("mosaic_tpu"), lambda: needs_backend("tpu")),
    "mosaic_gpu": (_paged("mosaic_gpu"), lambda: needs_backend("gpu")),
    "triton": (_paged("triton"), lambda: needs_backend("gpu", "jax_triton")),
    "jax_contiguous": (peers.jax_contiguous, lambda: None),
    "jax_deprecated": (peers.jax_deprecated, lambda: needs_backend("gpu")),
    "torch_sdpa": (peers.torch_sdpa, lambda: missing_modules("torch")),
    "torch_flex": (peers.torch_flex, lambda: missing_modules("torch")),
    "transformers_paged": (
        peers.transformers_paged,
        lambda: missing_modules("torch", "transformers"),
    ),
    "flashinfer": (
        peers.flashinfer,
        lambda: needs_backend("gpu", "flashinfer", "torch"),
    ),
    "ejkernel": (peers.ejkernel, lambda: needs_backend("gpu", "ejkernel")),
}


def measure_shape(
    name: str, shape: AttentionShape, repeats: int, least_s: float
) -> dict[str, Any]:
    """Times a contender at a shape, as `measure_case`."""
    if shape.kv_dtype is not None and name not in backends.IMPLEMENTATIONS:
        raise ValueError(f"kv_dtype: expected auto for {name}, got {shape.kv_dtype}")
    return measure_case(name, make_case(shape), repeats, least_s)


def measure_case(
    name: str, case: AttentionCase, repeats: int, least_s: float
) -> dict[str, Any]:
    """Checks a contender's output and times one call.

    Args:
      name: Of `CONTENDERS`.
      case: The inputs.
      repeats: Rounds; the median counts.
      least_s: Shortest duration of a round, in seconds.

    Returns:
      "error" against float64, "seconds" of a call, and "loops", the calls in a round.

    Raises:
      ValueError: The contender cannot serve the shape, or its output is wrong.
    """
    shape = case.shape
    out, run = CONTENDERS[name][0](case)
    error, most = relative_error(case, out), TOLERANCES[shape.kv_dtype or shape.dtype]
    if not error <= most:
        raise ValueError(
            f"output: expected a relative error of at most {most:.0e}, got "
            f"{error:.1e}; {name} is not timed"
        )
    return {"error": error} | median_seconds(run, repeats, least_s)
