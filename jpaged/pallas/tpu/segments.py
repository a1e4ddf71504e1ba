"""The work list of the TPU's attention kernel: segments of queries.

Pipeline: pallas.tpu.attention -> [pallas.tpu.segments].

Queries are cut into tiles of `tile_queries`, and a tile may hold queries of several
rows. A segment is the part of a tile that belongs to one row, so every segment has one
block table and one range of tokens that its queries see.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Segments(NamedTuple):
    """Segments in the order of the queries; the numbers of their tiles never decrease.

    Query `t` of a segment sees `t + shift` tokens. Segments that see nothing have
    `end_token` 0. Every tile has at least one segment.
    """

    tile: jax.Array  # i32[I], tile of queries
    row: jax.Array  # i32[I], row of the block tables
    first: jax.Array  # i32[I], first query
    end: jax.Array  # i32[I], one past the last query
    shift: jax.Array  # i32[I]
    first_token: jax.Array  # i32[I], first token that a query of the segment sees
    end_token: jax.Array  # i32[I], one past the last token that a query sees
    next_live: jax.Array  # i32[I + 1], first segment from this one on that sees tokens


def decode_segments(
    context_lens: jax.Array, window: jax.Array, max_tokens: int
) -> Segments:
    """Return the segments of rows of one query, each row a tile.

    Args:
      context_lens: i32[S].
      window: i32[], tokens that a query sees.
      max_tokens: Tokens that a block table holds.
    """
    row = jnp.arange(context_lens.shape[0], dtype=jnp.int32)
    return _with_tokens(row, row, row, row + 1, context_lens - row, window, max_tokens)


def chunk_segments(
    query_start_loc: jax.Array,
    context_lens: jax.Array,
    window: jax.Array,
    max_tokens: int,
    *,
    tile_queries: int,
    num_tiles: int,
) -> Segments:
    """Return the segments of rows of any number of queries: prompts and decode rows.

    Args:
      query_start_loc: i32[S + 1].
      context_lens: i32[S].
      window: i32[], tokens that a query sees.
      max_tokens: Tokens that a block table holds.
      tile_queries: Queries per tile.
      num_tiles: Number of tiles.
    """
    (num_rows,) = context_lens.shape
    starts = jnp.arange(num_tiles, dtype=jnp.int32) * tile_queries
    # No tile and no row ends between two neighbouring entries.
    first = jnp.sort(jnp.concatenate([starts, query_start_loc[:-1]]))
    last_end = jnp.full((1,), num_tiles * tile_queries, jnp.int32)
    end = jnp.minimum(jnp.concatenate([first[1:], last_end]), query_start_loc[-1])
    row = jnp.searchsorted(query_start_loc[1:], first, side="right")
    row = jnp.minimum(row, num_rows - 1).astype(jnp.int32)
    shift = context_lens[row] - query_start_loc[row + 1] + 1
    tile = jnp.minimum(first // tile_queries, num_tiles - 1)
    return _with_tokens(tile, row, first, end, shift, window, max_tokens)


def _with_tokens(
    tile: jax.Array,
    row: jax.Array,
    first: jax.Array,
    end: jax.Array,
    shift: jax.Array,
    window: jax.Array,
    max_tokens: int,
) -> Segments:
    """Add the ranges of tokens to segments."""
    end_token = jnp.where(first < end, end - 1 + shift, 0)
    end_token = jnp.clip(end_token, 0, max_tokens)
    first_token = jnp.clip(first + shift - window, 0, end_token)
    number = jnp.arange(tile.shape[0], dtype=jnp.int32)
    next_live = jnp.where(end_token > 0, number, tile.shape[0])
    next_live = jnp.pad(next_live, (0, 1), constant_values=tile.shape[0])
    next_live = lax.cummin(next_live, reverse=True)
    return Segments(tile, row, first, end, shift, first_token, end_token, next_live)
