"""Token automata: tables of the tokens that a constraint allows.

Pipeline: structured -> [automaton] -> constraints -> logits. Host only.

In state q, a token of class c leads to state `transitions[q, c]`, or is forbidden
(DEAD). Tokens with equal transitions in every state share a class, so the table is
small for any vocabulary.

Shape symbols: V vocabulary, Q states, C token classes, K allowed sets (shared by states
that allow the same tokens), W words of a bit mask.

Source: Willard and Louf 2023. https://arxiv.org/abs/2307.09702
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from jpaged.decoding.bit_masks import MASK_BITS, num_words

DEAD = -1  # not a state: no token is allowed
EOS_CLASS = 0  # the class of EOS tokens only
MAX_STATES = 2**15 - 1  # states and classes are int16 on the device


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """The token sequences that a constraint allows; built by `token_automaton`.

    State 0 is the start. Token t leads from state q to `transitions[q, classes[t]]`.
    EOS is allowed in accepting states only, and does not change the state. Every state
    is reachable, and EOS is reachable from every state.
    """

    classes: np.ndarray  # i32[V], EOS_CLASS for EOS tokens only
    transitions: np.ndarray  # i32[Q, C], the next state or DEAD
    is_accepting: np.ndarray  # bool[Q], whether the text may end here

    @property
    def vocab_size(self) -> int:
        """Size V of the vocabulary."""
        return len(self.classes)

    @property
    def num_states(self) -> int:
        """Number of states Q."""
        return self.transitions.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of token classes C."""
        return self.transitions.shape[1]

    @functools.cached_property
    def digest(self) -> np.ndarray:
        """A hash u32[4] of the arrays, which identifies the automaton."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self.classes, self.transitions, self.is_accepting):
            found.update(str(array.shape).encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return np.frombuffer(found.digest(), np.uint32)

    @functools.cached_property
    def allowed_sets(self) -> tuple[np.ndarray, np.ndarray]:
        """Index of each state's allowed set i32[Q], and the sets as masks u32[K, W]."""
        allowed_QC = self.transitions != DEAD
        sets_KC, set_of_state = np.unique(allowed_QC, axis=0, return_inverse=True)
        bits = np.zeros(num_words(self.vocab_size) * MASK_BITS, np.bool_)
        words_KW = np.empty((len(sets_KC), num_words(self.vocab_size)), np.uint32)
        for set_C, words in zip(sets_KC, words_KW, strict=True):
            bits[: self.vocab_size] = set_C[self.classes]
            words[:] = np.packbits(bits, bitorder="little").view("<u4")
        return set_of_state.reshape(-1).astype(np.int32), words_KW


def token_automaton(
    transitions: np.ndarray,
    is_accepting: np.ndarray,
    eos_token_ids: Sequence[int],
    classes: np.ndarray | None = None,
) -> TokenAutomaton:
    """Builds a trimmed automaton from a table, and adds EOS to its accepting states.

    States that are not reachable, or from which no accepting state is reachable, are
    removed. Tokens with equal columns are merged into classes. States keep their order.

    Args:
      transitions: int[Q, V], the next state of each token, or DEAD; with `classes`
        int[Q, C], the next state of each class. State 0 is the start. Entries of EOS
        tokens are ignored.
      is_accepting: bool[Q].
      eos_token_ids: Tokens that end the text; at least one.
      classes: int[V], the class of each token; None: every token has its own class.

    Raises:
      ValueError: Shapes or ids are invalid, there are no EOS tokens, no accepting state
        is reachable, or more than MAX_STATES states or classes are left.
    """
    transitions = np.asarray(transitions, np.int32)
    is_accepting = np.asarray(is_accepting, np.bool_)
    if classes is None:
        classes = np.arange(transitions.shape[-1])
    classes = np.asarray(classes, np.int32)
    eos_ids = _check_table(transitions, is_accepting, classes, eos_token_ids)
    # Only classes of tokens other than EOS are used; EOS gets a new class.
    is_eos = np.zeros(len(classes), np.bool_)
    is_eos[eos_ids] = True
    used, among_used = np.unique(classes[~is_eos], return_inverse=True)
    # Merging before the search makes it fast; removed states allow merging again later.
    transitions, among_columns = _merge_equal_columns(transitions[:, used])
    live = _live_states(transitions, is_accepting)
    if not live[0]:
        raise ValueError(
            "automaton: expected a sequence of tokens from the start to an accepting "
            "state, got none: the constraint cannot be met with this vocabulary"
        )
    new_ids = np.where(live, np.cumsum(live, dtype=np.int32) - 1, DEAD)
    # Index DEAD = -1 picks the appended last entry.
    transitions = np.append(new_ids, DEAD)[transitions[live]].astype(np.int32)
    is_accepting = is_accepting[live]
    transitions, column_ids = _merge_equal_columns(transitions)
    own_state = np.arange(len(is_accepting), dtype=np.int32)
    eos_column = np.where(is_accepting, own_state, DEAD).astype(np.int32)
    transitions = np.concatenate([eos_column[:, None], transitions], axis=1)
    token_classes = np.full(len(classes), EOS_CLASS, np.int32)
    token_classes[~is_eos] = 1 + column_ids[among_columns[among_used]]
    if max(transitions.shape) > MAX_STATES:
        raise ValueError(
            f"automaton: expected at most {MAX_STATES} states and token classes, got "
            f"{' and '.join(map(str, transitions.shape))}; use a simpler constraint"
        )
    return TokenAutomaton(token_classes, transitions, is_accepting)


def _check_table(
    transitions: np.ndarray,
    is_accepting: np.ndarray,
    classes: np.ndarray,
    eos_token_ids: Sequence[int],
) -> list[int]:
    """Returns the EOS ids; raises ValueError for an invalid table."""
    if transitions.ndim != 2 or is_accepting.shape != transitions.shape[:1]:
        raise ValueError(
            f"transitions, is_accepting: expected shapes [Q, C] and [Q], got "
            f"{transitions.shape} and {is_accepting.shape}"
        )
    num_states, num_classes = transitions.shape
    for name, values, low, end in (
        ("transitions", transitions, DEAD, num_states),
        ("classes", classes, 0, num_classes),
    ):
        if values.size and not (low <= values.min() and values.max() < end):
            raise ValueError(
                f"{name}: expected numbers from {low} to {end - 1}, got "
                f"{values.min()} to {values.max()}"
            )
    eos_ids = [int(token) for token in eos_token_ids]
    if not eos_ids or not all(0 <= token < len(classes) for token in eos_ids):
        raise ValueError(
            f"eos_token_ids: expected at least one id, all below the vocabulary's size "
            f"{len(classes)}, got {eos_ids}; without EOS a constrained text cannot end"
        )
    return eos_ids


def _edges(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs (state, next state) of a table."""
    num_states = len(transitions)
    source, column = np.nonzero(transitions != DEAD)
    pairs = np.unique(source * num_states + transitions[source, column])
    return pairs // num_states, pairs % num_states


def _distances(
    num_states: int, source: np.ndarray, target: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Fewest edges from any of `starts` to each state, i64[Q]; -1: not reachable."""
    order = np.argsort(source, kind="stable")
    target = target[order]
    first = np.searchsorted(source[order], np.arange(num_states + 1))
    distances = np.full(num_states, -1)
    distances[starts] = 0
    frontier, distance = np.asarray(starts), 0
    while len(frontier):
        distance += 1
        found = np.concatenate([target[first[q] : first[q + 1]] for q in frontier])
        frontier = np.unique(found[distances[found] < 0])
        distances[frontier] = distance
    return distances


def _live_states(transitions: np.ndarray, is_accepting: np.ndarray) -> np.ndarray:
    """States on a path from the start to an accepting state, bool[Q]."""
    num_states = len(transitions)
    source, target = _edges(transitions)
    is_reached = _distances(num_states, source, target, np.array([0])) >= 0
    accepting = np.flatnonzero(is_accepting)
    return is_reached & (_distances(num_states, target, source, accepting) >= 0)


def _merge_equal_columns(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct columns i32[Q, C], and the index of each column among them."""
    ids: dict[bytes, int] = {}
    # Hashing is faster than sorting, which compares long columns many times.
    columns = np.ascontiguousarray(transitions.T)
    column_ids = [ids.setdefault(column.tobytes(), len(ids)) for column in columns]
    column_ids = np.array(column_ids, np.int32)
    _, examples = np.unique(column_ids, return_index=True)
    return transitions[:, examples], column_ids


def shortest(automaton: TokenAutomaton) -> int:
    """Fewest tokens of a complete text, including EOS."""
    source, target = _edges(automaton.transitions)
    start = np.array([0])
    distances = _distances(automaton.num_states, source, target, start)
    return int(distances[automaton.is_accepting].min()) + 1
