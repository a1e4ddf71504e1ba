"""JSON shapes: a schema as alternatives of simple conditions on one JSON type.

Pipeline: JSON schema -> [structured.json_shapes] -> json_schema. Host only.

`Shapes.of` brings allOf, anyOf, oneOf, not, if and references into this form: any of
several shapes, each of which is a conjunction. The alternatives accept no value that
the schemas do not accept, and may lack some that they accept.
"""

import dataclasses
from fractions import Fraction
from typing import Any

from jpaged.structured import json_texts
from jpaged.structured.byte_automata import ByteAutomaton
from jpaged.structured.json_numbers import Bound, numbers
from jpaged.structured.json_references import Scope
from jpaged.structured.json_texts import cache_key

TYPES = ("null", "boolean", "number", "string", "array", "object")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A subschema, or its negation, with the base URI of its references."""

    schema: Any
    base: str
    where: str  # the path, for messages
    is_negated: bool = False
    scope: Scope = ()

    @property
    def key(self) -> tuple:
        """Identity of the condition; equal keys are equal conditions."""
        is_constant = isinstance(self.schema, bool)
        return (
            self.schema if is_constant else id(self.schema),
            self.base,
            self.is_negated,
            self.scope,
        )

    def negated(self) -> "Part":
        """Return the opposite condition."""
        return dataclasses.replace(self, is_negated=not self.is_negated)


Parts = tuple[Part, ...]  # all of them hold; () is any value


def all_of(*groups: Parts) -> Parts:
    """Return the conjunction without repetitions and without `true`."""
    found = {part.key: part for group in groups for part in group}
    return tuple(
        part
        for part in found.values()
        if not (part.schema is True or part.schema == {}) or part.is_negated
    )


def key_of(parts: Parts) -> frozenset:
    """Return a key by which equal conjunctions are equal."""
    return frozenset(part.key for part in parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Values of one JSON type; `is_stated` if a schema names it or has its keywords."""

    type: str
    is_stated: bool = False

    def met(self, other: "Shape") -> "Shape | None":
        """Return the values of both, or None if there are none."""
        if self.type != other.type:
            return None
        is_stated = self.is_stated or other.is_stated
        merged = self._met(other)
        return merged and dataclasses.replace(merged, is_stated=is_stated)

    def _met(self, other: Any) -> "Shape | None":
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants(Shape):
    """One of several values."""

    values: tuple[Any, ...]

    def _met(self, other: "Constants") -> "Shape | None":
        keys = {cache_key(value) for value in other.values}
        kept = tuple(value for value in self.values if cache_key(value) in keys)
        return dataclasses.replace(self, values=kept) if kept else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Shape):
    """Numbers within bounds."""

    type: str = "number"
    is_integer: bool = False
    low: Bound | None = None
    high: Bound | None = None
    divisors: frozenset[Fraction] = frozenset()
    non_divisors: frozenset[Fraction] = frozenset()
    excluded: frozenset[Fraction] = frozenset()

    def _met(self, other: "Numbers") -> "Shape | None":
        lows = [bound for bound in (self.low, other.low) if bound]
        highs = [bound for bound in (self.high, other.high) if bound]
        merged = Numbers(
            is_integer=self.is_integer or other.is_integer,
            low=max(lows, default=None),
            high=min(highs, key=lambda bound: (bound[0], not bound[1]), default=None),
            divisors=self.divisors | other.divisors,
            non_divisors=self.non_divisors | other.non_divisors,
            excluded=self.excluded | other.excluded,
        )
        return None if merged.is_empty else merged

    def texts(self) -> ByteAutomaton | None:
        """Return the automaton of the numbers' texts, or None if there are none.

        Raises:
            ValueError: a divisor has too many digits.
        """
        return numbers(
            self.is_integer,
            self.low,
            self.high,
            self.divisors,
            self.non_divisors,
            self.excluded,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no number is within the bounds."""
        if not (self.low and self.high):
            return False
        is_point = self.low[0] == self.high[0]
        return self.low[0] > self.high[0] or (
            is_point and (self.low[1] or self.high[1])
        )

    def accepts(self, value: Any) -> bool:
        """Return whether a number is one of these."""
        number = fraction(value)
        return (
            (not self.is_integer or number.denominator == 1)
            and (self.low is None or (self.low[0], self.low[1]) <= (number, False))
            and (self.high is None or (number, self.high[1]) <= (self.high[0], False))
            and all((number / divisor).denominator == 1 for divisor in self.divisors)
            and all((number / one).denominator != 1 for one in self.non_divisors)
            and number not in self.excluded
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strings(Shape):
    """Strings with lengths and conditions, see `json_texts.strings`."""

    type: str = "string"
    least: int = 0
    most: int | None = None
    conditions: frozenset[tuple[str, str, bool]] = frozenset()
    excluded: frozenset[str] = frozenset()

    def _met(self, other: "Strings") -> "Shape | None":
        limits = [most for most in (self.most, other.most) if most is not None]
        merged = Strings(
            least=max(self.least, other.least),
            most=min(limits, default=None),
            conditions=self.conditions | other.conditions,
            excluded=self.excluded | other.excluded,
        )
        is_empty = merged.most is not None and merged.least > merged.most
        return None if is_empty else merged

    def accepts(self, value: str, *, is_upper: bool = False) -> bool:
        """Return whether a string is one of these, or may be (`is_upper`)."""
        return (
            self.least <= len(value)
            and (self.most is None or len(value) <= self.most)
            and value not in self.excluded
            and (
                not self.conditions
                or json_texts.strings(
                    conditions=self.conditions, is_upper=is_upper
                ).matches(value)
            )
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """The keywords of one schema for the items of an array.

    Attributes:
        first: conditions on the first items, one each.
        rest: the condition on all others, or None.
        evaluates: whether these items count as evaluated, see `json_unevaluated`.
    """

    first: Parts
    rest: Part | None
    evaluates: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """A bound on the number of items that meet a condition, as `contains` has it.

    Attributes:
        part: the condition.
        least: fewest items that meet it.
        most: most items that meet it; None is no bound.
        first: index of the first item that counts.
        evaluates: whether items that meet it count as evaluated.
    """

    part: Part
    least: int
    most: int | None
    first: int = 0
    evaluates: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays(Shape):
    """Arrays: the items of each of several schemas, and bounds on their number."""

    type: str = "array"
    items: tuple[Items, ...] = ()
    contains: tuple[Counted, ...] = ()
    least: int = 0
    most: int | None = None
    is_unique: bool = False

    def _met(self, other: "Arrays") -> "Shape | None":
        limits = [most for most in (self.most, other.most) if most is not None]
        merged = Arrays(
            items=tuple(dict.fromkeys(self.items + other.items)),
            contains=tuple(dict.fromkeys(self.contains + other.contains)),
            least=max(self.least, other.least),
            most=min(limits, default=None),
            is_unique=self.is_unique or other.is_unique,
        )
        is_empty = merged.most is not None and merged.least > merged.most
        return None if is_empty else merged

    @property
    def num_first(self) -> int:
        """Number of items that have a part of their own."""
        return max((len(one.first) for one in self.items), default=0)

    def parts_at(self, index: int) -> Parts:
        """Return the conditions on an item."""
        found = []
        for one in self.items:
            part = one.first[index] if index < len(one.first) else one.rest
            found += [part] if part else []
        return all_of(tuple(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Members:
    """The keywords of one schema for the members of an object."""

    properties: dict[str, Part]
    patterns: dict[str, Part]
    others: Part | None  # None: not restricted, and not mentioned
    evaluates: bool = True  # see `json_unevaluated`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objects(Shape):
    """Objects: the members of each of several schemas, and conditions on names."""

    type: str = "object"
    members: tuple[Members, ...] = ()
    required: tuple[str, ...] = ()
    forbidden: frozenset[str] = frozenset()
    names: Parts = ()
    least: int = 0
    most: int | None = None

    def _met(self, other: "Objects") -> "Shape | None":
        limits = [most for most in (self.most, other.most) if most is not None]
        merged = Objects(
            members=tuple(dict.fromkeys(self.members + other.members)),
            required=tuple(dict.fromkeys(self.required + other.required)),
            forbidden=self.forbidden | other.forbidden,
            names=all_of(self.names, other.names),
            least=max(self.least, other.least),
            most=min(limits, default=None),
        )
        most = merged.most
        is_empty = most is not None and max(merged.least, len(merged.required)) > most
        is_empty |= not merged.forbidden.isdisjoint(merged.required)
        return None if is_empty else merged

    @property
    def named(self) -> tuple[str, ...]:
        """Names with a schema of their own, in the order of the schemas."""
        found = (name for members in self.members for name in members.properties)
        return tuple(dict.fromkeys(found))


def fraction(value: Any) -> Fraction:
    """Return a number exactly as it is written."""
    return Fraction(value) if isinstance(value, int) else Fraction(repr(float(value)))


def any_value(*, is_stated: bool = False) -> list[Shape]:
    """Return the shapes of all values."""
    return [
        Constants(type="null", values=(None,), is_stated=is_stated),
        Constants(type="boolean", values=(True, False), is_stated=is_stated),
        Numbers(is_stated=is_stated),
        Strings(is_stated=is_stated),
        Arrays(is_stated=is_stated),
        Objects(is_stated=is_stated),
    ]


def type_of(value: Any) -> str:
    """Return the JSON type of a value; integers are numbers.

    Raises:
        ValueError: it is not a JSON value.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    for name, python_type in (
        ("number", int | float),
        ("string", str),
        ("array", list),
        ("object", dict),
    ):
        if isinstance(value, python_type):
            return name
    raise ValueError(f"expected a JSON value, got {value!r}")
