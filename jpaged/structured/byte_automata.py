"""Byte automata: the texts of a regex or of a list, as a table over bytes.

Place on the road: regex or choices -> [byte_automata] -> token automaton. Host only.

A text is its UTF-8 bytes, because tokens are bytes that may end within a character.
`over_tokens` walks all tokens of a vocabulary through such a table at once.

Shape letters: Q states, B classes of bytes, V vocabulary, C classes of tokens.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

DEAD = -1  # no state: no text of the language begins so
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
    """Return the automaton of exactly these texts: a tree of their bytes.

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
    """Return the distinct columns i32[Q, B], and which one each byte has, [256]."""
    columns, class_of_byte = np.unique(transitions.T, axis=0, return_inverse=True)
    return np.ascontiguousarray(columns.T), class_of_byte.reshape(-1)


def minimised(transitions: np.ndarray, is_accepting: np.ndarray) -> ByteAutomaton:
    """Return the least automaton of the same language (Moore 1956).

    All states must be reached from state 0.

    States are told apart by whether they accept, then by where their bytes lead, until
    nothing changes. DEAD is a state like others here, so states that reach no end are
    equal to it, and vanish.
    """
    columns_QB, class_of_byte = _byte_classes(transitions)
    # DEAD gets the last place, where -1 finds it.
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
    # Numbered in the order of their first state, so that the start stays 0.
    _, first = np.unique(groups, return_index=True)
    order = np.argsort(first)
    order = order[order != dead]
    new_ids = np.full(num_groups, DEAD)
    new_ids[order] = np.arange(len(order))
    if new_ids[groups[0]] == DEAD:  # the language is empty; one state that says so
        empty = np.full((1, NUM_BYTES), DEAD, np.int32)
        return ByteAutomaton(empty, np.zeros(1, np.bool_))
    merged = new_ids[groups[rows[first[order]]]]
    is_accepting = np.append(is_accepting, False)[first[order]]
    return ByteAutomaton(merged[:, class_of_byte].astype(np.int32), is_accepting)


def _split(
    groups: np.ndarray, rows: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return groups of states that agree in `groups` and in those of all successors.

    By a random 64-bit sum per row, which is checked: rows that only look equal would
    show as unequal to the first of their group.
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
    """The bytes of all tokens of a vocabulary, one after the other."""

    text: np.ndarray  # u8[total]
    starts: np.ndarray  # i64[V]
    lengths: np.ndarray  # i64[V], 0 for tokens that stand for no text
    distinct: frozenset[bytes]

    @classmethod
    def of(cls, token_bytes: Sequence[bytes | None]) -> "TokenText":
        """Return the text of tokens given one by one; None stands for no text."""
        pieces = [token or b"" for token in token_bytes]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        text = np.frombuffer(b"".join(pieces), np.uint8)
        distinct = frozenset(pieces) - {b""}
        return cls(text, np.cumsum(lengths) - lengths, lengths, distinct)


def over_tokens(
    automaton: ByteAutomaton, tokens: TokenText
) -> tuple[np.ndarray, np.ndarray]:
    """Return the state after each token from each state, by classes of tokens.

    transitions i32[Q, C] and classes i32[V] as `token_automaton` wants them: a token's
    class is the function from state to state that its bytes make, and tokens without
    text lead nowhere. All tokens go byte by byte side by side, and each function that
    occurs is worked out once.
    """
    columns_QB, class_of_byte = _byte_classes(automaton.transitions)
    num_states, num_byte_classes = columns_QB.shape
    # The added last row is what DEAD = -1 picks.
    columns_QB = np.append(columns_QB, np.full((1, num_byte_classes), DEAD), axis=0)
    columns_QB = columns_QB.astype(np.int32)
    nowhere, identity = 0, 1
    functions = [np.full(num_states, DEAD, "i4"), np.arange(num_states, dtype="i4")]
    ids = {function.tobytes(): number for number, function in enumerate(functions)}
    after: dict[int, int] = {}  # function and byte class -> function
    byte_class = class_of_byte[tokens.text]
    classes = np.where(tokens.lengths > 0, identity, nowhere)
    for position in range(tokens.lengths.max(initial=0)):
        going = np.flatnonzero((tokens.lengths > position) & (classes != nowhere))
        step = byte_class[tokens.starts[going] + position]
        pairs, which = np.unique(
            classes[going] * num_byte_classes + step, return_inverse=True
        )
        for pair in pairs.tolist():
            if pair not in after:
                number, column = divmod(pair, num_byte_classes)
                function = columns_QB[functions[number], column]
                after[pair] = ids.setdefault(function.tobytes(), len(functions))
                if after[pair] == len(functions):
                    functions.append(function)
        reached = np.array([after[pair] for pair in pairs.tolist()], np.int64)
        classes[going] = reached[which]
    used, classes = np.unique(classes, return_inverse=True)
    transitions = np.stack([functions[number] for number in used], axis=1)
    return transitions, classes.astype(np.int32)
