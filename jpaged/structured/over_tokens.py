"""Over tokens: the transitions of a byte automaton by the tokens of a vocabulary.

Pipeline: byte automaton -> [structured.over_tokens] -> token automaton. Host only.

Shape symbols: Q states, B classes of bytes, V vocabulary, C classes of tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jpaged.structured.byte_automata import ByteAutomaton, byte_classes
from jpaged.structured.minimisation import DEAD


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
    columns_QB, class_of_byte = byte_classes(automaton.transitions)
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
