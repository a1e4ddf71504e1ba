"""JSON literals: constants as nodes of an automaton.

Pipeline: json_shapes -> [structured.json_literals] -> json_schema. Host only.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from jpaged.structured.byte_automata import ByteAutomaton, from_choices
from jpaged.structured.json_alternatives import Alternatives
from jpaged.structured.json_shapes import Parts
from jpaged.structured.json_texts import text_of
from jpaged.structured.nfa import Fragment, Nfa


class Writer(Protocol):
    """What the writers of values share, see `json_schema`."""

    nfa: Nfa
    alternatives: Alternatives
    limits: Any
    is_limited: bool

    def value_before(self, parts: Parts, reached: int, free_depth: int) -> int | None:
        """Write a value."""
        ...

    def text_before(self, text: str, reached: int) -> int:
        """Write ASCII text."""
        ...

    def separator_before(self, text: str, reached: int) -> int:
        """Write a comma or a colon and an optional space."""
        ...

    def string_before(self, automaton: ByteAutomaton, reached: int) -> int | None:
        """Write the strings of an automaton."""
        ...


def constants_before(writer: Writer, values: Sequence[Any], reached: int) -> int | None:
    """Write any of several constants before a node; None if there are none."""
    scalars = [text_of(value) for value in values if not isinstance(value, list | dict)]
    nodes = []
    if len(scalars) == 1:
        nodes.append(writer.nfa.text_before(scalars[0].encode(), reached))
    elif scalars:
        found = _any_of(tuple(scalars))
        nodes.append(writer.nfa.fragment_before(found, reached))
    nodes += [
        constant_before(writer, value, reached)
        for value in values
        if isinstance(value, list | dict)
    ]
    if len(nodes) < 2:
        return nodes[0] if nodes else None
    return writer.nfa.node(*nodes)


def constant_before(writer: Writer, value: Any, reached: int) -> int:
    """Write exactly one value before a node, with optional spaces."""
    if not isinstance(value, list | dict):
        return writer.nfa.text_before(text_of(value).encode(), reached)
    is_object = isinstance(value, dict)
    node = writer.text_before("}" if is_object else "]", reached)
    members = list(value.items()) if is_object else [(None, item) for item in value]
    for number, (name, item) in reversed(list(enumerate(members))):
        node = constant_before(writer, item, node)
        if name is not None:
            node = name_before(writer, name, node)
        if number:
            node = writer.separator_before(",", node)
    return writer.text_before("{" if is_object else "[", node)


def name_before(writer: Writer, name: str, reached: int) -> int:
    """Write a member's name and colon before a node."""
    node = writer.separator_before(":", reached)
    return writer.nfa.text_before(text_of(name).encode(), node)


@functools.lru_cache(maxsize=64)
def _any_of(texts: tuple[str, ...]) -> Fragment:
    return Fragment(from_choices(texts))
