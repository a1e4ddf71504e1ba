"""Operands of attention and of page updates: their shapes, checks and defaults.

Pipeline: attention -> [operands] -> xla | pallas | triton.

Shape symbols as in `jpaged.attention`. The checks raise a ValueError that names the
argument, what was expected and what was given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.kv.shared_prefix import SharedPrefix
from jpaged.pages.packed import LANES, plain_shape

# A window longer than any context: half of the range of int32, so that sums of a
# position and a window do not overflow.
EVERYTHING = 2**30


class Pools(NamedTuple):
    """Keys and values of all blocks, of one layer or of all layers."""

    k: jax.Array  # [N, K, P, D], or [L, N, K, P, D]
    v: jax.Array | None  # like k; None: latent pages, the keys are the values too
    k_scale: jax.Array | None = None  # quantised pages: f32[..., N, K, P'], P' >= P
    v_scale: jax.Array | None = None  # like k_scale

    @property
    def values(self) -> jax.Array:
        """The pages that hold the values: those of the keys if they are latent."""
        return self.k if self.v is None else self.v

    @property
    def values_scale(self) -> jax.Array | None:
        """The scales of `values`."""
        return self.k_scale if self.v is None else self.v_scale


class NewTokens(NamedTuple):
    """Keys and values of new tokens, in the form in which the pools store them."""

    k: jax.Array  # [T, K, D]
    v: jax.Array | None  # [T, K, D]; None for latent pages
    k_scale: jax.Array | None = None  # quantised pages: f32[T, K]
    v_scale: jax.Array | None = None  # quantised pages: f32[T, K]


class AttentionOperands(NamedTuple):
    """All operands of one attention call; a pytree.

    Kernels need Python numbers for `scale` and `logits_soft_cap`, which they compile
    in; XLA also accepts scalar arrays.
    """

    q: jax.Array  # [S, H, D], or [T, H, D] with query_start_loc
    pools: Pools
    block_tables: jax.Array  # i32[S, M]
    context_lens: jax.Array  # i32[S]
    query_start_loc: jax.Array | None = None  # i32[S + 1]
    scale: Any = 1.0
    sliding_window: int | jax.Array | None = None
    logits_soft_cap: Any = None
    sinks: jax.Array | None = None  # f32[H]
    layer: int | jax.Array | None = None  # index into stacked pools
    shared_prefix: SharedPrefix | None = None  # groups of rows that share blocks

    @property
    def block_size(self) -> int:
        """Tokens per block, of plain or packed pages."""
        return plain_shape(self.pools.k, self.q.shape[-1])[-2]


def merge_layers(operands: AttentionOperands) -> AttentionOperands:
    """View stacked pools as one pool of L * N blocks, and shift tables to the layer.

    Nothing is sliced, so nothing is copied. Table entries outside the pool become 0.
    """
    if operands.layer is None:
        return operands
    num_layers, num_blocks = operands.pools.k.shape[:2]
    tables = operands.block_tables
    inside = (tables >= 0) & (tables < num_blocks)
    offset = jnp.asarray(operands.layer, jnp.int32) * num_blocks
    return operands._replace(
        pools=jax.tree.map(
            lambda pages: pages.reshape(num_layers * num_blocks, *pages.shape[2:]),
            operands.pools,
        ),
        block_tables=jnp.where(inside, tables + offset, 0),
        layer=None,
    )


# ---- what replaces an argument that is None


def window_size(sliding_window: jax.Array | int | None) -> jax.Array:
    """Return the number of tokens that a query sees, i32[], at most EVERYTHING."""
    tokens = EVERYTHING if sliding_window is None else sliding_window
    return jnp.minimum(jnp.asarray(tokens, jnp.int32), EVERYTHING)


def query_starts(query_start_loc: jax.Array | None, num_rows: int) -> jax.Array:
    """Return the first query of each row, and the number of queries, i32[S + 1]."""
    if query_start_loc is None:  # one query per row
        return jnp.arange(num_rows + 1, dtype=jnp.int32)
    return query_start_loc.astype(jnp.int32)


def layer_index(layer: jax.Array | int | None) -> jax.Array:
    """Return the index of the layer in a stacked pool, i32[]; None is layer 0."""
    return jnp.asarray(0 if layer is None else layer, jnp.int32)


# ---- checks


def is_padded(head_dim: int, page_dim: int) -> bool:
    """Whether pages of `page_dim` hold heads of `head_dim` with zeros behind them."""
    return page_dim == cdiv(head_dim, LANES) * LANES


def check_pages(
    k_pages: jax.Array, v_pages: jax.Array | None, layer: jax.Array | int | None
) -> None:
    """Check that both pools are alike, and stacked if and only if `layer` is given."""
    rank, shape = (4, "[N, K, P, D]") if layer is None else (5, "[L, N, K, P, D]")
    if k_pages.ndim != rank:
        hint = "without layer=" if layer is None else "with layer="
        raise ValueError(
            f"k_pages: expected rank {rank} {shape} {hint}, got shape {k_pages.shape}"
        )
    if v_pages is None:
        return
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages: expected {k_pages.dtype}{list(k_pages.shape)} like k_pages, "
            f"got {v_pages.dtype}{list(v_pages.shape)}"
        )


def check_integers(name: str, value: jax.Array, rank: int) -> None:
    """Check that an argument is an integer array of a rank."""
    if value.ndim != rank or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name}: expected integers of rank {rank}, "
            f"got {value.dtype}{list(value.shape)}"
        )


def check_attention(operands: AttentionOperands) -> None:
    """Check that queries, tables, lengths and options fit the pages and each other."""
    _check_heads(operands.q, operands.pools.k, operands.sinks)
    _check_rows(operands)
    window, soft_cap = operands.sliding_window, operands.logits_soft_cap
    if isinstance(window, int) and window < 1:
        raise ValueError(f"sliding_window: expected at least 1, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"logits_soft_cap: expected above 0, got {soft_cap}")


def _check_heads(q: jax.Array, k_pages: jax.Array, sinks: jax.Array | None) -> None:
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q: expected floating [S, H, D] or [T, H, D], got {q.dtype}{list(q.shape)}"
        )
    _, num_heads, head_dim = q.shape
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
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks: expected shape ({num_heads},), got {sinks.shape}")


def _check_rows(operands: AttentionOperands) -> None:
    context_lens, query_start_loc = operands.context_lens, operands.query_start_loc
    check_integers("block_tables", operands.block_tables, 2)
    check_integers("context_lens", context_lens, 1)
    num_rows, num_queries = operands.block_tables.shape[0], operands.q.shape[0]
    if context_lens.shape != (num_rows,):
        raise ValueError(
            f"context_lens: expected shape ({num_rows},), one length for each row of "
            f"block_tables, got {context_lens.shape}"
        )
    if query_start_loc is None:
        if num_queries != num_rows:
            raise ValueError(
                f"q: expected one query for each of the {num_rows} rows of "
                f"block_tables, got {num_queries}; pass query_start_loc for prompt "
                "chunks"
            )
        return
    check_integers("query_start_loc", query_start_loc, 1)
    if query_start_loc.shape != (num_rows + 1,):
        raise ValueError(
            f"query_start_loc: expected shape ({num_rows + 1},), "
            f"got {query_start_loc.shape}"
        )
