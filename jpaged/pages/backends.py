"""Implementations of attention and of page updates: which one serves a call.

Place on the road: attention, kv_cache -> [implementations].

None takes the best that serves the backend. A name is never replaced by another: where
it cannot serve, it raises, and says what it would need and who serves instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.pages import packed as packed_pages
from jpaged.pages.packed import LANES
from jpaged.pages.quantised import BITS_OF_BFLOAT16, is_quantised, page_dtype

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu", "triton")

# The first choice by backend; "xla" elsewhere. No GPU's kernel was measured yet, so
# none is chosen there unasked.
_FIRST = {"tpu": "mosaic_tpu"}

# Block tables lie in a TPU core's scalar memory of 1 MiB, with some room for the rest.
_TABLE_BYTES = 896 * 1024
_ROWS = 16  # rows of a memory tile of bfloat16


def best() -> str:
    """The first choice on this process's default backend."""
    return _FIRST.get(jax.default_backend(), "xla")


def page_shape(
    block_size: int, head_dim: int, dtype: Any, implementation: str | None
) -> tuple[int, int]:
    """The last two axes with which an implementation wants its pages stored.

    On TPUs the last is a multiple of 128: of smaller heads XLA would order the axes
    otherwise, and a kernel's view of the pages would be a copy of the pool. Floats of
    16, 32 or 64 are packed, others filled up with zeros. Small heads whose blocks no
    packed rows fit are stored as they are, for "xla".
    """
    if (implementation or best()) != "mosaic_tpu":
        return block_size, head_dim
    per_row = packed_pages.per_row(head_dim, dtype)
    if per_row == 1:
        return block_size, cdiv(head_dim, LANES) * LANES
    if not packed_pages.fits(block_size, per_row):
        return block_size, head_dim
    return block_size // per_row, LANES


def stored_dtype(kv_dtype: str, implementation: str | None) -> str:
    """The dtype with which an implementation wants pages stored.

    `kv_dtype` is "int8", "fp8" or a float's name. On a CPU the XLA of jax 0.10 copies
    a whole pool of bfloat16, widened, to gather from it or to write a token into it;
    one of its bits it does not.
    """
    dtype = page_dtype(kv_dtype)
    is_xla = (implementation or best()) in ("xla", "reference")
    if dtype == "bfloat16" and is_xla and jax.default_backend() == "cpu":
        return BITS_OF_BFLOAT16
    return dtype


def scale_width(block_size: int, implementation: str | None) -> int:
    """The last axis with which an implementation wants quantised pages' scales stored.

    On TPUs a multiple of 128, for the reason that `page_shape` gives.
    """
    if (implementation or best()) != "mosaic_tpu":
        return block_size
    return cdiv(block_size, LANES) * LANES


def choose(
    implementation: str | None,
    k_pages: Any,
    head_dim: int | None = None,
    **attention: Any,
) -> str:
    """The implementation that serves a call.

    Args:
      implementation: a name, or None for the best that serves.
      k_pages: the pages, `[..., P, D]`, or packed for heads of `head_dim`.
      head_dim: of what is written; None where whole blocks are moved, or for q's.
      **attention: of a call of `paged_attention` its `q`, `block_tables`, `scale` and
        `logits_soft_cap`; of a page update nothing.

    Raises:
      ValueError: there is no such implementation, or it cannot serve the arguments.
    """
    if implementation is None and best() == "mosaic_tpu" and k_pages.shape[-1] % LANES:
        return "xla"  # "mosaic_tpu" would copy them, to be packed, if at all
    if "q" in attention:
        head_dim = attention["q"].shape[-1]
    elif head_dim is None:
        head_dim = packed_pages.head_dim_of_rows(k_pages)
    shape = packed_pages.plain_shape(k_pages, head_dim)
    k_pages = jax.ShapeDtypeStruct(shape, k_pages.dtype)
    if implementation is None:
        return "xla" if _complaint(best(), k_pages, attention) else best()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected None or one of {IMPLEMENTATIONS}, "
            f"got {implementation!r}"
        )
    if complaint := _complaint(implementation, k_pages, attention):
        raise ValueError(
            f"implementation: {implementation!r} cannot serve this ('xla' can): "
            f"{complaint}"
        )
    return implementation


def _complaint(
    implementation: str, k_pages: Any, attention: dict[str, Any]
) -> str | None:
    """What the implementation cannot serve, or None."""
    limits = _LIMITS.get(implementation)
    return limits(k_pages, attention) if limits else None


def _unserved_by_mosaic_tpu(k_pages: Any, attention: dict[str, Any]) -> str | None:
    *_, num_kv_heads, block_size, head_dim = k_pages.shape
    is_narrow = is_quantised(k_pages.dtype)
    if k_pages.dtype not in (jnp.bfloat16, jnp.float32) and not is_narrow:
        return (
            "k_pages: expected bfloat16, float32, int8, float8_e4m3fn or its bits as "
            f"uint8, got {k_pages.dtype}"
        )
    if block_size % _ROWS:
        return f"k_pages: expected a block_size of a multiple of 16, got {block_size}"
    if is_narrow and LANES % block_size and block_size % LANES:
        return (
            "k_pages: expected a block_size of 16, 32, 64 or a multiple of 128 for "
            f"pages of {k_pages.dtype}, got {block_size}"
        )
    if is_narrow and num_kv_heads not in (1, 2, 4) and num_kv_heads % 8:
        return (
            "k_pages: expected 1, 2, 4 or a multiple of 8 key/value heads on a device "
            f"for pages of {k_pages.dtype}, got {num_kv_heads}"
        )
    per_row = packed_pages.per_row(head_dim, k_pages.dtype)
    if head_dim % LANES and per_row == 1:
        return (
            "k_pages: expected a head_dim of 16, 32 or 64 of floats, or a multiple of "
            "128 (other pages are stored with zeros behind each head, q is not), got "
            f"{head_dim}"
        )
    if per_row > 1 and not packed_pages.fits(block_size, per_row):
        few = ", ".join(str(size) for size in (16, 32) if size < 8 * per_row)
        return (
            f"k_pages: expected a block_size of {few} or a multiple of {8 * per_row} "
            f"for a head_dim of {head_dim}, got {block_size}"
        )
    if not attention:
        return None
    if attention["q"].dtype not in (jnp.bfloat16, jnp.float32):
        return f"q: expected bfloat16 or float32, got {attention['q'].dtype}"
    if complaint := _unserved_by_any_kernel(attention):
        return complaint
    tables = attention["block_tables"]
    if 4 * tables.size > _TABLE_BYTES:
        return (
            f"block_tables: expected at most {_TABLE_BYTES // 4} entries in all, "
            f"got shape {tables.shape}; larger blocks need fewer"
        )
    return None


def _unserved_by_mosaic_gpu(k_pages: Any, attention: dict[str, Any]) -> str | None:
    """What 'mosaic_gpu' cannot serve, or None. Page updates are XLA's: all floats."""
    if not attention and not is_quantised(k_pages.dtype):
        return None
    *_, num_kv_heads, block_size, head_dim = k_pages.shape
    if k_pages.dtype not in (jnp.bfloat16, jnp.float16):
        return f"k_pages: expected bfloat16 or float16, got {k_pages.dtype}"
    if head_dim not in (64, 128, 256):
        return f"k_pages: expected a head_dim of 64, 128 or 256, got {head_dim}"
    if block_size not in (16, 32) and block_size % 64:
        return (
            "k_pages: expected a block_size of 16, 32 or a multiple of 64, got "
            f"{block_size}"
        )
    group = attention["q"].shape[1] // num_kv_heads
    if group > 64:
        return f"q: expected at most 64 heads to a key/value head, got {group}"
    return _unserved_by_any_kernel(attention)


def _unserved_by_any_kernel(attention: dict[str, Any]) -> str | None:
    for name in ("scale", "logits_soft_cap"):
        if isinstance(attention.get(name), jax.Array):
            return f"{name}: expected a Python number, got an array"
    return None


def _unserved_by_triton(k_pages: Any, attention: dict[str, Any]) -> str | None:
    head_dim = k_pages.shape[-1]
    floats = (jnp.bfloat16, jnp.float16, jnp.float32)
    if k_pages.dtype not in floats and not is_quantised(k_pages.dtype):
        return (
            "k_pages: expected bfloat16, float16, float32, int8 or the bits of "
            f"float8_e4m3fn, got {k_pages.dtype}"
        )
    if not 16 <= head_dim <= 256 or head_dim & (head_dim - 1):
        return f"k_pages: expected a head_dim of 16, 32, 64, 128 or 256, got {head_dim}"
    if "tensor" in jax.sharding.get_abstract_mesh().axis_names:
        return "mesh: expected none with an axis `tensor`"
    return _unserved_by_any_kernel(attention)


# What each cannot serve, as a sentence; those that serve everything are not here.
_LIMITS: dict[str, Callable[[Any, dict[str, Any]], str | None]] = {
    "mosaic_tpu": _unserved_by_mosaic_tpu,
    "mosaic_gpu": _unserved_by_mosaic_gpu,
    "triton": _unserved_by_triton,
}


def without_gradient(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` of arrays, an implementation whose gradient is refused in words."""

    def refuse(*args):
        raise ValueError(
            f"implementation: {name!r} has no gradient ('xla' and 'reference' have); "
            "take implementation='xla' for what is differentiated"
        )

    called = jax.custom_vjp(function)
    called.defvjp(refuse, refuse)
    return called
