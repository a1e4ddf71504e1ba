"""What the GPU's attention kernel works on: tiles of queries, split into items.

Place on the road: pallas.gpu_attention -> [pallas.gpu_work].

A tile holds queries of one row of the block tables, each with the G heads that share a
key. An item is a part of a tile's keys, and one block of threads reads it; parts are
about as long as all keys over the number of blocks that run at once, so that a long
context beside short ones is read by many. All counts follow the lengths, and none the
width of the tables.

Letters as in `jpaged.attention`; R rows of a tile's products, Q tiles, I items.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Tiles(NamedTuple):
    """Tiles in the order of their queries; those behind the last have no queries."""

    row: jax.Array  # i32[Q], row of the block tables
    first: jax.Array  # i32[Q], first query
    queries: jax.Array  # i32[Q], how many
    seen: jax.Array  # i32[Q, R], tokens that each row's query sees; 0 of rows without
    lowest: jax.Array  # i32[Q, R], first token that it sees
    first_token: jax.Array  # i32[Q], first token that any of them sees
    end_token: jax.Array  # i32[Q], behind the last token that any of them sees


class Items(NamedTuple):
    """Parts of tiles' keys, tile by tile; those behind the last have no steps."""

    tile: jax.Array  # i32[I]
    row: jax.Array  # i32[I], row of the block tables
    unit: jax.Array  # i32[I], first of the copies that it consists of
    last_unit: jax.Array  # i32[I], last that its tile needs
    steps: jax.Array  # i32[I], tiles of keys
    first_token: jax.Array  # i32[I], of its tile
    end_token: jax.Array  # i32[I], of its tile
    queries: jax.Array  # i32[I], of its tile


class Parts(NamedTuple):
    """Where the parts of a query's attention are."""

    item: jax.Array  # i32[T], first
    count: jax.Array  # i32[T], 0 of a query that sees nothing
    row: jax.Array  # i32[T], its first among the rows of its tile


def max_tiles(num_queries: int, num_rows: int, tile_queries: int) -> int:
    """The most tiles that so many queries of so many rows fill."""
    unfilled = (tile_queries - 1) * min(num_rows, num_queries)
    return (num_queries + unfilled) // tile_queries


def tiles_of(
    query_start_loc: jax.Array,
    context_lens: jax.Array,
    window: jax.Array,
    *,
    num_tiles: int,
    tile_queries: int,
    group: int,
    rows: int,
    max_tokens: int,
) -> Tiles:
    """Tiles of `tile_queries` queries of `group` heads, each of one row of the tables.

    Args:
      query_start_loc: i32[S + 1].
      context_lens: i32[S].
      window: i32[].
      num_tiles: as `max_tiles`.
      rows: R, at least `tile_queries * group`.
      max_tokens: that a block table holds.
    """
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts
    row, part, is_live = _owners(pl.cdiv(lengths, tile_queries), num_tiles)
    first = starts[row] + part * tile_queries
    queries = jnp.minimum(lengths[row] - part * tile_queries, tile_queries)
    queries = jnp.where(is_live, queries, 0)
    line = jnp.arange(rows, dtype=jnp.int32)
    query = (line // group)[None, :]
    shift = first + context_lens[row] - query_start_loc[row + 1] + 1
    seen = jnp.clip(query + shift[:, None], 0, max_tokens)
    seen = jnp.where(query < queries[:, None], seen, 0)
    lowest = jnp.maximum(seen - window, 0)
    end_token = jnp.max(seen, axis=1)
    first_token = jnp.where(is_live, jnp.minimum(lowest[:, 0], end_token), 0)
    return Tiles(row, first, queries, seen, lowest, first_token, end_token)


def tile_of_queries(
    query_start_loc: jax.Array, num_queries: int, tile_queries: int
) -> jax.Array:
    """i32[T], each query's tile; of those that no row owns, any."""
    starts = query_start_loc[:-1]
    counts = pl.cdiv(query_start_loc[1:] - starts, tile_queries)
    before = jnp.cumsum(counts, dtype=jnp.int32) - counts
    query = jnp.arange(num_queries, dtype=jnp.int32)
    row = _num_before(query_start_loc[1:], query)
    row = jnp.minimum(row, starts.shape[0] - 1)
    return before[row] + (query - starts[row]) // tile_queries


def items_of(
    tiles: Tiles,
    *,
    num_items: int,
    unit: int,
    units: int,
    min_steps: int,
) -> tuple[Items, jax.Array, jax.Array]:
    """The items of tiles, with each tile's first item and its number of items.

    Args:
      num_items: static, more than the number of tiles.
      unit: tokens of one copy.
      units: copies of one step.
      min_steps: of an item that is not the last of its tile.
    """
    first_unit = tiles.first_token // unit
    end_unit = pl.cdiv(tiles.end_token, unit)
    steps = pl.cdiv(end_unit - first_unit, units)
    # An item for each tile may be unfilled, so so many full ones are what is left.
    full = num_items - tiles.row.shape[0]
    longest = jnp.maximum(pl.cdiv(jnp.sum(steps, dtype=jnp.int32), full), min_steps)
    count = pl.cdiv(steps, longest)
    tile, part, is_live = _owners(count, num_items)
    begin = part * longest
    own = jnp.where(is_live, jnp.minimum(steps[tile] - begin, longest), 0)
    items = Items(
        tile=tile,
        row=tiles.row[tile],
        unit=first_unit[tile] + begin * units,
        last_unit=end_unit[tile] - 1,
        steps=own,
        first_token=tiles.first_token[tile],
        end_token=tiles.end_token[tile],
        queries=tiles.queries[tile],
    )
    return items, jnp.cumsum(count, dtype=jnp.int32) - count, count


def _owners(counts: jax.Array, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of `number` places, filled by each owner with `counts` of its own: whose it is,
    the how manieth of that owner's, and whether it is anybody's."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    place = jnp.arange(number, dtype=jnp.int32)
    owner = _num_before(ends, place)
    is_live = place < ends[-1]
    owner = jnp.minimum(owner, counts.shape[0] - 1)
    return owner, place - (ends - counts)[owner], is_live


def _num_before(rising: jax.Array, values: jax.Array) -> jax.Array:
    """i32, of each of `values` how many of `rising` are no larger.

    By comparing all: a binary search is a loop, whose steps are launches, and all that
    depends on it stays in the loop over layers.
    """
    found = jnp.searchsorted(rising, values, side="right", method="compare_all")
    return found.astype(jnp.int32)
