r"""JSON schemas as byte automata.

Pipeline: JSON schema -> [structured.json_schema] -> byte automaton. Host only.

Every text of the automaton is JSON that the schema accepts, but not vice versa: the
members of an object have the order of the schema; the only white space is an optional
space after a comma or a colon; strings have no \u escapes (every character except
control characters can be written directly); values nest to a limited depth where the
schema does not limit it.

Source: JSON Schema 2020-12. https://json-schema.org/draft/2020-12
"""

import dataclasses
from collections import Counter
from typing import Any

from jpaged.decoding.automaton import MAX_STATES
from jpaged.structured.byte_automata import ByteAutomaton, TooLargeError
from jpaged.structured.json_alternatives import MAX_DEPTH, Alternatives, stated
from jpaged.structured.json_arrays import array_before
from jpaged.structured.json_keywords import SchemaError
from jpaged.structured.json_literals import constants_before
from jpaged.structured.json_objects import object_before
from jpaged.structured.json_references import Document
from jpaged.structured.json_shapes import (
    Arrays,
    Constants,
    Numbers,
    Objects,
    Parts,
    Shape,
    Strings,
    all_of,
    key_of,
)
from jpaged.structured.json_texts import escaped, strings
from jpaged.structured.nfa import Nfa, fragment

_QUOTE = 1 << ord('"')


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where the schema sets no limit, or a large one, texts have these."""

    free_depth: int  # levels of objects and arrays in a value without a schema
    recursion: int  # times that a schema can be inside itself
    repetitions: int  # characters of a string, items of an array


# The first limits with which the automaton is small enough are used.
LIMITS = (
    Limits(free_depth=2, recursion=2, repetitions=100_000),
    Limits(free_depth=2, recursion=2, repetitions=1_000),
    Limits(free_depth=1, recursion=2, repetitions=250),
    Limits(free_depth=1, recursion=1, repetitions=60),
    Limits(free_depth=0, recursion=1, repetitions=16),
    Limits(free_depth=0, recursion=0, repetitions=8),
)
# Fewer states leave space for other constraints in the engine's pool.
_ENOUGH_STATES = (MAX_STATES, *[MAX_STATES // 2] * (len(LIMITS) - 2), MAX_STATES)


def to_automaton(schema: Any) -> ByteAutomaton:
    """Return the automaton of JSON texts that `schema` accepts.

    Args:
        schema: a parsed JSON schema: a dict, or True for any value.

    Raises:
        ValueError: `schema` is not a schema, has an unsupported keyword, needs too many
            states, or accepts nothing. The message contains the path to the problem.
    """
    if not isinstance(schema, dict | bool):
        raise SchemaError(f"json: expected a JSON schema (a dict), got {schema!r}")
    try:
        alternatives = Alternatives(Document(schema))
        for limits, enough in zip(LIMITS, _ENOUGH_STATES, strict=True):
            writer = _Writer(alternatives, limits)
            try:
                automaton = writer.automaton(schema)
                if automaton.num_states <= enough:
                    return automaton
            except TooLargeError:
                pass
            if not writer.is_limited:  # lower limits would not change anything
                break
    except RecursionError:
        raise _too_deep("json") from None
    except SchemaError:
        raise
    except ValueError as error:
        raise SchemaError(f"json: {error}") from error
    raise SchemaError(
        f"json: expected a schema that needs at most {MAX_STATES} states, got one that "
        "needs more; use fewer properties, or smaller maxLength and maxItems"
    )


def _too_deep(where: str) -> SchemaError:
    return SchemaError(
        f"{where[:60]}...: expected at most {MAX_DEPTH} schemas in one another, got "
        "more"
    )


class _Writer:
    """Writes values from their end to their start; equal values with equal ends are
    written once."""

    def __init__(self, alternatives: Alternatives, limits: Limits) -> None:
        self.alternatives, self.limits = alternatives, limits
        self.nfa = Nfa()
        self.is_limited = False  # whether lower limits would need fewer states
        self._done: dict[tuple, int | None] = {}
        self._open: Counter[frozenset] = Counter()
        self._depth = self._level = 0

    def automaton(self, schema: Any) -> ByteAutomaton:
        """Return the automaton of the whole schema."""
        end = self.nfa.node()
        root = all_of((self.alternatives.root(schema),))
        start = self.value_before(root, end, self.limits.free_depth)
        if start is None:
            raise SchemaError(
                "json: expected a schema that accepts some value, got one that accepts "
                "none, or none with the supported nesting"
            )
        return self.nfa.determinised(start, [end])

    def value_before(self, parts: Parts, reached: int, free_depth: int) -> int | None:
        """Write a value before a node.

        Args:
            parts: its conditions.
            reached: the node that continues the text.
            free_depth: levels of objects and arrays if there are no conditions.

        Returns:
            The node before the value, or None if no value meets the conditions.
        """
        key = key_of(parts)
        is_inside = bool(parts) and self._open[key] > 0
        self._level += is_inside
        self.is_limited |= is_inside or not parts
        question = (key, reached, self._level, None if parts else free_depth)
        if question not in self._done:
            self._done[question] = None
            if self._level <= self.limits.recursion:
                self._enter(parts, 1)
                self._open[key] += 1
                found = self._alternatives_before(parts, reached, free_depth)
                self._open[key] -= 1
                self._enter(parts, -1)
                self._done[question] = found
        self._level -= is_inside
        return self._done[question]

    def text_before(self, text: str, reached: int) -> int:
        """Write ASCII text before a node."""
        return self.nfa.text_before(text.encode(), reached)

    def separator_before(self, text: str, reached: int) -> int:
        """Write a comma or a colon and an optional space before a node."""
        key = (text, reached)
        found = self._done.get(key)
        if found is None:
            space = self.text_before(" ", reached)
            found = self.nfa.before(1 << ord(text), self.nfa.node(space, reached))
            self._done[key] = found
        return found

    def string_before(self, automaton: ByteAutomaton, reached: int) -> int | None:
        """Write the strings of an automaton with quotes and escapes."""
        inside = escaped(automaton)
        if inside.is_empty:
            return None
        end = self.nfa.before(_QUOTE, reached)
        return self.nfa.before(_QUOTE, self.nfa.fragment_before(fragment(inside), end))

    def _free_string_before(self, least: int, most: int | None, reached: int) -> int:
        """Write a string of `least` to `most` characters."""
        character = fragment(escaped(strings(1, 1)))
        end = node = self.nfa.before(_QUOTE, reached)
        if most is None:
            node = self.nfa.fragment_before(fragment(escaped(strings())), end)
        for _ in range(0 if most is None else most - least):
            node = self.nfa.node(end, self.nfa.fragment_before(character, node))
        for _ in range(least):
            node = self.nfa.fragment_before(character, node)
        return self.nfa.before(_QUOTE, node)

    def _enter(self, parts: Parts, step: int) -> None:
        self._depth += step
        if self._depth > MAX_DEPTH:
            raise _too_deep(parts[0].where if parts else "json")

    def _alternatives_before(
        self, parts: Parts, reached: int, free_depth: int
    ) -> int | None:
        child_depth = self.limits.free_depth if parts else free_depth - 1
        nodes = []
        for shape in stated(self.alternatives.of_all(parts)):
            if not parts and not free_depth and isinstance(shape, Arrays | Objects):
                continue
            node = self._shape_before(shape, reached, max(child_depth, 0))
            nodes += [] if node is None else [node]
        if len(nodes) < 2:
            return nodes[0] if nodes else None
        return self.nfa.node(*nodes)

    def _shape_before(self, shape: Shape, reached: int, free_depth: int) -> int | None:
        if isinstance(shape, Constants):
            return constants_before(self, shape.values, reached)
        if isinstance(shape, Arrays):
            return array_before(self, shape, reached, free_depth)
        if isinstance(shape, Objects):
            return object_before(self, shape, reached, free_depth)
        if isinstance(shape, Strings):
            most = shape.most
            if most is not None:
                self.is_limited |= most > max(shape.least, LIMITS[-1].repetitions)
                most = max(min(most, self.limits.repetitions), shape.least)
            if not shape.conditions and not shape.excluded:
                return self._free_string_before(shape.least, most, reached)
            texts = strings(shape.least, most, shape.conditions, shape.excluded)
            return self.string_before(texts, reached)
        assert isinstance(shape, Numbers)
        found = shape.texts()
        if found is None:
            return None
        return self.nfa.fragment_before(fragment(found), reached)
