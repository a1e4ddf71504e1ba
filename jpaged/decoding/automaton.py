"""Token automata: which tokens a constraint allows, as a table that was trimmed.

Place on the road: structured -> [automaton] -> constraints -> logits. Host only.

In state q a token of class c leads to `transitions[q, c]`, or nowhere (DEAD). Tokens
that every state treats alike share a class, so the table is small at any vocabulary.

Shape letters: V vocabulary, Q states, C token classes, K allowed sets (states that
allow the same tokens share one), W words of a bit mask.
Source: Willard and Louf 2023. https://arxiv.org/abs/2307.09702
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from jpaged.arithmetic import cdiv

DEAD = -1  # no state: nothing is allowed any more
EOS_CLASS = 0  # the class of the EOS tokens, and of no others
MAX_STATES = 2**15 - 1  # states and classes are int16 on the device
MASK_BITS = 32  # vocabulary entries per word of a bit mask


def num_words(vocab_size: int) -> int:
    """Return W, the words of a bit mask over the vocabulary."""
    return cdiv(vocab_size, MASK_BITS)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Which sequences of tokens a constraint allows; state 0 is the start.

    A token t leads from state q to `transitions[q, classes[t]]`. EOS is allowed in the
    accepting states alone, and stays there. Every state can be reached, and from every
    state some allowed tokens lead to EOS. `token_automaton` makes one.
    """

    classes: np.ndarray  # i32[V], EOS_CLASS for EOS tokens alone
    transitions: np.ndarray  # i32[Q, C], the next state or DEAD
    is_accepting: np.ndarray  # bool[Q], the text may end here

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.classes)

    @property
    def num_states(self) -> int:
        """Q."""
        return self.transitions.shape[0]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.transitions.shape[1]

    @functools.cached_property
    def digest(self) -> np.ndarray:
        """u32[4] that tells this automaton from others: a hash of its arrays."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self.classes, self.transitions, self.is_accepting):
            found.update(str(array.shape).encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return np.frombuffer(found.digest(), np.uint32)

    @functools.cached_property
    def allowed_sets(self) -> tuple[np.ndarray, np.ndarray]:
        """The allowed set of each state i32[Q], and the sets as bits u32[K, W]."""
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
    """Return the trimmed automaton of a table, with EOS in its accepting states.

    States that cannot be reached, or that cannot reach an accepting one, are dropped,
    and tokens with equal columns are merged into classes. States keep their order.

    Args:
        transitions: int[Q, V], the next state of each token, or DEAD; with `classes`
            int[Q, C], the next state of each class. State 0 is the start. What it says
            of EOS tokens does not matter.
        is_accepting: bool[Q].
        eos_token_ids: at least one; all of them end the text.
        classes: int[V], or None for a class of its own for each token.

    Raises:
        ValueError: shapes or ids do not fit; there are no EOS tokens; no accepting
            state can be reached; more than MAX_STATES states or classes are left.
    """
    transitions = np.asarray(transitions, np.int32)
    is_accepting = np.asarray(is_accepting, np.bool_)
    if classes is None:
        classes = np.arange(transitions.shape[-1])
    classes = np.asarray(classes, np.int32)
    eos_ids = _check_table(transitions, is_accepting, classes, eos_token_ids)
    # Only the classes that tokens other than EOS have; behind them one for EOS.
    is_eos = np.zeros(len(classes), np.bool_)
    is_eos[eos_ids] = True
    used, among_used = np.unique(classes[~is_eos], return_inverse=True)
    # Merged before the search, so that it sees few columns, and once more after it.
    transitions, among_columns = _merge_equal_columns(transitions[:, used])
    live = _live_states(transitions, is_accepting)
    if not live[0]:
        raise ValueError(
            "automaton: wanted a sequence of tokens from the start to an accepting "
            "state, got none: the constraint cannot be met with this vocabulary"
        )
    new_ids = np.where(live, np.cumsum(live, dtype=np.int32) - 1, DEAD)
    # The added last entry is what DEAD = -1 picks.
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
            f"automaton: wanted at most {MAX_STATES} states and token classes, got "
            f"{' and '.join(map(str, transitions.shape))}; use a simpler constraint"
        )
    return TokenAutomaton(token_classes, transitions, is_accepting)


def _check_table(
    transitions: np.ndarray,
    is_accepting: np.ndarray,
    classes: np.ndarray,
    eos_token_ids: Sequence[int],
) -> list[int]:
    """Return the EOS ids, or raise ValueError for a table that is none."""
    if transitions.ndim != 2 or is_accepting.shape != transitions.shape[:1]:
        raise ValueError(
            f"transitions, is_accepting: wanted [Q, C] and [Q], got "
            f"{transitions.shape} and {is_accepting.shape}"
        )
    num_states, num_classes = transitions.shape
    for name, values, low, end in (
        ("transitions", transitions, DEAD, num_states),
        ("classes", classes, 0, num_classes),
    ):
        if values.size and not (low <= values.min() and values.max() < end):
            raise ValueError(
                f"{name}: wanted numbers from {low} to {end - 1}, got "
                f"{values.min()} to {values.max()}"
            )
    eos_ids = [int(token) for token in eos_token_ids]
    if not eos_ids or not all(0 <= token < len(classes) for token in eos_ids):
        raise ValueError(
            f"eos_token_ids: wanted at least one id, all below the vocabulary's size "
            f"{len(classes)}, got {eos_ids}: without EOS a constrained text cannot end"
        )
    return eos_ids


def _edges(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (state, next state) of a table, each once."""
    num_states = len(transitions)
    source, column = np.nonzero(transitions != DEAD)
    pairs = np.unique(source * num_states + transitions[source, column])
    return pairs // num_states, pairs % num_states


def _distances(
    num_states: int, source: np.ndarray, target: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Return i64[Q]: the fewest edges from any of `starts`, or -1 where none leads."""
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
    """Return bool[Q]: reached from the start, and an accepting state is reached."""
    num_states = len(transitions)
    source, target = _edges(transitions)
    is_reached = _distances(num_states, source, target, np.array([0])) >= 0
    accepting = np.flatnonzero(is_accepting)
    return is_reached & (_distances(num_states, target, source, accepting) >= 0)


def _merge_equal_columns(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct columns i32[Q, C], and for each column which it is."""
    ids: dict[bytes, int] = {}
    # A hash of each column: a sort would compare long rows again and again.
    columns = np.ascontiguousarray(transitions.T)
    column_ids = [ids.setdefault(column.tobytes(), len(ids)) for column in columns]
    column_ids = np.array(column_ids, np.int32)
    _, examples = np.unique(column_ids, return_index=True)
    return transitions[:, examples], column_ids


def shortest(automaton: TokenAutomaton) -> int:
    """Return the fewest tokens of a complete text, EOS included."""
    source, target = _edges(automaton.transitions)
    start = np.array([0])
    distances = _distances(automaton.num_states, source, target, start)
    return int(distances[automaton.is_accepting].min()) + 1
