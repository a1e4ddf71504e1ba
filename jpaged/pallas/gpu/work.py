"""The work list of the GPU's attention kernel: tiles of queries, split into items.

Pipeline: pallas.gpu.calls -> [pallas.gpu.work].

A tile holds queries of one row of the block tables, each with the G heads that share a
key. An item is a tile over a part of its keys, and one block of threads computes it.
The size of a part is about the number of keys of the step divided by the number of
thread blocks that run at once. So many thread blocks share a long context. All
counts depend on the lengths, not on the width of the tables.

Shape symbols as in `jpaged.attention`; R rows of a tile's products, Q tiles, I items.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv


class QueryTiles(NamedTuple):
    """Tiles in the order of their queries; unused tiles come last and have none."""

    row: jax.Array  # i32[Q], row of the block tables
    first: jax.Array  # i32[Q], first query
    queries: jax.Array  # i32[Q], number of queries
    seen: jax.Array  # i32[Q, R], tokens up to each row's query; 0: no query
    lowest: jax.Array  # i32[Q, R], first token that each row's query sees
    first_token: jax.Array  # i32[Q], first token that a query of the tile sees
    end_token: jax.Array  # i32[Q], one past the last token that a query sees


class Items(NamedTuple):
    """Parts of tiles, tile by tile; unused items come last and have no steps."""

    tile: jax.Array  # i32[I]
    row: jax.Array  # i32[I], row of the block tables
    unit: jax.Array  # i32[I], first unit of keys; a copy moves one unit
    last_unit: jax.Array  # i32[I], last unit that the tile needs
    steps: jax.Array  # i32[I], tiles of keys
    first_token: jax.Array  # i32[I], of the tile
    end_token: jax.Array  # i32[I], of the tile
    queries: jax.Array  # i32[I], of the tile


class QueryParts(NamedTuple):
    """Where the partial results of each query are."""

    item: jax.Array  # i32[T], first item
    num_items: jax.Array  # i32[T], 0 for a query that sees nothing
    row: jax.Array  # i32[T], the query's first row within its tile


def max_tiles(num_queries: int, num_rows: int, tile_queries: int) -> int:
    """Return the largest number of tiles that these queries of these rows fill."""
    unfilled = (tile_queries - 1) * min(num_rows, num_queries)
    return (num_queries + unfilled) // tile_queries


def query_tiles(
    query_start_loc: jax.Array,
    context_lens: jax.Array,
    window: jax.Array,
    *,
    num_tiles: int,
    tile_queries: int,
    group: int,
    rows: int,
    max_tokens: int,
) -> QueryTiles:
    """Cut the queries of each row of the tables into tiles.

    Args:
      query_start_loc: i32[S + 1].
      context_lens: i32[S].
      window: i32[], tokens that a query sees.
      num_tiles: Q, as `max_tiles` returns it.
      tile_queries: Queries per tile.
      group: G, heads that share a key.
      rows: R, at least `tile_queries * group`.
      max_tokens: Tokens that a block table holds.
    """
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts
    row, part, is_live = _owners(cdiv(lengths, tile_queries), num_tiles)
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
    return QueryTiles(row, first, queries, seen, lowest, first_token, end_token)


def tile_of_queries(
    query_start_loc: jax.Array, num_queries: int, tile_queries: int
) -> jax.Array:
    """Return each query's tile, i32[T]; any tile for queries that belong to no row."""
    starts = query_start_loc[:-1]
    counts = cdiv(query_start_loc[1:] - starts, tile_queries)
    before = jnp.cumsum(counts, dtype=jnp.int32) - counts
    query = jnp.arange(num_queries, dtype=jnp.int32)
    row = _count_up_to(query_start_loc[1:], query)
    row = jnp.minimum(row, starts.shape[0] - 1)
    return before[row] + (query - starts[row]) // tile_queries


def split_tiles(
    tiles: QueryTiles,
    *,
    num_items: int,
    unit: int,
    units: int,
    min_steps: int,
) -> tuple[Items, jax.Array, jax.Array]:
    """Split the tiles into items of about equal length.

    Args:
      tiles: The tiles.
      num_items: I; more than the number of tiles.
      unit: Tokens per copy.
      units: Copies per step.
      min_steps: The fewest steps of an item that is not the last of its tile.

    Returns:
      The items, each tile's first item i32[Q], and its number of items i32[Q].
    """
    first_unit = tiles.first_token // unit
    end_unit = cdiv(tiles.end_token, unit)
    steps = cdiv(end_unit - first_unit, units)
    # Each tile may have one item that is not full; the rest can be full.
    num_full = num_items - tiles.row.shape[0]
    longest = jnp.maximum(cdiv(jnp.sum(steps, dtype=jnp.int32), num_full), min_steps)
    count = cdiv(steps, longest)
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


def _owners(counts: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assign `size` entries to owners in order, `counts[i]` entries to owner i.

    Returns:
      i32[size], the owner; i32[size], the entry's number among those of its owner;
      bool[size], whether the entry has an owner.
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    entry = jnp.arange(size, dtype=jnp.int32)
    owner = _count_up_to(ends, entry)
    is_live = entry < ends[-1]
    owner = jnp.minimum(owner, counts.shape[0] - 1)
    return owner, entry - (ends - counts)[owner], is_live


def _count_up_to(rising: jax.Array, values: jax.Array) -> jax.Array:
    """Return, for each value, how many entries of `rising` are at most the value.

    All pairs are compared. A binary search would be a loop whose steps are launches,
    and XLA would not move what depends on it out of the loop over layers.
    """
    found = jnp.searchsorted(rising, values, side="right", method="compare_all")
    return found.astype(jnp.int32)
