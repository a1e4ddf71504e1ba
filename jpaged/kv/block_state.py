"""Block tables, lengths and reference counts: the state of the block manager.

Pipeline: [block_state] -> block_manager, which changes it.

Shape symbols: S rows, N blocks, M blocks per row, of all cache groups together.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv

NO_BLOCK = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drops:
    """What rows of a `BlockState` have dropped; zeros for empty rows."""

    dropped: jax.Array  # i32[S], tokens, a multiple of the block size
    decided: jax.Array  # i32[S], computed tokens at the last decision; 0: none yet
    statistic: jax.Array | None = None  # f32[S, M], of each block, without it None
    observed: jax.Array | None = None  # i32[S], tokens whose queries it includes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockState:
    """Complete state of the block manager, as a pytree."""

    ref_counts: jax.Array  # i32[N], block-table entries that point at it; 0 = free
    block_tables: jax.Array  # i32[S, M], NO_BLOCK after the last used entry
    context_lens: jax.Array  # i32[S], tokens stored; 0 = the row is empty
    block_size: int = dataclasses.field(metadata={"static": True})
    drops: Drops | None = None  # None: rows store all their tokens (`kv.drops`)
    # Of each cache group, the tokens that a query sees; None: all. The tables of the
    # groups are side by side, and start with NO_BLOCK in front of a window.
    windows: tuple[int | None, ...] = dataclasses.field(
        default=(None,), metadata={"static": True}
    )


def init_state(
    *,
    num_blocks: int,
    block_size: int,
    max_seqs: int,
    max_blocks_per_seq: int,
    windows: tuple[int | None, ...] = (None,),
) -> BlockState:
    """Return a state in which every block is free and every row is empty.

    Args:
      num_blocks: N, physical blocks in the pool.
      block_size: P, tokens per block.
      max_seqs: S, rows of the block tables.
      max_blocks_per_seq: columns of the block table of each group.
      windows: tokens that a query sees in each cache group (`kv.cache_groups`); None:
        all.

    Raises:
      ValueError: a size is below 1, or slot numbers do not fit into int32.
    """
    sizes = dict(
        num_blocks=num_blocks,
        block_size=block_size,
        max_seqs=max_seqs,
        max_blocks_per_seq=max_blocks_per_seq,
    )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name in ("num_blocks", "max_blocks_per_seq"):
        if sizes[name] * block_size >= 2**31:
            raise ValueError(
                f"{name} * block_size: expected less than 2**31 (slots are int32), "
                f"got {sizes[name]} * {block_size}; use fewer blocks"
            )
    return BlockState(
        ref_counts=jnp.zeros((num_blocks,), jnp.int32),
        block_tables=jnp.full(
            (max_seqs, max_blocks_per_seq * len(windows)), NO_BLOCK, jnp.int32
        ),
        context_lens=jnp.zeros((max_seqs,), jnp.int32),
        block_size=block_size,
        windows=tuple(windows),
    )


def num_free_blocks(state: BlockState) -> jax.Array:
    """Return the number of blocks that no row uses, i32[]."""
    return jnp.sum(state.ref_counts == 0, dtype=jnp.int32)


def num_blocks_per_row(state: BlockState) -> jax.Array:
    """Return the number of blocks of each row without a window, i32[S]."""
    return cdiv(state.context_lens, state.block_size)


def row_array(
    name: str, value: jax.Array, state: BlockState, dtype: type = jnp.int32
) -> jax.Array:
    """Return `value` as an array of shape [S] and type `dtype`.

    Raises:
      ValueError: `value` does not have one boolean or integer per row.
    """
    value = jnp.asarray(value)
    kind = jnp.bool_ if dtype == jnp.bool_ else jnp.integer
    if value.shape != state.context_lens.shape or not jnp.issubdtype(value.dtype, kind):
        raise ValueError(
            f"{name}: expected {kind.__name__} of shape {state.context_lens.shape}, "
            f"one per row, got {value.dtype} of shape {value.shape}"
        )
    return value.astype(dtype)


def violations(state: BlockState) -> list[str]:
    """Return one sentence for each inconsistency; an empty list if there is none.

    Runs on the host, for tests and debugging. It recounts everything from the tables,
    row by row, and uses none of the traced operations.
    """
    ref_counts = np.asarray(state.ref_counts)
    block_tables = np.asarray(state.block_tables)
    (num_blocks,) = ref_counts.shape
    width = block_tables.shape[1] // len(state.windows)
    found: list[str] = []
    entries = np.zeros((num_blocks,), np.int64)
    for row, length in enumerate(np.asarray(state.context_lens).tolist()):
        if not 0 <= length <= width * state.block_size:
            found.append(f"row {row}: length {length} does not fit the block table")
        for group, window in enumerate(state.windows):
            table = block_tables[row, group * width : (group + 1) * width]
            name = f"row {row}" + f", group {group}" * (len(state.windows) > 1)
            wrong, blocks = _table_violations(
                table, length, window, state.block_size, num_blocks
            )
            found += [f"{name}: {one}" for one in wrong]
            np.add.at(entries, blocks, 1)
    for block in np.flatnonzero(entries != ref_counts).tolist():
        found.append(
            f"block {block}: {entries[block]} table entries point at it, "
            f"its reference count is {ref_counts[block]}"
        )
    return found


def _table_violations(
    table: np.ndarray, length: int, window: int | None, size: int, num_blocks: int
) -> tuple[list[str], np.ndarray]:
    """Check the table of one row and group; also return its blocks."""
    found: list[str] = []
    num_used = max(0, cdiv(length, size))
    used, rest = table[:num_used], table[num_used:]
    if window is not None:
        # The next token sees itself and the `window - 1` tokens before it.
        first = max(0, length - (window - 1)) // size
        is_gone = used == NO_BLOCK
        if is_gone[first:].any():
            columns = np.flatnonzero(is_gone[first:]) + first
            found.append(f"columns {columns.tolist()} inside the window have no block")
        if (is_gone[1:] & ~is_gone[:-1]).any():
            found.append(f"{used.tolist()} has blocks in front of released ones")
        used = used[~is_gone]
    is_block = (used >= 0) & (used < num_blocks)
    if not is_block.all():
        found.append(f"{used.tolist()} contains invalid block numbers")
    if (rest != NO_BLOCK).any():
        found.append(f"entries {rest.tolist()} after its {length} tokens")
    blocks, times = np.unique(used[is_block], return_counts=True)
    if (times > 1).any():
        found.append(f"blocks {blocks[times > 1].tolist()} occur twice")
    return found, used[is_block]
