"""JSON arrays with `uniqueItems` as nodes of an automaton.

Pipeline: json_shapes -> [structured.json_unique] -> json_arrays. Host only.

A finite automaton cannot compare items. It can remember which of a few constants were
written, and allows these in any order. It allows more constants only in the order of
the schema. Other strings and numbers are divided into classes by their first
character, and an array has at most one item of each class, in the order of the classes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jpaged.structured import byte_automata
from jpaged.structured.byte_automata import ByteAutomaton, from_choices, minimised
from jpaged.structured.json_alternatives import stated
from jpaged.structured.json_keywords import SchemaError
from jpaged.structured.json_literals import Writer, constant_before
from jpaged.structured.json_shapes import Arrays, Constants, Numbers, Shape, Strings
from jpaged.structured.json_texts import cache_key, strings, text_of
from jpaged.structured.minimisation import DEAD
from jpaged.structured.nfa import fragment
from jpaged.structured.regex import from_regex

_MAX_SETS = 256  # of constants that were written
_MAX_RANGE = 64  # integers between two bounds that count as constants
_MAX_CHARACTERS = 40  # of a string with a maxLength, in arrays with classes
# Classes by the first byte of a string; "a" and "A" are one.
_INITIALS = [
    frozenset(range(256)).difference(range(48, 58), range(65, 91), range(97, 123)),
    frozenset(range(48, 58)),
    *(frozenset([letter, letter + 32]) for letter in range(65, 91)),
]
_REST = r"[0-9]{0,9}(?:\.[0-9]{1,5})?"
_NUMBERS = [
    *(f"-{digit}{_REST}" for digit in range(9, 0, -1)),
    r"-?0(?:\.[0-9]{1,5})?",
    *(f"{digit}{_REST}" for digit in range(1, 10)),
]
Item = Callable[[int], int | None]  # writes an item before a node


def unique_items_before(writer: Writer, shape: Arrays, close: int) -> int | None:
    """Write the items of an array without equal ones; None if there are none."""
    alternatives = writer.alternatives
    num_positions = shape.num_first + 1
    at = [
        _constants(stated(alternatives.of_all(shape.parts_at(index))))
        for index in range(num_positions)
    ]
    finite = [values for values in at if values is not None]
    if len(finite) == num_positions:
        values = {key: value for one in finite for key, value in one.items()}
        most = len(values) if shape.most is None else min(shape.most, len(values))
        if sum(math.comb(len(values), n) for n in range(most + 1)) <= _MAX_SETS:
            return _Sets(writer, shape, close, finite, most).before(())
    if shape.num_first or shape.contains:
        raise _refused(shape, "prefixItems or contains beside it", "few constants")
    if at[0] is not None:
        items: list[Item] = [
            functools.partial(constant_before, writer, one) for one in at[0].values()
        ]
    else:
        items = list(_classes(writer, shape))
    return _in_order(writer, shape, close, items)


def _refused(shape: Arrays, got: str, allowed: str) -> SchemaError:
    parts = [one.rest or next(iter(one.first), None) for one in shape.items]
    where = next((part.where for part in parts if part), "json")
    return SchemaError(
        f"{where}: the keyword 'uniqueItems' is not supported for items with {got}, "
        f"only for {allowed}: a finite automaton cannot compare items; remove it"
    )


def _constants(shapes: list[Shape]) -> dict | None:
    """Return the values of shapes by their keys, or None if there are too many."""
    values: list[Any] = []
    for one in shapes:
        if isinstance(one, Constants):
            values += one.values
        elif isinstance(one, Numbers) and one.is_integer and one.low and one.high:
            first, last = math.ceil(one.low[0]), math.floor(one.high[0])
            if last - first >= _MAX_RANGE:
                return None
            values += [n for n in range(first, last + 1) if one.accepts(n)]
        else:
            return None
    return {cache_key(value): value for value in values}


class _Sets:
    """Constants in any order, with a node per set of constants already written."""

    def __init__(
        self, writer: Writer, shape: Arrays, close: int, at: list[dict], most: int
    ) -> None:
        self._writer, self._shape, self._close = writer, shape, close
        self._at, self._most = at, most
        self._done: dict[Any, int | None] = {}
        if any(one.first for one in shape.contains):
            raise _refused(shape, "a negated 'items'", "items without it")

    def before(self, written: tuple) -> int | None:
        """Return the node after some keys, before the rest of the array."""
        key = frozenset(written)
        if key not in self._done:
            self._done[key] = self._before(written)
        return self._done[key]

    def _before(self, written: tuple) -> int | None:
        writer, index = self._writer, len(written)
        nodes = []
        if index >= self._shape.least and self._is_counted(written):
            nodes.append(self._close)
        here = self._at[min(index, len(self._at) - 1)]
        for key, value in here.items() if index < self._most else ():
            after = None if key in written else self.before((*written, key))
            if after is not None:
                node = constant_before(writer, value, after)
                nodes.append(writer.separator_before(",", node) if index else node)
        return writer.nfa.node(*nodes) if nodes else None

    def _is_counted(self, written: tuple) -> bool:
        values = {key: value for one in self._at for key, value in one.items()}
        items = [values[key] for key in written]
        return self._writer.alternatives.has_counts(self._shape, items)


def _in_order(
    writer: Writer, shape: Arrays, close: int, items: list[Item]
) -> int | None:
    """Write some of the items, in this order; None if there are too few items."""
    most = len(items) if shape.most is None else min(shape.most, len(items))
    # Without an upper bound, counting up to the lower bound is enough.
    last = max(shape.least, 1) if most == len(items) else most
    if shape.least > most:
        return None
    # after[n] is the node after n items, before a comma or the end; first is the node
    # before the first item or the end.
    after = [close if n >= shape.least else None for n in range(last + 1)]
    first = after[0]
    for item in reversed(items):
        following = list(after)
        for n in range(last + 1):
            is_full = n == last and most < len(items)
            rest = None if is_full else following[min(n + 1, last)]
            node = None if rest is None else item(rest)
            if node is None:
                continue
            if n == 0:
                first = node if first is None else writer.nfa.node(first, node)
            else:
                comma, other = writer.separator_before(",", node), following[n]
                after[n] = comma if other is None else writer.nfa.node(other, comma)
    return first


def _classes(writer: Writer, shape: Arrays) -> list[Item]:
    """Return the classes of items that are not constants, as writers of one item."""
    texts, decimals, others = _texts_of_items(writer, shape)
    items: list[Item] = [
        functools.partial(constant_before, writer, value) for value in others
    ]
    if decimals:
        every = functools.reduce(byte_automata.union, decimals)
        by_digit = (byte_automata.intersection(every, from_regex(r)) for r in _NUMBERS)
        items += [
            functools.partial(_number_before, writer, one)
            for one in by_digit
            if not one.is_empty
        ]
    if texts:
        every = functools.reduce(byte_automata.union, texts)
        items += [functools.partial(constant_before, writer, "")] * every.matches("")
        items += [
            functools.partial(writer.string_before, one)
            for initials in _INITIALS
            if not (one := _beginning_with(every, initials)).is_empty
        ]
    return items


def _texts_of_items(
    writer: Writer, shape: Arrays
) -> tuple[list[ByteAutomaton], list[ByteAutomaton], list[Any]]:
    """Return automata of the items' strings and numbers, and the other constants."""
    parts = shape.parts_at(0)
    texts: list[ByteAutomaton] = []
    decimals: list[ByteAutomaton] = []
    others: list[Any] = []
    for one in stated(writer.alternatives.of_all(parts)):
        if isinstance(one, Strings):
            most = one.most
            if most is not None:
                most = max(min(most, _MAX_CHARACTERS), one.least)
            texts.append(strings(one.least, most, one.conditions, one.excluded))
        elif isinstance(one, Numbers):
            found = one.texts()
            decimals += [] if found is None else [found]
        elif isinstance(one, Constants):
            kinds = [type(value) for value in one.values]
            if str in kinds:
                texts.append(from_choices(map(str, one.values)))
            elif bool in kinds or None in one.values:
                others += one.values
            elif dict in kinds or list in kinds:
                raise _refused(shape, "an array or object", "strings and numbers")
            else:
                decimals.append(from_choices(map(text_of, one.values)))
        elif parts:
            raise _refused(shape, f"the type {one.type!r}", "constants and scalars")
    return texts, decimals, others


def _number_before(writer: Writer, texts: ByteAutomaton, reached: int) -> int | None:
    return writer.nfa.fragment_before(fragment(texts), reached)


def _beginning_with(texts: ByteAutomaton, initials: frozenset[int]) -> ByteAutomaton:
    """Return the automaton of those texts that begin with one of some bytes."""
    start = np.full((1, texts.transitions.shape[1]), DEAD, np.int32)
    allowed = sorted(initials)
    moved = np.where(texts.transitions == DEAD, DEAD, texts.transitions + 1)
    start[0, allowed] = moved[0, allowed]
    is_accepting = np.append(False, texts.is_accepting)
    table = np.concatenate([start, moved]).astype(np.int32)
    is_reached = np.zeros(len(table) + 1, np.bool_)
    is_reached[0], num_before = True, 0
    while is_reached.sum() > num_before:
        num_before = is_reached.sum()
        is_reached[table[is_reached[:-1]]] = True
        is_reached[DEAD] = False
    ids = np.append(np.cumsum(is_reached[:-1]) - 1, DEAD).astype(np.int32)
    kept = np.flatnonzero(is_reached[:-1])
    return minimised(ids[table[kept]], is_accepting[kept])
