"""Sharing: which existing blocks a sequence maps when it gets a batch row.

Pipeline: prefix cache -> [look_up] -> scheduler -> [sharing] -> request table, blocks.

`look_up` finds blocks in the prefix cache, and `append_tokens` makes the cache evict
blocks that new tokens need. A sequence also maps the first `shared_lens` tokens of its
source, another sequence. The source is set at submission (the request's leader, or a
pinned prefix). Two functions change it later: `reassign_sources` for preempted
sequences, which compares them within their request, and `join_running_rows` for newly
admitted rows, which finds rows that compute the same prefix at that time.

Shape symbols: R sequences of the request table, S batch rows, L tokens of the longest
sequence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged import scheduler
from jpaged.arithmetic import floor_div, remainder
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine.request_table import RequestTable
from jpaged.indexing import add, put, take
from jpaged.kv import block_manager, cache_groups, prefix_cache
from jpaged.kv.block_manager import NO_BLOCK, Append, BlockState
from jpaged.kv.drops import computed_lens
from jpaged.kv.prefix_cache import Eviction, PrefixCache
from jpaged.scheduler import WAITING, Hits, UntilDecision


def look_up(
    known_blocks: PrefixCache | None,
    table: RequestTable,
    rows: jax.Array,
    config: EngineConfig,
    until: UntilDecision | None = None,
) -> Hits | None:
    """Look up the waiting sequences in the prefix cache, if any can be admitted.

    Args:
      known_blocks: the prefix cache, if there is one.
      table: the request table.
      rows: i32[S], sequence index of each row.
      config: the engine's config.
      until: tokens that retention lets sequences map; None: no limit.
    """
    if known_blocks is None:
        return None
    queue = table.queue
    # At least one token is left to compute: its logits are needed.
    most = jnp.where(queue.status == WAITING, queue.num_tokens - 1, 0)
    most = jnp.where(table.params.keeps_prompt_logprobs | queue.has_ended, 0, most)
    if until is not None:
        most = jnp.minimum(most, until.mappable)

    def match(hits: Hits) -> Hits:
        return Hits(*prefix_cache.match(known_blocks, table.tokens, most))

    width = config.max_blocks_per_seq * len(config.group_windows)
    none = Hits.none(config.max_num_requests, width)
    return when(scheduler.can_admit(queue, rows), match, none)


def append_tokens(
    cache: PrefixCache | None,
    blocks: BlockState,
    num_tokens: jax.Array,
    eviction: Eviction | None = None,
) -> tuple[PrefixCache | None, BlockState, Append]:
    """Append tokens to the rows; the prefix cache evicts blocks for them.

    Args:
      cache: the prefix cache, if there is one.
      blocks: the block state.
      num_tokens: i32[S], tokens to append to each row.
      eviction: which blocks the cache evicts; None: the least recently used.

    Returns:
      The prefix cache, the blocks, and the copies to do before writing.
    """
    if cache is None:
        return None, *block_manager.append(blocks, num_tokens)
    needed = block_manager.demand(blocks, num_tokens)
    cache = prefix_cache.evict(cache, blocks.ref_counts, needed.total, eviction)
    cache = without_orphans(cache, blocks)
    before, kept = blocks, prefix_cache.is_cached(cache)
    blocks, appended = block_manager.append(blocks, num_tokens, kept, needed)
    written = overwritten_nodes(before, num_tokens, appended, kept)
    cache = when(
        jnp.any(written != NO_BLOCK),
        lambda cache: prefix_cache.forget(cache, written),
        cache,
    )
    return cache, blocks, appended


def without_orphans(cache: PrefixCache, blocks: BlockState) -> PrefixCache:
    """Return the cache after an eviction without nodes whose ancestors are evicted."""
    return cache if blocks.drops is None else prefix_cache.forget_orphans(cache)


def overwritten_nodes(
    blocks: BlockState, num_tokens: jax.Array, appended: Append, kept: jax.Array
) -> jax.Array:
    """Return the cached block that each row writes into, NO_BLOCK: none.

    A row that was truncated may write into a cached block of which it is the only
    owner. The cache must forget that block.

    Args:
      blocks: before the append.
      num_tokens: i32[S], tokens that were appended to each row.
      appended: the result of the append.
      kept: bool[N], the blocks in the cache.

    Returns:
      i32[S * G].
    """
    if len(blocks.windows) > 1:
        num_tokens = jnp.repeat(num_tokens, len(blocks.windows))
        blocks = cache_groups.split_groups(blocks)
    is_partial = remainder(blocks.context_lens, blocks.block_size) != 0
    is_writer = (num_tokens > 0) & is_partial
    is_writer &= appended.ok & (appended.copy_dst == NO_BLOCK)
    rows = jnp.arange(is_writer.shape[0], dtype=jnp.int32)
    column = floor_div(blocks.context_lens, blocks.block_size)
    last = take(blocks.block_tables, rows, column)
    return jnp.where(is_writer & take(kept, last), last, NO_BLOCK)


def without_sources(table: RequestTable, seq_indices: jax.Array) -> RequestTable:
    """Let sequences i32[S] that have lost their blocks compute all tokens; R: none.

    With retention, the tokens of a source after its prompt are not a prefix.
    """
    queue = table.queue
    queue = dataclasses.replace(
        queue,
        sources=put(queue.sources, seq_indices, seq_indices),
        shared_lens=put(queue.shared_lens, seq_indices, 0),
    )
    return dataclasses.replace(table, queue=queue)


def reassign_sources(table: RequestTable, seq_indices: jax.Array) -> RequestTable:
    """Choose new sources for sequences that have lost their blocks.

    The new source of a sequence is the sequence of its request with the longest common
    prefix, among the given ones with a lower index. So no two sequences ever wait for
    each other. The first sequence of each request keeps its source. The function
    compares tokens, one sequence with all others at a time.

    Args:
      table: the request table.
      seq_indices: i32[S], the sequences; R is padding.
    """
    table_size, _ = table.tokens.shape
    seq_indices = jnp.sort(seq_indices)
    valid = seq_indices < table_size
    safe = jnp.where(valid, seq_indices, 0)
    tokens, lens = take(table.tokens, safe), take(table.queue.num_tokens, safe)
    leaders = jnp.where(valid, take(table.queue.leaders, safe), table_size)
    is_candidate = valid & ~take(table.queue.has_ended, safe)
    index = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)

    def compare(
        j: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        sources, shared = carry
        # At least one token is left to compute: its logits are needed.
        most = jnp.minimum(lens, take(lens, j)) - 1
        common = _num_common(tokens, take(tokens, j)[None, :], most)
        fits = (
            valid & take(is_candidate, j) & (leaders == take(leaders, j)) & (index > j)
        )
        is_better = fits & (common > shared)
        sources = jnp.where(is_better, take(seq_indices, j), sources)
        return sources, jnp.where(is_better, common, shared)

    first = (
        jnp.full_like(seq_indices, scheduler.NO_REQUEST),
        jnp.zeros_like(seq_indices),
    )
    num_lost = jnp.sum(valid, dtype=jnp.int32)  # padding is last after sorting
    sources, shared = jax.lax.fori_loop(0, num_lost, compare, first)
    found = jnp.where(shared > 0, seq_indices, table_size)
    is_first = valid & ~jnp.any(
        (leaders[None, :] == leaders[:, None]) & (index[None, :] < index[:, None]),
        axis=1,
    )
    # Without a common prefix, the old source is no longer valid either.
    alone = jnp.where(valid & ~is_first & (shared == 0), seq_indices, table_size)
    queue = table.queue
    new_sources = put(queue.sources, found, sources)
    new_lens = put(queue.shared_lens, found, shared)
    queue = dataclasses.replace(
        queue,
        sources=new_sources,
        shared_lens=put(new_lens, alone, 0),
    )
    return dataclasses.replace(table, queue=queue)


def _num_common(tokens: jax.Array, others: jax.Array, most: jax.Array) -> jax.Array:
    """Length of the common prefix i32[S], at most `most` i32[S] (each below L)."""
    is_other = tokens != others
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    is_other |= column[None, :] >= most[:, None]
    return jnp.argmax(is_other, axis=1).astype(jnp.int32)


def join_running_rows(
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    is_new: jax.Array,
    until: UntilDecision | None = None,
) -> tuple[RequestTable, BlockState, jax.Array]:
    """Let newly admitted rows wait for a prefix that another row is computing.

    A new row joins a row before it if the next whole block of both has the same tokens,
    behind the same blocks. That row becomes its source, with the tokens of their common
    prefix. A row that has joined has no blocks and computes nothing until it maps those
    of its source (`scheduler`).

    Args:
      table: after admission.
      rows: i32[S], after admission.
      blocks: after admission.
      is_new: bool[S], rows that have just been admitted.
      until: tokens that retention lets sequences map; None: no limit.

    Returns:
      The table, the blocks, and bool[S]: which rows have joined another row.
    """
    queue, seq_indices = table.queue, jnp.maximum(rows, 0)
    known = take(queue.num_tokens, seq_indices)
    start = blocks.context_lens  # of a new row: what the prefix cache had
    # Tokens that never change: a lockstep row may get another's tokens behind its
    # prompt.
    fixed = jnp.where(
        take(queue.is_lockstep, seq_indices),
        take(queue.prompt_lens, seq_indices),
        known,
    )
    if until is not None and until.exact is not None:
        fixed = jnp.minimum(fixed, take(until.exact, seq_indices))
    fixed = fixed - 1
    is_before = scheduler.rows_before(queue, rows)
    fits = _has_same_next_block(table, rows, blocks, is_new, fixed, is_before)
    mappable = None if until is None else take(until.mappable, seq_indices)
    if mappable is not None:
        fits &= (mappable >= start + blocks.block_size)[:, None]
        fits &= (computed_lens(blocks) == blocks.context_lens)[None, :]
    joins = jnp.any(fits, axis=1)
    # The first of those before it, which may itself wait for another row.
    ranks = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    order = jnp.where(fits, ranks[None, :], rows.shape[0])
    source = jnp.argmin(order, axis=1).astype(jnp.int32)
    most = jnp.minimum(known - 1, take(fixed, source))
    if mappable is not None:
        most = jnp.minimum(most, mappable)
    shared = _num_common(
        take(table.tokens, seq_indices),
        take(table.tokens, take(seq_indices, source)),
        most,
    )
    if cache_groups.has_windows(blocks.windows):
        joins &= cache_groups.has_windows_at(blocks, source, shared)
    at = jnp.where(joins, rows, queue.status.shape[0])
    counts = take(scheduler.is_new_request(queue), seq_indices)
    gained = jnp.where(counts, shared - start, 0)
    queue = dataclasses.replace(
        queue,
        sources=put(queue.sources, at, take(seq_indices, source)),
        shared_lens=put(queue.shared_lens, at, shared),
        num_cached=add(queue.num_cached, at, gained),
    )
    table = dataclasses.replace(table, queue=queue)
    return table, block_manager.free(blocks, joins), joins


def _has_same_next_block(
    table: RequestTable,
    rows: jax.Array,
    blocks: BlockState,
    is_new: jax.Array,
    fixed: jax.Array,
    is_before: jax.Array,
) -> jax.Array:
    """bool[S, S]: row i can join row j, whose next whole block has the same tokens.

    `fixed` i32[S]: tokens of each row that never change and are not the last one.
    `is_before` bool[S, S]: whether row j comes before row i.
    """
    size, queue, seq_indices = blocks.block_size, table.queue, jnp.maximum(rows, 0)
    known, start = take(queue.num_tokens, seq_indices), blocks.context_lens
    can_join = is_new & ~take(table.params.keeps_prompt_logprobs, seq_indices)
    can_join &= take(queue.sources, seq_indices) == seq_indices
    can_join &= start + size < known
    is_source = (rows != scheduler.NO_REQUEST) & (
        take(queue.status, seq_indices) == scheduler.RUNNING
    )
    is_source &= ~take(queue.has_ended | table.is_stale, seq_indices)

    fits = can_join[:, None] & is_source[None, :] & is_before
    fits &= fixed[None, :] >= (start + size)[:, None]
    # The same block precedes the next one in both rows.
    last = jnp.maximum(floor_div(start, size) - 1, 0)
    tables, index = blocks.block_tables, jnp.arange(rows.shape[0], dtype=jnp.int32)
    same_path = tables[:, last].T == tables[index, last][:, None]
    if cache_groups.has_windows(blocks.windows):
        same_path &= (tables[index, last] != NO_BLOCK)[:, None]
    same_path &= blocks.context_lens[None, :] >= start[:, None]
    fits &= same_path | (start == 0)[:, None]

    column = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    mine = take(table.tokens, seq_indices[:, None], column)
    others = take(table.tokens, seq_indices[None, :, None], column[:, None, :])
    return fits & jnp.all(others == mine[:, None, :], axis=2)
