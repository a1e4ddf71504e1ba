"""JSON alternatives: brings the keywords of schemas into the form of `json_shapes`.

Pipeline: JSON schema -> [structured.json_alternatives] -> json_schema. Host only.

A negation can lack alternatives ("not all items are ..."), but has no wrong ones.

Source: JSON Schema 2020-12, and the keywords of drafts 4 to 2019-09.
https://json-schema.org/draft/2020-12/json-schema-validation
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

from jpaged.structured import json_keywords, json_negations, json_texts
from jpaged.structured.json_keywords import SchemaError, expected
from jpaged.structured.json_references import Document
from jpaged.structured.json_shapes import (
    Arrays,
    Constants,
    Objects,
    Part,
    Parts,
    Shape,
    Strings,
    any_value,
    key_of,
    type_of,
)
from jpaged.structured.json_unevaluated import with_unevaluated, without_evaluated
from jpaged.structured.json_values import Values

MAX_ALTERNATIVES = 256
_MAX_OF_NEGATION = 64
MAX_DEPTH = 100  # nested schemas
_MAX_TOGETHER = 4  # alternatives of `anyOf` whose combinations are shapes too
_REFERENCES = ("$ref", "$recursiveRef", "$dynamicRef")


class Alternatives(Values):
    """The shapes of the parts of one document; equal questions are answered once.

    Args:
        document: the schema with its references.
        is_upper: whether shapes may have too many values instead of too few. Two
            conditions without a common value in this sense have none at all.
    """

    def __init__(self, document: Document, *, is_upper: bool = False) -> None:
        self._document = document
        self.is_upper = is_upper
        self._upper = self if is_upper else Alternatives(document, is_upper=True)
        self._found: dict[tuple, list[Shape]] = {}
        self._found_all: dict[frozenset, list[Shape]] = {}
        self._open: list[tuple] = []
        self.other_names: dict[int, list] = {}  # by shape, see `json_objects`
        self._kept: list[Any] = []  # so that the ids in keys stay unique

    def root(self, schema: Any) -> Part:
        """Return the part that is the whole schema."""
        base = self._document.base_of(schema, "")
        return Part(schema, base, "json", scope=self._document.entered((), base))

    def of_all(self, parts: Parts) -> list[Shape]:
        """Return the shapes of values that meet all parts."""
        key = key_of(parts)
        if key not in self._found_all:
            found = any_value()
            # A part with constants comes first, because it leaves the fewest shapes.
            by_size = sorted(parts, key=lambda p: (p.is_negated, len(self.of(p))))
            for part in by_size:
                lacks = part.is_negated
                found = self.product(found, self.of(part), part.where, may_lack=lacks)
            self._kept.append(parts)
            self._found_all[key] = found
        return self._found_all[key]

    def of(self, part: Part) -> list[Shape]:
        """Return the shapes of one part.

        Raises:
            SchemaError: a keyword is malformed or not supported, or the schema refers
                to itself without an object or an array between.
        """
        if part.key in self._found:
            return self._found[part.key]
        if part.key in self._open or len(self._open) > MAX_DEPTH:
            what = (
                "refers to itself" if part.key in self._open else "is nested too deeply"
            )
            raise SchemaError(
                f"{part.where[:200]}: expected at most {MAX_DEPTH} schemas in one "
                "another, got "
                f"one that {what}"
            )
        self._open.append(part.key)
        if part.is_negated:
            found = without_evaluated(self._negated(part))
        else:
            found = self._positive(part)
        self._open.pop()
        self._kept.append(part)
        self._found[part.key] = found
        return found

    def are_disjoint(self, a: Part, b: Part) -> bool:
        """Return whether no value certainly meets both parts."""
        upper = self._upper
        return all(
            upper.is_empty(met)
            for one in upper.of(a)
            for other in upper.of(b)
            if (met := upper.met(one, other))
        )

    def met(self, one: Shape, other: Shape) -> Shape | None:
        """Return the values of both shapes, or None if there are none."""
        if one.type != other.type:
            return None
        if isinstance(other, Constants) and not isinstance(one, Constants):
            one, other = other, one
        if not isinstance(one, Constants) or isinstance(other, Constants):
            return one.met(other)
        kept = tuple(value for value in one.values if self.has(other, value))
        return dataclasses.replace(one, values=kept, is_stated=True) if kept else None

    def product(
        self, a: list[Shape], b: list[Shape], where: str, *, may_lack: bool = False
    ) -> list[Shape]:
        """Return the shapes of values in both.

        Args:
            a: shapes.
            b: shapes.
            where: the path, for messages.
            may_lack: whether some are left out if there are too many, as is right for
                a negation.
        """
        if may_lack:  # keep some of all shapes of `a`
            a, b = b, a
        found = [met for one in a for other in b if (met := self.met(one, other))]
        if may_lack and len(found) > _MAX_OF_NEGATION:
            return found[:_MAX_OF_NEGATION]
        if len(found) > MAX_ALTERNATIVES:
            raise SchemaError(
                f"{where}: expected at most {MAX_ALTERNATIVES} combinations of "
                f"alternatives, got {len(found)}; write fewer anyOf or oneOf into one "
                "another"
            )
        return found

    def is_empty(self, shape: Shape) -> bool:
        """Return whether a shape has no value, as its constants and bounds show."""
        if isinstance(shape, Strings) and shape.conditions:
            return json_texts.strings(
                shape.least, None, shape.conditions, is_upper=True
            ).is_empty
        if isinstance(shape, Objects):
            parts = [json_keywords.parts_of(shape, name) for name in shape.required]
            return any(self._is_nothing(one) for one in parts)
        if isinstance(shape, Arrays):
            return any(
                self._is_nothing(shape.parts_at(i)) for i in range(min(shape.least, 8))
            )
        return False

    def _is_nothing(self, parts: Parts) -> bool:
        key = ("nothing", key_of(parts))
        if key in self._open or len(self._open) > MAX_DEPTH:
            return False
        self._open.append(key)
        found = all(self.is_empty(shape) for shape in self.of_all(parts))
        self._open.pop()
        return found

    def _child(
        self, part: Part, schema: Any, step: str, *, negated: bool = False
    ) -> Part:
        if isinstance(schema, Part):  # in a schema that the standard only implies
            return schema
        base, scope = self._document.base_of(schema, part.base), part.scope
        if base != part.base:
            scope = self._document.entered(scope, base)
        return Part(schema, base, f"{part.where}/{step}", negated, scope)

    def _children(self, part: Part, name: str, *, negated: bool = False) -> Parts:
        schemas = part.schema[name]
        if not isinstance(schemas, list) or not schemas:
            raise expected(f"{part.where}/{name}", "a list of schemas", schemas)
        return tuple(
            self._child(part, schema, f"{name}/{i}", negated=negated)
            for i, schema in enumerate(schemas)
        )

    def _target(self, part: Part, name: str) -> Part:
        ref = part.schema[name]
        if name == "$ref":
            found = self._document.resolve(ref, part.base)
        else:
            found = self._document.resolve_dynamic(ref, part.base, part.scope)
        if found is None:
            raise SchemaError(
                f"{part.where}/{name}: there is no {part.schema[name]!r} in the "
                "schema; other documents are not loaded"
            )
        scope = self._document.entered(part.scope, found.base)
        return Part(found.schema, found.base, part.where, part.is_negated, scope)

    def _positive(self, part: Part) -> list[Shape]:
        schema = part.schema
        if isinstance(schema, bool):
            return any_value() if schema else []
        if not isinstance(schema, Mapping):
            raise expected(part.where, "a JSON schema (a dict)", schema)
        factors = []
        for name in _REFERENCES:
            if name in schema:
                factors.append(self.of(self._target(part, name)))
                if self._document.ignores_siblings:
                    return factors[0]
        child = functools.partial(self._child, part)
        base = json_keywords.shapes(schema, child, part.where, is_upper=self.is_upper)
        if "enum" in schema or "const" in schema:
            factors.insert(0, self._constants(part, base))
        else:
            factors.append(base)
        if "allOf" in schema:
            factors += [self.of(one) for one in self._children(part, "allOf")]
        if "anyOf" in schema:
            factors.append(self._any_of(part))
        if "oneOf" in schema:
            factors.append(self._one_of(part))
        factors += self._conditions(part)
        found = factors[0]
        for other in factors[1:]:
            found = self.product(found, other, part.where)
        if not self.is_upper:
            evaluates = self._document.contains_evaluates
            found = with_unevaluated(found, schema, child, evaluates)
        return found

    def _any_of(self, part: Part) -> list[Shape]:
        parts = self._children(part, "anyOf")
        found = [shape for one in parts for shape in self.of(one)]
        if self._document.has_unevaluated and len(parts) <= _MAX_TOGETHER:
            # If several hold, all of them evaluate members.
            for number in range(2, len(parts) + 1):
                for some in itertools.combinations(parts, number):
                    found += self.of_all(some)
        return found

    def _constants(self, part: Part, base: list[Shape]) -> list[Shape]:
        values = json_keywords.constants(part.schema, part.where)
        by_type: dict[str, list[Any]] = {}
        for value in values:
            if any(self.has(shape, value) for shape in base):
                by_type.setdefault(type_of(value), []).append(value)
        return [
            Constants(type=name, values=tuple(kept), is_stated=True)
            for name, kept in by_type.items()
        ]

    def _conditions(self, part: Part) -> list[list[Shape]]:
        """Return the factors of not, if, then, else and of dependent keywords."""
        schema, factors = part.schema, []
        if self.is_upper:
            return []
        if "not" in schema:
            factors.append(
                self.of(self._child(part, schema["not"], "not", negated=True))
            )
        if "if" in schema and not {"then", "else"} & set(schema):
            if self._document.has_unevaluated:
                factors.append(
                    any_value() + self.of(self._child(part, schema["if"], "if"))
                )
        elif "if" in schema:
            both = []
            for name, negated in (("then", False), ("else", True)):
                condition = self.of(
                    self._child(part, schema["if"], "if", negated=negated)
                )
                if name in schema:
                    result = self.of(self._child(part, schema[name], name))
                    condition = self.product(condition, result, part.where)
                both += condition
            factors.append(both)
        for trigger, dependent in json_keywords.dependents(schema, part.where):
            if isinstance(dependent, list):
                result: list[Shape] = [Objects(required=tuple(dependent))]
            else:
                result = self.of(
                    self._child(part, dependent, f"dependencies/{trigger}")
                )
            without: list[Shape] = [
                shape for shape in any_value() if not isinstance(shape, Objects)
            ]
            without.append(Objects(forbidden=frozenset([trigger])))
            with_it: list[Shape] = [Objects(required=(trigger,))]
            factors.append(without + self.product(with_it, result, part.where))
        return factors

    def _one_of(self, part: Part) -> list[Shape]:
        """Return the shapes of each alternative without the others' values."""
        parts = self._children(part, "oneOf")
        if self.is_upper:
            return [shape for one in parts for shape in self.of(one)]
        found = []
        for one in parts:
            shapes = self.of(one)
            for other in parts:
                if other is not one and not self.are_disjoint(one, other):
                    others = self.of(other.negated())
                    others = others + self._foreign_members(shapes, other)
                    shapes = self.product(shapes, others, part.where, may_lack=True)
            found += shapes
        if not found:
            raise SchemaError(
                f"{part.where}/oneOf: expected alternatives that differ by a type, a "
                "constant, a required property or a bound, got some whose values "
                "cannot be told apart; write anyOf if more than one may hold"
            )
        return found

    def _foreign_members(self, shapes: list[Shape], other: Part) -> list[Shape]:
        """Return objects with a member of `shapes` that `other` does not accept."""
        named = [
            name for one in shapes if isinstance(one, Objects) for name in one.named
        ]
        upper = [one for one in self._upper.of(other) if isinstance(one, Objects)]
        return [
            Objects(required=(name,), is_stated=True)
            for name in dict.fromkeys(named)
            if all(
                self._upper._is_nothing(json_keywords.parts_of(one, name))
                for one in upper
            )
        ]

    def _negated(self, part: Part) -> list[Shape]:
        schema = part.schema
        if self.is_upper:
            return any_value()
        if isinstance(schema, bool) or not schema:
            return [] if schema is not False else any_value()
        if not isinstance(schema, Mapping):
            raise expected(part.where, "a JSON schema (a dict)", schema)
        found = []
        for name in _REFERENCES:
            if name in schema:
                found += self.of(self._target(part, name))
                if self._document.ignores_siblings:
                    return found
        child = functools.partial(self._child, part)
        found += json_negations.negations(schema, child, part.where)
        if "enum" in schema or "const" in schema:
            values = json_keywords.constants(schema, part.where)
            found += json_negations.without(values)
        if "allOf" in schema:
            for one in self._children(part, "allOf", negated=True):
                found += self.of(one)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                found += self.of_all(self._children(part, name, negated=True))
        found += self._broken_dependents(part)
        if "not" in schema:
            found += self.of(self._child(part, schema["not"], "not"))
        if "if" in schema:
            for name, negated in (("then", False), ("else", True)):
                if name in schema:
                    condition = self._child(part, schema["if"], "if", negated=negated)
                    result = self._child(part, schema[name], name, negated=True)
                    found += self.product(
                        self.of(condition), self.of(result), part.where
                    )
        return found

    def _broken_dependents(self, part: Part) -> list[Shape]:
        found: list[Shape] = []
        for trigger, dependent in json_keywords.dependents(part.schema, part.where):
            if isinstance(dependent, list):
                found += [
                    Objects(
                        required=(trigger,), forbidden=frozenset([name]), is_stated=True
                    )
                    for name in dependent
                    if name != trigger
                ]
            else:
                wrong = self._child(part, dependent, "dependencies", negated=True)
                with_it: list[Shape] = [Objects(required=(trigger,), is_stated=True)]
                found += self.product(with_it, self.of(wrong), part.where)
        return found


def stated(shapes: list[Shape]) -> list[Shape]:
    """Return the shapes of types that a schema names, or else all of them."""
    return [shape for shape in shapes if shape.is_stated] or shapes
