"""JSON schemas: `json` parses random walks, and rules in this file validate them."""

import json
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged.params import StructuredOutputsParams
from jpaged.structured.json_schema import to_regex
from jpaged.structured.json_values import integers_between
from jpaged.structured.regex import from_regex
from tests.support.automaton_walk import TINY, automaton_of, walk

PERSON = {
    "type": "object",
    "title": "Person",
    "$defs": {"color": {"enum": ["red", "green \"x\""]}},
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": -3, "maximum": 120},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/color"}, "maxItems": 2},
        "born": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        "free": {},
    },
    "required": ["age", "born"],
}  # fmt: skip


def is_person(value) -> bool:
    tags = value.get("tags", [])
    return (
        set(value) <= set(PERSON["properties"])
        and set(value) >= {"age", "born"}
        and isinstance(value["age"], int)
        and -3 <= value["age"] <= 120
        and 1 <= len(value.get("name", "x")) <= 5
        and len(tags) <= 2
        and set(tags) <= {"red", 'green "x"'}
        and (value["born"] is None or re.fullmatch(r"\d{4}-\d\d-\d\d", value["born"]))
    )


SCHEMAS = {
    "person": (PERSON, is_person),
    "object": ({"type": "object"}, lambda value: isinstance(value, dict)),
    "anything": (True, lambda value: True),
    "number": ({"type": "number"}, lambda value: isinstance(value, int | float)),
    "one or none": ({"type": ["boolean", "null"]}, lambda v: v in (True, False, None)),
    "pair": (
        {"items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        lambda value: len(value) == 2,
    ),
    "map": (
        {"type": "object", "additionalProperties": {"type": "boolean"}},
        lambda value: all(isinstance(flag, bool) for flag in value.values()),
    ),
    "constant": ({"const": {"a": [1, "<->\n"]}}, lambda v: v == {"a": [1, "<->\n"]}),
    "typed enum": ({"type": "integer", "enum": [1, 2.0, "x"]}, lambda v: v in (1, 2)),
    "pattern": ({"pattern": "b[0-9]$"}, lambda value: re.search("b[0-9]$", value)),
    "whole pattern": ({"pattern": "^a+$"}, lambda value: re.fullmatch("a+", value)),
    "optional": (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
        lambda value: all(value[name] == "abc".index(name) + 1 for name in value),
    ),
    "uuid": ({"format": "uuid", "type": "string"}, lambda value: len(value) == 36),
    "exclusive": (
        {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 8},
        lambda value: value in (6, 7),
    ),
    "escaped reference": (
        {"$defs": {"a/b~": {"const": 4}}, "$ref": "#/$defs/a~1b~0"},
        lambda value: value == 4,
    ),
    "single allOf": ({"allOf": [{"type": "null"}]}, lambda value: value is None),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_are_json_that_the_schema_accepts(name):
    schema, accepts = SCHEMAS[name]
    automaton = automaton_of(StructuredOutputsParams(json=schema))
    rng = np.random.default_rng(0)
    for _ in range(25):
        text = TINY.decode(walk(automaton, rng, most=40))
        assert accepts(json.loads(text)), text


@pytest.mark.parametrize(
    ("schema", "accepted", "rejected"),
    [
        (PERSON, ['{"age":0,"born":null}', '{"name": "日本", "age": -3, "born": null}'],
         ['{"born":null}', '{"age":121,"born":null}', '{"age":0,"born":null,}']),
        (SCHEMAS["optional"][0], ["{}", '{"a":1}', '{"b":2, "c":3}', '{"c":3}'],
         ['{"a":1,}', '{,"b":2}', '{"c":3,"b":2}', '{"d":1}']),
        ({"type": "object"}, ['{"a": {"b": [1, true]}}'], ['{"a":{"b":{"c":{}}}}']),
        ({"type": "string"}, ['"\\"\\n"', '""'], ['"\n"', '"\\x"', '"']),
        ({"type": "number"}, ["-1.5e+3", "0"], ["01", "1.", "+1", ".5"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "string", "format": "date"}, ['"2024-12-31"'], ['"2024-02-30"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"24:00:00Z"']),
    ],
)  # fmt: skip
def test_a_schema_accepts_and_rejects_these_texts(schema, accepted, rejected):
    automaton = from_regex(to_regex(schema))
    for text in accepted:
        assert automaton.matches(text), text
    for text in rejected:
        assert not automaton.matches(text), text


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(-1200, 1200), st.integers(0, 1500), st.booleans())
def test_integer_bounds_accept_exactly_the_integers_between_them(low, width, is_open):
    bounds = {"minimum": low} | ({} if is_open else {"maximum": low + width})
    automaton = from_regex(to_regex({"type": "integer", **bounds}))
    for number in {low - 1, low, low + 1, low + width, low + width + 1, 0, -1, 10**6}:
        is_valid = low <= number and (is_open or number <= low + width)
        assert automaton.matches(str(number)) == is_valid, number
    assert not automaton.matches("-0")
    assert not automaton.matches("00")
    below = from_regex(to_regex({"type": "integer", "maximum": low}))
    assert below.matches(str(low))
    assert not below.matches(str(low + 1))


def test_integers_between_matches_every_number_of_a_small_range():
    for low, high in ((0, 9), (7, 123), (95, 105), (100, 100), (0, 1000)):
        automaton = from_regex(integers_between(low, high))
        matched = [n for n in range(1200) if automaton.matches(str(n))]
        assert matched == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "json/type: expected one or more of null, .*got 'strin'"),
        ({"type": "number", "minimum": 3}, "json: the keyword 'minimum' is not "),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}},
         "json/properties/a: the keyword 'uniqueItems' is not supported here; what is"),
        ({"oneOf": [{"type": "null"}]}, "json: expected a schema with a type, got "),
        ({"allOf": [{}, {}]}, "json/allOf: expected one schema, got 2; merge them"),
        ({"anyOf": []}, "json/anyOf: expected a list of schemas"),
        ({"$ref": "#/$defs/x"}, r"there is no '#/\$defs/x' in the schema"),
        ({"$ref": "http://x"}, r"expected a path in this schema \(#/...\)"),
        ({"properties": {"a": {"$ref": "#"}}}, "refers to itself"),
        ({"properties": {"a": {}}, "required": ["b"]}, "expected a list of names in p"),
        ({"type": "string", "pattern": ".*"}, 'matches quotes, .* write '),
        ({"type": "string", "format": "email"}, "json/format: expected one of date, "),
        ({"pattern": "a", "maxLength": 3}, "expected one of pattern, format and leng"),
        ({"type": "string", "minLength": -1}, "json/minLength: expected an integer"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems 3 is above"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer is at least 3"),
        ({"type": "integer", "minimum": 1.5}, "json/minimum: expected an integer"),
        ({"enum": ["a"], "type": "null"}, "json/enum: expected at least one acc"),
        (False, "json: expected a JSON schema"),
    ],
)  # fmt: skip
def test_unsupported_schemas_are_refused_with_the_path(schema, message):
    with pytest.raises(ValueError, match=message):
        to_regex(schema)
