"""JSON objects as nodes of an automaton.

Pipeline: json_shapes -> [structured.json_objects] -> json_schema. Host only.

The members with names of the schema come first, in its order; members with other names
follow, where the schema asks for them or names none.
"""

import dataclasses
from collections.abc import Iterator

from jpaged.structured import byte_automata
from jpaged.structured.byte_automata import ByteAutomaton, from_choices
from jpaged.structured.json_alternatives import stated
from jpaged.structured.json_keywords import SchemaError, parts_of
from jpaged.structured.json_literals import Writer, name_before
from jpaged.structured.json_shapes import (
    Members,
    Objects,
    Parts,
    Strings,
    all_of,
    key_of,
)
from jpaged.structured.json_texts import strings
from jpaged.structured.regex import containing

_MAX_PATTERNS = 8  # of names, in one object


@dataclasses.dataclass(frozen=True)
class _Count:
    """Where the text is: after how many members."""

    has_any: bool
    distinct: int = 0  # members with certainly different names, up to the least number
    members: int = 0  # all members, if there is a limit


def object_before(
    writer: Writer, shape: Objects, reached: int, free_depth: int
) -> int | None:
    """Write an object before a node; None if there is none."""
    start = _Object(writer, shape, reached, free_depth).start()
    return None if start is None else writer.text_before("{", start)


class _Object:
    def __init__(
        self, writer: Writer, shape: Objects, reached: int, free_depth: int
    ) -> None:
        self._writer, self._shape, self._free_depth = writer, shape, free_depth
        self._close = writer.text_before("}", reached)
        named = [
            name
            for name in dict.fromkeys((*shape.named, *shape.required))
            if name not in shape.forbidden
            and writer.alternatives.accepts(shape.names, name)
        ]
        self._named = named
        known = writer.alternatives.other_names
        if id(shape) not in known:
            known[id(shape)] = list(_others(writer, shape)) if self._is_open() else []
        self._others = known[id(shape)]
        self._most = shape.most
        if self._most is not None and self._most >= len(named) and not self._others:
            self._most = None

    def start(self) -> int | None:
        """Return the node after the opening bracket."""
        shape = self._shape
        if not set(shape.required) <= set(self._named):
            return None
        counts = self._counts()
        nodes = {count: self._end(count) for count in counts}
        for name in reversed(self._named):
            parts, is_required = parts_of(shape, name), name in shape.required
            nodes = {
                count: self._member(name, parts, nodes, count, is_required)
                for count in counts
            }
        return nodes[_Count(False)]

    def _is_open(self) -> bool:
        """Return whether members with other names are written."""
        members, shape = self._shape.members, self._shape
        if any(
            one.others and one.others.schema is False and not one.patterns
            for one in members
        ):
            return False
        is_asked = any(
            one.patterns or (one.others and one.others.schema is not False)
            for one in members
        )
        return is_asked or not self._named or shape.least > len(self._named)

    def _counts(self) -> list[_Count]:
        """Return all counts that can occur, the start among them."""
        found, todo = [], [_Count(False)]
        while todo:
            count = todo.pop()
            if count not in found:
                found.append(count)
                following = self._after(count)
                todo += [] if following is None else [following]
        return found

    def _after(self, count: _Count) -> _Count | None:
        """Return the count after one more member, or None if there are too many."""
        if self._most is not None and count.members >= self._most:
            return None
        return _Count(
            True,
            min(count.distinct + 1, self._shape.least),
            0 if self._most is None else count.members + 1,
        )

    def _member(
        self,
        name: str,
        parts: Parts,
        nodes: dict[_Count, int | None],
        count: _Count,
        is_required: bool,
    ) -> int | None:
        """Return the node before a member and all later ones."""
        without = None if is_required else nodes[count]
        following = self._after(count)
        after = None if following is None else nodes[following]
        if after is None:
            return without
        node = self._writer.value_before(parts, after, self._free_depth)
        if node is None:
            return without
        node = name_before(self._writer, name, node)
        if count.has_any:
            node = self._writer.separator_before(",", node)
        return node if without is None else self._writer.nfa.node(without, node)

    def _end(self, count: _Count) -> int | None:
        """Return the node before members with other names and the closing bracket.

        Other names can be repeated, so only one of them counts as distinct.
        """
        least, nfa = self._shape.least, self._writer.nfa
        close = self._close if count.distinct >= least else None
        if not self._others:
            return close
        after_one = self._after(count)
        if after_one is None or after_one.distinct < least:
            return close
        if self._most is None:
            loop = nfa.node(self._close)
            members = self._other_members(loop)
            if not members:
                return close
            for node in members:
                nfa.step(loop, self._writer.separator_before(",", node))
        else:
            loop = self._close
            for _ in range(min(self._most - count.members, 64) - 1):
                members = self._other_members(loop)
                commas = [self._writer.separator_before(",", node) for node in members]
                loop = nfa.node(self._close, *commas)
            members = self._other_members(loop)
        if count.has_any:
            members = [self._writer.separator_before(",", node) for node in members]
        nodes = [*members, *([] if close is None else [close])]
        return nfa.node(*nodes) if nodes else None

    def _other_members(self, reached: int) -> list[int]:
        """Return the nodes before one member with another name."""
        found = []
        for names, parts in self._others:
            node = self._writer.value_before(parts, reached, self._free_depth)
            if node is not None:
                node = self._writer.separator_before(":", node)
                node = self._writer.string_before(names, node)
                found += [] if node is None else [node]
        return found


def _others(writer: Writer, shape: Objects) -> Iterator[tuple[ByteAutomaton, Parts]]:
    """Yield sets of other names, and the conditions on members with these names."""
    all_names = strings()
    if shape.names:
        shapes = stated(writer.alternatives.of_all(shape.names))
        found = [
            strings(one.least, one.most, one.conditions, one.excluded)
            for one in shapes
            if isinstance(one, Strings)
        ]
        if len(found) != 1:  # constants are names of the schema, or there are none
            return
        all_names = found[0]
    taken = {*shape.named, *shape.required, *shape.forbidden}
    if taken:
        all_names = byte_automata.difference(all_names, from_choices(sorted(taken)))
    patterns = list(dict.fromkeys(p for m in shape.members for p in m.patterns))
    if len(patterns) > _MAX_PATTERNS:
        raise SchemaError(
            f"json: expected at most {_MAX_PATTERNS} patternProperties in one object, "
            f"got {len(patterns)}"
        )
    cells = [(all_names, frozenset())]
    for pattern in patterns:
        matching, other = containing(pattern), containing(pattern, is_wide=True)
        cells = [
            cell
            for names, found in cells
            for cell in (
                (byte_automata.intersection(names, matching), found | {pattern}),
                (byte_automata.difference(names, other), found),
            )
            if not cell[0].is_empty
        ]
    merged: dict[frozenset, tuple[ByteAutomaton, Parts]] = {}
    for names, found in cells:
        parts = _parts_of_cell(shape.members, found)
        if any(part.schema is False and not part.is_negated for part in parts):
            continue
        key = key_of(parts)
        if key in merged:
            names = byte_automata.union(merged[key][0], names)
        merged[key] = (names, parts)
    yield from merged.values()


def _parts_of_cell(members: tuple[Members, ...], patterns: frozenset[str]) -> Parts:
    found = []
    for one in members:
        matching = [
            part for pattern, part in one.patterns.items() if pattern in patterns
        ]
        found += matching or ([one.others] if one.others else [])
    return all_of(tuple(found))
