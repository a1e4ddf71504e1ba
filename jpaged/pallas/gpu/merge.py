"""The parts of a query's attention, made one.

Place on the road: pallas.gpu -> [pallas.gpu_merge].

One block of threads serves a query and a key/value head, or some of many heads that
share a key: it walks the items that read that query's keys, and keeps a running maximum
as attention itself does. The order is fixed, so the same lengths give the same bits.

Letters as in `jpaged.attention`; I items, D' at least 128.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas.gpu.work import Parts

_LOWEST = -1e29
# Parts of which the loads are under way at once.
_AHEAD = 4
# Heads that a block of threads serves, one after another, at most.
_HEADS = 8


def merge(
    outs: jax.Array,
    lses: jax.Array,
    parts: Parts,
    group: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """[T, H, D'] of `dtype`, and log2 of the sum of weights, f32[T, H].

    Where a query has no parts: zeros, and a number below -1e28.

    Args:
      outs: f32[I, K, rows, D'].
      lses: f32[I, K, R], log2.
      parts: of each of T queries.
      group: heads that share a key.
    """
    num_queries, num_kv_heads, width = parts.item.shape[0], outs.shape[1], outs.shape[3]
    num_heads = num_kv_heads * group
    heads = next(n for n in range(_HEADS, 0, -1) if group % n == 0)
    call = plgpu.kernel(
        functools.partial(_kernel, group=group, heads=heads),
        out_type=[
            jax.ShapeDtypeStruct((num_queries, num_heads, width), dtype),
            jax.ShapeDtypeStruct((num_queries, num_heads), jnp.float32),
        ],
        grid=(num_queries, num_kv_heads, group // heads),
        grid_names=("query", "kv_head", "some"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="merge_parts",
    )
    return call(outs, lses, jnp.stack(parts, axis=1))


def _kernel(
    outs,  # f32[I, K, rows, D']
    lses,  # f32[I, K, R]
    fields,  # i32[T, fields of Parts]
    out,  # [T, H, D']
    lse,  # f32[T, H]
    *,
    group: int,
    heads: int,
):
    query, kv_head = lax.axis_index("query"), lax.axis_index("kv_head")
    first_head = lax.axis_index("some") * heads
    parts = Parts(*(fields[query, i] for i in range(len(Parts._fields))))
    last = parts.item + parts.count - 1
    width = outs.shape[-1]

    for i in range(heads):
        head = first_head + i  # of those of the key
        row = parts.row + head

        def step(number, carry, row=row):
            acc, total, highest = carry
            first = parts.item + number * _AHEAD
            items = [jnp.minimum(first + i, last) for i in range(_AHEAD)]
            found = [
                (outs[item, kv_head, row], lses[item, kv_head, row]) for item in items
            ]
            for i, (part, weight) in enumerate(found):
                weight = jnp.where(first + i <= last, weight, 2 * _LOWEST)
                higher = jnp.maximum(highest, weight)
                keep, weight = jnp.exp2(highest - higher), jnp.exp2(weight - higher)
                acc = acc * keep + part * weight
                total, highest = total * keep + weight, higher
            return acc, total, highest

        start = jnp.zeros((width,), jnp.float32), jnp.float32(0), jnp.float32(_LOWEST)
        trips = lax.div(parts.count + (_AHEAD - 1), jnp.int32(_AHEAD))
        acc, total, highest = lax.fori_loop(0, trips, step, start)
        total = jnp.maximum(total, 1e-30)
        head += kv_head * group
        out[query, head] = (acc / total).astype(out.dtype)
        lse[query, head] = highest + jnp.log2(total)
