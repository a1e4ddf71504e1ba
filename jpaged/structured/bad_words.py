"""Bad words: the automaton of all texts that contain none of some words.

Pipeline: requests -> [structured.bad_words] -> TokenAutomaton -> decoding. Host only.

The automaton of Aho and Corasick knows, after each byte, the longest end of the text
with which a word begins. A byte that completes a word leads nowhere. Over tokens this
forbids the words however they are divided into tokens, also inside longer tokens.

Source: Aho and Corasick 1975. https://doi.org/10.1145/360825.360855
"""

import collections
import functools
from collections.abc import Sequence

import numpy as np

from jpaged.decoding.automaton import (
    DEAD,
    EOS_CLASS,
    MAX_STATES,
    TokenAutomaton,
    token_automaton,
)
from jpaged.structured.byte_automata import NUM_BYTES, ByteAutomaton
from jpaged.structured.over_tokens import TokenText, over_tokens
from jpaged.structured.token_bytes import token_bytes
from jpaged.text.tokenizer import Tokenizer

MAX_BYTES = 4096  # of all words of a request together
_CACHE_SIZE = 64  # compiled sets of words


def without_words(words: Sequence[str]) -> ByteAutomaton:
    """Return the automaton of the texts that contain none of `words`.

    A word that begins with a blank is also forbidden, without the blank, at the start
    of the text: the automaton starts as if a blank had been read.
    """
    children: list[dict[int, int]] = [{}]
    ends = {0: False}
    for word in words:
        node = 0
        for byte in word.encode("utf-8"):
            if byte not in children[node]:
                ends[len(children)] = False
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends[node] = True
    table = np.zeros((len(children), NUM_BYTES), np.int32)
    is_end = np.array([ends[node] for node in range(len(children))])
    queue, fallback = collections.deque([0]), [0] * len(children)
    while queue:
        node = queue.popleft()
        if node:
            table[node] = table[fallback[node]]
            is_end[node] |= is_end[fallback[node]]
        for byte, child in children[node].items():
            # The root's children fall back to the root.
            fallback[child] = int(table[node, byte]) if node else 0
            table[node, byte] = child
            queue.append(child)
    start = 0 if is_end[table[0, ord(" ")]] else int(table[0, ord(" ")])
    return _trimmed(np.where(is_end[table], DEAD, table), start)


def _trimmed(table: np.ndarray, start: int) -> ByteAutomaton:
    """Return the states that are reachable from `start`, which becomes state 0."""
    order, new_ids = [start], {DEAD: DEAD, start: 0}
    for state in order:
        for target in np.unique(table[state]).tolist():
            if target not in new_ids:
                new_ids[target] = len(order)
                order.append(target)
    renamed = np.vectorize(new_ids.__getitem__, otypes=[np.int32])(table[order])
    return ByteAutomaton(renamed, np.ones(len(order), np.bool_))


@functools.lru_cache(maxsize=_CACHE_SIZE)
def compile_bad_words(
    words: tuple[str, ...],
    tokenizer: Tokenizer,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
) -> TokenAutomaton:
    """Return the automaton of all token sequences whose text has none of `words`.

    The text may end anywhere. Tokens without text, special tokens included, are always
    allowed. Recent results are cached: equal arguments return the same object.

    Args:
        words: texts that are not empty.
        tokenizer: of the model.
        vocab_size: of the model; may differ from that of the tokenizer.
        eos_token_ids: tokens that end the text.

    Raises:
        ValueError: the words are too long, or the bytes of the tokenizer's tokens are
            unknown, see `token_bytes`.
    """
    if (size := sum(len(word.encode("utf-8")) for word in words)) > MAX_BYTES:
        raise ValueError(
            f"bad_words: expected strings of at most {MAX_BYTES} bytes together, got "
            f"{size}; pass sequences of token ids instead"
        )
    pieces = token_bytes(tokenizer)[:vocab_size]
    pieces += [None] * (vocab_size - len(pieces))
    tokens = TokenText.of(pieces)
    transitions, classes = over_tokens(without_words(words), tokens)
    own_state = np.arange(len(transitions), dtype=np.int32)[:, None]
    # Classes 0 and 1 are those of EOS and of tokens without text.
    transitions = np.concatenate([own_state, own_state, transitions], axis=1)
    classes = np.where(tokens.lengths > 0, classes + 2, 1).astype(np.int32)
    classes[list(eos_token_ids)] = EOS_CLASS
    is_accepting = np.ones(len(transitions), np.bool_)
    return TokenAutomaton(classes, transitions.astype(np.int32), is_accepting)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def intersection(constraint: TokenAutomaton, words: TokenAutomaton) -> TokenAutomaton:
    """Return the automaton of the texts that both allow, without dead ends.

    Args:
        constraint: the automaton of a structured output.
        words: the automaton of `compile_bad_words` for the same vocabulary.

    Raises:
        ValueError: no text is left, or the automaton has too many states.
    """
    pairs = np.stack([constraint.classes, words.classes], axis=1)
    columns, classes = np.unique(pairs, axis=0, return_inverse=True)
    states, rows = {(0, 0): 0}, []
    for first, second in (order := [(0, 0)]):
        after_first = constraint.transitions[first, columns[:, 0]]
        after_second = words.transitions[second, columns[:, 1]]
        row = np.full(len(columns), DEAD, np.int32)
        for c in np.flatnonzero((after_first != DEAD) & (after_second != DEAD)):
            pair = (int(after_first[c]), int(after_second[c]))
            if pair not in states:
                states[pair] = len(order)
                order.append(pair)
            row[c] = states[pair]
        rows.append(row)
        if len(order) > MAX_STATES:
            raise ValueError(
                f"bad_words: expected at most {MAX_STATES} states together with "
                "structured_outputs, got more; use fewer words or a simpler constraint"
            )
    is_accepting = np.array([constraint.is_accepting[first] for first, _ in order])
    eos_ids = np.flatnonzero(constraint.classes == EOS_CLASS).tolist()
    try:
        return token_automaton(
            np.stack(rows), is_accepting, eos_ids, classes.reshape(-1)
        )
    except ValueError as error:
        raise ValueError(
            "bad_words: expected strings that leave a text for structured_outputs: "
            f"{error}"
        ) from error
