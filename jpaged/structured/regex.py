r"""Regexes as byte automata.

Pipeline: regex or JSON schema -> [structured.regex] -> byte automaton. Host only.

^ and $ can be anywhere. A look-ahead is possible at the start of the text, where it is
an intersection: ^(?!admin)[a-z]+$.
"""

import functools
from collections.abc import Sequence

from jpaged.structured import byte_automata, characters
from jpaged.structured.byte_automata import ByteAutomaton
from jpaged.structured.nfa import AT_END, AT_START, Nfa
from jpaged.structured.regex_syntax import (
    END,
    START,
    Alternatives,
    Anchor,
    Characters,
    LookAhead,
    Node,
    Repetition,
    parse,
)
from jpaged.structured.regex_syntax import Sequence as Parts

_ANYTHING = Repetition(Characters(characters.ANY), 0, None)


def from_regex(pattern: str, *, may_be_empty: bool = False) -> ByteAutomaton:
    r"""Return the automaton of the texts that `pattern` matches as a whole.

    >>> from_regex("[a-c]+|no").matches("no")
    True

    Args:
        pattern: the regex.
        may_be_empty: return an automaton of no texts instead of an error.

    Raises:
        ValueError: the pattern does not parse, cannot be an automaton, matches nothing,
            or is too large.
    """
    automaton = _compiled(pattern, is_search=False)
    if automaton.is_empty and not may_be_empty:
        raise ValueError(
            f"regex: expected a regex that some text matches, got {pattern!r}"
        )
    return automaton


def containing(pattern: str, *, is_wide: bool = False) -> ByteAutomaton:
    """Return the automaton of the texts that contain a match, as JSON Schema asks.

    Args:
        pattern: the regex.
        is_wide: whether a match for ECMA-262 or for Python is one, and not only one
            for both; see `regex_syntax.parse`.
    """
    return _compiled(pattern, is_search=True, is_wide=is_wide)


@functools.lru_cache(maxsize=48)
def _compiled(pattern: str, *, is_search: bool, is_wide: bool = False) -> ByteAutomaton:
    tree = parse(pattern, is_json=is_search, is_wide=is_wide)
    if is_wide and tree == parse(pattern, is_json=is_search):
        return _compiled(pattern, is_search=is_search)
    whole = [_of_parts(_flat(part), pattern, is_search) for part in _options(tree)]
    return functools.reduce(byte_automata.union, whole)


def _options(tree: Node) -> Sequence[Node]:
    """Return the alternatives apart where one has a look-ahead, else the whole."""
    if isinstance(tree, Alternatives) and any(_has_look_ahead(p) for p in tree.parts):
        return tree.parts
    return (tree,)


def _flat(tree: Node) -> list[Node]:
    parts = tree.parts if isinstance(tree, Parts) else (tree,)
    return [
        p
        for part in parts
        for p in (_flat(part) if isinstance(part, Parts) else [part])
    ]


def _has_look_ahead(tree: Node) -> bool:
    if isinstance(tree, Repetition):
        return _has_look_ahead(tree.part)
    if isinstance(tree, Parts | Alternatives):
        return any(map(_has_look_ahead, tree.parts))
    return isinstance(tree, LookAhead)


def _of_parts(parts: list[Node], pattern: str, is_search: bool) -> ByteAutomaton:
    is_at_start, conditions = not is_search, []
    for part in parts:
        if isinstance(part, LookAhead) and is_at_start:
            conditions.append(part)
        elif part == Anchor(START):
            is_at_start = True
        else:
            break
    parts = [part for part in parts if not any(part is look for look in conditions)]
    if any(map(_has_look_ahead, [*parts, *(look.part for look in conditions)])):
        raise ValueError(
            "regex: expected look-ahead only at the start of the text, got "
            f"{pattern!r}: elsewhere it is not supported"
        )
    automaton = _automaton(parts, is_search)
    for look in conditions:
        ahead = _automaton([look.part, _ANYTHING], is_search=False)
        combine = (
            byte_automata.difference if look.is_negative else byte_automata.intersection
        )
        automaton = combine(automaton, ahead)
    return automaton


def _automaton(parts: list[Node], is_search: bool) -> ByteAutomaton:
    nfa = Nfa()
    end = nfa.node()
    if is_search:
        parts = [_ANYTHING, *parts, _ANYTHING]
    return nfa.determinised(_before(nfa, Parts(tuple(parts)), end), [end])


def _before(nfa: Nfa, tree: Node, reached: int) -> int:
    """Add `tree` before a node, and return the node before both."""
    if isinstance(tree, Characters):
        byte_set = characters.ascii_bytes(tree.ranges)
        if byte_set is not None:
            return nfa.before(byte_set, reached)
        return nfa.fragment_before(characters.utf8(tree.ranges), reached)
    if isinstance(tree, Parts):
        for part in reversed(tree.parts):
            reached = _before(nfa, part, reached)
        return reached
    if isinstance(tree, Alternatives):
        return nfa.node(*(_before(nfa, part, reached) for part in tree.parts))
    if isinstance(tree, Anchor):
        node = nfa.node()
        nfa.step(node, reached, {START: AT_START, END: AT_END}[tree.where])
        return node
    assert isinstance(tree, Repetition)
    return _repeated_before(nfa, tree, reached)


def _repeated_before(nfa: Nfa, tree: Repetition, reached: int) -> int:
    if tree.most is None:
        loop = nfa.node(reached)
        nfa.step(loop, _before(nfa, tree.part, loop))
        node = loop
    else:
        node = reached
        for _ in range(tree.most - tree.least):
            node = nfa.node(reached, _before(nfa, tree.part, node))
    for _ in range(tree.least):
        node = _before(nfa, tree.part, node)
    return node
