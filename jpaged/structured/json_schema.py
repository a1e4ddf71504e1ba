r"""JSON schemas as regexes.

Pipeline: JSON schema -> [structured.json_schema] -> regex. Host only.

Every text that the regex matches is JSON that the schema accepts, but not vice versa:
objects have only the properties of the schema, in its order; the only white space is an
optional space after a comma or a colon; strings have no \u escapes (every character
except control characters can be written directly). An unknown keyword is an error.

Source: JSON Schema 2020-12. https://json-schema.org/draft/2020-12
"""

from collections.abc import Callable, Mapping
from typing import Any

from jpaged.structured.byte_automata import DEAD
from jpaged.structured.json_values import (
    ANY_DEPTH,
    CHARACTER,
    COLON,
    COMMA,
    FORMATS,
    INTEGER,
    NUMBER,
    PLAIN,
    STRING,
    any_of,
    anything,
    free_object,
    integers_between,
    literal,
    object_of,
)
from jpaged.structured.regex import from_regex, without_anchors

# Keywords that do not affect what is valid.
_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly "
    "$schema $id $comment $defs definitions".split()
)
# Supported keywords of each type.
_OF_TYPE = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum".split()),
    "number": frozenset(),
    "string": frozenset("minLength maxLength pattern format".split()),
    "array": frozenset("items minItems maxItems".split()),
    "object": frozenset("properties required additionalProperties".split()),
}


def to_regex(schema: Any) -> str:
    """Return a regex of JSON texts that `schema` accepts.

    Args:
        schema: a parsed JSON schema: a dict, or True for any value.

    Raises:
        ValueError: `schema` is not a schema, has an unsupported keyword, refers to
            itself, or accepts nothing. The message contains the path to the problem.
    """
    return _Writer(schema).value(schema, "json")


class _Writer:
    """Converts the parts of one schema; `where` is the path to a part."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open_refs: list[str] = []

    def value(self, schema: Any, where: str) -> str:
        """Return the regex of one value."""
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise ValueError(
                f"{where}: expected a JSON schema (a dict), got {schema!r}"
            )
        keywords = set(schema) - _ANNOTATIONS
        if not keywords:
            return anything(ANY_DEPTH)
        if "$ref" in keywords:
            _only(keywords, {"$ref"}, where)
            return self._reference(schema["$ref"], where)
        if "enum" in keywords or "const" in keywords:
            return self._constants(schema, keywords, where)
        for name in ("anyOf", "allOf"):
            if name in keywords:
                _only(keywords, {name}, where)
                return self._combined(name, schema[name], where)
        return self._typed(schema, keywords, where)

    def _reference(self, ref: Any, where: str) -> str:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise ValueError(
                f"{where}/$ref: expected a path in this schema (#/...), got {ref!r}"
            )
        if ref in self._open_refs:
            raise ValueError(
                f"{where}/$ref: {ref!r} refers to itself. A finite automaton cannot "
                "nest without end; write the levels out"
            )
        target = self._root
        for part in ref.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or part not in target:
                raise ValueError(f"{where}/$ref: there is no {ref!r} in the schema")
            target = target[part]
        self._open_refs.append(ref)
        regex = self.value(target, where)
        self._open_refs.pop()
        return regex

    def _constants(self, schema: Mapping, keywords: set[str], where: str) -> str:
        name = "enum" if "enum" in keywords else "const"
        _only(keywords, {name, "type"}, where)
        values = schema["enum"] if name == "enum" else [schema["const"]]
        if not isinstance(values, list):
            raise ValueError(f"{where}/enum: expected a list, got {values!r}")
        if "type" in keywords:
            types = _types(schema, keywords, where)
            values = [value for value in values if _has_type(value, types)]
        if not values:
            raise ValueError(
                f"{where}/{name}: expected at least one accepted value, got none"
            )
        return any_of(literal(value, f"{where}/{name}") for value in values)

    def _combined(self, name: str, parts: Any, where: str) -> str:
        if not isinstance(parts, list) or not parts:
            raise ValueError(
                f"{where}/{name}: expected a list of schemas, got {parts!r}"
            )
        if name == "allOf" and len(parts) > 1:
            raise ValueError(
                f"{where}/allOf: expected one schema, got {len(parts)}; merge them"
            )
        return any_of(
            self.value(part, f"{where}/{name}/{i}") for i, part in enumerate(parts)
        )

    def _typed(self, schema: Mapping, keywords: set[str], where: str) -> str:
        types = _types(schema, keywords, where)
        _only(keywords, {"type"}.union(*(_OF_TYPE[name] for name in types)), where)
        writers: dict[str, Callable[[], str]] = {
            "null": lambda: "null",
            "boolean": lambda: "(?:true|false)",
            "integer": lambda: _integer(schema, where),
            "number": lambda: NUMBER,
            "string": lambda: _string(schema, where),
            "array": lambda: self._array(schema, where),
            "object": lambda: self._object(schema, where),
        }
        return any_of(writers[name]() for name in types)

    def _array(self, schema: Mapping, where: str) -> str:
        low, high = _bounds(schema, "minItems", "maxItems", where)
        if high == 0:
            return r"\[\]"
        item = self.value(schema.get("items", True), f"{where}/items")
        more = "" if high is None else high - 1
        items = f"{item}(?:{COMMA}{item}){{{max(low, 1) - 1},{more}}}"
        return rf"\[{items}\]" if low else rf"\[(?:{items})?\]"

    def _object(self, schema: Mapping, where: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise ValueError(f"{where}/properties: expected a dict, got {properties!r}")
        names = list(properties)
        if not isinstance(required, list) or any(n not in names for n in required):
            raise ValueError(
                f"{where}/required: expected a list of names in properties, got "
                f"{required!r}; properties has {names}"
            )
        others = schema.get("additionalProperties", True)
        if properties:  # other properties are not generated
            return object_of(
                (
                    literal(name, where)
                    + COLON
                    + self.value(part, f"{where}/properties/{name}"),
                    name in required,
                )
                for name, part in properties.items()
            )
        if others is False:
            return r"\{\}"
        return free_object(self.value(others, f"{where}/additionalProperties"))


def _only(keywords: set[str], known: set[str], where: str) -> None:
    unknown = sorted(keywords - known)
    if unknown:
        raise ValueError(
            f"{where}: the keyword {unknown[0]!r} is not supported here; what is: "
            f"{', '.join(sorted(known)) or 'none'}"
        )


def _types(schema: Mapping, keywords: set[str], where: str) -> list[str]:
    """Return the types of a schema, or else the one type that has its keywords."""
    if "type" not in keywords:
        types = [name for name, known in _OF_TYPE.items() if keywords & known]
        if len(types) == 1:
            return types
        raise ValueError(
            f"{where}: expected a schema with a type, got {sorted(keywords)}; "
            "supported are type, enum, const, anyOf, allOf of one, $ref"
        )
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or not all(isinstance(t, str) and t in _OF_TYPE for t in types):
        raise ValueError(
            f"{where}/type: expected one or more of {', '.join(_OF_TYPE)}, got "
            f"{schema['type']!r}"
        )
    return types


def _has_type(value: Any, types: list[str]) -> bool:
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean") in types
    if isinstance(value, int | float):
        is_whole = isinstance(value, int) or value.is_integer()
        return "number" in types or ("integer" in types and is_whole)
    python_types = {"string": str, "array": list, "object": Mapping}
    return any(isinstance(value, python_types.get(name, ())) for name in types)


def _bounds(
    schema: Mapping, low_name: str, high_name: str, where: str
) -> tuple[int, int | None]:
    low, high = schema.get(low_name, 0), schema.get(high_name)
    for name, number in ((low_name, low), (high_name, 0 if high is None else high)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(
                f"{where}/{name}: expected an integer of at least 0, got {number!r}"
            )
    if high is not None and low > high:
        raise ValueError(f"{where}: {low_name} {low} is above {high_name} {high}")
    return low, high


def _string(schema: Mapping, where: str) -> str:
    given = [name for name in ("pattern", "format") if name in schema]
    has_bounds = "minLength" in schema or "maxLength" in schema
    if len(given) + has_bounds > 1:
        raise ValueError(
            f"{where}: expected one of pattern, format and lengths, got several; write "
            "the lengths into the pattern"
        )
    if "format" in schema:
        if schema["format"] not in list(FORMATS):
            raise ValueError(
                f"{where}/format: expected one of {', '.join(FORMATS)}, got "
                f"{schema['format']!r}"
            )
        return f'"{FORMATS[schema["format"]]}"'
    if "pattern" in schema:
        return f'"{_pattern(schema["pattern"], where)}"'
    low, high = _bounds(schema, "minLength", "maxLength", where)
    if not has_bounds:
        return STRING
    return f'"{CHARACTER}{{{low},{"" if high is None else high}}}"'


def _pattern(pattern: Any, where: str) -> str:
    """Return the regex of strings that contain `pattern`; they must need no escapes."""
    if not isinstance(pattern, str):
        raise ValueError(f"{where}/pattern: expected a string, got {pattern!r}")
    automaton = from_regex(pattern)
    to_escape = [*range(0x20), ord('"'), ord("\\")]
    if (automaton.transitions[:, to_escape] != DEAD).any():
        raise ValueError(
            f"{where}/pattern: {pattern!r} matches quotes, backslashes or control "
            r'characters, which JSON escapes; write [^"\\\x00-\x1f] for .'
        )
    inner = without_anchors(pattern)
    is_open = inner == pattern.removeprefix("^")  # the pattern has no $
    before = "" if pattern.startswith("^") else f"{PLAIN}*"
    return f"{before}(?:{inner}){f'{PLAIN}*' if is_open else ''}"


def _integer(schema: Mapping, where: str) -> str:
    """Return the regex of the integers within the bounds of the schema."""
    lows, highs = [], []
    for name, bounds, step in (
        ("minimum", lows, 0),
        ("exclusiveMinimum", lows, 1),
        ("maximum", highs, 0),
        ("exclusiveMaximum", highs, -1),
    ):
        number = schema.get(name)
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{where}/{name}: expected an integer, got {number!r}")
        bounds.append(number + step)
    low, high = max(lows, default=None), min(highs, default=None)
    if low is None and high is None:
        return INTEGER
    if low is not None and high is not None and low > high:
        raise ValueError(f"{where}: no integer is at least {low} and at most {high}")
    parts = []
    if low is None or low < 0:
        least = 1 if high is None else max(1, -high)
        parts.append(f"-{integers_between(least, None if low is None else -low)}")
    if high is None or high >= 0:
        parts.append(integers_between(max(0, low or 0), high))
    return any_of(parts)
