"""Paged attention on NVIDIA GPUs: the kernels read pages in place and gather nothing.

Pipeline: attention -> [triton.attention] -> triton.launch.

The work is a list of items, each a tile of queries of one row. Rows of one query, as in
decode, are also split along their tokens, by their actual lengths: the size of a part
is about the number of tokens of the step divided by the number of programs that fill
the GPU. A second, small kernel merges the partial results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.pages import operands, tuned
from jpaged.pages.quantised import float8_bits
from jpaged.triton import tiles as triton_tiles
from jpaged.triton.launch import launch
from jpaged.triton.tiles import TritonTiles


class WorkList(NamedTuple):
    """Which program computes what; a function of the lengths alone."""

    starts: jax.Array  # i32[S + 1], first query of each row
    items: jax.Array  # i32[S + 1], first item of each row
    parts: jax.Array  # i32[S + 1], first partial result of each row that is split
    chunk: jax.Array  # i32[], tokens per part


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    layer: jax.Array | int | None,
    scale: float,
    sliding_window: jax.Array | int | None,
    logits_soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    dtype: Any = None,
    tiles: TritonTiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the output [T, H, D] and the log-sum-exp f32[T, H].

    The arguments are those of `jpaged.attention.paged_attention`, and these.

    Args:
      k_scale: Scales of quantised pages, f32([L,] N, K, at least P), or None.
      v_scale: Like k_scale.
      dtype: The output's dtype; None: that of q.
      tiles: Tile sizes; None: those of `jpaged.pages.tuned`.
    """
    num_rows, width = block_tables.shape
    *_, num_blocks, num_kv_heads, block_size, _ = k_pages.shape
    tiles = _choose_tiles(q, k_pages) if tiles is None else tiles
    is_ragged = query_start_loc is not None
    static = _static_sizes(q, k_pages, k_scale, sinks, tiles, is_ragged=is_ragged)
    window = operands.window_size(sliding_window)
    starts = operands.query_starts(query_start_loc, num_rows)
    # All parts together are at most this many more than the rows.
    num_more = max(tiles.programs // num_kv_heads, 1)
    queries = static["QUERIES"]
    work = plan_work(context_lens, starts, window, queries, num_more, tiles)
    num_items = num_rows + (q.shape[0] // queries if is_ragged else 0) + num_more
    has_parts = width * block_size > tiles.least_chunk
    settings = jnp.stack([operands.layer_index(layer), window, work.chunk])
    sizes = jnp.array([num_rows, width, num_blocks], jnp.int32)
    sinks = jnp.zeros(q.shape[1]) if sinks is None else sinks.astype(jnp.float32)
    # The kernel reads no scales of pages that have none, so any array can be passed.
    if k_scale is None or v_scale is None:
        k_scale = v_scale = sinks
    out, lse, *parts = launch(
        "attend_kernel",
        (num_items, num_kv_heads),
        (
            *(q, float8_bits(k_pages), float8_bits(v_pages), k_scale, v_scale),
            *(block_tables, context_lens.astype(jnp.int32), *work[:3]),
            *(jnp.concatenate([settings, sizes]), sinks),
        ),
        _result_shapes(q, dtype, num_rows + num_more if has_parts else 1),
        num_warps=_num_warps(tiles, static, is_ragged=is_ragged),
        num_stages=tiles.num_stages,
        SCALE=float(scale),
        SOFT_CAP=float(logits_soft_cap or 0.0),
        **static,
    )
    if has_parts:
        out, lse = _merge_parts(out, lse, parts, work, sinks, static)
    # The kernels do not write queries that belong to no row.
    is_owned = jnp.arange(q.shape[0], dtype=jnp.int32) < work.starts[-1]
    out = jnp.where(is_owned[:, None, None], out, 0)
    return out, jnp.where(is_owned[:, None], lse, -jnp.inf)


def _merge_parts(
    out: jax.Array,
    lse: jax.Array,
    parts: list[jax.Array],
    work: WorkList,
    sinks: jax.Array,
    static: dict[str, Any],
) -> list[jax.Array]:
    """Return output and log-sum-exp, in their memory, with those of split rows."""
    return launch(
        "merge_kernel",
        (work.starts.shape[0] - 1, out.shape[1]),
        (*parts, work.starts, work.parts, sinks, out, lse),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (out, lse)],
        aliases={5: 0, 6: 1},
        **{name: static[name] for name in ("HEADS", "HEAD_DIM", "HAS_SINKS")},
    )


def _choose_tiles(q: jax.Array, k_pages: jax.Array) -> TritonTiles:
    itemsizes = k_pages.dtype.itemsize, q.dtype.itemsize
    tiles = triton_tiles.default_tiles(q.shape[-1], *itemsizes)
    return tuned.tiles("triton", tiles, q.shape[1], k_pages)


def _static_sizes(
    q: jax.Array,
    k_pages: jax.Array,
    k_scale: jax.Array | None,
    sinks: jax.Array | None,
    tiles: TritonTiles,
    *,
    is_ragged: bool,
) -> dict[str, Any]:
    """Return the static arguments of `attend_kernel` that follow from shapes."""
    _, num_heads, head_dim = q.shape
    *_, num_kv_heads, block_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    queries = max(tiles.query_rows // group, 1) if is_ragged else 1
    product_dtype = k_pages.dtype if k_scale is None else q.dtype
    return dict(
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=block_size,
        QUERIES=queries,
        ROWS=max(1 << (queries * group - 1).bit_length(), 16),
        TOKENS=tiles.tokens,
        HAS_SINKS=sinks is not None,
        SCALES=0 if k_scale is None else k_scale.shape[-1],
        # TF32 would round float32 keys to 10 bits.
        PRECISION="ieee" if product_dtype == jnp.float32 else "tf32",
    )


def _num_warps(tiles: TritonTiles, static: dict[str, Any], *, is_ragged: bool) -> int:
    """Return twice the warps for prompts: their tiles have four times the rows."""
    group = static["HEADS"] // static["KV_HEADS"]
    return tiles.num_warps * (2 if is_ragged or group > 32 else 1)


def _result_shapes(
    q: jax.Array, dtype: Any, num_parts: int
) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of output and log-sum-exp, and of those of `num_parts`."""
    num_queries, num_heads, head_dim = q.shape
    return [
        jax.ShapeDtypeStruct(q.shape, q.dtype if dtype is None else dtype),
        jax.ShapeDtypeStruct((num_queries, num_heads), jnp.float32),
        jax.ShapeDtypeStruct((num_parts, num_heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_parts, num_heads), jnp.float32),
    ]


def plan_work(
    context_lens: jax.Array,
    starts: jax.Array,
    window: jax.Array,
    queries: int,
    num_more: int,
    tiles: TritonTiles,
) -> WorkList:
    """Split rows of one query into parts, and other rows into tiles of queries.

    Args:
      context_lens: i32[S].
      starts: i32[S + 1], first query of each row.
      window: i32[], tokens that a query sees.
      queries: Queries per tile.
      num_more: All parts together are at most this many more than the rows.
      tiles: Tile sizes.
    """
    num_queries = starts[1:] - starts[:-1]
    is_one = num_queries == 1
    spans = jnp.where(is_one, jnp.minimum(context_lens, window), 0).astype(jnp.int32)
    chunk = cdiv(jnp.sum(spans, dtype=jnp.int32), num_more)
    chunk = cdiv(chunk, tiles.tokens) * tiles.tokens
    chunk = jnp.maximum(chunk, tiles.least_chunk)
    num_parts = jnp.maximum(cdiv(spans, chunk), 1)
    items = jnp.where(is_one, num_parts, cdiv(num_queries, queries))
    parts = jnp.where(is_one & (num_parts > 1), num_parts, 0)
    return WorkList(starts, _offsets(items), _offsets(parts), chunk)


def _offsets(counts: jax.Array) -> jax.Array:
    """Return the sum of the counts before each row, and of all, i32[S + 1]."""
    return jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
