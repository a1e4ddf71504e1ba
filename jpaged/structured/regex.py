"""Regexes: compile them to byte automata with the package outlines-core.

Pipeline: regex or JSON schema -> [structured.regex] -> byte automaton. Host only.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from jpaged.structured.byte_automata import (
    DEAD,
    NUM_BYTES,
    ByteAutomaton,
    minimised,
)

MAX_REGEX_STATES = 50_000  # in the library's table, before minimisation
INSTALL = "pip install 'jpaged[structured]'"
# The library needs a start without look-behind. So each pattern is compiled with this
# byte before it, which is not part of a word and precedes a match of (?m)^.
_BEFORE = b"\n"
# Approximate number of states of character classes; others need few.
_STATES_OF_CLASS = {r"\w": 320, r"\W": 320, r"\p": 320, r"\P": 320, r"\d": 25}
# One item of a regex. A closing bracket that is the first character of a class, or the
# first after ^, is an ordinary character.
_ITEM = re.compile(
    r"\\.|\[\^?\]?|\{(?P<least>[0-9]+)(?:,(?P<most>[0-9]*))?\}|.", re.DOTALL
)


def from_regex(pattern: str) -> ByteAutomaton:
    r"""Return the automaton of the texts that `pattern` matches as a whole.

    The syntax is that of Rust's crate `regex`: that of Python without look-around and
    back-references. ^ at the start and $ at the end have no effect.

    >>> from_regex("[a-c]+|no").matches("no")
    True

    Raises:
        ValueError: the pattern does not parse, cannot be an automaton, matches nothing,
            or is too large; or the extra `structured` is not installed.
    """
    inner = without_anchors(pattern)
    outlines_core = _library()
    all_bytes = {bytes([byte]): [byte] for byte in range(NUM_BYTES)}
    vocabulary = outlines_core.Vocabulary(NUM_BYTES, all_bytes)
    # Without \z the library's table ends at the first alternative that matches: a|ab
    # would not match ab.
    try:
        index = outlines_core.Index(f"{_BEFORE.decode()}(?:{inner})\\z", vocabulary)
    except ValueError as error:
        raise _explained(pattern, error) from error
    table, finals = index.get_transitions(), index.get_final_states()
    if len(table) > MAX_REGEX_STATES:
        raise _too_large(pattern, len(table))
    before = index.get_initial_state()
    start = table[before].get(_BEFORE[0])
    # The start becomes state 0; the state before it is removed.
    states = [start, *(state for state in table if state not in (start, before))]
    ids = {state: number for number, state in enumerate(states)}
    transitions = np.full((len(states), NUM_BYTES), DEAD, np.int32)
    for state in states:
        for byte, reached in table.get(state, {}).items():
            if byte < NUM_BYTES:
                transitions[ids[state], byte] = ids[reached]
    return minimised(transitions, np.array([state in finals for state in states]))


def _library() -> Any:
    try:
        import outlines_core
    except ImportError as error:
        raise ValueError(
            "structured_outputs: regex and json need the package outlines-core, which "
            f"is not installed: {INSTALL}"
        ) from error
    return outlines_core


def without_anchors(pattern: str) -> str:
    r"""Return `pattern` without ^ at the start and an unescaped $ at the end.

    Raises:
        ValueError: the pattern has another start anchor, an unmatched closing bracket
            (it is compiled inside brackets), or too many repetitions.
    """
    item, position, class_depth, is_in_class = "", 0, 0, False
    sizes = [_Size()]
    for match in _ITEM.finditer(pattern):
        item, position, is_in_class = match.group(), match.start(), class_depth > 0
        if item.startswith("["):
            class_depth += 1
        elif is_in_class:
            class_depth -= item == "]"
        elif item == r"\A" or (item == "^" and position and "(?m" not in pattern):
            raise ValueError(
                f"regex: {_short(pattern)} has a start anchor at position {position}. "
                "The whole text must always match, so omit anchors"
            )
        elif item == ")" and len(sizes) == 1:
            raise ValueError(
                f"regex: {_short(pattern)} does not parse: the ) at position "
                f"{position} closes nothing"
            )
        _count_states(sizes, match, is_in_class)
    num_states = sum(size.before + size.item for size in sizes)
    if num_states > MAX_REGEX_STATES:
        raise _too_large(pattern, num_states)
    end = position if item == "$" and not is_in_class else len(pattern)
    return pattern[pattern.startswith("^") : end]


@dataclasses.dataclass
class _Size:
    """Approximate number of states of an open bracket so far."""

    before: int = 0  # items before the last one
    item: int = 0  # the last one, which a repetition multiplies


def _count_states(sizes: list[_Size], match: re.Match, is_in_class: bool) -> None:
    """Add an item to the estimate, which prevents hours of work on a huge regex."""
    item, size, count = match.group(), sizes[-1], match["most"] or match["least"]
    if is_in_class:  # a class is one item with the states of its contents
        size.item += _STATES_OF_CLASS.get(item, 0)
    elif item == "(":
        sizes.append(_Size())
    elif item == ")":
        inner = sizes.pop()
        sizes[-1].before += sizes[-1].item
        sizes[-1].item = inner.before + inner.item
    elif count:
        size.item *= max(1, int(count))
    elif item not in ("*", "+", "?", "|"):
        size.before += size.item
        size.item = _STATES_OF_CLASS.get(item, 1)


def _too_large(pattern: str, num_states: int) -> ValueError:
    return ValueError(
        f"regex: expected at most {MAX_REGEX_STATES} states, got about {num_states} "
        f"for {_short(pattern)}; repeat fewer times, or write [a-z] for \\w"
    )


def _explained(pattern: str, error: ValueError) -> ValueError:
    """Return an error that explains what is wrong with `pattern`."""
    if "no transitions" in str(error):
        return ValueError(f"regex: {_short(pattern)} matches no text at all")
    try:
        re.compile(pattern)
    except re.error as reason:
        return ValueError(f"regex: {_short(pattern)} does not parse: {reason}")
    return ValueError(
        f"regex: {_short(pattern)} is not supported: {error}. Look-around, "
        "back-references and Unicode's \\b cannot be an automaton; the syntax is that "
        "of Rust's crate regex"
    )


def _short(pattern: str, most: int = 80) -> str:
    return repr(pattern if len(pattern) <= most else pattern[:most] + "...")
