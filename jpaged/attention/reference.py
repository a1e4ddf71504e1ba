"""The reference backend: it gathers whole tables, and tests compare others with it.

Pipeline: attention -> [reference]. Shape symbols as in `jpaged.attention`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pages.backend import Backend
from jpaged.pages.layout import PLAIN_OR_BITS
from jpaged.pages.operands import AttentionOperands, merge_layers, query_starts
from jpaged.pages.quantised import widen
from jpaged.xla.backend import XLA


def attend(
    operands: AttentionOperands, *, return_lse: bool = True, dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Return attention with each query's whole table gathered, in float32.

    Rows are read one by one, whatever `operands.shared_prefix` says.

    Args:
      operands: plain pages, and heads as wide as the pages' D.
      return_lse: the log-sum-exp is returned in either case.
      dtype: of the output; None: that of q.

    Returns:
      Output `[T, H, D]` and log-sum-exp f32`[T, H]`.
    """
    del return_lse
    operands = merge_layers(operands)
    q, pools = operands.q, operands.pools
    (num_queries, num_heads, head_dim), num_kv_heads = q.shape, pools.k.shape[1]
    row, visible = _visible_tokens(operands)
    mask = _mask(operands, visible)
    blocks = jnp.clip(operands.block_tables, 0, pools.k.shape[0] - 1)[row]  # [T, M]
    # Full precision: a GPU would otherwise multiply float32 as TF32.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    q_TKGD = q.astype(jnp.float32).reshape(num_queries, num_kv_heads, -1, head_dim)
    keys = _gather(pools.k, pools.k_scale, blocks, mask)
    scores = product("tkgd,tkcd->tkgc", q_TKGD, keys) * operands.scale
    if (cap := operands.logits_soft_cap) is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask_TKGC = mask[:, None, None, :]
    scores = jnp.where(mask_TKGC, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)  # [T, K, G]
    if operands.sinks is not None:
        sink_KG = operands.sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1)
        # A query that sees no token has no sink either.
        is_empty = (visible <= 0)[:, None, None]
        lse = jnp.where(is_empty, lse, jnp.logaddexp(lse, sink_KG))
    base = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weights = jnp.where(mask_TKGC, jnp.exp(scores - base[..., None]), 0.0)
    values = _gather(pools.values, pools.values_scale, blocks, mask)
    out = product("tkgc,tkcd->tkgd", weights, values).reshape(q.shape)
    dtype = q.dtype if dtype is None else dtype
    return out.astype(dtype), lse.reshape(num_queries, num_heads)


def _visible_tokens(operands: AttentionOperands) -> tuple[jax.Array, jax.Array]:
    """Return the row of each query, and how many tokens it sees; i32[T] each."""
    num_rows = operands.block_tables.shape[0]
    starts = query_starts(operands.query_start_loc, num_rows)
    query = jnp.arange(operands.q.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], query, side="right")
    row = jnp.minimum(row, num_rows - 1).astype(jnp.int32)
    # The last query of a row sees context_lens tokens, the query before it one fewer.
    visible = operands.context_lens[row] - (starts[row + 1] - 1 - query)
    return row, jnp.where(query < starts[-1], visible, 0)


def _mask(operands: AttentionOperands, visible: jax.Array) -> jax.Array:
    """Return bool[T, M * P]: whether the query sees the table's token."""
    num_tokens = operands.block_tables.shape[1] * operands.pools.k.shape[2]
    position = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    mask = position < visible[:, None]
    if operands.sliding_window is not None:
        mask &= position >= visible[:, None] - operands.sliding_window
    return mask


def _gather(
    pages: jax.Array, scale: jax.Array | None, blocks: jax.Array, mask: jax.Array
) -> jax.Array:
    """Return f32[T, K, M * P, D]: the tokens of `blocks` i32[T, M], 0 where masked."""
    num_queries = blocks.shape[0]
    _, num_kv_heads, block_size, head_dim = pages.shape
    tokens = widen(pages[blocks]).astype(jnp.float32)
    if scale is not None:
        tokens *= scale[blocks][..., :block_size, None]
    tokens = tokens.transpose(0, 2, 1, 3, 4)
    tokens = tokens.reshape(num_queries, num_kv_heads, -1, head_dim)
    return jnp.where(mask[:, None, :, None], tokens, 0.0)


REFERENCE = Backend(
    name="reference",
    attend=attend,
    write=XLA.write,
    copy=XLA.copy,
    layout=PLAIN_OR_BITS,
    is_differentiable=True,
    serves_latents=True,
)
