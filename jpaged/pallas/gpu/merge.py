"""Merges the partial results of each query's attention.

Pipeline: pallas.gpu.calls -> [pallas.gpu.merge].

One block of threads serves a query and a key/value head; if many heads share the key,
it serves some of them. It loops over the query's items and keeps a running maximum, as
attention itself does. The order of items is fixed, so equal lengths give equal bits.

Shape symbols as in `jpaged.attention`; I items, D' at least 128.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas.gpu.work import QueryParts

_LOWEST = -1e29
# Parts whose loads are in flight at once.
_AHEAD = 4
# The most heads that a block of threads serves, one after another.
_HEADS = 8


def merge_items(
    outs: jax.Array,
    lses: jax.Array,
    parts: QueryParts,
    group: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Merge the items' results of each query.

    Args:
      outs: f32[I, K, rows, D'].
      lses: f32[I, K, R], to base 2.
      parts: Where the results of each of T queries are.
      group: Heads that share a key.
      dtype: The output's dtype.

    Returns:
      Outputs [T, H, D'], and log-sum-exps to base 2, f32[T, H]. A query without parts
      has zeros and a log-sum-exp below -1e28.
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
        grid_names=("query", "kv_head", "heads"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="merge_parts",
    )
    return call(outs, lses, jnp.stack(parts, axis=1))


def _kernel(
    outs: Any,  # f32[I, K, rows, D']
    lses: Any,  # f32[I, K, R]
    fields: Any,  # i32[T, fields of QueryParts]
    out: Any,  # [T, H, D']
    lse: Any,  # f32[T, H]
    *,
    group: int,
    heads: int,
) -> None:
    query, kv_head = lax.axis_index("query"), lax.axis_index("kv_head")
    first_head = lax.axis_index("heads") * heads
    parts = QueryParts(*(fields[query, i] for i in range(len(QueryParts._fields))))
    last = parts.item + parts.num_items - 1
    width = outs.shape[-1]

    for i in range(heads):
        head = first_head + i  # among the heads of the key
        row = parts.row + head

        def step(number: Any, carry: Any, row: Any = row) -> Any:
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
        trips = lax.div(parts.num_items + (_AHEAD - 1), jnp.int32(_AHEAD))
        acc, total, highest = lax.fori_loop(0, trips, step, start)
        total = jnp.maximum(total, 1e-30)
        head += kv_head * group
        out[query, head] = (acc / total).astype(out.dtype)
        lse[query, head] = highest + jnp.log2(total)
