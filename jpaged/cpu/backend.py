"""The "cpu" backend: attention and page updates in C++, on CPUs with a compiler.

Pipeline: attention.backends -> [cpu.backend] -> cpu.calls.

Gradients are those of the "xla" backend, from the outputs of the kernel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.cpu import calls, library
from jpaged.cpu.layers import LAYER_KERNELS
from jpaged.pages.backend import AttentionCall, Backend, CascadeOptions
from jpaged.pages.layout import PLAIN_OR_BITS
from jpaged.pages.operands import (
    AttentionOperands,
    NewTokens,
    Pools,
    layer_index,
)
from jpaged.pages.quantised import BITS_OF_BFLOAT16, is_quantised
from jpaged.xla import backend as xla_backend
from jpaged.xla import gradients

MAX_GROUP = 64  # query heads per key/value head, as in kernels/attention.cc

_FLOATS = ("float32", "bfloat16", "float16")


def attend(
    operands: AttentionOperands, *, return_lse: bool = True, dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Return attention as `calls.attention`; it always has the log-sum-exp.

    More than `MAX_GROUP` heads that read one key/value head are several calls.
    """
    del return_lse
    q, sinks = operands.q, operands.sinks
    if operands.pools.k.shape[-3] > 1 or q.shape[1] <= MAX_GROUP:
        return calls.attention(operands, dtype)
    parts = []
    for first in range(0, q.shape[1], MAX_GROUP):
        heads = slice(first, first + MAX_GROUP)
        own_sinks = None if sinks is None else sinks[heads]
        part = operands._replace(q=q[:, heads], sinks=own_sinks)
        parts.append(calls.attention(part, dtype))
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=1)


def write(pools: Pools, new: NewTokens, slot_mapping: jax.Array, layer: Any) -> Pools:
    """Return the pools with new tokens, as `calls.write_kv`; differentiable.

    The kernels update two pools at a time; latent pages are one, which XLA updates.
    """
    if pools.v is None:
        return xla_backend.write(pools, new, slot_mapping, layer)
    index = None if layer is None else layer_index(layer)
    return _write(pools, new, slot_mapping, index)


_write = jax.custom_vjp(calls.write_kv)


def _write_forward(*arguments: Any) -> tuple[Pools, Any]:
    return calls.write_kv(*arguments), arguments


def _write_backward(arguments: Any, cotangents: Any) -> Any:
    _, gradient = jax.vjp(xla_backend.write, *arguments)
    return gradient(cotangents)


_write.defvjp(_write_forward, _write_backward)


def copy(pools: Pools, src: jax.Array, dst: jax.Array, layer: Any) -> Pools:
    """Return the pools with blocks copied, as `calls.copy_blocks`; see `write`."""
    if pools.v is None:
        return xla_backend.copy(pools, src, dst, layer)
    return calls.copy_blocks(pools, src, dst, layer)


def unsupported(pages: jax.ShapeDtypeStruct, call: AttentionCall | None) -> str | None:
    """Say what the kernels do not support, or None.

    They need a compiler, pages and queries of at most 32 bits, and at most 64 query
    heads for each of several key/value heads.
    """
    if reason := library.problem():
        return reason
    name = jnp.dtype(pages.dtype).name
    if name not in (*_FLOATS, BITS_OF_BFLOAT16) and not is_quantised(pages.dtype):
        return (
            f"k_pages: expected {', '.join(_FLOATS)}, the bits of bfloat16, int8 or "
            f"float8_e4m3fn, got {name}"
        )
    if call is None:
        return None
    if jnp.dtype(call.q.dtype).name not in _FLOATS:
        return f"q: expected {', '.join(_FLOATS)}, got {call.q.dtype}"
    num_heads, num_kv_heads = call.q.shape[1], pages.shape[-3]
    if num_kv_heads > 1 and num_heads > MAX_GROUP * num_kv_heads:
        return (
            f"q: expected at most {MAX_GROUP} heads for each of the {num_kv_heads} "
            f"key/value heads, got {num_heads}"
        )
    tables = call.block_tables
    if tables is not None and 0 in (*tables.shape[-1:], *pages.shape[:-2]):
        return f"k_pages, block_tables: expected some blocks, got {pages.shape}"
    return None


CPU = Backend(
    name="cpu",
    attend=attend,
    write=write,
    copy=copy,
    unsupported=unsupported,
    layout=PLAIN_OR_BITS,
    is_differentiable=True,
    serves_latents=True,
    add_gradient=gradients.add_gradient,
    cascade=CascadeOptions(branches=True),
    platform="cpu",
    device="CPU",
    is_installed=library.is_available,
    layer_kernels=LAYER_KERNELS,
)
