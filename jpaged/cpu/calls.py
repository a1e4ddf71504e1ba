"""Calls of the kernels: operands as the C++ functions expect them.

Pipeline: cpu.backend, models -> [cpu.calls] -> kernels/*.cc.

The kernels check shapes and dtypes again and limit all indices, so no call reads or
writes outside of its arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.cpu import library
from jpaged.pages.operands import (
    AttentionOperands,
    NewTokens,
    Pools,
    layer_index,
    window_size,
)


def attention(
    operands: AttentionOperands, dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Return attention and its log-sum-exp.

    Args:
      operands: plain pages, of one layer or stacked with `layer`. `scale`,
        `logits_soft_cap` and `sliding_window` may be traced. `shared_prefix` is not
        used.
      dtype: of the output; None: of q.

    Returns:
      Output `[T, H, D]`, and log-sum-exp f32`[T, H]`.
    """
    q, starts, cap = operands.q, operands.query_start_loc, operands.logits_soft_cap
    pools = _stacked(operands.pools, operands.layer)
    values_scale = pools.values_scale
    num_queries, num_heads, _ = q.shape
    no_integers, no_floats = jnp.zeros((0,), jnp.int32), jnp.zeros((0,), jnp.float32)
    window = window_size(operands.sliding_window)
    numbers = [operands.scale, 0.0 if cap is None else cap]
    results = [
        jax.ShapeDtypeStruct(q.shape, q.dtype if dtype is None else dtype),
        jax.ShapeDtypeStruct((num_queries, num_heads), jnp.float32),
    ]
    call = jax.ffi.ffi_call(
        library.target("attention"), results, vmap_method="sequential"
    )
    out, lse = call(
        q,
        pools.k,
        pools.values,
        operands.block_tables.astype(jnp.int32),
        operands.context_lens.astype(jnp.int32),
        no_integers if starts is None else starts.astype(jnp.int32),
        jnp.stack([layer_index(operands.layer), window]),
        jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers]),
        no_floats if operands.sinks is None else operands.sinks.astype(jnp.float32),
        no_floats if pools.k_scale is None else pools.k_scale,
        no_floats if values_scale is None else values_scale,
    )
    return out, lse


def write_kv(
    pools: Pools, new: NewTokens, slot_mapping: jax.Array, layer: Any
) -> Pools:
    """Return the pools with new tokens at slots i32`[T]`, updated in place."""
    block_size = pools.k.shape[-2]
    where = slot_mapping.astype(jnp.int32), layer_index(layer).reshape(1)

    def write(pages: tuple[Any, Any], values: tuple[Any, Any]) -> list[jax.Array]:
        call = _in_place("write_kv", *pages, stacked=pools.k.ndim == 5)
        return call(*pages, *values, *where, block_size=block_size)

    written = write((pools.k, pools.v), (new.k, new.v))
    if pools.k_scale is None:
        return Pools(*written)
    scales = (pools.k_scale, pools.v_scale), (new.k_scale, new.v_scale)
    return Pools(*written, *write(*scales))


def copy_blocks(pools: Pools, src: jax.Array, dst: jax.Array, layer: Any) -> Pools:
    """Return the pools with blocks `src` i32`[C]` copied to `dst`, in place.

    Stacked pools without `layer` copy the blocks in every layer.
    """
    layers = jnp.zeros((0,), jnp.int32) if layer is None else layer_index(layer)
    where = src.astype(jnp.int32), dst.astype(jnp.int32), layers.reshape(-1)

    def copy(*pages: Any) -> list[jax.Array]:
        call = _in_place("copy_blocks", *pages, stacked=pools.k.ndim == 5)
        return call(*pages, *where)

    copied = copy(pools.k, pools.v)
    if pools.k_scale is None:
        return Pools(*copied)
    return Pools(*copied, *copy(pools.k_scale, pools.v_scale))


def matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None = None
) -> jax.Array:
    """Return x `[M, K]` @ weight `[K, N]`, with sums in float32.

    Args:
      x: float32, bfloat16 or float16.
      weight: float32, bfloat16, float16 or int8.
      scale: f32`[N]`, a factor of each column; None: 1.

    Returns:
      `[M, N]` in the dtype of x.
    """
    return matmuls(x, [weight], [scale])[0]


def matmuls(
    x: jax.Array, weights: Sequence[jax.Array], scales: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """Return the products of x `[M, K]` with several matrices, in one call.

    Args:
      x: as in `matmul`.
      weights: `[K, N]` each, of one dtype.
      scales: of each matrix, as in `matmul`.

    Returns:
      `[M, N]` of each matrix, with the same bits as from `matmul`.
    """
    operands = []
    for weight, scale in zip(weights, scales, strict=True):
        if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
            raise ValueError(
                f"x, weight: expected shapes [M, K] and [K, N], got {x.shape} and "
                f"{weight.shape}"
            )
        _check_product(x, weight, scale, weight.shape[1:])
        if weight.dtype != weights[0].dtype:
            raise ValueError(
                f"weights: expected one dtype, got {weights[0].dtype} and "
                f"{weight.dtype}"
            )
        factors = jnp.zeros((0,), jnp.float32) if scale is None else scale
        operands += [weight, factors]
    out = [
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype)
        for weight in weights
    ]
    call = jax.ffi.ffi_call(library.target("matmul"), out, vmap_method="sequential")
    return list(call(x, *operands))


def grouped_matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, counts: jax.Array
) -> jax.Array:
    """Return consecutive groups of rows, each multiplied by its own matrix.

    Args:
      x: `[T, K]`; the first counts[0] rows are multiplied by weight[0], and so on.
      weight: `[X, K, N]`, dtypes as in `matmul`.
      scale: f32`[X, N]`; None: 1.
      counts: i32`[X]`. A negative count is 0, and rows past T are ignored.

    Returns:
      `[T, N]` in the dtype of x; zeros in rows past the sum of `counts`.
    """
    factors = jnp.zeros((0, 0), jnp.float32) if scale is None else scale
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x, weight: expected shapes [T, K] and [X, K, N], got {x.shape} and "
            f"{weight.shape}"
        )
    if counts.shape != weight.shape[:1]:
        raise ValueError(
            f"counts: expected shape {weight.shape[:1]}, got {counts.shape}"
        )
    _check_product(x, weight, scale, (weight.shape[0], weight.shape[2]))
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[2]), x.dtype)
    name = library.target("grouped_matmul")
    call = jax.ffi.ffi_call(name, out, vmap_method="sequential")
    return call(x, weight, factors, counts.astype(jnp.int32))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return x f32`[M, E]` / its root mean square * weight f32`[E]`."""
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"x, weight: expected shapes [M, E] and [E], got {x.shape} and "
            f"{weight.shape}"
        )
    return _elementwise("rms_norm", x, weight, eps=np.float32(eps))


ACTIVATIONS = ("silu", "gelu_tanh")  # by the kernel's number


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """Return activation(gate) * up, f32 of one shape; see `ACTIVATIONS`."""
    if gate.shape != up.shape:
        raise ValueError(f"gate, up: expected one shape, got {gate.shape}, {up.shape}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {ACTIVATIONS}, got {activation!r}"
        )
    number = np.int64(ACTIVATIONS.index(activation))
    return _elementwise("gated", gate, up, activation=number)


def _elementwise(name: str, x: jax.Array, y: jax.Array, **attributes: Any) -> jax.Array:
    if x.dtype != jnp.float32 or y.dtype != jnp.float32:
        raise ValueError(f"{name}: expected float32, got {x.dtype} and {y.dtype}")
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call(library.target(name), out, vmap_method="sequential")
    return call(x, y, **attributes)


_FLOATS = ("float32", "bfloat16", "float16")


def _check_product(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, shape: tuple[int, ...]
) -> None:
    """Raise ValueError for dtypes that a product does not support, or a wrong scale."""
    for name, array, dtypes in (
        ("x", x, _FLOATS),
        ("weight", weight, (*_FLOATS, "int8")),
    ):
        if jnp.dtype(array.dtype).name not in dtypes:
            raise ValueError(
                f"{name}: expected dtype {', '.join(dtypes)}, got {array.dtype}"
            )
    if scale is not None and (scale.shape != shape or scale.dtype != jnp.float32):
        raise ValueError(
            f"scale: expected float32 {shape}, got {scale.dtype} {scale.shape}"
        )


def _in_place(name: str, *pools: jax.Array, stacked: bool) -> Any:
    """Return the call of a kernel whose results are its first operands, updated.

    The pools keep their shape: a reshape before the call makes XLA copy them in loops.
    """
    call = jax.ffi.ffi_call(
        library.target(name),
        [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        input_output_aliases={index: index for index in range(len(pools))},
        vmap_method="sequential",
    )
    return functools.partial(call, stacked=int(stacked))


def _stacked(pools: Pools, layer: Any) -> Pools:
    """Return pools with an axis of layers."""
    if layer is not None:
        return pools
    return jax.tree.map(lambda pool: pool.reshape(1, *pool.shape), pools)
