"""Chunks of queries in plain XLA: each row's, a tile of queries at a time.

Place on the road: xla.attention, xla.cascade -> [xla.chunks] -> xla.online_softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.xla.online_softmax import finish, walk
from jpaged.xla.pages import Pools


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes; `docs/decisions/attention.md` has the measurements behind them.

    Those of a device are in `jpaged.tuned`.
    """

    decode_rows: int = 16  # rows of a decode group
    decode_tokens: int = 768  # tokens of a decode tile, over all of its rows
    decode_least: int = 32  # tokens of a decode tile, of one row, at least
    decode_most: int = 128  # and at most
    ragged_queries: int = 32  # queries of a prompt tile
    ragged_tokens: int = 128  # tokens of a prompt tile
    shared_rows: int = 16  # rows that read a tile of a shared prefix together


TILES = Tiles()


def chunks(
    q: jax.Array,
    pools: Pools,
    block_tables: jax.Array,
    context_lens: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | jax.Array,
    sliding_window: int | jax.Array | None,
    logits_soft_cap: float | jax.Array | None,
    sinks: jax.Array | None,
    tiles: Tiles,
    is_causal: bool = True,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [T, H, D] and log-sum-exp f32[T, H] of the rows' chunks of queries.

    Row s has queries `starts[s]` to `starts[s] + lengths[s]`, in rising order of rows;
    the last one sees `context_lens[s]` tokens, and where not `is_causal` all of them
    do. Zeros and -inf for queries that are nobody's. `dtype` is the output's; None
    takes that of q.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = pools.k.shape[1:3]
    group = num_heads // num_kv_heads
    size = tiles.ragged_queries if is_causal else tiles.shared_rows
    size = min(size, num_queries)
    dtype = q.dtype if dtype is None else dtype
    blocks = max(1, min(tiles.ragged_tokens // block_size, block_tables.shape[1]))
    num_tiles, tile_at = query_tiles(
        starts, lengths, context_lens, size, is_causal=is_causal
    )

    # A tile may reach past its row's queries: tiles are walked in the order of the
    # queries, so the rows behind write over what it left there.
    padded_q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
    out = jnp.zeros((num_queries + size, num_heads, head_dim), dtype)
    lse = jnp.full((num_queries + size, num_heads), -jnp.inf, jnp.float32)

    def tile(index, carry):
        out, lse = carry
        row, start, visible = tile_at(index)
        state = walk(
            take(padded_q, start, size, num_kv_heads),
            pools,
            lax.dynamic_slice(block_tables, (row, 0), (1, block_tables.shape[1])),
            jnp.tile(visible, group)[None, :],
            blocks=blocks,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        tile_out, tile_lse = finish(state, sinks, num_kv_heads, dtype, size)
        return (
            lax.dynamic_update_slice(out, untake(tile_out, size), (start, 0, 0)),
            lax.dynamic_update_slice(lse, untake(tile_lse, size), (start, 0)),
        )

    out, lse = lax.fori_loop(0, num_tiles, tile, (out, lse))
    return out[:num_queries], lse[:num_queries]


def query_tiles(
    starts: jax.Array,
    lengths: jax.Array,
    context_lens: jax.Array,
    size: int,
    *,
    is_causal: bool = True,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    """The number of tiles of `size` queries, and a function of a tile's index: its row,
    its first query, and how many tokens each query sees, i32[size] with 0 behind the
    row's last.

    Row s has queries `starts[s]` to `starts[s] + lengths[s]`.
    """
    counts = (lengths + size - 1) // size
    ends = jnp.cumsum(counts)

    def tile_at(index):
        row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
        offset = (index - (ends[row] - counts[row])) * size
        index_in_row = offset + jnp.arange(size, dtype=jnp.int32)
        visible = context_lens[row]
        if is_causal:
            visible += 1 + index_in_row - lengths[row]
        visible = jnp.where(index_in_row < lengths[row], visible, 0)
        return row, starts[row] + offset, visible

    return ends[-1], tile_at


def take(rows: jax.Array, start: jax.Array, size: int, num_kv_heads: int) -> jax.Array:
    """`rows` [T, H, ...] from `start` on, by KV head: [K, G * size, ...]."""
    taken = lax.dynamic_slice_in_dim(rows, start, size)
    taken = taken.reshape(size, num_kv_heads, -1, *rows.shape[2:])
    taken = jnp.moveaxis(taken, 0, 2)  # [K, G, size, ...]
    return taken.reshape(num_kv_heads, -1, *rows.shape[2:])


def untake(taken: jax.Array, size: int) -> jax.Array:
    """[size, H, ...] of what `take` gave."""
    num_kv_heads, _, *rest = taken.shape
    rows = jnp.moveaxis(taken.reshape(num_kv_heads, -1, size, *rest), 2, 0)
    return rows.reshape(size, -1, *rest)
