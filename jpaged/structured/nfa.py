"""Nondeterministic automata: built from their end to their start, then determinised.

Pipeline: regex or JSON schema -> [structured.nfa] -> byte automaton. Host only.

A part of a language is added in front of the node that continues the text, so that
equal ends of a text are shared. Nodes are numbers. Sets of bytes are integers with bit
b set for byte b.

Shape symbols: N nodes, B classes of bytes, E edges.
"""

import functools
from collections.abc import Sequence

import numpy as np

from jpaged.structured.byte_automata import (
    NUM_BYTES,
    ByteAutomaton,
    TooLargeError,
    byte_classes,
    minimised,
)
from jpaged.structured.minimisation import DEAD

ALWAYS, AT_START, AT_END = range(3)  # where a step without a byte is possible
MAX_NODES = 150_000
MAX_DETERMINISED = 60_000  # states, before minimisation


class Fragment:
    """A byte automaton as edges, to be added to an `Nfa` any number of times."""

    def __init__(self, automaton: ByteAutomaton) -> None:
        columns, class_of_byte = byte_classes(automaton.transitions)
        self.source, column = np.nonzero(columns != DEAD)
        self.target = columns[self.source, column]
        masks = [
            sum(1 << int(byte) for byte in np.flatnonzero(class_of_byte == c))
            for c in range(columns.shape[1])
        ]
        self.used, self.byte_set = np.unique(column, return_inverse=True)
        self.masks = [masks[c] for c in self.used]
        self.num_states = automaton.num_states
        self.accepting = np.flatnonzero(automaton.is_accepting)
        # A single accepting state without edges becomes the next node itself.
        is_simple = len(self.accepting) == 1 and self.accepting[0] not in self.source
        self.end = int(self.accepting[0]) if is_simple and self.num_states > 1 else None


class Nfa:
    """Nodes and edges; `max_nodes` bounds the work for a huge constraint."""

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self.num_nodes = 0
        self._max_nodes = max_nodes
        self._set_ids: dict[int, int] = {}
        self._edges: list[tuple[int, int, int]] = []
        self._blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._steps: dict[int, list[tuple[int, int]]] = {}
        self._fragment_sets: dict[Fragment, np.ndarray] = {}

    def node(self, *nexts: int) -> int:
        """Add a node from which `nexts` are reached without a byte."""
        self._grow(1)
        node = self.num_nodes - 1
        for reached in nexts:
            self.step(node, reached)
        return node

    def step(self, node: int, reached: int, where: int = ALWAYS) -> None:
        """Add a step without a byte."""
        self._steps.setdefault(node, []).append((reached, where))

    def before(self, byte_set: int, reached: int) -> int:
        """Add a node with an edge to `reached`."""
        node = self.node()
        self._edges.append((node, self._set_id(byte_set), reached))
        return node

    def text_before(self, text: bytes, reached: int) -> int:
        """Add the nodes of a text."""
        for byte in reversed(text):
            reached = self.before(1 << byte, reached)
        return reached

    def fragment_before(self, fragment: Fragment, reached: int) -> int:
        """Add the nodes of a fragment, and return its start."""
        offset = self.num_nodes
        self._grow(fragment.num_states)
        sets = self._fragment_sets.get(fragment)
        if sets is None:
            sets = np.array([self._set_id(mask) for mask in fragment.masks], np.int64)
            sets = sets[fragment.byte_set] if len(sets) else sets
            self._fragment_sets[fragment] = sets
        target = fragment.target + offset
        if fragment.end is not None:
            target[fragment.target == fragment.end] = reached
        else:
            for state in fragment.accepting.tolist():
                self.step(offset + state, reached)
        self._blocks.append((fragment.source + offset, sets, target))
        return offset

    def determinised(self, start: int, accepting: Sequence[int]) -> ByteAutomaton:
        """Return the minimal automaton of the texts from `start` to `accepting`.

        Raises:
            TooLargeError: it has more than MAX_DETERMINISED states before minimisation.
        """
        start, edges, is_accepting = self._without_steps(start, accepting)
        table, sets, class_of_byte = self._table(edges)
        table, is_accepting = _with_sets(table, sets, is_accepting)
        # Only states that can be reached, in an order that begins with the start.
        order = _reachable(table, start)
        new_ids = np.full(len(table) + 1, DEAD, np.int32)
        new_ids[order] = np.arange(len(order))
        return minimised(new_ids[table[order]], is_accepting[order], class_of_byte)

    def _grow(self, number: int) -> None:
        self.num_nodes += number
        if self.num_nodes > self._max_nodes:
            raise TooLargeError(
                f"structured_outputs: expected a constraint of at most "
                f"{self._max_nodes} nodes, got more; repeat fewer times or nest less"
            )

    def _set_id(self, byte_set: int) -> int:
        return self._set_ids.setdefault(byte_set, len(self._set_ids))

    def _closure(self, node: int, *wheres: int) -> list[int]:
        """Return all nodes that are reached from `node` without a byte."""
        found, todo = {node}, [node]
        while todo:
            for reached, where in self._steps.get(todo.pop(), ()):
                if where in wheres and reached not in found:
                    found.add(reached)
                    todo.append(reached)
        return list(found)

    def _without_steps(
        self, start: int, accepting: Sequence[int]
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the start, the edges i64[3, E] and the accepting nodes of an equal
        automaton in which every step has a byte."""
        ends, first = set(accepting), self.node()  # nothing leads back to `first`
        is_accepting = np.zeros(self.num_nodes, np.bool_)
        is_accepting[list(ends)] = True
        pairs = []
        for node in self._steps:
            pairs += [(node, other) for other in self._closure(node, ALWAYS)]
            if len(pairs) > 20 * self._max_nodes:
                self._grow(self._max_nodes)
            if not is_accepting[node]:
                reached = self._closure(node, ALWAYS, AT_END)
                is_accepting[node] = not ends.isdisjoint(reached)
        pairs += [(first, other) for other in self._closure(start, ALWAYS, AT_START)]
        everywhere = self._closure(start, ALWAYS, AT_START, AT_END)
        is_accepting[first] = not ends.isdisjoint(everywhere)
        edges = np.array(self._edges, np.int64).reshape(-1, 3).T
        edges = np.concatenate([edges, *map(np.stack, self._blocks)], axis=1)
        edges = edges[:, np.argsort(edges[0], kind="stable")]
        bounds = np.searchsorted(edges[0], np.arange(self.num_nodes + 1))
        node, other = np.array(pairs, np.int64).T
        is_copy = node != other
        node, other = node[is_copy], other[is_copy]
        which, copied = _ragged(bounds[other], bounds[other + 1])
        copies = np.stack([node[which], edges[1][copied], edges[2][copied]])
        return first, np.concatenate([edges, copies], axis=1), is_accepting

    def _table(
        self, edges: np.ndarray
    ) -> tuple[np.ndarray, dict[tuple[int, ...], int], np.ndarray]:
        """Return the table i32[N, B], the sets of nodes in it, and classes of bytes.

        A set of several next nodes has a number from N on.
        """
        masks = [mask.to_bytes(NUM_BYTES // 8, "little") for mask in self._set_ids]
        bits = np.frombuffer(b"".join(masks), np.uint8).reshape(-1, NUM_BYTES // 8)
        bits = np.unpackbits(bits, axis=1, bitorder="little")
        columns, class_of_byte = byte_classes(bits)
        num_classes = columns.shape[1]
        of_set, in_set = np.nonzero(columns)
        bounds = np.searchsorted(of_set, np.arange(len(bits) + 1))
        which, entry = _ragged(bounds[edges[1]], bounds[edges[1] + 1])
        key = edges[0][which] * num_classes + in_set[entry]
        pairs = np.unique(key * self.num_nodes + edges[2][which])
        key, target = pairs // self.num_nodes, pairs % self.num_nodes
        is_first = np.append(True, key[1:] != key[:-1])[: len(key)]
        starts = np.flatnonzero(is_first)
        lengths = np.diff(np.append(starts, len(key)))
        table = np.full(self.num_nodes * num_classes, DEAD, np.int32)
        table[key[starts]] = target[starts]
        sets: dict[tuple[int, ...], int] = {}
        for i in np.flatnonzero(lengths > 1).tolist():
            members = tuple(target[starts[i] : starts[i] + lengths[i]].tolist())
            number = sets.setdefault(members, self.num_nodes + len(sets))
            table[key[starts[i]]] = number
        return table.reshape(-1, num_classes), sets, class_of_byte


def _ragged(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (i, j) with starts[i] <= j < ends[i], as two arrays."""
    lengths = ends - starts
    which = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return which, np.repeat(starts, lengths) + offsets


def _reachable(table: np.ndarray, start: int) -> np.ndarray:
    is_found = np.zeros(len(table) + 1, np.bool_)
    is_found[[start, DEAD]] = True
    order = [np.array([start])]
    while len(order[-1]):
        found = table[order[-1]].reshape(-1)
        found = np.unique(found[~is_found[found]])
        is_found[found] = True
        order.append(found)
    return np.concatenate(order)


def _with_sets(
    table: np.ndarray, sets: dict[tuple[int, ...], int], is_accepting: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add the rows of the sets of nodes, and of all sets that are reached from them."""
    num_nodes = len(table)
    rows, accepts, todo = [], [], list(sets)
    members_of = todo  # of each set, by its number
    while len(rows) < len(todo):
        members = np.array(todo[len(rows)])
        accepts.append(bool(is_accepting[members].any()))
        reached = table[members]
        most = reached.max(axis=0)
        others = np.where(reached == DEAD, np.iinfo(np.int32).max, reached)
        row = np.where(most == DEAD, DEAD, most)
        for column in np.flatnonzero((others.min(axis=0) != most) & (most != DEAD)):
            nodes: set[int] = set()
            for node in set(reached[:, column].tolist()) - {DEAD}:
                nodes.update(
                    [node] if node < num_nodes else members_of[node - num_nodes]
                )
            key = tuple(sorted(nodes))
            number = sets.get(key)
            if number is None:
                number = sets[key] = num_nodes + len(sets)
                todo.append(key)
            row[column] = number
        rows.append(row)
        if len(rows) > MAX_DETERMINISED:
            raise TooLargeError(
                "structured_outputs: expected a constraint of at most "
                f"{MAX_DETERMINISED} states, got more: many alternatives that begin "
                "alike; write them so that they differ early"
            )
    if not rows:
        return table, is_accepting
    table = np.concatenate([table, np.stack(rows).astype(np.int32)])
    return table, np.append(is_accepting, accepts)


@functools.lru_cache(maxsize=64)
def fragment(automaton: ByteAutomaton) -> Fragment:
    """Return the edges of an automaton."""
    return Fragment(automaton)
