"""Statistics: what attention tells about blocks, for retention.

Pipeline: pages, queries, log-sum-exps -> [statistics] -> a number for each block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.attention.kv_cache import KVCache
from jpaged.pages.operands import AttentionOperands, Pools
from jpaged.pages.packed import plain, plain_shape
from jpaged.xla import block_statistics
from jpaged.xla.block_statistics import attention_mass as attention_mass
from jpaged.xla.block_statistics import key_norms as key_norms


def operands(
    q: jax.Array,
    cache: KVCache,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    scale: float | None,
    logits_soft_cap: float | None,
    layer: Any,
) -> AttentionOperands:
    """Return the operands of `attention_mass` and `key_norms`.

    Arguments as of `paged_attention`. Only keys are read.
    """
    head_dim = q.shape[-1]
    pages = plain(cache.k_pages, head_dim)
    return AttentionOperands(
        q,
        Pools(pages, pages, cache.k_scale, cache.k_scale),
        block_tables,
        context_lens,
        query_start_loc,
        scale=head_dim**-0.5 if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
        layer=layer,
    )


def block_size(cache: KVCache, head_dim: int) -> int:
    """Return the tokens of a block."""
    return plain_shape(cache.k_pages, head_dim)[-2]


def largest_scores(
    q: jax.Array,
    cache: KVCache,
    block_tables: jax.Array,
    *,
    layer: Any,
    scale: float | None,
) -> jax.Array:
    """Return a bound of the scores of each block's keys, f32[S, M]: a mean over heads.

    Args:
      q: [S, H, D], a query of each row.
      cache: with key extremes. Blocks that are not full have arbitrary ones.
      block_tables: i32[S, M].
      layer: the layer.
      scale: as of `paged_attention`.
    """
    assert cache.k_min is not None
    assert cache.k_max is not None
    tables = jnp.maximum(block_tables, 0)
    return block_statistics.largest_scores(
        q,
        cache.k_min[layer, tables],
        cache.k_max[layer, tables],
        q.shape[-1] ** -0.5 if scale is None else scale,
    )
