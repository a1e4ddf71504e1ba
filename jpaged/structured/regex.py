"""Regexes as byte automata, by the package outlines-core.

Place on the road: regex or JSON schema -> [regex] -> byte automaton. Host only.
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

MAX_REGEX_STATES = 50_000  # of the library's table, before equal states are merged
INSTALL = "pip install 'jpaged[structured]'"
# The library needs a start that looks at nothing before it, so each pattern is compiled
# behind this byte, which is neither part of a word nor refused by (?m)^.
_BEFORE = b"\n"
# About how many states a character class takes; others take a few.
_STATES_OF_CLASS = {r"\w": 320, r"\W": 320, r"\p": 320, r"\P": 320, r"\d": 25}
# What a regex consists of. A bracket that comes first in a class, or first after ^, is
# an ordinary character.
_ITEM = re.compile(
    r"\\.|\[\^?\]?|\{(?P<least>[0-9]+)(?:,(?P<most>[0-9]*))?\}|.", re.DOTALL
)


def from_regex(pattern: str) -> ByteAutomaton:
    r"""Return the automaton of the texts that `pattern` matches as a whole.

    The syntax is that of Rust's crate `regex`, which is Python's without look-around
    and back-references. ^ in front and $ behind change nothing.

    >>> from_regex("[a-c]+|no").matches("no")
    True

    Raises:
        ValueError: the pattern does not parse, has what no automaton can do, matches
            nothing, or is too large; or the extra `structured` is not installed.
    """
    inner = without_anchors(pattern)
    outlines_core = _library()
    all_bytes = {bytes([byte]): [byte] for byte in range(NUM_BYTES)}
    vocabulary = outlines_core.Vocabulary(NUM_BYTES, all_bytes)
    # Without \z the library's table stops at the first branch that matches: of a|ab
    # it would not let ab through.
    try:
        index = outlines_core.Index(f"{_BEFORE.decode()}(?:{inner})\\z", vocabulary)
    except ValueError as error:
        raise _explained(pattern, error) from error
    table, finals = index.get_transitions(), index.get_final_states()
    if len(table) > MAX_REGEX_STATES:
        raise _too_large(pattern, len(table))
    before = index.get_initial_state()
    start = table[before].get(_BEFORE[0])
    # The start becomes state 0, and the state before it goes.
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
    r"""Return `pattern` without ^ in front and an unescaped $ behind.

    Raises:
        ValueError: it has another start anchor, closes brackets that it did not open
            (it is compiled in brackets of ours), or repeats too often.
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
                "The whole text always has to match, so leave anchors out"
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
    """About how many states an open bracket needs so far."""

    before: int = 0  # items before the last one
    item: int = 0  # the last one, which a repetition multiplies


def _count_states(sizes: list[_Size], match: re.Match, is_in_class: bool) -> None:
    """Add an item to the estimate, before the library spends hours on a huge regex."""
    item, size, count = match.group(), sizes[-1], match["most"] or match["least"]
    if is_in_class:  # a class is one item, as large as what it holds
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
        f"regex: wanted at most {MAX_REGEX_STATES} states, got about {num_states} from "
        f"{_short(pattern)}; repeat fewer times, or write [a-z] for \\w"
    )


def _explained(pattern: str, error: ValueError) -> ValueError:
    """Return an error that says what is wrong with `pattern`."""
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
