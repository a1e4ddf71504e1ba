"""Block statistics in plain XLA: what queries attend to, and norms of keys, by block.

Pipeline: attention's log-sum-exps, pages -> [block_statistics] -> retention.

An extra pass over the keys of the rows whose queries count: half the bytes that
attention reads for these rows, and about half its products. Other rows cost nothing.

Shape symbols as in `jpaged.attention`; R rows of a loop, Q queries of a row, C blocks
of a tile, B = R * K.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.compat import when
from jpaged.pages.operands import AttentionOperands, Pools, merge_layers
from jpaged.xla.pages import gather_keys

_TILE_TOKENS = 128
_TILE_QUERIES = 64


def attention_mass(
    operands: AttentionOperands, lse: jax.Array, first: jax.Array
) -> jax.Array:
    """Return the attention that each block gets, f32[S, M]: a mean over heads.

    The sum over a row's blocks is the number of its queries that count, without
    what sinks get.

    Args:
      operands: of an attention call, without windows. Pages are plain.
      lse: f32[T, H], the call's log-sum-exps.
      first: i32[S], stored index of the row's first query that counts.
    """
    operands = merge_layers(operands)
    num_rows, width = operands.block_tables.shape
    lens, starts = operands.context_lens, operands.query_start_loc
    mass = jnp.zeros((num_rows, width), jnp.float32)
    counts = (first < lens) & (lens > 0)
    if starts is None:
        rows = jnp.arange(num_rows, dtype=jnp.int32)

        def decode(mass: jax.Array) -> jax.Array:
            seen = jnp.where(counts, lens, 0)[:, None]
            tile = (operands.q[:, None], lse[:, None], seen)
            return _add_mass(operands, rows, *tile, mass)

        return when(jnp.any(counts), decode, mass)

    num_queries = operands.q.shape[0]
    size = min(_TILE_QUERIES, num_queries)
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)

    def add_row(i: jax.Array, mass: jax.Array) -> jax.Array:
        row = order[i]
        end = starts[row + 1]
        # The query with the stored index `first`, if it is in this step.
        begin = end - jnp.minimum(lens[row] - first[row], end - starts[row])

        def add_tile(j: jax.Array, mass: jax.Array) -> jax.Array:
            query = begin + j * size + jnp.arange(size, dtype=jnp.int32)
            seen = jnp.where(query < end, lens[row] - (end - 1 - query), 0)
            query = jnp.minimum(query, num_queries - 1)
            tile = (operands.q[query][None], lse[query][None], seen[None])
            return _add_mass(operands, row[None], *tile, mass)

        return lax.fori_loop(0, cdiv(end - begin, size), add_tile, mass)

    return lax.fori_loop(0, jnp.sum(counts, dtype=jnp.int32), add_row, mass)


def _add_mass(
    operands: AttentionOperands,
    rows: jax.Array,
    q: jax.Array,
    lse: jax.Array,
    seen: jax.Array,
    mass: jax.Array,
) -> jax.Array:
    """Return `mass` with what queries of some rows attend to.

    Args:
      operands: pools of one layer.
      rows: i32[R].
      q: [R, Q, H, D].
      lse: f32[R, Q, H].
      seen: i32[R, Q], tokens that each query sees; 0: it does not count.
      mass: f32[S, M].
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = operands.pools.k.shape[1:3]
    width = mass.shape[1]
    blocks = min(max(1, _TILE_TOKENS // block_size), width)
    q = q.reshape(num_rows, num_queries, num_kv_heads, -1, head_dim)
    q = q.astype(jnp.float32) * operands.scale
    lse = lse.reshape(num_rows, num_queries, num_kv_heads, -1)
    tables = jnp.pad(operands.block_tables[rows], ((0, 0), (0, -width % blocks)))

    def add(i: jax.Array, mass: jax.Array) -> jax.Array:
        columns = lax.dynamic_slice(tables, (0, i * blocks), (num_rows, blocks))
        keys = gather_keys(operands.pools, columns)
        keys = keys[..., :head_dim]  # without padding
        keys = keys.reshape(num_rows, num_kv_heads, blocks * block_size, head_dim)
        scores = jnp.einsum("rqkgd,rktd->rqkgt", q, keys.astype(jnp.float32))
        if (cap := operands.logits_soft_cap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        token = i * (blocks * block_size) + jnp.arange(blocks * block_size)
        is_seen = token[None, None, :] < seen[:, :, None]
        weights = jnp.exp(scores - lse[..., None])
        weights = jnp.where(is_seen[:, :, None, None, :], weights, 0.0)
        total = jnp.sum(weights, axis=(1, 2, 3)) / num_heads
        total = jnp.sum(total.reshape(num_rows, blocks, block_size), axis=2)
        at = i * blocks + jnp.arange(blocks)
        return mass.at[rows[:, None], at[None, :]].add(total, mode="drop")

    most = jnp.max(seen)
    return lax.fori_loop(0, cdiv(most, blocks * block_size), add, mass)


def key_norms(operands: AttentionOperands, is_due: jax.Array) -> jax.Array:
    """Return the mean norm of each block's keys, f32[S, M], over tokens and heads.

    Args:
      operands: of an attention call.
      is_due: bool[S], the rows to compute; others get zeros.
    """
    operands = merge_layers(operands)
    num_rows, width = operands.block_tables.shape
    num_kv_heads, block_size = operands.pools.k.shape[1:3]
    blocks = min(max(1, _TILE_TOKENS // block_size), width)
    lens = jnp.where(is_due, operands.context_lens, 0)
    pad = ((0, 0), (0, -width % blocks))
    tables = jnp.pad(operands.block_tables, pad)

    def add(i: jax.Array, norms: jax.Array) -> jax.Array:
        columns = lax.dynamic_slice(tables, (0, i * blocks), (num_rows, blocks))
        keys = gather_keys(operands.pools, columns).astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(keys**2, axis=-1))
        norm = norm.reshape(num_rows, num_kv_heads, blocks, block_size)
        token = i * (blocks * block_size) + jnp.arange(blocks * block_size)
        is_token = token[None, :] < lens[:, None]
        is_token = is_token.reshape(num_rows, blocks, block_size)
        norm = jnp.sum(jnp.where(is_token[:, None], norm, 0.0), axis=(1, 3))
        count = jnp.maximum(jnp.sum(is_token, axis=2), 1) * num_kv_heads
        norm = norm / count.astype(jnp.float32)
        return lax.dynamic_update_slice(norms, norm, (0, i * blocks))

    norms = jnp.zeros(tables.shape, jnp.float32)
    most = cdiv(jnp.max(lens), blocks * block_size)
    return lax.fori_loop(0, most, add, norms)[:, :width]


def block_keys(pools: Pools, blocks: jax.Array, layer: jax.Array | int) -> jax.Array:
    """Return the keys of `blocks` i32[T] of a layer, [T, K, P, D]; past the pool: any.

    Args:
      pools: of all layers, plain.
      blocks: i32[T].
      layer: the layer.
    """
    num_layers, num_blocks, num_kv_heads, block_size, _ = pools.k.shape
    flat = jax.tree.map(
        lambda pages: pages.reshape(num_layers * num_blocks, *pages.shape[2:]), pools
    )
    blocks = jnp.minimum(blocks, num_blocks - 1)
    keys = gather_keys(flat, (blocks + layer * num_blocks)[:, None])
    return keys.reshape(blocks.size, num_kv_heads, block_size, -1)


def largest_scores(
    q: jax.Array, k_min: jax.Array, k_max: jax.Array, scale: float
) -> jax.Array:
    """Return a bound of the scores of each block's keys, f32[S, M]: a mean over heads.

    Args:
      q: [S, H, D], a query of each row.
      k_min, k_max: f32[S, M, K, D], extremes of the keys of each row's blocks.
      scale: factor of the scores.
    """
    num_rows, num_heads, head_dim = q.shape
    q = q.reshape(num_rows, 1, k_min.shape[2], -1, head_dim).astype(jnp.float32)
    bounds = (q * extreme[:, :, :, None] for extreme in (k_min, k_max))
    return jnp.sum(jnp.maximum(*bounds), axis=(2, 3, 4)) * (scale / num_heads)
