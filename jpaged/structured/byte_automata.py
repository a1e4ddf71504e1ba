"""Byte automata: languages of texts as tables over bytes.

Pipeline: regex, choices or schema -> [structured.byte_automata] -> token automaton.

The alphabet is the bytes of UTF-8, because a token can end inside a character. Host
only.

Shape symbols: Q states, B classes of bytes.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from jpaged.structured.minimisation import DEAD, equivalent_states

NUM_BYTES = 256
MAX_PAIRS = 30_000_000  # of states in a product of two automata


class TooLargeError(ValueError):
    """A constraint needs too many states."""


@dataclasses.dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A finite automaton over bytes; state 0 is the start."""

    transitions: np.ndarray  # i32[Q, 256], the next state or DEAD
    is_accepting: np.ndarray  # bool[Q]

    @property
    def num_states(self) -> int:
        """Number of states Q."""
        return len(self.is_accepting)

    @property
    def is_empty(self) -> bool:
        """Whether no text is in the language."""
        return not self.is_accepting.any()

    def reaches(self, text: bytes) -> int:
        """Return the state after `text`, or DEAD."""
        state = 0
        for byte in text:
            state = int(self.transitions[state, byte])
            if state == DEAD:
                break
        return state

    def matches(self, text: str) -> bool:
        """Return whether the whole of `text` is in the language."""
        state = self.reaches(text.encode("utf-8", errors="surrogatepass"))
        return state != DEAD and bool(self.is_accepting[state])


def from_choices(choices: Iterable[str]) -> ByteAutomaton:
    """Return the automaton that accepts exactly these texts, built as a tree of bytes.

    >>> from_choices(["yes", "no"]).matches("no")
    True
    """
    children: list[dict[int, int]] = [{}]
    accepting = set()
    for choice in choices:
        state = 0
        for byte in choice.encode("utf-8"):
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        accepting.add(state)
    transitions = np.full((len(children), NUM_BYTES), DEAD, np.int32)
    for state, row in enumerate(children):
        transitions[state, list(row)] = list(row.values())
    is_accepting = np.zeros(len(children), np.bool_)
    is_accepting[list(accepting)] = True
    return minimised(transitions, is_accepting)


def byte_classes(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct columns i32[Q, B], and the column of each byte, [256]."""
    ids: dict[bytes, int] = {}
    columns = np.ascontiguousarray(transitions.T)
    class_of_byte = [ids.setdefault(column.tobytes(), len(ids)) for column in columns]
    class_of_byte = np.array(class_of_byte)
    _, first = np.unique(class_of_byte, return_index=True)
    return np.ascontiguousarray(columns[first].T), class_of_byte


def minimised(
    transitions: np.ndarray,
    is_accepting: np.ndarray,
    class_of_byte: np.ndarray | None = None,
) -> ByteAutomaton:
    """Return the minimal automaton of the same language.

    States from which no accepting state can be reached are equivalent to DEAD and are
    removed.

    Args:
        transitions: i32[Q, 256], or i32[Q, B] with `class_of_byte`; all states must be
            reachable from state 0.
        is_accepting: bool[Q].
        class_of_byte: the column of each byte, [256].
    """
    if class_of_byte is None:
        transitions, class_of_byte = byte_classes(transitions)
    groups = equivalent_states(transitions, is_accepting)
    if groups[0] == DEAD:
        empty = np.full((1, NUM_BYTES), DEAD, np.int32)
        return ByteAutomaton(empty, np.zeros(1, np.bool_))
    # Groups are numbered by their first state, so that the start stays 0.
    live = np.flatnonzero(groups != DEAD)
    _, first = np.unique(groups[live], return_index=True)
    first = np.sort(live[first])
    new_ids = np.full(groups.max() + 2, DEAD, np.int32)  # the last is that of DEAD
    new_ids[groups[first]] = np.arange(len(first))
    of_state = np.append(new_ids[groups], np.int32(DEAD))
    merged = of_state[transitions[first]]
    return ByteAutomaton(merged[:, class_of_byte], is_accepting[first])


def intersection(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """Return the automaton of the texts that both accept."""
    return _product(a, b, np.logical_and, needs_a=True, needs_b=True)


def difference(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """Return the automaton of the texts that `a` accepts and `b` does not."""
    return _product(a, b, lambda p, q: p & ~q, needs_a=True, needs_b=False)


def union(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """Return the automaton of the texts that `a` or `b` accepts."""
    return _product(a, b, np.logical_or, needs_a=False, needs_b=False)


def _product(
    a: ByteAutomaton,
    b: ByteAutomaton,
    accepts: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    needs_a: bool,
    needs_b: bool,
) -> ByteAutomaton:
    """Return the automaton of reachable pairs of states; the last state is DEAD."""
    both, class_of_byte = byte_classes(np.concatenate([a.transitions, b.transitions]))
    dead_a, dead_b = a.num_states, b.num_states
    if (dead_a + 1) * (dead_b + 1) > MAX_PAIRS:
        raise TooLargeError(
            f"structured_outputs: expected conditions on one text with at most "
            f"{MAX_PAIRS} pairs of states, got {dead_a} x {dead_b}; simplify one"
        )
    next_a = np.append(both[:dead_a], np.full((1, both.shape[1]), DEAD), axis=0)
    next_b = np.append(both[dead_a:], np.full((1, both.shape[1]), DEAD), axis=0)
    next_a[next_a == DEAD], next_b[next_b == DEAD] = dead_a, dead_b
    width = dead_b + 1
    ids = np.full((dead_a + 1) * width, DEAD, np.int64)
    ids[0], num_states = 0, 1
    frontier, pairs, rows = np.zeros(1, np.int64), [np.zeros(1, np.int64)], []
    while len(frontier):
        reached_a, reached_b = next_a[frontier // width], next_b[frontier % width]
        is_dead = (reached_a == dead_a) & (reached_b == dead_b)
        is_dead |= (reached_a == dead_a) & needs_a
        is_dead |= (reached_b == dead_b) & needs_b
        reached = np.where(is_dead, DEAD, reached_a.astype(np.int64) * width)
        reached = np.where(is_dead, DEAD, reached + reached_b)
        found = np.unique(reached)
        found = found[found != DEAD]
        frontier = found[ids[found] == DEAD]
        ids[frontier] = num_states + np.arange(len(frontier))
        num_states += len(frontier)
        pairs.append(frontier)
        rows.append(np.where(is_dead, DEAD, ids[reached]))
    pairs = np.concatenate(pairs)
    accepts_a, accepts_b = (
        np.append(a.is_accepting, False),
        np.append(b.is_accepting, False),
    )
    is_accepting = accepts(accepts_a[pairs // width], accepts_b[pairs % width])
    transitions = np.concatenate(rows).astype(np.int32)
    return minimised(transitions, is_accepting, class_of_byte)
