"""Contenders: decode attention of one layer, by jpaged and by what else is installed.

Beside the road: each is built from the same numbers, is compared with float64 before it
is timed, and runs in a process of its own (`experiments.bench_attention`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.lib.attention import peers as peers
from experiments.lib.attention.cases import (
    TOLERANCES,
    Built,
    Case,
    Shape,
    jax_loop,
    make_case,
    median_seconds,
    relative_error,
)
from jpaged import attention
from jpaged.attention import backends
from jpaged.pages import quantised as quantised_pages


def _paged(implementation: str) -> Callable[[Case], Built]:
    def build(case: Case) -> Built:
        shape = case.shape
        page = quantised_pages.page_dtype(shape.kv_dtype or shape.dtype)
        kind = shape.dtype if shape.kv_dtype is None else "float32"
        pools, scales = [], {}
        for name, values in (("k_scale", case.keys), ("v_scale", case.values)):
            pages = jnp.asarray(case.pages(values), kind)
            if shape.kv_dtype is not None:
                pages, scales[name] = quantised_pages.quantise(pages, page)
            pools.append(backends.layout(implementation).store(pages))
        lens = jnp.full(shape.rows, shape.context, jnp.int32)

        def attend(q, k_pages, v_pages, tables, lens, scales):
            options = scales | {"implementation": implementation}
            args = (q, k_pages, v_pages, tables, lens)
            return attention.paged_attention(*args, **options)

        q, tables = jnp.asarray(case.q, shape.dtype), jnp.asarray(case.block_tables)
        return jax_loop(attend, q, *pools, tables, lens, scales)

    return build


def has(*modules: str) -> str | None:
    """None, or which of the modules are not installed."""
    missing = [one for one in modules if importlib.util.find_spec(one) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def needs_backend(backend: str, *modules: str) -> str | None:
    """None, or that this process has another backend or lacks a module."""
    if jax.default_backend() != backend:
        return f"needs a {backend.upper()}"
    return has(*modules)


# Of each: how it is built, and what keeps it from this machine.
CONTENDERS: dict[str, tuple[Callable[[Case], Built], Callable[[], str | None]]] = {
    "reference": (_paged("reference"), lambda: None),
    "xla": (_paged("xla"), lambda: None),
    "mosaic_tpu": (_paged("mosaic_tpu"), lambda: needs_backend("tpu")),
    "mosaic_gpu": (_paged("mosaic_gpu"), lambda: needs_backend("gpu")),
    "triton": (_paged("triton"), lambda: needs_backend("gpu", "jax_triton")),
    "jax_contiguous": (peers.jax_contiguous, lambda: None),
    "jax_deprecated": (peers.jax_deprecated, lambda: needs_backend("gpu")),
    "torch_sdpa": (peers.torch_sdpa, lambda: has("torch")),
    "torch_flex": (peers.torch_flex, lambda: has("torch")),
    "transformers_paged": (
        peers.transformers_paged,
        lambda: has("torch", "transformers"),
    ),
    "flashinfer": (
        peers.flashinfer,
        lambda: needs_backend("gpu", "flashinfer", "torch"),
    ),
    "ejkernel": (peers.ejkernel, lambda: needs_backend("gpu", "ejkernel")),
}


def measure(name: str, shape: Shape, repeats: int, least_s: float) -> dict[str, Any]:
    """As `measure_case`, of the shape's own numbers."""
    if shape.kv_dtype is not None and name not in backends.IMPLEMENTATIONS:
        raise ValueError(f"no pages of {shape.kv_dtype} here")
    return measure_case(name, make_case(shape), repeats, least_s)


def measure_case(name: str, case: Case, repeats: int, least_s: float) -> dict[str, Any]:
    """Seconds of one call, median over `repeats` rounds of at least `least_s` each.

    Raises:
      ValueError: it cannot serve the shape, or its numbers are wrong.
    """
    shape = case.shape
    out, run = CONTENDERS[name][0](case)
    error, most = relative_error(case, out), TOLERANCES[shape.kv_dtype or shape.dtype]
    if not error <= most:
        raise ValueError(
            f"wrong numbers: relative error {error:.1e}, wanted at most {most:.0e}; "
            "not timed"
        )
    return {"error": error} | median_seconds(run, repeats, least_s)
