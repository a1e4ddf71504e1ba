"""Slow prefix cache in plain Python, and a comparison with the arrays.

The model is a dictionary: the tokens of a whole prefix -> its block and clock. It has
no parents, hashes or table. `Checked` runs both, with a memory in which every token is
written at the slot of the block manager: if a node is overwritten or a row gets a wrong
block, reading the memory back gives wrong tokens.
"""

import dataclasses
import functools
import random
import types

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.kv import block_manager, prefix_cache
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.kv.prefix_table import NOT_CACHED

N, P, S, M = 13, 2, 3, 4
L = M * P
ROWS = range(S)
QUICKLY = {"xla_backend_optimization_level": 0}


def as_owner(cache, blocks):
    """The blocks, with one more reference for each node."""
    is_node = (cache.parents != NOT_CACHED).astype(jnp.int32)
    return dataclasses.replace(blocks, ref_counts=blocks.ref_counts + is_node)


def append_beside(cache, blocks, num_tokens):
    """An append that neither reuses nor overwrites a node."""
    after, appended = block_manager.append(as_owner(cache, blocks), num_tokens)
    is_node = as_owner(cache, blocks).ref_counts - blocks.ref_counts
    return dataclasses.replace(after, ref_counts=after.ref_counts - is_node), appended


def append_carelessly(cache, blocks, num_tokens):
    """A fault: unused nodes are not reused, but a node in use is written in place."""
    is_unused = (as_owner(cache, blocks).ref_counts == 1) & (blocks.ref_counts == 0)
    after = dataclasses.replace(
        blocks, ref_counts=blocks.ref_counts + is_unused.astype(jnp.int32)
    )
    after, appended = block_manager.append(after, num_tokens)
    counts = after.ref_counts - is_unused.astype(jnp.int32)
    return dataclasses.replace(after, ref_counts=counts), appended


def jitted(function):
    """A new jitted function: jax shares programs between wrappers of one function."""
    return jax.jit(functools.partial(function), compiler_options=QUICKLY)


# The same for all mutants of the prefix cache, so compiled once.
SHARED = {
    "append": jitted(append_beside),
    "fork": jitted(block_manager.fork),
    "truncate": jitted(block_manager.truncate),
}


def operations(module=prefix_cache, **others):
    """All operations of a walk, jitted; `module` can be a mutant of `prefix_cache`."""
    found = {
        name: jitted(getattr(module, name))
        for name in ("match", "insert", "touch", "evict")
    }
    return types.SimpleNamespace(**SHARED | found | others, module=module)


def i32(*values: int) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


class Checked:
    """The arrays and the model side by side; every method compares them."""

    def __init__(self, run, max_nodes: int | None = None) -> None:
        """`max_nodes`: the capacity of the hash table, if a test makes it overflow."""
        self.run, self.max_nodes = run, max_nodes
        self.cache = run.module.init_prefix_cache(N, P)
        self.blocks = block_manager.init_state(
            num_blocks=N, block_size=P, max_seqs=S, max_blocks_per_seq=M
        )
        self.nodes: dict[tuple[int, ...], int] = {}  # prefix -> block
        self.used: dict[tuple[int, ...], int] = {}  # prefix -> clock
        self.histories: list[list[int]] = [[] for _ in ROWS]
        self.memory = np.full((N, P), -1)
        self.clock = 0
        self.num_hits = self.num_evicted = self.num_replaced = self.num_refused = 0
        self.num_copies = 0

    def longest(self, tokens: list[int], limit: int) -> int:
        """Tokens of the longest cached prefix."""
        end, limit = 0, min(limit, len(tokens))
        while end + P <= limit and tuple(tokens[: end + P]) in self.nodes:
            end += P
        return end

    def padded(self, rows: list[list[int]]) -> jax.Array:
        return jnp.asarray(np.array([r + [-7] * (L - len(r)) for r in rows], np.int32))

    def match(self, tokens: list[int], limit: int) -> list[int]:
        """Look up row 0 with the limit and row 1 without; row 2 looks up nothing."""
        rows, lens = [tokens] * S, [min(limit, len(tokens)), len(tokens), 0]
        paths, found = self.run.match(self.cache, self.padded(rows), i32(*lens))
        paths = np.asarray(paths).tolist()
        for row, most in enumerate(lens):
            end = self.longest(tokens, most)
            path = [self.nodes[tuple(tokens[: at + P])] for at in range(0, end, P)]
            assert int(found[row]) == end
            assert paths[row] == path + [NO_BLOCK] * (M - len(path))
        return paths[0][: int(found[0]) // P]

    def start(self, row: int, tokens: list[int]) -> None:
        """Give an empty row a prompt: map the cached prefix and append the rest."""
        if self.histories[row]:
            return
        path = self.match(tokens, len(tokens) - 1)
        self.num_hits += len(path)
        tables = np.array(self.blocks.block_tables)
        counts = np.array(self.blocks.ref_counts)
        lens = np.array(self.blocks.context_lens)
        tables[row, : len(path)] = path
        counts[path] += 1
        lens[row] = len(path) * P
        self.blocks = dataclasses.replace(
            self.blocks,
            block_tables=jnp.asarray(tables),
            ref_counts=jnp.asarray(counts),
            context_lens=jnp.asarray(lens),
        )
        self.histories[row] = list(tokens[: len(path) * P])
        self.evict(cdiv(len(tokens), P) - len(path))
        if not self.append({row: tokens[len(path) * P :]}):
            self.free([row])

    def append(self, new: dict[int, list[int]]) -> bool:
        counts = i32(*(len(new.get(row, [])) for row in ROWS))
        self.blocks, appended = self.run.append(self.cache, self.blocks, counts)
        for row in ROWS:
            source, target = int(appended.copy_src[row]), int(appended.copy_dst[row])
            if source != NO_BLOCK:
                self.memory[target] = self.memory[source]
                self.num_copies += 1
        if appended.ok:
            tables = np.asarray(self.blocks.block_tables)
            for row, tokens in new.items():
                for token in tokens:
                    at = len(self.histories[row])
                    self.memory[tables[row, at // P], at % P] = token
                    self.histories[row].append(token)
        self.check()
        return bool(appended.ok)

    def decode(self, tokens: list[int]) -> None:
        """Append one token to every row with capacity, after an eviction."""
        live = [row for row in ROWS if 0 < len(self.histories[row]) < L]
        self.evict(len(live))
        self.append({row: [tokens[row]] for row in live})

    def commit(self) -> None:
        """End a step: insert the full blocks, and touch the blocks in use."""
        before = np.asarray(self.blocks.block_tables)
        self.cache, self.blocks = self.run.insert(
            self.cache, self.blocks, self.padded(self.histories), self.clock
        )
        after = np.asarray(self.blocks.block_tables)
        self.num_replaced += int((before != after).sum())
        is_node = np.asarray(self.run.module.is_cached(self.cache))
        new: dict[tuple[int, ...], set[int]] = {}
        for row, history in enumerate(self.histories):
            for column in range(len(history) // P):
                prefix = tuple(history[: (column + 1) * P])
                new.setdefault(prefix, set()).add(int(before[row, column]))
        for prefix in sorted(new, key=len):
            if prefix in self.nodes:
                continue
            chosen = [block for block in new[prefix] if is_node[block]]
            if not chosen:
                assert self.max_nodes is not None
                assert is_node.sum() == self.max_nodes
                self.num_refused += 1
                continue
            (self.nodes[prefix],) = chosen
        for row, history in enumerate(self.histories):
            for column in range(len(history) // P):
                prefix = tuple(history[: (column + 1) * P])
                expected = self.nodes.get(prefix, before[row, column])
                assert after[row, column] == expected
        self.cache = self.run.touch(self.cache, self.blocks.ref_counts, self.clock)
        for prefix, block in self.nodes.items():
            if (after == block).any():
                self.used[prefix] = self.clock
        self.check()

    def tick(self) -> None:
        self.clock += 1

    def evict(self, num_needed: int) -> None:
        in_use = set(np.asarray(self.blocks.block_tables).ravel().tolist())
        num_free = N - len((in_use | set(self.nodes.values())) - {NO_BLOCK})
        order = sorted(
            (prefix for prefix, block in self.nodes.items() if block not in in_use),
            key=lambda prefix: (
                self.used[prefix], -len(prefix), -self.nodes[prefix],
            ),
        )  # fmt: skip
        for prefix in order[: max(0, num_needed - num_free)]:
            del self.nodes[prefix], self.used[prefix]
            self.num_evicted += 1
        self.cache = self.run.evict(self.cache, self.blocks.ref_counts, num_needed)
        self.check()

    def free(self, rows: list[int]) -> None:
        parents = [NO_BLOCK if row in rows else row for row in ROWS]
        self.fork(parents)

    def fork(self, parents: list[int]) -> None:
        self.blocks = self.run.fork(self.blocks, i32(*parents))
        self.histories = [
            [] if parent == NO_BLOCK else list(self.histories[parent])
            for parent in parents
        ]
        self.check()

    def truncate(self, row: int, length: int) -> None:
        if length < len(self.histories[row]):
            lens = [length if row == r else -1 for r in ROWS]
            self.blocks = self.run.truncate(self.blocks, i32(*lens))
            del self.histories[row][length:]
            self.check()

    def check(self) -> None:
        tokens = self.padded(self.histories)
        assert self.run.module.violations(self.cache, self.blocks, tokens) == []
        assert block_manager.violations(self.blocks) == []
        is_node = np.asarray(self.run.module.is_cached(self.cache))
        assert np.flatnonzero(is_node).tolist() == sorted(self.nodes.values())
        tables = np.asarray(self.blocks.block_tables)
        for prefix, block in self.nodes.items():
            assert tuple(self.memory[block].tolist()) == prefix[-P:]
            assert int(self.cache.depths[block]) == len(prefix) // P - 1
            assert int(self.cache.last_used[block]) == self.used.get(prefix, self.clock)
        for row, history in enumerate(self.histories):
            read = self.memory[tables[row, : cdiv(len(history), P)]].ravel()
            assert read[: len(history)].tolist() == history


def walk(checked: Checked, num_steps: int, seed: int) -> Checked:
    """Run a long random sequence of an engine's operations."""
    rng = random.Random(seed)
    for _ in range(num_steps):
        roll = rng.random()
        row = rng.randrange(S)
        if roll < 0.35:
            checked.start(row, [rng.randrange(2) for _ in range(rng.randint(1, L))])
        elif roll < 0.55:
            checked.decode([rng.randrange(2) for _ in ROWS])
            checked.commit()
        elif roll < 0.7:
            checked.commit()
        elif roll < 0.8:
            checked.free([row])
        elif roll < 0.86:
            checked.fork([rng.choice([r, r, row]) for r in ROWS])
        elif roll < 0.9:
            checked.truncate(row, rng.randint(0, L))
        elif roll < 0.93:
            checked.evict(rng.randint(0, N))
        else:
            checked.match([rng.randrange(2) for _ in range(L)], rng.randint(0, L))
        if rng.random() < 0.6:
            checked.tick()
    return checked
