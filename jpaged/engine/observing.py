"""Observing: what a step's queries and keys tell retention about blocks.

Pipeline: attention of a layer -> [observing] -> a statistic of each block.

Shape symbols: S rows of the step, M blocks per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.attention import statistics
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.engine.batch import Reads
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.kv.drops import pack_columns
from jpaged.models.inputs import StepInputs
from jpaged.retention import Retention, blocks_to_read

# (sum f32[S, M], q, log-sum-exps, cache, layer, attention's options) -> sum
Observer = Callable[..., jax.Array]


def nothing(inputs: StepInputs) -> jax.Array:
    """Return the statistic of no layer, f32[S, M]."""
    return jnp.zeros(inputs.block_tables.shape, jnp.float32)


def observer(
    method: Retention | None, inputs: StepInputs, observed: jax.Array | None
) -> Observer | None:
    """Return a function that adds a layer's statistic; None if nothing is observed.

    Args:
      method: the retention method.
      inputs: the step.
      observed: i32[S'], position of the first query that counts, of the step's rows.
    """
    if method is None or observed is None:
        return None
    num_rows = inputs.context_lens.shape[0]
    lens, starts = inputs.context_lens, inputs.query_start_loc
    # The last query of a row is at stored index lens - 1.
    last = jnp.arange(num_rows) if starts is None else starts[1:] - 1
    last_position = inputs.positions[jnp.clip(last, 0, inputs.positions.size - 1)]
    dropped = last_position - (lens - 1)
    first = jnp.maximum(observed[:num_rows] - dropped, 0)
    counts = (lens > 0) & (first < lens)

    def add(
        seen: jax.Array,
        q: jax.Array,
        lse: jax.Array,
        cache: KVCache,
        layer: Any,
        options: dict[str, Any],
    ) -> jax.Array:
        operands = statistics.operands(
            q,
            cache,
            inputs.block_tables,
            lens,
            starts,
            scale=options["scale"],
            logits_soft_cap=options["logits_soft_cap"],
            layer=layer,
        )

        def observe(seen: jax.Array) -> jax.Array:
            if method.statistic == "key_norm":
                return seen + statistics.key_norms(operands, counts)
            return seen + statistics.attention_mass(operands, lse, first)

        return when(jnp.any(counts), observe, seen)

    return add


def tables_to_read(
    method: Retention,
    reads: Reads,
    inputs: StepInputs,
    q: jax.Array,
    cache: KVCache,
    layer: Any,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """Return tables and lengths of the blocks that a layer reads, i32[S, M], i32[S].

    Args:
      method: selects the blocks.
      reads: of the step's rows.
      inputs: the step.
      q: [T, H, D], the layer's queries.
      cache: with the step's tokens.
      layer: the layer.
      options: of its attention.
    """
    tables, lens, starts = (
        inputs.block_tables,
        inputs.context_lens,
        inputs.query_start_loc,
    )
    num_rows, width = tables.shape
    reads = jax.tree.map(lambda column: column[:num_rows], reads)
    selects = reads.selects & (lens > 0)
    block_size = statistics.block_size(cache, q.shape[-1])

    def select(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tables, lens = carry
        query = q[:num_rows] if starts is None else q[starts[:-1].clip(0, len(q) - 1)]
        bounds = statistics.largest_scores(
            query, cache, tables, layer=layer, scale=options["scale"]
        )
        keeps = blocks_to_read(
            method,
            reads.values,
            bounds,
            num_tokens=lens,
            prompt_lens=reads.prompt_lens,
            block_size=block_size,
        )
        column = jnp.arange(width)[None, :]
        keeps |= ~selects[:, None]
        is_block = column * block_size < lens[:, None]
        skipped = jnp.sum(is_block & ~keeps, axis=1, dtype=jnp.int32)
        return pack_columns(tables, keeps, NO_BLOCK), lens - skipped * block_size

    return when(jnp.any(selects), select, (tables, lens))
