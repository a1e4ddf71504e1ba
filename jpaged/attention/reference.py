"""The reference: attention that gathers whole tables, to compare others with.

Place on the road: attention -> [reference]. Letters as in `jpaged.attention`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jpaged.pages.quantised import decode
from jpaged.xla.pages import Pools


def attend(
    q: jax.Array,
    pools: Pools,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    scale: float | jax.Array,
    sliding_window: int | jax.Array | None,
    logits_soft_cap: float | jax.Array | None,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp f32[T, H].

    Gathers each query's whole table, masks, and takes the softmax in float32.
    Arguments as of `jpaged.attention.paged_attention`; `pools` are one layer's.
    """
    num_queries, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = pools.k.shape
    num_seqs, max_blocks = block_tables.shape
    if query_start_loc is None:
        query_start_loc = jnp.arange(num_seqs + 1, dtype=jnp.int32)
    query = jnp.arange(num_queries, dtype=jnp.int32)
    row = jnp.searchsorted(query_start_loc[1:], query, side="right")
    row = jnp.minimum(row, num_seqs - 1).astype(jnp.int32)
    # The last query of a row sees context_lens tokens, the one before it one less.
    visible = context_lens[row] - (query_start_loc[row + 1] - 1 - query)
    visible = jnp.where(query < query_start_loc[-1], visible, 0)

    blocks = jnp.clip(block_tables, 0, num_blocks - 1)[row]  # [T, M]
    position = jnp.arange(max_blocks * block_size, dtype=jnp.int32)
    position, visible = position[None, :], visible[:, None]
    mask = position < visible
    if sliding_window is not None:
        mask &= position >= visible - sliding_window
    mask = mask[:, None, None, :]

    def gathered(pages, scale):  # [T, K, M * P, D]
        rows = decode(pages[blocks]).astype(jnp.float32)
        if scale is not None:
            rows *= scale[blocks][..., :block_size, None]
        rows = rows.transpose(0, 2, 1, 3, 4)
        rows = rows.reshape(num_queries, num_kv_heads, -1, head_dim)
        return jnp.where(mask[:, 0, 0, :][:, None, :, None], rows, 0.0)

    q_TKGD = q.astype(jnp.float32).reshape(num_queries, num_kv_heads, -1, head_dim)
    keys = gathered(pools.k, pools.k_scale)
    # Not TF32, which GPUs would take for float32.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = product("tkgd,tkcd->tkgc", q_TKGD, keys) * scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)  # [T, K, G]
    if sinks is not None:
        sink_KG = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1)
        # A row that sees nothing stays empty, sink or not.
        lse = jnp.where(visible[:, None] > 0, jnp.logaddexp(lse, sink_KG), lse)
    base = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weights = jnp.where(mask, jnp.exp(scores - base[..., None]), 0.0)
    values = gathered(pools.v, pools.v_scale)
    out = product("tkgc,tkcd->tkgd", weights, values)
    shape = (num_queries, num_heads)
    return out.reshape(*shape, head_dim).astype(q.dtype), lse.reshape(shape)
