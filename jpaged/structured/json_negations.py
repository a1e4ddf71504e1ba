"""JSON negations: the values that violate one of a schema's own keywords.

Pipeline: JSON schema -> [structured.json_negations] -> json_alternatives. Host only.

A negation can lack some of these values, but contains no others.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from jpaged.structured import json_keywords
from jpaged.structured.json_keywords import Child
from jpaged.structured.json_shapes import (
    Arrays,
    Constants,
    Counted,
    Items,
    Members,
    Numbers,
    Objects,
    Part,
    Shape,
    Strings,
    any_value,
    fraction,
    type_of,
)


def negations(schema: Mapping, child: Child, where: str) -> list[Shape]:
    """Return shapes of values that violate one of a schema's own keywords."""
    found: list[Shape] = list(_other_types(json_keywords.types(schema, where)))
    shapes = json_keywords.shapes(schema, child, where, is_upper=True)
    own = {shape.type: shape for shape in shapes}
    numbers, strings, objects = own.get("number"), own.get("string"), own.get("object")
    if isinstance(numbers, Numbers):
        found += _numbers(numbers)
    if isinstance(strings, Strings):
        found += _strings(strings)
    if "array" in own:
        arrays = json_keywords.arrays(schema, child, where)
        found += _arrays(arrays) if arrays else [Arrays()]
    if isinstance(objects, Objects):
        if objects.least:
            found.append(Objects(most=objects.least - 1))
        if objects.most is not None:
            found.append(Objects(least=objects.most + 1))
    required = json_keywords.required_names(schema, where)
    found += [Objects(forbidden=frozenset([name])) for name in required]
    properties = json_keywords.schemas(schema, "properties", child, where)
    for name, part in properties.items():
        found += _member(schema, name, part)
    return [dataclasses.replace(shape, is_stated=True) for shape in found]


def _other_types(names: list[str] | None) -> Iterator[Shape]:
    if names is None:
        return
    for shape in any_value():
        if shape.type == "number" and "integer" in names:
            if "number" not in names:
                yield Numbers(non_divisors=frozenset([Fraction(1)]))
        elif shape.type not in names:
            yield shape


def _numbers(numbers: Numbers) -> Iterator[Shape]:
    if numbers.low:
        yield Numbers(high=(numbers.low[0], not numbers.low[1]))
    if numbers.high:
        yield Numbers(low=(numbers.high[0], not numbers.high[1]))
    for divisor in numbers.divisors:
        yield Numbers(non_divisors=frozenset([divisor]))


def _strings(strings: Strings) -> Iterator[Shape]:
    if strings.least:
        yield Strings(most=strings.least - 1)
    if strings.most is not None:
        yield Strings(least=strings.most + 1)
    for kind, text, _ in strings.conditions:
        yield Strings(conditions=frozenset([(kind, text, True)]))


def _arrays(arrays: Arrays) -> Iterator[Shape]:
    if arrays.least:
        yield Arrays(most=arrays.least - 1)
    if arrays.most is not None:
        yield Arrays(least=arrays.most + 1)
    for one in arrays.items:
        for index, part in enumerate(one.first):
            if part.schema is not True:
                first = (
                    *[dataclasses.replace(part, schema=True)] * index,
                    part.negated(),
                )
                yield Arrays(least=index + 1, items=(Items(first, None, False),))
        if one.rest is not None and one.rest.schema is not False:
            wrong = Counted(one.rest.negated(), 1, None, len(one.first), False)
            yield Arrays(contains=(wrong,))
    for one in arrays.contains:
        if one.least:
            yield Arrays(contains=(Counted(one.part, 0, one.least - 1, 0, False),))
        if one.most is not None:
            yield Arrays(contains=(Counted(one.part, one.most + 1, None, 0, False),))


def _member(schema: Mapping, name: str, part: Part) -> list[Shape]:
    """Return the objects with a wrong member, for members that tell schemas apart."""
    is_mark = isinstance(part.schema, Mapping) and {"const", "enum"} & set(part.schema)
    if part.schema is False:
        return [Objects(required=(name,))]
    is_only = len(schema.get("properties", {})) == 1 and not schema.get("required")
    if not is_mark and not is_only and name not in schema.get("required", []):
        return []
    members = Members({name: part.negated()}, {}, None, False)
    return [Objects(members=(members,), required=(name,))]


def without(values: list[Any]) -> list[Shape]:
    """Return shapes of values other than these."""
    kinds = {type_of(value) for value in values}
    texts = frozenset(value for value in values if isinstance(value, str))
    numbers = frozenset(fraction(v) for v in values if type_of(v) == "number")
    found: list[Shape] = []
    for shape in any_value(is_stated=True):
        if shape.type not in kinds:
            found.append(shape)
        elif shape.type == "string":
            found.append(Strings(excluded=texts, is_stated=True))
        elif shape.type == "number":
            found.append(Numbers(excluded=numbers, is_stated=True))
        elif True not in values or False not in values:
            rest = tuple(
                v for v in (True, False) if not any(v is one for one in values)
            )
            if shape.type == "boolean" and rest:
                found.append(Constants(type="boolean", values=rest, is_stated=True))
    return found
