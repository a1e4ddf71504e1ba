"""Slow block manager in Python lists, and a comparison with the arrays.

The model has no block numbers. A page is a Python list of tokens, a table is a list of
pages, and two rows share a page if both tables contain the same list object. It appends
token by token, row by row. It shares only the paper's rules with the arrays, and the
two are compared up to the numbering of blocks.

`Checked` runs both side by side, with a simulated memory that is written as the engine
writes pages: first the copies, then each new token at its slot. Every written token is
a different number. So a row that reads back its own history shares no block by mistake,
lost no block, and was copied where necessary.
"""

import copy
import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.kv import block_manager
from jpaged.kv.block_manager import NO_BLOCK, BlockState

Page = list[int]


class OutOfBlocks(Exception):
    """The model's pool is empty, or a table is full."""


@dataclasses.dataclass
class SlowBlockManager:
    """Rows of pages. At most `num_blocks` pages can be in use at the same time."""

    num_blocks: int
    block_size: int
    max_seqs: int
    max_blocks_per_seq: int

    def __post_init__(self) -> None:
        self.tables: list[list[Page]] = [[] for _ in range(self.max_seqs)]
        self.histories: list[list[int]] = [[] for _ in range(self.max_seqs)]
        self.copied_rows: list[int] = []

    def owners(self, page: Page) -> list[int]:
        return [
            row
            for row, table in enumerate(self.tables)
            if any(page is one for one in table)
        ]

    def num_free(self) -> int:
        return self.num_blocks - len({id(p) for table in self.tables for p in table})

    def append(self, tokens: list[list[int]]) -> bool:
        """Append `tokens[row]` to each row, or nothing at all."""
        before = (list(map(list, self.tables)), list(map(list, self.histories)))
        pages = {id(p): (p, list(p)) for table in self.tables for p in table}
        self.copied_rows = []
        try:
            for row, row_tokens in enumerate(tokens):
                for token in row_tokens:
                    self._append_token(row, token)
        except OutOfBlocks:
            self.tables, self.histories = before
            for page, contents in pages.values():
                page[:] = contents
            self.copied_rows = []
            return False
        return True

    def _append_token(self, row: int, token: int) -> None:
        table, history = self.tables[row], self.histories[row]
        offset = len(history) % self.block_size
        if offset == 0:
            if len(table) == self.max_blocks_per_seq:
                raise OutOfBlocks
            table.append(self._new_page())
        elif len(self.owners(table[-1])) > 1:
            page = self._new_page()
            page[:] = table[-1]
            table[-1] = page
            self.copied_rows.append(row)
        table[-1][offset] = token
        history.append(token)

    def _new_page(self) -> Page:
        if self.num_free() == 0:
            raise OutOfBlocks
        return [0] * self.block_size

    def fork(self, parents: list[int]) -> None:
        tables, histories = self.tables, self.histories
        is_row = [0 <= parent < self.max_seqs for parent in parents]
        pairs = list(zip(parents, is_row, strict=True))
        self.tables = [list(tables[p]) if ok else [] for p, ok in pairs]
        self.histories = [list(histories[p]) if ok else [] for p, ok in pairs]

    def truncate(self, context_lens: list[int]) -> None:
        for row, length in enumerate(context_lens):
            if 0 <= length < len(self.histories[row]):
                del self.histories[row][length:]
                del self.tables[row][cdiv(length, self.block_size) :]

    def freed_by(self, rows: set[int]) -> int:
        """Number of pages that become free when exactly these rows are freed."""
        pages = {id(page): page for table in self.tables for page in table}
        return sum(set(self.owners(page)) <= rows for page in pages.values())

    def check_reads(self) -> None:
        """Check the model itself: every row reads what was appended to it."""
        for table, history in zip(self.tables, self.histories, strict=True):
            assert list(itertools.chain(*table))[: len(history)] == history


def jitted_operations() -> types.SimpleNamespace:
    """Every operation, compiled once for all walks of the same shapes."""
    names = ("append", "fork", "free", "truncate", "slots", "num_free_blocks")
    names += ("blocks_needed", "exclusive_blocks")
    # jax.jit shares compiled programs between all wrappers of one function, so it would
    # not see a planted fault, nor count from zero. A partial is a new function.
    return types.SimpleNamespace(
        **{n: jax.jit(functools.partial(getattr(block_manager, n))) for n in names}
    )


class Checked:
    """The arrays, the model and the memory, compared after every operation."""

    def __init__(self, operations: types.SimpleNamespace, **sizes: int) -> None:
        self.operations = operations
        self.state: BlockState = block_manager.init_state(**sizes)
        block_size, max_seqs = sizes["block_size"], sizes["max_seqs"]
        self.model = SlowBlockManager(
            sizes["num_blocks"], block_size, max_seqs, sizes["max_blocks_per_seq"]
        )
        self.memory = np.zeros((sizes["num_blocks"], block_size), np.int64)
        self.next_token = 1
        self.num_refused = self.num_copies = 0

    def branch(self) -> "Checked":
        """A copy that can be continued independently."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)  # preserves which pages are shared
        other.memory = self.memory.copy()
        return other

    def append(self, num_tokens: list[int]) -> bool:
        ops, before = self.operations, self.state
        needed = np.asarray(ops.blocks_needed(before, _i32(num_tokens)))
        state, appended = ops.append(before, _i32(num_tokens))
        return self.check_append(num_tokens, state, appended, needed)

    def check_append(
        self,
        num_tokens: list[int],
        state: BlockState,
        appended: block_manager.Append,
        needed: np.ndarray,
    ) -> bool:
        """Check the result of an append."""
        before, self.state = self.state, state
        tokens = [self._new_tokens(n) for n in num_tokens]
        is_valid = all(n >= 0 for n in num_tokens)
        ok = is_valid and self.model.append(tokens)
        assert bool(appended.ok) == ok
        src, dst = np.asarray(appended.copy_src), np.asarray(appended.copy_dst)
        if not ok:
            self.num_refused += 1
            assert (src == NO_BLOCK).all()
            assert (dst == NO_BLOCK).all()
            for new, old in zip(
                jax.tree.leaves(state), jax.tree.leaves(before), strict=True
            ):
                np.testing.assert_array_equal(new, old)
        else:
            assert np.flatnonzero(src != NO_BLOCK).tolist() == self.model.copied_rows
            taken = _used(state) - _used(before)
            assert needed.sum() == taken
            self.num_copies += len(self.model.copied_rows)
            self._write(tokens, src, dst)
        self.check()
        return ok

    def fork(self, parents: list[int]) -> None:
        self.model.fork(parents)
        self.state = self.operations.fork(self.state, _i32(parents))
        self.check()

    def free(self, rows: list[bool]) -> None:
        self.model.fork([NO_BLOCK if r else i for i, r in enumerate(rows)])
        self.state = self.operations.free(self.state, jnp.asarray(rows))
        self.check()

    def truncate(self, context_lens: list[int]) -> None:
        self.model.truncate(context_lens)
        self.state = self.operations.truncate(self.state, _i32(context_lens))
        self.check()

    def check_exclusive_blocks(self, order: list[int]) -> None:
        counts = np.asarray(self.operations.exclusive_blocks(self.state, _i32(order)))
        rows = sorted(range(len(order)), key=lambda row: (order[row], row))
        for first in range(len(rows)):
            last = rows[first:]
            assert counts[last].sum() == self.model.freed_by(set(last))

    def check(self) -> None:
        """Check that the arrays are consistent, equal the model, and read back."""
        self.model.check_reads()
        assert block_manager.violations(self.state) == []
        model, tables = self.model, np.asarray(self.state.block_tables)
        lengths = [len(history) for history in model.histories]
        assert np.asarray(self.state.context_lens).tolist() == lengths
        free = int(self.operations.num_free_blocks(self.state))
        assert free == model.num_free()
        ref_counts = np.asarray(self.state.ref_counts)
        names: dict[int, int] = {}
        for row, table in enumerate(model.tables):
            for column, page in enumerate(table):
                block = int(tables[row, column])
                assert names.setdefault(id(page), block) == block
                assert ref_counts[block] == len(model.owners(page))
            read = self.memory[tables[row, : len(table)]].reshape(-1)
            assert read[: lengths[row]].tolist() == model.histories[row]
        assert len(set(names.values())) == len(names)

    def _new_tokens(self, count: int) -> list[int]:
        first = self.next_token
        self.next_token += max(count, 0)
        return list(range(first, self.next_token))

    def _write(self, tokens: list[list[int]], src: np.ndarray, dst: np.ndarray) -> None:
        """Write as the engine does: all copies, then every token at its slot."""
        is_copy = src != NO_BLOCK
        self.memory[dst[is_copy]] = self.memory[src[is_copy]]
        limit = self.model.max_blocks_per_seq * self.model.block_size
        rows, positions, values = [], [], []
        for row, row_tokens in enumerate(tokens):
            end = len(self.model.histories[row])
            positions += range(end - len(row_tokens), end)
            rows += [row] * len(row_tokens)
            values += row_tokens
        # The size is fixed, so that `slots` compiles once; the rest are padding tokens.
        padding = limit * len(tokens) - len(rows)
        slots = self.operations.slots(
            self.state, _i32(rows + [-1] * padding), _i32(positions + [0] * padding)
        )
        slots = np.asarray(slots)
        assert (slots[len(rows) :] == -1).all()
        slots = slots[: len(rows)]
        assert (slots >= 0).all()
        assert len(set(slots.tolist())) == len(slots)
        self.memory.reshape(-1)[slots] = values


def random_walk(checked: Checked, rng: np.random.Generator, num_steps: int) -> None:
    """Mix operations as an engine does, and some that no engine requests."""
    max_seqs = checked.model.max_seqs
    block_size = checked.model.block_size
    for _ in range(num_steps):
        lengths = np.array([len(history) for history in checked.model.histories])
        match rng.integers(6):
            case 0 | 1:  # a decode step, sometimes with a new row
                tokens = np.where(lengths > 0, 1, 0)
                tokens[rng.integers(max_seqs)] = rng.integers(2 * block_size + 1)
                checked.append(tokens.tolist())
            case 2:
                checked.append(rng.integers(0, block_size, max_seqs).tolist())
            case 3:
                checked.fork(rng.integers(-1, max_seqs, max_seqs).tolist())
            case 4:
                checked.free((rng.random(max_seqs) < 0.3).tolist())
            case 5:
                cut = lengths - rng.integers(0, block_size + 1, max_seqs)
                checked.truncate(cut.tolist())
        checked.check_exclusive_blocks(rng.integers(0, 3, max_seqs).tolist())


def _i32(values: list[int]) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


def _used(state: BlockState) -> int:
    return int((np.asarray(state.ref_counts) > 0).sum())
