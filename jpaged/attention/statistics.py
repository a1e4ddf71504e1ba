"""Statistics: what attention tells about blocks, for retention.

Pipeline: pages, queries, log-sum-exps -> [statistics] -> a number for each block.
"""

from __future__ import annotations

from typing import Any

import jax

from jpaged.attention.kv_cache import KVCache
from jpaged.pages.operands import AttentionOperands, Pools
from jpaged.pages.packed import plain
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
