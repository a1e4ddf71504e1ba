"""Attention in plain XLA that can be differentiated: by q, by the pages and by sinks.

Place on the road: attention -> [xla.gradients] -> xla.attention.

The loops of the forward pass have as many trips as the contexts are long, and such
loops cannot be reversed. So the backward pass is written here: it walks the same tiles
again, recomputes their scores from the saved log-sum-exps (Dao et al. 2022, section
3.1), and adds what each tile gives to its blocks. Blocks that rows share get the sum.

With s = scale * q . k, p = exp(s - lse), o = sum p v and their cotangents d:
dv = p do, ds = p (do . v - do . o + dlse), dq = scale * ds k, dk = scale * ds q.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jpaged.kv.shared_prefix import SharedPrefix
from jpaged.pages import tuned
from jpaged.pages.quantised import is_quantised
from jpaged.xla import attention, chunks, pages
from jpaged.xla.pages import Pools


class Operands(NamedTuple):
    """What attention gets, as one pytree; shapes as in `jpaged.attention`."""

    q: jax.Array
    pools: Pools
    block_tables: jax.Array
    context_lens: jax.Array
    query_start_loc: jax.Array | None
    shared: SharedPrefix | None  # how it is read, which no gradient depends on
    scale: float | jax.Array
    sliding_window: int | jax.Array | None
    logits_soft_cap: float | jax.Array | None
    sinks: jax.Array | None


@jax.custom_vjp
def attend(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [T, H, D] and log-sum-exp f32[T, H]; differentiable once, in reverse."""
    fields: dict[str, Any] = operands._asdict()
    q, pools, tables, lens, starts = operands[:5]
    options = {name: fields[name] for name in Operands._fields[5:]}
    options["tiles"] = tuned.tiles("xla", chunks.TILES, q.shape[1], pools.k)
    if starts is None:
        return attention.decode(q, pools, tables, lens, **options)
    return attention.ragged(q, pools, tables, lens, starts, **options)


def _forward(operands: Any):
    """The result, and what the backward pass needs; refuses what it does not give."""
    values = jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=_is_primal)
    for name, leaf in _without_gradient(operands, values):
        if leaf is not None and leaf.perturbed:
            kind = f"{name} of 8 bits" if "pages" in name else name
            raise ValueError(
                f"{name}: expected to be differentiated by q, sinks or pages of "
                f"floats, got {kind}; jax.lax.stop_gradient makes it a constant"
            )
    out, lse = attend(values)
    return (out, lse), (values, out, lse)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _without_gradient(operands: Any, values: Operands):
    pools = operands.pools
    yield "k_scale", pools.k_scale
    yield "v_scale", pools.v_scale
    yield "scale", operands.scale
    yield "logits_soft_cap", operands.logits_soft_cap
    if is_quantised(values.pools.k.dtype):
        yield "k_pages", pools.k
        yield "v_pages", pools.v


class _Sums(NamedTuple):
    """What the backward pass adds up, in float32."""

    q: jax.Array  # [T + size, H, D], of which tiles are overwritten in order
    k: jax.Array  # [N, K, P, D]
    v: jax.Array  # [N, K, P, D]


def _backward(saved, cotangents):
    operands, out, lse = saved
    q, pools, tables, context_lens, starts = operands[:5]
    d_out, d_lse = (
        jnp.zeros(x.shape, jnp.float32) if isinstance(x, SymbolicZero) else x
        for x in cotangents
    )
    d_out = d_out.astype(jnp.float32)
    # What each score's cotangent has beside do . v.
    offset = d_lse - jnp.sum(d_out * out.astype(jnp.float32), axis=-1)
    size, lengths = 1, (context_lens > 0).astype(jnp.int32)
    if starts is not None:
        size, lengths = min(_QUERIES, q.shape[0]), jnp.diff(starts)
        starts = starts[:-1]
    else:
        starts = jnp.arange(q.shape[0], dtype=jnp.int32)
    num_tiles, tile_at = chunks.query_tiles(starts, lengths, context_lens, size)
    num_kv_heads = pools.k.shape[1]

    padded = tuple(
        jnp.pad(x, ((0, size),) + ((0, 0),) * (x.ndim - 1))
        for x in (q.astype(jnp.float32), d_out, lse, offset)
    )

    def tile(index, sums: _Sums) -> _Sums:
        row, start, visible = tile_at(index)
        taken = [chunks.take(x, start, size, num_kv_heads) for x in padded]
        table = lax.dynamic_slice(tables, (row, 0), (1, tables.shape[1]))
        visible = jnp.tile(visible, q.shape[1] // num_kv_heads)[:, None]
        d_q, d_k, d_v = _tile(operands, taken, table, visible, sums.k, sums.v)
        d_q = chunks.untake(d_q, size)
        d_q = lax.dynamic_update_slice(sums.q, d_q, (start, 0, 0))
        return _Sums(d_q, d_k, d_v)

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    sums = _Sums(zeros(padded[0].shape), zeros(pools.k.shape), zeros(pools.v.shape))
    sums = lax.fori_loop(0, num_tiles, tile, sums)
    d_pools = None
    kind = pools.k.dtype
    if jnp.issubdtype(kind, jnp.floating) and not is_quantised(kind):
        d_pools = Pools(sums.k.astype(kind), sums.v.astype(kind), None, None)
    d_q = sums.q[: q.shape[0]].astype(q.dtype)
    given: dict[str, Any] = dict.fromkeys(Operands._fields)
    d_sinks = _d_sinks(operands.sinks, lse, offset)
    given |= dict(q=d_q, pools=d_pools, sinks=d_sinks)
    return (Operands(**given),)


_QUERIES, _TOKENS = 32, 128  # of a tile


def _tile(operands: Operands, taken, table, visible, d_k, d_v):
    """Of one row's queries: d_q f32[K, G * Bq, D], and d_k, d_v with their shares.

    Args:
      operands: all of them.
      taken: q, d_out [K, G * Bq, D], lse and offset [K, G * Bq] of the queries.
      table: i32[1, M], the row's.
      visible: i32[G * Bq, 1], tokens that each query sees.
      d_k, d_v: f32[N, K, P, D], the sums so far.
    """
    q, d_out, lse, offset = taken
    pools, window, cap = (
        operands.pools,
        operands.sliding_window,
        operands.logits_soft_cap,
    )
    num_blocks, num_kv_heads, block_size, head_dim = pools.k.shape
    blocks = max(1, min(_TOKENS // block_size, table.shape[1]))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % blocks)))
    table = jnp.clip(table, 0, num_blocks - 1)
    tokens = blocks * block_size
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]

    def add(total, columns, shares):  # shares [K, C * P, D] to the blocks of columns
        shares = shares.reshape(num_kv_heads, blocks, block_size, head_dim)
        return total.at[columns].add(shares.transpose(1, 0, 2, 3))

    def step(index, carry):
        d_q, d_k, d_v = carry
        columns = lax.dynamic_slice(table, (0, index * blocks), (1, blocks))
        position = index * tokens + jnp.arange(tokens, dtype=jnp.int32)[None, :]
        mask = position < visible
        if window is not None:
            mask &= position >= visible - window
        seen = jnp.any(mask, axis=0)[None, :, None]
        keys, values = (
            # Unused slots may hold NaN, and 0 * NaN is NaN.
            jnp.where(seen, _dequantised(numbers, scale), 0.0)
            for numbers, scale in _pairs(pages.gather(pools, columns))
        )
        scores = product("kqd,ktd->kqt", q, keys) * operands.scale
        slope = jnp.ones_like(scores)
        if cap is not None:
            bent = jnp.tanh(scores / cap)
            scores, slope = cap * bent, 1 - bent**2
        weights = jnp.where(mask, jnp.exp(scores - lse), 0.0)
        d_scores = product("kqd,ktd->kqt", d_out, values) + offset[..., None]
        d_scores = weights * d_scores * slope * operands.scale
        d_k = add(d_k, columns[0], product("kqt,kqd->ktd", d_scores, q))
        d_v = add(d_v, columns[0], product("kqt,kqd->ktd", weights, d_out))
        return d_q + product("kqt,ktd->kqd", d_scores, keys), d_k, d_v

    end = (jnp.max(visible) + tokens - 1) // tokens
    return lax.fori_loop(0, end, step, (jnp.zeros_like(q), d_k, d_v))


def _pairs(tokens: pages.Tokens):
    return (tokens.k, tokens.k_scale), (tokens.v, tokens.v_scale)


def _dequantised(numbers, scale):
    numbers = numbers.astype(jnp.float32)
    return numbers if scale is None else numbers * scale[..., None]


def _d_sinks(sinks, lse, offset):
    if sinks is None:
        return None
    weights = jnp.exp(sinks.astype(jnp.float32)[None, :] - lse)
    weights = jnp.where(jnp.isneginf(lse), 0.0, weights)
    return jnp.sum(weights * offset, axis=0).astype(sinks.dtype)


attend.defvjp(_forward, _backward, symbolic_zeros=True)
