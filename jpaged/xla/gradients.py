"""Attention in plain XLA with gradients of q, of the pages and of sinks.

Pipeline: xla.backend -> [xla.gradients] -> xla.attention.

The loops of the forward pass have as many trips as the contexts are long, and JAX
cannot reverse such loops. The backward pass is therefore written here: it reads the
same tiles again, recomputes their scores from the saved log-sum-exps (Dao et al. 2022,
section 3.1), and adds the gradient of each tile to its blocks. A block that several
rows share gets the sum.

With s = scale * q . k, p = exp(s - lse), o = sum p v and their cotangents d:
dv = p do, ds = p (do . v - do . o + dlse), dq = scale * ds k, dk = scale * ds q.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jpaged.arithmetic import cdiv
from jpaged.pages import tuned
from jpaged.pages.operands import AttentionOperands, Pools, merge_layers
from jpaged.xla import attention, chunks, pages
from jpaged.xla.online_softmax import Result

_QUERIES, _TOKENS = 32, 128  # of a tile of the backward pass


def add_gradient(
    function: Callable[[AttentionOperands], Result],
) -> Callable[[AttentionOperands], Result]:
    """Return attention with a gradient; differentiable once, in reverse mode.

    Args:
      function: attention without one. It returns the output and the log-sum-exp. Its
        operands may have stacked pools and shared prefixes.
    """
    called = jax.custom_vjp(function)
    forward = functools.partial(_forward, function)
    called.defvjp(forward, _backward_of_layers, symbolic_zeros=True)
    return called


def attend(operands: AttentionOperands) -> Result:
    """Return attention; differentiable once, in reverse mode.

    Args:
      operands: plain pages of one layer, and heads as wide as the pages' D.

    Returns:
      Output `[T, H, D]` in the dtype of q and log-sum-exp f32`[T, H]`.
    """
    return _differentiable(operands)


def _attend(operands: AttentionOperands) -> Result:
    num_heads, pools = operands.q.shape[1], operands.pools
    tiles = tuned.tiles("xla", chunks.TILES, num_heads, pools.k)
    if operands.query_start_loc is None:
        return attention.attend_decode(operands, tiles)
    return attention.attend_ragged(operands, tiles)


def _forward(
    function: Callable[[AttentionOperands], Result], operands: Any
) -> tuple[Result, tuple[AttentionOperands, Any, Any]]:
    """Return the result and what the backward pass needs.

    Raises:
      ValueError: an operand without a gradient is differentiated.
    """
    values = jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=_is_primal)
    for name, leaf in _constants(operands, values):
        if leaf is not None and leaf.perturbed:
            kind = f"{name} of 8 bits" if "pages" in name else name
            raise ValueError(
                f"{name}: expected to be differentiated by q, sinks or pages of "
                f"floats, got {kind}; jax.lax.stop_gradient makes it a constant"
            )
    out, lse = function(values)
    return (out, lse), (values, out, lse)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _constants(operands: Any, values: AttentionOperands) -> Iterator[tuple[str, Any]]:
    """Yield the names and primals of the operands that have no gradient."""
    pools = operands.pools
    yield "k_scale", pools.k_scale
    yield "v_scale", pools.v_scale
    yield "scale", operands.scale
    yield "logits_soft_cap", operands.logits_soft_cap
    if values.pools.k_scale is not None:
        yield "k_pages", pools.k
        yield "v_pages", pools.v


class _Sums(NamedTuple):
    """The gradients that the backward pass accumulates, in float32."""

    q: jax.Array  # [T + size, H, D]; tiles overwrite it in order
    k: jax.Array  # [N, K, P, D]
    v: jax.Array  # [N, K, P, D]


class _QueryTile(NamedTuple):
    """Queries of one row, by KV head, and what the backward pass knows of them."""

    q: jax.Array  # f32[K, G * size, D]
    d_out: jax.Array  # f32[K, G * size, D]
    lse: jax.Array  # f32[K, G * size]
    offset: jax.Array  # f32[K, G * size]: dlse - do . o


def _backward_of_layers(
    saved: tuple[AttentionOperands, jax.Array, jax.Array], cotangents: Any
) -> tuple[AttentionOperands]:
    """Return the gradient of operands that may have stacked pools."""
    operands, out, lse = saved
    (gradients,) = _backward((merge_layers(operands), out, lse), cotangents)
    if gradients.pools is not None:
        shape = operands.pools.k.shape
        pools = jax.tree.map(lambda pages: pages.reshape(shape), gradients.pools)
        gradients = gradients._replace(pools=pools)
    return (gradients,)


def _backward(
    saved: tuple[AttentionOperands, jax.Array, jax.Array], cotangents: Any
) -> tuple[AttentionOperands]:
    operands, out, lse = saved
    q, pools, tables = operands.q, operands.pools, operands.block_tables
    d_out, d_lse = (
        jnp.zeros(x.shape, jnp.float32) if isinstance(x, SymbolicZero) else x
        for x in cotangents
    )
    d_out = d_out.astype(jnp.float32)
    offset = d_lse - jnp.sum(d_out * out.astype(jnp.float32), axis=-1)
    starts, lengths, size = _query_rows(operands)
    num_tiles, tile_at = chunks.query_tiles(
        starts, lengths, operands.context_lens, size
    )
    num_kv_heads = pools.k.shape[1]
    padded = [
        jnp.pad(x, ((0, size),) + ((0, 0),) * (x.ndim - 1))
        for x in (q.astype(jnp.float32), d_out, lse, offset)
    ]

    def tile(index: jax.Array, sums: _Sums) -> _Sums:
        row, start, visible = tile_at(index)
        taken = (chunks.take_queries(x, start, size, num_kv_heads) for x in padded)
        table = lax.dynamic_slice(tables, (row, 0), (1, tables.shape[1]))
        visible = jnp.tile(visible, q.shape[1] // num_kv_heads)[:, None]
        d_q, d_k, d_v = _tile(
            operands, _QueryTile(*taken), table, visible, sums.k, sums.v
        )
        d_q = chunks.put_back(d_q, size)
        return _Sums(lax.dynamic_update_slice(sums.q, d_q, (start, 0, 0)), d_k, d_v)

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    sums = _Sums(zeros(padded[0].shape), zeros(pools.k.shape), zeros(pools.k.shape))
    sums = lax.fori_loop(0, num_tiles, tile, sums)
    d_pools = None
    kind = pools.k.dtype
    if jnp.issubdtype(kind, jnp.floating) and pools.k_scale is None:
        if pools.v is None:  # the keys are the values too
            d_pools = Pools((sums.k + sums.v).astype(kind), None)
        else:
            d_pools = Pools(sums.k.astype(kind), sums.v.astype(kind))
    gradients: dict[str, Any] = dict.fromkeys(AttentionOperands._fields)
    gradients["q"] = sums.q[: q.shape[0]].astype(q.dtype)
    gradients["pools"] = d_pools
    gradients["sinks"] = _sink_gradient(operands.sinks, lse, offset)
    return (AttentionOperands(**gradients),)


def _query_rows(operands: AttentionOperands) -> tuple[jax.Array, jax.Array, int]:
    """Return each row's first query and number of queries, and the size of a tile."""
    num_queries, starts = operands.q.shape[0], operands.query_start_loc
    if starts is None:
        lengths = (operands.context_lens > 0).astype(jnp.int32)
        return jnp.arange(num_queries, dtype=jnp.int32), lengths, 1
    return starts[:-1], jnp.diff(starts), min(_QUERIES, num_queries)


def _tile(
    operands: AttentionOperands,
    queries: _QueryTile,
    table: jax.Array,
    visible: jax.Array,
    d_k: jax.Array,
    d_v: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradient of a tile of queries, and d_k and d_v with its part added.

    Args:
      operands: all operands.
      queries: the tile.
      table: i32[1, M], the row's.
      visible: i32[G * size, 1], tokens that each query sees.
      d_k, d_v: f32[N, K, P, D], the sums so far.
    """
    num_blocks, num_kv_heads, block_size, head_dim = operands.pools.k.shape
    blocks = max(1, min(_TOKENS // block_size, table.shape[1]))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % blocks)))
    table = jnp.clip(table, 0, num_blocks - 1)
    tokens = blocks * block_size

    def add(total: jax.Array, columns: jax.Array, update: jax.Array) -> jax.Array:
        update = update.reshape(num_kv_heads, blocks, block_size, head_dim)
        return total.at[columns].add(update.transpose(1, 0, 2, 3))

    def step(
        index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        d_q, d_k, d_v = carry
        columns = lax.dynamic_slice(table, (0, index * blocks), (1, blocks))
        position = index * tokens + jnp.arange(tokens, dtype=jnp.int32)[None, :]
        mask = position < visible
        if operands.sliding_window is not None:
            mask &= position >= visible - operands.sliding_window
        q_part, k_part, v_part = _key_tile(operands, queries, columns, mask)
        d_k, d_v = add(d_k, columns[0], k_part), add(d_v, columns[0], v_part)
        return d_q + q_part, d_k, d_v

    end = cdiv(jnp.max(visible), tokens)
    return lax.fori_loop(0, end, step, (jnp.zeros_like(queries.q), d_k, d_v))


def _key_tile(
    operands: AttentionOperands,
    queries: _QueryTile,
    columns: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients from a tile of queries and the keys of `columns` i32[1, C].

    Returns:
      Of the queries f32[K, G * size, D], of the keys and values f32[K, C * P, D].
    """
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    q, d_out, lse, offset = queries
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]
    gathered = pages.gather(operands.pools, columns)
    # Unused slots may hold NaN, and 0 * NaN is NaN.
    seen = jnp.any(mask, axis=0)[None, :, None]
    keys = jnp.where(seen, _dequantise(gathered.k, gathered.k_scale), 0.0)
    values = jnp.where(seen, _dequantise(gathered.v, gathered.v_scale), 0.0)
    scores = product("kqd,ktd->kqt", q, keys) * operands.scale
    slope = jnp.ones_like(scores)
    if (cap := operands.logits_soft_cap) is not None:
        bent = jnp.tanh(scores / cap)
        scores, slope = cap * bent, 1 - bent**2
    weights = jnp.where(mask, jnp.exp(scores - lse), 0.0)
    d_scores = product("kqd,ktd->kqt", d_out, values) + offset[..., None]
    d_scores = weights * d_scores * slope * operands.scale
    return (
        product("kqt,ktd->kqd", d_scores, keys),
        product("kqt,kqd->ktd", d_scores, q),
        product("kqt,kqd->ktd", weights, d_out),
    )


def _dequantise(numbers: jax.Array, scale: jax.Array | None) -> jax.Array:
    numbers = numbers.astype(jnp.float32)
    return numbers if scale is None else numbers * scale[..., None]


def _sink_gradient(
    sinks: jax.Array | None, lse: jax.Array, offset: jax.Array
) -> jax.Array | None:
    if sinks is None:
        return None
    weights = jnp.exp(sinks.astype(jnp.float32)[None, :] - lse)
    weights = jnp.where(jnp.isneginf(lse), 0.0, weights)
    return jnp.sum(weights * offset, axis=0).astype(sinks.dtype)


_differentiable = add_gradient(_attend)
