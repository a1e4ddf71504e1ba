"""JSON keywords: the conditions of a schema's own keywords, without its subschemas.

Pipeline: JSON schema -> [structured.json_keywords] -> json_alternatives. Host only.

Keywords that the standard does not define are annotations, which it says to ignore.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jpaged.structured.json_shapes import (
    TYPES,
    Arrays,
    Counted,
    Items,
    Members,
    Numbers,
    Objects,
    Part,
    Parts,
    Shape,
    Strings,
    all_of,
    any_value,
    fraction,
)
from jpaged.structured.json_texts import FORMATS, cache_key
from jpaged.structured.regex import containing

Child = Callable[..., Part]  # of a subschema and the step to it
# Keywords that restrict values in ways that are not supported.
_REFUSED = "extends disallow divisibleBy".split()
_OF_TYPE = {
    "number": frozenset(
        "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
    ),
    "string": frozenset("minLength maxLength pattern format".split()),
    "array": frozenset(
        "items prefixItems additionalItems minItems maxItems uniqueItems contains "
        "unevaluatedItems".split()
    ),
    "object": frozenset(
        "properties required additionalProperties patternProperties minProperties "
        "maxProperties propertyNames dependentRequired dependentSchemas dependencies "
        "unevaluatedProperties".split()
    ),
}


class SchemaError(ValueError):
    """A schema is malformed or not supported; the message has the path."""


def expected(where: str, what: str, value: Any) -> SchemaError:
    """Return the error for a malformed keyword."""
    text = repr(value)
    return SchemaError(f"{where}: expected {what}, got {text[:200]}")


def constants(schema: Mapping, where: str) -> list[Any]:
    """Return the values of const or enum."""
    if "enum" not in schema:
        return [schema["const"]]
    values = schema["enum"]
    if not isinstance(values, list):
        raise expected(f"{where}/enum", "a list", values)
    if "const" in schema:
        key = cache_key(schema["const"])
        values = [value for value in values if cache_key(value) == key]
    return values


def dependents(schema: Mapping, where: str) -> Iterator[tuple[str, Any]]:
    """Yield pairs of a property's name and what it requires: names or a schema."""
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        found = schema.get(keyword, {})
        if not isinstance(found, Mapping):
            raise expected(f"{where}/{keyword}", "a dict", found)
        for name, value in found.items():
            yield name, [value] if isinstance(value, str) else value


def types(schema: Mapping, where: str) -> list[str] | None:
    """Return the types that a schema names, or None."""
    if "type" not in schema:
        return None
    found = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    known = (*TYPES, "integer")
    if not found or not all(isinstance(name, str) and name in known for name in found):
        raise expected(
            f"{where}/type", f"one or more of {', '.join(known)}", schema["type"]
        )
    return found


def shapes(
    schema: Mapping, child: Child, where: str, *, is_upper: bool = False
) -> list[Shape]:
    """Return a shape for each type that a schema allows, by its own keywords."""
    for name in _REFUSED:
        if name in schema and not is_upper:
            raise SchemaError(
                f"{where}: the keyword {name!r} is not supported; remove it, or write "
                "the condition with other keywords"
            )
    names = types(schema, where)
    mentioned = {name for name, known in _OF_TYPE.items() if known & set(schema)}
    found = []
    for shape in any_value():
        if names is not None and shape.type not in names:
            if not (shape.type == "number" and "integer" in names):
                continue
        if shape.type == "number":
            shape = _numbers(schema, names, where)
        elif shape.type == "string":
            shape = _strings(schema, where, is_upper)
        elif shape.type == "array":
            shape = arrays(schema, child, where, is_upper=is_upper)
        elif shape.type == "object":
            shape = _objects(schema, child, where)
        if shape is not None:
            is_stated = names is not None or shape.type in mentioned
            found.append(dataclasses.replace(shape, is_stated=is_stated))
    return found


def _limits(schema: Mapping, low: str, high: str, where: str) -> tuple[int, int | None]:
    found = []
    for name in (low, high):
        number = schema.get(name)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if number is not None and not (
            is_number and number >= 0 and number == int(number)
        ):
            raise expected(f"{where}/{name}", "an integer of at least 0", number)
        found.append(None if number is None else int(number))
    return found[0] or 0, found[1]


def _number(schema: Mapping, name: str, where: str) -> Any:
    value = schema.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value)):
        raise expected(f"{where}/{name}", "a number", value)
    return None if value is None else fraction(value)


def _numbers(schema: Mapping, names: list[str] | None, where: str) -> Numbers | None:
    bounds = []
    for name, exclusive in (
        ("minimum", "exclusiveMinimum"),
        ("maximum", "exclusiveMaximum"),
    ):
        found = []
        number = _number(schema, name, where)
        if isinstance(schema.get(exclusive), bool):  # draft 4
            if number is not None:
                found.append((number, schema[exclusive]))
        else:
            found += [] if number is None else [(number, False)]
            other = _number(schema, exclusive, where)
            found += [] if other is None else [(other, True)]
        if name == "minimum":
            bounds.append(max(found, default=None))
        else:
            bounds.append(min(found, key=lambda b: (b[0], not b[1]), default=None))
    divisor = _number(schema, "multipleOf", where)
    if divisor is not None and divisor <= 0:
        raise expected(f"{where}/multipleOf", "a number above 0", schema["multipleOf"])
    is_integer = names is not None and "integer" in names and "number" not in names
    shape = Numbers(
        is_integer=is_integer,
        low=bounds[0],
        high=bounds[1],
        divisors=frozenset([divisor] if divisor is not None else []),
    )
    return None if shape.is_empty else shape


def _strings(schema: Mapping, where: str, is_upper: bool) -> Strings | None:
    least, most = _limits(schema, "minLength", "maxLength", where)
    conditions = set()
    if "pattern" in schema:
        pattern = schema["pattern"]
        if not isinstance(pattern, str):
            raise expected(f"{where}/pattern", "a string", pattern)
        if not is_upper or _is_supported(pattern):
            check_pattern(pattern, f"{where}/pattern")
            conditions.add(("pattern", pattern, False))
    # Other formats are annotations.
    if (
        isinstance(schema.get("format"), str)
        and schema["format"] in FORMATS
        and not is_upper
    ):
        conditions.add(("format", schema["format"], False))
    if most is not None and least > most:
        return None
    return Strings(least=least, most=most, conditions=frozenset(conditions))


def _is_supported(pattern: str) -> bool:
    try:
        containing(pattern)
    except ValueError:
        return False
    return True


def check_pattern(pattern: str, where: str) -> None:
    """Raise SchemaError with the path if a pattern is not supported."""
    try:
        containing(pattern)
    except ValueError as error:
        raise SchemaError(f"{where}: {error}") from error


def arrays(
    schema: Mapping, child: Child, where: str, *, is_upper: bool = False
) -> Arrays | None:
    """Return the shape of arrays by a schema's own keywords, or None without any."""
    least, most = _limits(schema, "minItems", "maxItems", where)
    first, rest = schema.get("prefixItems", []), schema.get("items")
    first_name, rest_name = "prefixItems", "items"
    if isinstance(rest, list):  # drafts before 2020-12
        first, rest = rest, schema.get("additionalItems")
        first_name, rest_name = "items", "additionalItems"
    if not isinstance(first, list):
        raise expected(f"{where}/prefixItems", "a list of schemas", first)
    items = ()
    if first or rest is not None:
        parts = tuple(child(one, f"{first_name}/{i}") for i, one in enumerate(first))
        items = (Items(parts, None if rest is None else child(rest, rest_name)),)
    if rest is False:
        most = len(first) if most is None else min(most, len(first))
    if most is not None and least > most:
        return None
    return Arrays(
        items=items,
        contains=() if is_upper else _contains(schema, child, where),
        least=least,
        most=most,
        is_unique=schema.get("uniqueItems") is True,
    )


def _contains(schema: Mapping, child: Child, where: str) -> tuple[Counted, ...]:
    least, most = _limits(schema, "minContains", "maxContains", where)
    if "contains" not in schema:
        return ()
    if "minContains" not in schema:
        least = 1
    return (Counted(child(schema["contains"], "contains"), least, most),)


def schemas(schema: Mapping, name: str, child: Child, where: str) -> dict[str, Part]:
    """Return the conditions of a keyword that has a schema per name."""
    found = schema.get(name, {})
    if not isinstance(found, Mapping):
        raise expected(f"{where}/{name}", "a dict", found)
    return {key: child(value, f"{name}/{key}") for key, value in found.items()}


def required_names(schema: Mapping, where: str) -> list[str]:
    """Return the names of `required`."""
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(n, str) for n in required):
        raise expected(f"{where}/required", "a list of names", required)
    return required


def _objects(schema: Mapping, child: Child, where: str) -> Objects | None:
    least, most = _limits(schema, "minProperties", "maxProperties", where)
    patterns = schemas(schema, "patternProperties", child, where)
    for pattern in patterns:
        check_pattern(pattern, f"{where}/patternProperties")
    others = schema.get("additionalProperties")
    members = Members(
        schemas(schema, "properties", child, where),
        patterns,
        None if others is None else child(others, "additionalProperties"),
    )
    is_plain = not (members.properties or members.patterns or members.others)
    names = schema.get("propertyNames", True)
    required = required_names(schema, where)
    if most is not None and max(least, len(required)) > most:
        return None
    return Objects(
        members=() if is_plain else (members,),
        required=tuple(dict.fromkeys(required)),
        names=all_of((child(names, "propertyNames"),)),
        least=least,
        most=most,
    )


def parts_of(shape: Objects, name: str) -> Parts:
    """Return the conditions on the member with this name."""
    found: list[Part] = []
    for members in shape.members:
        is_evaluated = name in members.properties
        if is_evaluated:
            found.append(members.properties[name])
        for pattern, part in members.patterns.items():
            # Where validators disagree, both readings hold.
            if containing(pattern, is_wide=True).matches(name):
                found.append(part)
                is_evaluated |= containing(pattern).matches(name)
        if members.others and not is_evaluated:
            found.append(members.others)
    return all_of(tuple(found))
