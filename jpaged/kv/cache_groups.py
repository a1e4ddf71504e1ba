"""Cache groups: layers with the same window share block tables of their own.

Pipeline: model config -> [cache_groups] -> block_state, block_manager, scheduler.

A query of a layer with a sliding window sees only the last tokens, so the blocks in
front of the window can be reused, while layers without a window keep theirs. Layers
with the same window therefore form *groups*. All groups have the same number of
layers, so that blocks of all groups have one size in bytes and come from one pool.

The tables of the groups are side by side in one table per row: group g has the columns
g * M to (g + 1) * M. Operations that only count references or move rows, such as `fork`
and swapping, need to know nothing else. For the others, `split_groups` makes a state in
which each group of each row is a row.

Shape symbols: S rows, G groups, M blocks per row and group, P tokens per block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv, floor_div
from jpaged.compat import when
from jpaged.indexing import take
from jpaged.kv.block_state import NO_BLOCK, BlockState, num_blocks_per_row

# Groups have equal numbers of layers, so some have layers that store nothing. More
# groups waste less memory for them, and cost more time for their tables.
_MAX_GROUPS = 8
_MAX_PADDING = 1.15

Windows = tuple[int | None, ...]


class LayerGroups(NamedTuple):
    """Which group each layer belongs to."""

    windows: Windows  # of each group, None: all tokens; groups without window first
    num_layers: int  # layers of each group, those that store nothing included
    groups: tuple[int, ...]  # of each layer
    indices: tuple[int, ...]  # of each layer: its number in its group


def layer_groups(windows: Sequence[int | None], max_model_len: int) -> LayerGroups:
    """Divide layers into groups with equal numbers of layers.

    Args:
      windows: tokens that a query of each layer sees; None: all.
      max_model_len: tokens of the longest sequence; a window that is not shorter is
        none.

    >>> layer_groups([8, None, 8], 32)
    LayerGroups(windows=(None, 8, 8), num_layers=1, groups=(1, 0, 2), indices=(0, 0, 0))
    >>> layer_groups([8, 8, 8, 8, 8, None], 32).windows
    (None, 8, 8, 8, 8, 8)
    >>> layer_groups([8, 8], 32)
    LayerGroups(windows=(8,), num_layers=2, groups=(0, 0), indices=(0, 1))
    """
    effective = [None if w is None or w >= max_model_len else w for w in windows]
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(effective):
        kinds.setdefault(window, []).append(layer)
    ordered = sorted(kinds, key=lambda window: (window is not None, window or 0))
    size = _group_size([len(layers) for layers in kinds.values()])
    found: list[int | None] = []
    groups, indices = [0] * len(effective), [0] * len(effective)
    for window in ordered:
        for number, layer in enumerate(kinds[window]):
            groups[layer] = len(found) + number // size
            indices[layer] = number % size
        found += [window] * cdiv(len(kinds[window]), size)
    return LayerGroups(tuple(found), size, tuple(groups), tuple(indices))


def choose_groups(
    windows: Sequence[int | None],
    max_model_len: int,
    is_grouped: bool = True,
    draft_windows: Sequence[int | None] = (),
) -> LayerGroups:
    """Return `layer_groups`, or one group of all layers without a window.

    Args:
      windows, max_model_len: as for `layer_groups`.
      is_grouped: False returns one group.
      draft_windows: tokens that a query of each layer of a draft model sees. There is
        one group if no group of the target keeps all tokens that such a layer sees.
    """
    found = layer_groups(windows, max_model_len)
    fits = place_layers(draft_windows, found.windows, max_model_len) is not None
    if is_grouped and fits:
        return found
    return layer_groups([None] * len(windows), max_model_len)


def place_layers(
    windows: Sequence[int | None], groups: Windows, max_model_len: int
) -> LayerGroups | None:
    """Divide the layers of a draft model over the groups of its target.

    A layer joins the group with the fewest layers among those whose window is not
    smaller than its own, those with the largest windows first.

    Args:
      windows: tokens that a query of each layer sees; None: all.
      groups: the windows of the target's groups.
      max_model_len: as for `layer_groups`.

    Returns:
      The group of each layer; None if no group keeps the tokens that a layer sees.

    >>> place_layers([None, 8, 8, 8], (None, 16, 16), 32)
    LayerGroups(windows=(None, 16, 16), num_layers=2, groups=(0, 1, 2, 0), \
indices=(0, 0, 0, 1))
    >>> place_layers([None], (16,), 32)
    """

    def size(window: int | None) -> int:
        return max_model_len if window is None else min(window, max_model_len)

    members: list[list[int]] = [[] for _ in groups]
    for layer in sorted(range(len(windows)), key=lambda i: -size(windows[i])):
        fitting = [
            mine
            for mine, window in zip(members, groups, strict=True)
            if size(window) >= size(windows[layer])
        ]
        if not fitting:
            return None
        min(fitting, key=len).append(layer)
    places = {
        layer: (group, index)
        for group, mine in enumerate(members)
        for index, layer in enumerate(mine)
    }
    return LayerGroups(
        groups,
        max(map(len, members)),
        tuple(places[layer][0] for layer in range(len(windows))),
        tuple(places[layer][1] for layer in range(len(windows))),
    )


def groups_of_layers(
    windows: Sequence[int | None], groups: Windows, max_model_len: int
) -> LayerGroups:
    """Return the group of each layer of a model, or of its draft model.

    Args:
      windows, max_model_len: as for `layer_groups`.
      groups: the windows of the engine's groups.

    Raises:
      ValueError: the model has other groups, and cannot be a draft model for these.
    """
    if groups == (None,):
        return layer_groups([None] * len(windows), max_model_len)
    found: LayerGroups | None = layer_groups(windows, max_model_len)
    if found is not None and found.windows != groups:
        found = place_layers(windows, groups, max_model_len)
    if found is None:
        raise ValueError(
            "group_windows: expected (None,) with a draft model whose layers see more "
            f"tokens than a group of its target's keeps, got {groups}"
        )
    return found


def _group_size(counts: list[int]) -> int:
    """Return the layers of a group, for kinds with so many layers each."""

    def num_groups(size: int) -> int:
        return sum(cdiv(count, size) for count in counts)

    sizes = range(min(counts), 0, -1)
    for size in sizes:
        is_small = size * num_groups(size) <= _MAX_PADDING * sum(counts)
        if is_small and num_groups(size) <= _MAX_GROUPS:
            return size
    few = [size for size in sizes if num_groups(size) <= _MAX_GROUPS]
    if not few:  # more kinds of layers than groups: the table of each is padded
        return max(counts)
    return min(few, key=lambda size: size * num_groups(size))


def has_windows(windows: Windows) -> bool:
    """Return whether some group frees blocks in front of its window."""
    return any(window is not None for window in windows)


def max_window_blocks(window: Any, block_size: int, chunk: Any) -> Any:
    """Return the blocks that a row of a group with a window uses at most.

    The tokens of a chunk and those that its first query sees may begin at any offset.

    Args:
      window: tokens that a query sees.
      block_size: P.
      chunk: tokens that a row computes in one step at most.
    """
    return cdiv(chunk + window - 2, block_size) + 1


def blocks_of_length(windows: Windows, block_size: int, length: Any, chunk: Any) -> Any:
    """Return the blocks of all groups that a row of `length` tokens uses at most.

    Args:
      windows: of the groups.
      block_size: P.
      length: an integer or integers.
      chunk: as for `max_window_blocks`.

    >>> blocks_of_length((None,), 16, 100, 8)
    7
    >>> blocks_of_length((None, 32), 16, 1000, 1)  # 63 and 3
    66
    """
    return sum(group_blocks(windows, block_size, length, chunk))


def group_blocks(
    windows: Windows, block_size: int, length: Any, chunk: Any
) -> list[Any]:
    """Return the same as `blocks_of_length` for each group."""
    whole = cdiv(length, block_size)
    return [
        whole
        if window is None
        else _least(whole, max_window_blocks(window, block_size, chunk))
        for window in windows
    ]


def _least(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def longest_length(
    windows: Windows, block_size: int, num_blocks: int, chunk: int
) -> int:
    """Return the tokens of the longest row that fits into `num_blocks` blocks.

    0 if not even one block of each group fits. Without a limit, that is, if all groups
    have windows and fit, it is 2 ** 30.
    """
    low, high = 0, 2**30 // block_size
    while low < high:
        middle = (low + high + 1) // 2
        needed = blocks_of_length(windows, block_size, middle * block_size, chunk)
        low, high = (middle, high) if needed <= num_blocks else (low, middle - 1)
    return low * block_size


# ---- tables of all groups


def num_columns(state: BlockState) -> int:
    """Return M, the columns of each group's table."""
    return state.block_tables.shape[1] // len(state.windows)


def tables_by_group(block_tables: jax.Array, num_groups: int) -> jax.Array:
    """Return tables i32[S, G * M] as i32[G, S, M]."""
    num_rows, width = block_tables.shape
    tables = block_tables.reshape(num_rows, num_groups, width // num_groups)
    return jnp.swapaxes(tables, 0, 1)


def split_groups(state: BlockState) -> BlockState:
    """Return a state with a row for each group of each row: row s * G + g.

    The tables stay where they are in memory.
    """
    return dataclasses.replace(
        state,
        block_tables=state.block_tables.reshape(-1, num_columns(state)),
        context_lens=jnp.repeat(state.context_lens, len(state.windows)),
        windows=(None,),
    )


def join_groups(split: BlockState, state: BlockState) -> BlockState:
    """Undo `split_groups`, with the windows of `state`."""
    return dataclasses.replace(
        state,
        ref_counts=split.ref_counts,
        block_tables=split.block_tables.reshape(state.block_tables.shape),
        context_lens=split.context_lens[:: len(state.windows)],
    )


def sum_groups(values: jax.Array, state: BlockState) -> jax.Array:
    """Return the sum over groups of values of `split_groups`' rows, i32[S]."""
    return jnp.sum(values.reshape(-1, len(state.windows)), axis=1)


def num_stored_blocks(state: BlockState) -> jax.Array:
    """Return the blocks of each row in each group, i32[G, S]; i32[S] of one table."""
    if state.windows == (None,):
        return num_blocks_per_row(state)
    tables = tables_by_group(state.block_tables, len(state.windows))
    return jnp.sum(tables != NO_BLOCK, axis=2, dtype=jnp.int32)


def first_columns(state: BlockState, lens: jax.Array) -> jax.Array:
    """Return the first column that the next token of each row still sees, i32[G, S].

    Args:
      state: the block tables.
      lens: i32[S], tokens of each row. The next one is at this position, and sees
        `window` tokens, itself included.
    """
    return jnp.stack(
        [
            jnp.zeros_like(lens)
            if window is None
            else floor_div(jnp.maximum(lens - window + 1, 0), state.block_size)
            for window in state.windows
        ]
    )


def release_front(state: BlockState, held: jax.Array) -> BlockState:
    """Release the blocks in front of the window of each row's next token.

    A row's blocks end up in one range of columns, up to its last one. Nothing is
    written if no row has a block to release, as in most steps.

    Args:
      state: the block tables.
      held: bool[S], rows that keep their blocks, because others will map them.
    """
    if not has_windows(state.windows):
        return state
    firsts = jnp.where(held[None, :], 0, first_columns(state, state.context_lens))
    width = num_columns(state)

    # Rows release from the front, so the last column before the window tells.
    group, row = jnp.indices(firsts.shape, jnp.int32)
    column = group * width + jnp.clip(firsts - 1, 0, width - 1)
    last = take(state.block_tables, row, column)
    has_any = jnp.any((firsts > 0) & (last != NO_BLOCK))

    def release(state: BlockState) -> BlockState:
        column = jnp.arange(width, dtype=jnp.int32)
        is_before = column[None, None, :] < firsts.T[:, :, None]
        is_before = is_before.reshape(state.block_tables.shape)
        is_released = is_before & (state.block_tables != NO_BLOCK)
        (num_blocks,) = state.ref_counts.shape
        at = jnp.where(is_released, state.block_tables, num_blocks)
        return dataclasses.replace(
            state,
            ref_counts=state.ref_counts.at[at].add(-1, mode="drop"),
            block_tables=jnp.where(is_released, NO_BLOCK, state.block_tables),
        )

    return when(has_any, release, state)


def has_windows_at(state: BlockState, rows: jax.Array, lens: jax.Array) -> jax.Array:
    """Return whether rows still have what a copy of their first tokens would see.

    Args:
      state: the block tables.
      rows: i32[B], rows.
      lens: i32[B], tokens; no more of them than the row has count.

    Returns:
      bool[B].
    """
    lens = jnp.minimum(lens, take(state.context_lens, rows))
    columns = first_columns(state, lens)
    tables = tables_by_group(state.block_tables, len(state.windows))
    group = jnp.arange(len(state.windows), dtype=jnp.int32)[:, None]
    entry = tables.at[group, rows[None, :], columns].get(mode="clip")
    sees_none = columns * state.block_size >= lens[None, :]
    return jnp.all(sees_none | (entry != NO_BLOCK), axis=0)


def at_least(stored: jax.Array, least: jax.Array) -> jax.Array:
    """Return `stored`, as from `num_stored_blocks`, but at least `least`, i32[S]."""
    return jnp.maximum(stored, least if stored.ndim == 1 else least[None, :])


def num_blocks_to_grow(
    state: BlockState, lens: jax.Array, stored: jax.Array, chunk: jax.Array
) -> jax.Array:
    """Return the further blocks that rows need to grow to `lens` tokens, at most.

    Args:
      state: the sizes.
      lens: i32[B], tokens of each row in the end.
      stored: i32[B] or i32[G, B], blocks that each row has in each group.
      chunk: i32[], tokens that a row computes in one step at most.

    Returns:
      i32[B]; negative if a row without windows has more blocks than it needs.
    """
    if state.windows == (None,):
        return cdiv(lens, state.block_size) - stored
    most = jnp.stack(group_blocks(state.windows, state.block_size, lens, chunk))
    stored = stored if stored.ndim == 2 else stored[None, :]
    return jnp.sum(jnp.maximum(most - stored, 0), axis=0)


def num_entries(state: BlockState) -> jax.Array:
    """Return the entries of all tables that have a block, i32[]."""
    return jnp.sum(state.block_tables != NO_BLOCK, dtype=jnp.int32)


def num_single_table_blocks(state: BlockState) -> jax.Array:
    """Return the blocks of all groups if no group had a window, i32[].

    Blocks that rows share now count once. What rows shared in front of a window is not
    known any more and counts for each of them, but only if all groups have windows.
    """
    table = tables_by_group(state.block_tables, len(state.windows))[0]
    has_block = table != NO_BLOCK
    # A block with n owners counts n times as a part of 1 / n.
    owners = take(state.ref_counts, jnp.maximum(table, 0)).astype(jnp.float32)
    parts = jnp.where(has_block, 1 / jnp.maximum(owners, 1), 0)
    num_used = jnp.round(jnp.sum(parts)).astype(jnp.int32)
    num_shared = jnp.sum(has_block, dtype=jnp.int32) - num_used
    whole = jnp.sum(num_blocks_per_row(state)) - num_shared
    return whole * len(state.windows)
