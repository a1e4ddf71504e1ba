"""Attention's checks: shapes and dtypes that do not fit together, in words.

Place on the road: attention -> [attention_checks]. Each raises a ValueError that names
the argument, what was expected and what it got.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.pages.packed import LANES


def is_padded(head_dim: int, page_dim: int) -> bool:
    """Whether pages of `page_dim` are those of `head_dim` as TPUs want them stored."""
    return page_dim == cdiv(head_dim, LANES) * LANES


def check_pages(
    k_pages: jax.Array, v_pages: jax.Array, layer: jax.Array | int | None
) -> None:
    """Both pools are alike, and have layers just where `layer` is given."""
    rank, shape = (4, "[N, K, P, D]") if layer is None else (5, "[L, N, K, P, D]")
    if k_pages.ndim != rank:
        hint = "without layer=" if layer is None else "with layer="
        raise ValueError(
            f"k_pages: expected rank {rank} {shape} {hint}, got shape {k_pages.shape}"
        )
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages: expected {k_pages.dtype}{list(k_pages.shape)} like k_pages, "
            f"got {v_pages.dtype}{list(v_pages.shape)}"
        )


def check_int(name: str, value: jax.Array, rank: int) -> None:
    """An argument is integers of a rank."""
    if value.ndim != rank or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name}: expected integers of rank {rank}, "
            f"got {value.dtype}{list(value.shape)}"
        )


def check_attention(
    q: jax.Array,
    k_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    sinks: jax.Array | None,
) -> None:
    """Queries, tables and lengths fit the pages and each other."""
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q: expected floating [S, H, D] or [T, H, D], got {q.dtype}{list(q.shape)}"
        )
    check_int("block_tables", block_tables, 2)
    check_int("context_lens", context_lens, 1)
    num_queries, num_heads, head_dim = q.shape
    num_seqs = block_tables.shape[0]
    *_, num_kv_heads, _, page_dim = k_pages.shape
    if head_dim != page_dim and not is_padded(head_dim, page_dim):
        raise ValueError(
            f"q: expected head_dim {page_dim} as in k_pages, got {head_dim}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"q: expected a number of heads that is a multiple of the pages' "
            f"{num_kv_heads} key/value heads, got {num_heads}"
        )
    if context_lens.shape != (num_seqs,):
        raise ValueError(
            f"context_lens: expected shape ({num_seqs},) as block_tables has rows, "
            f"got {context_lens.shape}"
        )
    if query_start_loc is None and num_queries != num_seqs:
        raise ValueError(
            f"q: expected one query for each of the {num_seqs} rows of block_tables, "
            f"got {num_queries}; pass query_start_loc for prompt chunks"
        )
    if query_start_loc is not None:
        check_int("query_start_loc", query_start_loc, 1)
        if query_start_loc.shape != (num_seqs + 1,):
            raise ValueError(
                f"query_start_loc: expected shape ({num_seqs + 1},), "
                f"got {query_start_loc.shape}"
            )
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks: expected shape ({num_heads},), got {sinks.shape}")
