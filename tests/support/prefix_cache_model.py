"""A slow prefix cache in plain Python, and a check of the arrays against it.

The model is a dictionary: the tokens of a whole prefix -> its block and clock. It knows
no parents, no hashes and no table. `Checked` drives both, with a memory in which every
token is written where the block manager says: a node that was overwritten, or a row
that was given a wrong block, does not read back what it should.
"""

import dataclasses
import functools
import random
import types

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.kv import block_manager, prefix_cache
from jpaged.kv.block_manager import NO_BLOCK

N, P, S, M = 13, 2, 3, 4
L = M * P
ROWS = range(S)
QUICKLY = {"xla_backend_optimization_level": 0}


def as_owner(cache, blocks):
    """The blocks in which being a node counts as one more table entry."""
    is_node = (cache.parents != prefix_cache.NOT_CACHED).astype(jnp.int32)
    return dataclasses.replace(blocks, ref_counts=blocks.ref_counts + is_node)


def append_beside(cache, blocks, num_tokens):
    """An append that neither takes nor overwrites a node."""
    held, appended = block_manager.append(as_owner(cache, blocks), num_tokens)
    is_node = as_owner(cache, blocks).ref_counts - blocks.ref_counts
    return dataclasses.replace(held, ref_counts=held.ref_counts - is_node), appended


def append_carelessly(cache, blocks, num_tokens):
    """A fault: free nodes are not taken, but a node in use is written in place."""
    is_unused = (as_owner(cache, blocks).ref_counts == 1) & (blocks.ref_counts == 0)
    held = dataclasses.replace(
        blocks, ref_counts=blocks.ref_counts + is_unused.astype(jnp.int32)
    )
    held, appended = block_manager.append(held, num_tokens)
    counts = held.ref_counts - is_unused.astype(jnp.int32)
    return dataclasses.replace(held, ref_counts=counts), appended


def operations(module=prefix_cache, append=append_beside):
    """All that a walk calls, jitted; another module is a mutant of this one."""
    found = {
        "match": module.match,
        "insert": module.insert,
        "touch": module.touch,
        "evict": module.evict,
        "append": append,
        "fork": block_manager.fork,
        "truncate": block_manager.truncate,
    }
    # New functions: jax would give what it compiled for others of the same name.
    jitted = {
        name: jax.jit(functools.partial(function), compiler_options=QUICKLY)
        for name, function in found.items()
    }
    return types.SimpleNamespace(**jitted, module=module)


def i32(*values: int) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


class Checked:
    """Arrays and model side by side; every method compares them."""

    def __init__(self, run, max_nodes: int | None = None) -> None:
        """`max_nodes`: places of the table, where a test makes it overflow."""
        self.run, self.max_nodes = run, max_nodes
        self.cache = run.module.init_cache(N, P)
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
        """Tokens of the longest known beginning."""
        end, limit = 0, min(limit, len(tokens))
        while end + P <= limit and tuple(tokens[: end + P]) in self.nodes:
            end += P
        return end

    def padded(self, rows: list[list[int]]) -> jax.Array:
        return jnp.asarray(np.array([r + [-7] * (L - len(r)) for r in rows], np.int32))

    def match(self, tokens: list[int], limit: int) -> list[int]:
        """Row 0 is looked up with the limit, row 1 without, row 2 takes no part."""
        rows, lens = [tokens] * S, [min(limit, len(tokens)), len(tokens), 0]
        paths, found = self.run.match(self.cache, self.padded(rows), i32(*lens))
        paths = np.asarray(paths).tolist()
        for row, most in enumerate(lens):
            end = self.longest(tokens, most)
            wanted = [self.nodes[tuple(tokens[: at + P])] for at in range(0, end, P)]
            assert int(found[row]) == end
            assert paths[row] == wanted + [NO_BLOCK] * (M - len(wanted))
        return paths[0][: int(found[0]) // P]

    def start(self, row: int, tokens: list[int]) -> None:
        """An empty row gets a prompt: what is known is mapped, the rest computed."""
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
        self.evict(-(-len(tokens) // P) - len(path))
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
        """Every row with room takes a token, if blocks suffice after an eviction."""
        live = [row for row in ROWS if 0 < len(self.histories[row]) < L]
        self.evict(len(live))
        self.append({row: [tokens[row]] for row in live})

    def commit(self) -> None:
        """The end of a step: full blocks are entered, and what is used is touched."""
        before = np.asarray(self.blocks.block_tables)
        self.cache, self.blocks = self.run.insert(
            self.cache, self.blocks, self.padded(self.histories), self.clock
        )
        after = np.asarray(self.blocks.block_tables)
        self.num_replaced += int((before != after).sum())
        is_node = np.asarray(self.run.module.is_cached(self.cache))
        brought: dict[tuple[int, ...], set[int]] = {}
        for row, history in enumerate(self.histories):
            for column in range(len(history) // P):
                prefix = tuple(history[: (column + 1) * P])
                brought.setdefault(prefix, set()).add(int(before[row, column]))
        for prefix in sorted(brought, key=len):
            if prefix in self.nodes:
                continue
            chosen = [block for block in brought[prefix] if is_node[block]]
            if not chosen:
                assert self.max_nodes is not None
                assert is_node.sum() == self.max_nodes
                self.num_refused += 1
                continue
            (self.nodes[prefix],) = chosen
        for row, history in enumerate(self.histories):
            for column in range(len(history) // P):
                prefix = tuple(history[: (column + 1) * P])
                wanted = self.nodes.get(prefix, before[row, column])
                assert after[row, column] == wanted
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
            read = self.memory[tables[row, : -(-len(history) // P)]].ravel()
            assert read[: len(history)].tolist() == history


def walk(checked: Checked, num_steps: int, seed: int) -> Checked:
    """A long random sequence of what an engine does."""
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
