"""All attention backends, and the choice of the one that serves a call.

Pipeline: paged_attention, kv_cache -> [backends] -> a folder with kernels.

`implementation=None` selects the first backend of `PREFERRED` that supports the call. A
name is never replaced by another: an unsupported call raises ValueError.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from jpaged.attention.reference import REFERENCE
from jpaged.cpu.backend import CPU
from jpaged.pages import packed
from jpaged.pages.backend import AttentionCall, Backend, LayerKernels
from jpaged.pages.layout import PageLayout
from jpaged.pallas.gpu.backend import MOSAIC_GPU
from jpaged.pallas.tpu.backend import MOSAIC_TPU
from jpaged.triton.backend import TRITON
from jpaged.xla.backend import XLA

BACKENDS = (REFERENCE, XLA, CPU, MOSAIC_TPU, MOSAIC_GPU, TRITON)
IMPLEMENTATIONS = tuple(backend.name for backend in BACKENDS)
Implementation = Literal[
    "reference", "xla", "cpu", "mosaic_tpu", "mosaic_gpu", "triton"
]

# Names to try for `implementation=None`, by platform. The last one supports every call.
# No kernel for GPUs has been measured yet, so none is a default. "cpu" needs a C++
# compiler or a library that is built (`jpaged.cpu.library`).
PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "xla"),
    "gpu": ("xla",),
    "tpu": ("mosaic_tpu", "xla"),
}


def find_backend(name: str) -> Backend:
    """Return the backend of a name.

    Raises:
      ValueError: no backend has this name.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(
        f"implementation: expected None or one of {IMPLEMENTATIONS}, got {name!r}"
    )


def preferred() -> list[Backend]:
    """Return the available backends for `implementation=None`, the best one first."""
    names = PREFERRED.get(jax.default_backend(), ("xla",))
    backends = [find_backend(name) for name in names]
    return [backend for backend in backends if backend.is_available()]


def layout(implementation: str | None) -> PageLayout:
    """Return the page layout of a backend; None: of the preferred one."""
    return find_backend(serving_name(implementation)).layout


def serving_name(implementation: str | None) -> str:
    """Return the name of a backend; None: of the preferred one."""
    return preferred()[0].name if implementation is None else implementation


def layer_kernels(implementation: str | None) -> LayerKernels | None:
    """Return the layer kernels of a backend; None: of the preferred one."""
    return find_backend(serving_name(implementation)).layer_kernels


def unrolls_layers(implementation: str | None) -> bool:
    """Return whether decoders unroll their layers; None: with the preferred backend."""
    if implementation is None:
        return preferred()[0].unrolls_layers
    return find_backend(implementation).unrolls_layers


def choose_backend(
    implementation: str | None,
    k_pages: Any,
    *,
    head_dim: int | None = None,
    call: AttentionCall | None = None,
    is_latent: bool = False,
) -> Backend:
    """Return the backend for a call of attention or for a page update.

    Args:
      implementation: a name; None: the first of `preferred()` whose layout the pages
        have and that supports the call.
      k_pages: pages `[..., P, D]` or packed: an array, or its shape and dtype.
      head_dim: of the tokens that a page update writes; None if it moves whole blocks.
      call: arguments of `paged_attention`; None for a page update.
      is_latent: there are no pages of values.

    Raises:
      ValueError: no backend has this name, or it does not support the arguments.
    """
    if call is not None:
        head_dim = call.q.shape[-1]
    dim = packed.head_dim_of_rows(k_pages) if head_dim is None else head_dim

    def problem(backend: Backend) -> str | None:
        shape = backend.layout.plain_shape(k_pages, dim)
        plain = jax.ShapeDtypeStruct(shape, k_pages.dtype)
        return backend.problem(plain, call, is_latent=is_latent)

    if implementation is None:
        *first, last = preferred()
        for backend in first:
            if backend.layout.is_native(k_pages) and problem(backend) is None:
                return backend
        return last
    backend = find_backend(implementation)
    if reason := problem(backend):
        raise ValueError(
            f"implementation: {implementation!r} cannot serve this ('xla' can): "
            f"{reason}"
        )
    return backend
