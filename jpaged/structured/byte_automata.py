"""Byte automata: the language of a regex or of a list of texts, as a table over bytes.

Pipeline: regex or choices -> [structured.byte_automata] -> token automaton. Host only.

The alphabet is the bytes of UTF-8, because a token can end inside a character.
`over_tokens` computes the transitions of all tokens of a vocabulary at once.

Shape symbols: Q states, B classes of bytes, V vocabulary, C classes of tokens.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

DEAD = -1  # no state: no text of the language has this prefix
NUM_BYTES = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A finite automaton over bytes; state 0 is the start."""

    transitions: np.ndarray  # i32[Q, 256], the next state or DEAD
    is_accepting: np.ndarray  # bool[Q]

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
        state = self.reaches(text.encode("utf-8"))
        return state != DEAD and bool(self.is_accepting[state])


def from_choices(choices: Iterable[str]) -> ByteAutomaton:
    """Return the automaton that accepts exactly these texts, built as a tree of bytes.

    >>> from_choices(["yes", "no"]).matches("no")
    True
    """
    rows = [[DEAD] * NUM_BYTES]
    accepting = set()
    for choice in choices:
        state = 0
        for byte in choice.encode("utf-8"):
            if rows[state][byte] == DEAD:
                rows[state][byte] = len(rows)
                rows.append([DEAD] * NUM_BYTES)
            state = rows[state][byte]
        accepting.add(state)
    is_accepting = np.array([state in accepting for state in range(len(rows))])
    return minimised(np.array(rows, np.int32), is_accepting)


def _byte_classes(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct columns i32[Q, B], and the column of each byte, [256]."""
    columns, class_of_byte = np.unique(transitions.T, axis=0, return_inverse=True)
    return np.ascontiguousarray(columns.T), class_of_byte.reshape(-1)


def minimised(transitions: np.ndarray, is_accepting: np.ndarray) -> ByteAutomaton:
    """Return the minimal automaton of the same language (Moore 1956).

    The groups of equivalent states start as accepting and other states. They are split
    by the groups of their successors until nothing changes. DEAD is treated as a state,
    so states from which no accepting state can be reached are equivalent to it and are
    removed.

    Args:
        transitions: i32[Q, 256]; all states must be reachable from state 0.
        is_accepting: bool[Q].
    """
    columns_QB, class_of_byte = _byte_classes(transitions)
    # DEAD is the last row, which the index -1 selects.
    rows = np.append(columns_QB, np.full((1, columns_QB.shape[1]), DEAD), axis=0)
    groups = np.append(is_accepting, False).astype(np.int64)
    num_groups = len(np.unique(groups))
    rng = np.random.default_rng(0)
    while True:
        groups = _split(groups, rows, rng)
        if groups.max() + 1 == num_groups:
            break
        num_groups = groups.max() + 1
    dead = groups[-1]
    # Groups are numbered in the order of their first state, so the start stays 0.
    _, first = np.unique(groups, return_index=True)
    order = np.argsort(first)
    order = order[order != dead]
    new_ids = np.full(num_groups, DEAD)
    new_ids[order] = np.arange(len(order))
    if new_ids[groups[0]] == DEAD:  # the language is empty
        empty = np.full((1, NUM_BYTES), DEAD, np.int32)
        return ByteAutomaton(empty, np.zeros(1, np.bool_))
    merged = new_ids[groups[rows[first[order]]]]
    is_accepting = np.append(is_accepting, False)[first[order]]
    return ByteAutomaton(merged[:, class_of_byte].astype(np.int32), is_accepting)


def _split(
    groups: np.ndarray, rows: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Split groups of states by the groups of their successors; return the new groups.

    Rows are compared by a random 64-bit hash. A collision is detected, because each row
    is then compared with the first row of its group, and leads to another hash.
    """
    signature = np.concatenate([groups[:, None], groups[rows]], axis=1)
    while True:
        factors = rng.integers(1, 2**63, signature.shape[1], dtype=np.uint64)
        hashes = (signature.astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
        _, first, split = np.unique(hashes, return_index=True, return_inverse=True)
        if np.array_equal(signature, signature[first[split]]):
            return split


@dataclasses.dataclass(frozen=True, eq=False)
class TokenText:
    """The bytes of all tokens of a vocabulary, concatenated."""

    text: np.ndarray  # u8[total]
    starts: np.ndarray  # i64[V]
    lengths: np.ndarray  # i64[V], 0 for tokens without text
    distinct: frozenset[bytes]  # the bytes of all tokens with text

    @classmethod
    def of(cls, token_bytes: Sequence[bytes | None]) -> "TokenText":
        """Concatenate the bytes of tokens; None means a token without text."""
        pieces = [token or b"" for token in token_bytes]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        text = np.frombuffer(b"".join(pieces), np.uint8)
        distinct = frozenset(pieces) - {b""}
        return cls(text, np.cumsum(lengths) - lengths, lengths, distinct)


def over_tokens(
    automaton: ByteAutomaton, tokens: TokenText
) -> tuple[np.ndarray, np.ndarray]:
    """Return the transitions of tokens, by classes of tokens.

    The bytes of a token define a function from states to states. Tokens with the same
    function form a class. All tokens advance byte by byte together, and each function
    that occurs is computed once.

    Args:
        automaton: of the allowed texts.
        tokens: the vocabulary. Tokens without text lead to DEAD.

    Returns:
        transitions i32[Q, C] and classes i32[V], arguments of `token_automaton`.
    """
    columns_QB, class_of_byte = _byte_classes(automaton.transitions)
    num_states, num_byte_classes = columns_QB.shape
    # DEAD = -1 selects the additional last row.
    columns_QB = np.append(columns_QB, np.full((1, num_byte_classes), DEAD), axis=0)
    columns_QB = columns_QB.astype(np.int32)
    nowhere, identity = 0, 1
    functions = [np.full(num_states, DEAD, "i4"), np.arange(num_states, dtype="i4")]
    ids = {function.tobytes(): number for number, function in enumerate(functions)}
    after: dict[int, int] = {}  # function and byte class -> function
    byte_class = class_of_byte[tokens.text]
    classes = np.where(tokens.lengths > 0, identity, nowhere)
    for position in range(tokens.lengths.max(initial=0)):
        active = np.flatnonzero((tokens.lengths > position) & (classes != nowhere))
        step = byte_class[tokens.starts[active] + position]
        pairs, which = np.unique(
            classes[active] * num_byte_classes + step, return_inverse=True
        )
        for pair in pairs.tolist():
            if pair not in after:
                number, column = divmod(pair, num_byte_classes)
                function = columns_QB[functions[number], column]
                after[pair] = ids.setdefault(function.tobytes(), len(functions))
                if after[pair] == len(functions):
                    functions.append(function)
        reached = np.array([after[pair] for pair in pairs.tolist()], np.int64)
        classes[active] = reached[which]
    used, classes = np.unique(classes, return_inverse=True)
    transitions = np.stack([functions[number] for number in used], axis=1)
    return transitions, classes.astype(np.int32)
