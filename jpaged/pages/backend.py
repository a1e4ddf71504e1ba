"""The record of an attention backend: what it does, and what it supports.

Pipeline: xla, pallas, triton -> [backend] -> attention.backends, which lists them all.

To add a backend, write a folder with a `Backend` record in its `backend.py`, and add
the record to `jpaged.attention.backends.BACKENDS`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jpaged.pages.layout import PLAIN, PageLayout
from jpaged.pages.operands import NewTokens, Pools

# (operands: AttentionOperands, *, return_lse: bool), and with `cascade` also the
# output's `dtype` -> output [T, H, D] and log-sum-exp f32[T, H], or None without.
Attend = Callable[..., tuple[jax.Array, Any]]
# (pools, new, slot_mapping i32[T], layer) -> pools. Slots below 0 or past the pool are
# skipped.
Write = Callable[[Pools, NewTokens, jax.Array, Any], Pools]
# (pools, src i32[C], dst i32[C], layer) -> pools. A pair with -1 is skipped; stacked
# pools without a layer copy the blocks in all layers.
Copy = Callable[[Pools, jax.Array, jax.Array, Any], Pools]


class LayerKernels(NamedTuple):
    """A backend's own kernels for decoder layers, in a step of the engine.

    Each returns None where XLA's operation serves. They have no gradients.
    """

    # (x [M, K], weights [K, N], their scales f32[N] or None) -> [M, N] of each weight,
    # in the dtype of x
    matmuls: Callable[..., list[jax.Array] | None]
    # (x [T, K] in groups of rows, weight [X, K, N], scale f32[X, N] or None, rows of
    # each group i32[X]) -> [T, N], in the dtype of x
    grouped_matmul: Callable[..., jax.Array | None]
    # (x [..., E], weight [E], eps) -> x / its root mean square * weight
    rms_norm: Callable[..., jax.Array | None]
    # (gate [..., F], up [..., F], name of an activation) -> activation(gate) * up
    gated: Callable[..., jax.Array | None]


class AttentionCall(NamedTuple):
    """The arguments of `paged_attention` that decide whether a backend supports it."""

    q: Any  # [T, H, D]: an array or its shape and dtype
    block_tables: Any = None  # i32[S, M]
    scale: Any = None
    logits_soft_cap: Any = None
    needs_lse: bool = False


# (plain pages [..., K, P, D], call or None for a page update) -> what is not supported,
# as "argument: expected ..., got ...", or None.
Unsupported = Callable[[jax.ShapeDtypeStruct, AttentionCall | None], str | None]


@dataclasses.dataclass(frozen=True)
class CascadeOptions:
    """How `attention.cascade` reads shared prefixes with a backend's `attend`.

    Attributes:
      branches: whether a step in which no prefix is shared skips their part by a branch
        on the device. A GPU would wait for its host at every branch.
      tile_rows: rows of a tile of queries, given q's dtype. One virtual row fills a
        tile. None stands for `cascade.TILE_ROWS`.
    """

    branches: bool
    tile_rows: Callable[[Any], int] | None = None


def _no_limits(pages: jax.ShapeDtypeStruct, call: AttentionCall | None) -> None:
    del pages, call


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation of attention and of page updates.

    Attributes:
      name: the value of `implementation=`.
      attend: attention; see `Attend`.
      write: writes new tokens into pages; see `Write`.
      copy: copies whole blocks; see `Copy`.
      unsupported: says what the backend does not support; see `Unsupported`.
      layout: how the backend stores pages and scales.
      accepts_stored_pages: whether `attend` and `write` accept pages as `layout` stores
        them, and unpadded heads. Otherwise they get plain pages `[..., P, D]` and heads
        padded to the pages' D.
      is_differentiable: whether `attend` has a gradient. Otherwise differentiation
        raises an error that names the backends that have one.
      add_gradient: returns a function of `AttentionOperands` with a gradient; for a
        backend that is differentiable by another backend's gradient.
      returns_lse: whether `attend` can return log-sum-exps.
      serves_latents: whether pools may have no pages of values (`Pools.v` is None).
      cascade: how shared prefixes are read once with `attend`; None if `attend` itself
        handles `operands.shared_prefix`.
      unrolls_layers: whether a decoder has code of its own for every layer. Otherwise
        its layers are a loop, which compiles faster (docs/decisions/layers.md).
      platform: `jax.default_backend()` that the backend runs on; None for any.
      device: name of the device that the backend needs, for error messages.
      requires: packages from an extra that must be installed.
      is_installed: whether what else the backend needs is there.
      tile_sizes: returns the dataclass of the tile sizes that `pages.tuned` may set.
      layer_kernels: kernels for other operations of layers; None: XLA's.
    """

    name: str
    attend: Attend
    write: Write
    copy: Copy
    unsupported: Unsupported = _no_limits
    layout: PageLayout = PLAIN
    accepts_stored_pages: bool = False
    is_differentiable: bool = False
    add_gradient: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    returns_lse: bool = True
    serves_latents: bool = False
    cascade: CascadeOptions | None = None
    unrolls_layers: bool = False
    platform: str | None = None
    device: str = ""
    requires: tuple[str, ...] = ()
    is_installed: Callable[[], bool] = lambda: True
    tile_sizes: Callable[[], type] | None = None
    layer_kernels: LayerKernels | None = None

    def problem(
        self,
        pages: jax.ShapeDtypeStruct,
        call: AttentionCall | None,
        *,
        is_latent: bool = False,
    ) -> str | None:
        """Return what the backend does not support, or None.

        Args:
          pages: shape and dtype of plain pages `[..., K, P, D]`.
          call: arguments of attention; None for a page update.
          is_latent: there are no pages of values.
        """
        if is_latent and not self.serves_latents:
            return (
                "v_pages: expected pages of values, got None: latent pages, whose "
                "values are the keys (multi-head latent attention)"
            )
        if call is not None and call.needs_lse and not self.returns_lse:
            return "return_lse: expected False, and no shared_prefix, got True"
        return self.unsupported(pages, call)

    def is_available(self) -> bool:
        """Whether this process has the device and all that the backend needs."""
        is_here = self.platform in (None, jax.default_backend())
        has_packages = is_here and all(map(importlib.util.find_spec, self.requires))
        return has_packages and self.is_installed()


def unsupported_numbers(call: AttentionCall | None) -> str | None:
    """Reject arrays where a kernel compiles a Python number in."""
    for name in ("scale", "logits_soft_cap"):
        if isinstance(getattr(call, name, None), jax.Array):
            return f"{name}: expected a Python number, got an array"
    return None
