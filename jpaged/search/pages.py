"""Pages of a search: each node is a row of block tables.

Pipeline: tree -> [pages] -> block manager, decoder -> hidden states.

A node's row maps the blocks of its parent and appends one token: one `fork`, one
`append`, one step of the decoder with one token per tree. No token of a text is
computed twice, and the blocks in front of it are stored once for all nodes. The last
block of a parent is copied when a child writes into it, so a node takes at most one
block.

Shape symbols: B trees, N nodes of a tree, L tokens of the longest text, E hidden size,
S = B * N rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention import kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.config import EngineConfig
from jpaged.engine import forward
from jpaged.kv import block_manager, cache_groups
from jpaged.kv.block_manager import NO_BLOCK, BlockState
from jpaged.kv.block_state import num_blocks_per_row
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import StepInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodePages:
    """The pool, and the rows of all nodes: node n of tree b is row b * N + n."""

    cache: KVCache
    blocks: BlockState
    kept: jax.Array  # bool[num_blocks], blocks that the search must not use
    num_copies: jax.Array  # i32[], blocks that were copied
    is_full: jax.Array  # bool[], an append was refused: a bug of the caller


def init_pages(
    cache: KVCache,
    kept: jax.Array,
    config: EngineConfig,
    num_rows: int,
    num_blocks_per_row: int,
) -> NodePages:
    """Return rows without tokens.

    Args:
      cache: the pool; donate it.
      kept: bool[num_blocks], blocks that the search must not use.
      config: the engine's config.
      num_rows: S.
      num_blocks_per_row: blocks of the longest text.
    """
    blocks = block_manager.init_state(
        num_blocks=kept.shape[0],
        block_size=config.block_size,
        max_seqs=num_rows,
        max_blocks_per_seq=num_blocks_per_row,
        windows=config.group_windows,
    )
    return NodePages(cache, blocks, kept, jnp.int32(0), jnp.bool_(False))


def _append(
    pages: NodePages, num_tokens: jax.Array, rows: jax.Array, config: EngineConfig
) -> NodePages:
    """Append tokens i32[S] to some of the rows `rows` i32[B]; copy shared blocks."""
    blocks, appended = block_manager.append(pages.blocks, num_tokens, pages.kept)
    num_groups = len(blocks.windows)
    src, dst = (
        x.reshape(-1, num_groups)[rows].reshape(-1)
        for x in (appended.copy_src, appended.copy_dst)
    )
    return dataclasses.replace(
        pages,
        blocks=blocks,
        num_copies=pages.num_copies + jnp.sum(dst != NO_BLOCK, dtype=jnp.int32),
        is_full=pages.is_full | ~appended.ok,
        cache=kv_cache.copy_blocks(pages.cache, src, dst, config.attention),
    )


def _tables(blocks: BlockState, rows: jax.Array) -> jax.Array:
    """Return the tables of some rows as the decoder reads them."""
    tables, num_groups = blocks.block_tables[rows], len(blocks.windows)
    if num_groups == 1:
        return tables
    return cache_groups.tables_by_group(tables, num_groups)


def write_prompts(
    model: Decoder,
    pages: NodePages,
    tokens: jax.Array,
    lens: jax.Array,
    config: EngineConfig,
) -> tuple[NodePages, jax.Array]:
    """Compute the prompts in the rows of the roots, one chunk after another.

    Args:
      model: the decoder.
      pages: the rows of the roots may have blocks of the prefix cache.
      tokens: i32[B, L].
      lens: i32[B]; trees without a prompt are last.
      config: the engine's config.

    Returns:
      The pages, and the hidden states [B, E] of the prompts' last tokens.
    """
    num_trees, length = tokens.shape
    num_nodes = pages.blocks.context_lens.shape[0] // num_trees
    size = min(config.largest_chunk, length)
    index = jnp.arange(size, dtype=jnp.int32)
    all_rows = jnp.arange(pages.blocks.context_lens.shape[0], dtype=jnp.int32)

    def chunk(
        carry: tuple[jax.Array, NodePages, jax.Array],
    ) -> tuple[jax.Array, NodePages, jax.Array]:
        tree, pages, hidden = carry
        row, start = tree * num_nodes, pages.blocks.context_lens[tree * num_nodes]
        count = jnp.minimum(lens[tree] - start, size)
        rows = row[None]
        pages = _append(pages, jnp.where(all_rows == row, count, 0), rows, config)
        is_live, positions = index < count, start + index
        inputs = StepInputs(
            tokens=jnp.where(is_live, tokens.at[tree, positions].get(mode="clip"), 0),
            positions=jnp.where(is_live, positions, 0),
            slot_mapping=block_manager.slots(
                pages.blocks, jnp.where(is_live, row, -1), positions
            ),
            block_tables=_tables(pages.blocks, rows),
            context_lens=(start + count)[None],
            query_start_loc=jnp.stack([jnp.int32(0), count]),
        )
        cache, states, _ = forward.run_trunk(
            model, pages.cache, inputs, config, is_alone=False
        )
        last = forward.last_hidden(states)[count - 1]
        pages = dataclasses.replace(pages, cache=cache)
        is_done = start + count >= lens[tree]
        return (
            tree + is_done.astype(jnp.int32),
            pages,
            hidden.at[tree].set(last.astype(hidden.dtype)),
        )

    count = jnp.sum(lens > 0, dtype=jnp.int32)
    sizes = model.config
    hidden = jnp.zeros((num_trees, sizes.hidden_size), sizes.dtype)
    carry = (jnp.int32(0), pages, hidden)
    _, pages, hidden = lax.while_loop(lambda carry: carry[0] < count, chunk, carry)
    return pages, hidden


def expand(
    model: Decoder,
    pages: NodePages,
    parents: jax.Array,
    children: jax.Array,
    tokens: jax.Array,
    is_live: jax.Array,
    config: EngineConfig,
) -> tuple[NodePages, jax.Array]:
    """Compute one new node of each live tree, in one step of the decoder.

    Args:
      model: the decoder.
      pages: the pages.
      parents: i32[B], rows of the parents.
      children: i32[B], rows of the new nodes, which are empty.
      tokens: i32[B], the tokens that the new nodes append.
      is_live: bool[B].
      config: the engine's config.

    Returns:
      The pages, and the hidden states [B, E] of the tokens.
    """
    rows = jnp.arange(pages.blocks.context_lens.shape[0], dtype=jnp.int32)
    at = jnp.where(is_live, children, rows.size)
    forked = block_manager.fork(pages.blocks, rows.at[at].set(parents, mode="drop"))
    pages = dataclasses.replace(pages, blocks=forked)
    count = jnp.zeros_like(rows).at[at].set(1, mode="drop")
    pages = _append(pages, count, children, config)
    positions = pages.blocks.context_lens[children] - 1
    inputs = StepInputs(
        tokens=jnp.where(is_live, tokens, 0),
        positions=jnp.where(is_live, positions, 0),
        slot_mapping=block_manager.slots(
            pages.blocks, jnp.where(is_live, children, -1), positions
        ),
        block_tables=_tables(pages.blocks, children),
        context_lens=jnp.where(is_live, positions + 1, 0),
        query_start_loc=None,
    )
    cache, hidden, _ = forward.run_trunk(
        model, pages.cache, inputs, config, is_alone=False
    )
    pages = dataclasses.replace(pages, cache=cache)
    return pages, forward.last_hidden(hidden)


def move(pages: NodePages, order: jax.Array) -> NodePages:
    """Move the blocks of nodes to other rows, and free all other rows.

    Args:
      pages: the pages.
      order: i32[B, N], the old node of each node of a tree; below 0: none.
    """
    num_trees, num_nodes = order.shape
    first = jnp.arange(num_trees, dtype=jnp.int32)[:, None] * num_nodes
    parents = jnp.where(order >= 0, first + order, NO_BLOCK).reshape(-1)
    return dataclasses.replace(pages, blocks=block_manager.fork(pages.blocks, parents))


def count_blocks(pages: NodePages, num_trees: int) -> tuple[jax.Array, jax.Array]:
    """Count the blocks of each tree. A block that several trees share counts for each.

    Args:
      pages: the pages.
      num_trees: B.

    Returns:
      i32[B], blocks that each tree uses; i32[B], blocks that it would use if each node
      had a copy of its text.
    """
    blocks = pages.blocks
    tables = blocks.block_tables.reshape(num_trees, -1)
    index = jnp.arange(num_trees, dtype=jnp.int32)[:, None]
    at = jnp.where(tables == NO_BLOCK, blocks.ref_counts.size, tables)
    is_used = jnp.zeros((num_trees, blocks.ref_counts.size), jnp.bool_)
    is_used = is_used.at[index, at].set(True, mode="drop")
    copied = num_blocks_per_row(blocks).reshape(num_trees, -1) * len(blocks.windows)
    total = jnp.sum(copied, axis=1, dtype=jnp.int32)
    return jnp.sum(is_used, axis=1, dtype=jnp.int32), total
