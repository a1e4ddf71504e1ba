"""JSON schemas: `json` parses random walks, and rules in this file validate them."""

import json
import re
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged.params import StructuredOutputsParams
from jpaged.structured.json_numbers import integers_between
from jpaged.structured.json_schema import to_automaton
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
        ({"type": "string", "pattern": r"^\d$"}, ['"7"'], ['"߀"', '"77"']),
        ({"type": "string", "pattern": r"^\w$"}, ['"_"'], ['"é"', '"-"']),
        ({"type": "string", "pattern": "^$|^https"}, ['""', '"https:"'], ['"http"']),
        ({"type": "string", "pattern": ".*", "maxLength": 1}, ['"\\""'], ['"ab"']),
        ({"type": "string", "pattern": "^a", "minLength": 3}, ['"abc"'], ['"ab"']),
        ({"type": "number", "minimum": 3}, ["3", "3.0", "17.5"], ["2.9", "-4"]),
        ({"type": "number", "exclusiveMaximum": -0.5}, ["-0.51", "-8"], ["-0.5", "0"]),
        ({"type": "number", "multipleOf": 0.25}, ["1.75", "3"], ["1.7", "0.3"]),
        ({"type": "integer", "multipleOf": 7}, ["14", "-7"], ["15"]),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object",
          "properties": {"a": {}, "b": {}}}, ['{"a":1}', '{"b":1}'],
         ["{}", '{"a":1,"b":1}']),
        ({"patternProperties": {"^x": {"type": "null"}},
          "additionalProperties": {"type": "boolean"}}, ['{"x":null, "y":true}'],
         ['{"x":true}', '{"y":null}']),
        ({"allOf": [{"properties": {"a": {"type": "string"}}},
                    {"properties": {"a": {"maxLength": 1}}, "required": ["a"]}]},
         ['{"a":"b"}'], ['{"a":"bc"}', '{"a":1}', "{}"]),
        ({"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True},
         ["[1,3]", "[3,1,2]", "[]"], ["[1,1]", "[1,2,1]"]),
        ({"items": {"type": "string"}, "uniqueItems": True, "minItems": 2},
         ['["", "10", "Ada","bob","c"]', '["é","Zoe"]'], ['["a","a"]', '["a"]']),
        ({"items": {"type": "number"}, "uniqueItems": True, "maxItems": 3},
         ["[-3.5,0,1]", "[]"], ["[0,-0]", "[1,1.0]", "[1,2,3,4]", "[10,1e1]"]),
        ({"items": {"type": "integer", "minimum": 1, "maximum": 9},
          "uniqueItems": True, "minItems": 9}, ["[1,2,3,4,5,6,7,8,9]"], ["[1,1]"]),
        ({"type": "string", "pattern": r"^[^\w\s]$"}, ['"-"'],
         ['"é"', '"\u202f"', '"\x85"']),
        ({"type": "string", "not": {"pattern": r"^\W+$"}}, ['"a"'],
         ['"é"', '"-"', '"-\\n"']),
        ({"format": "hostname"}, ['"a-b.example"'], ['"xn--a"', '"-a"']),
        ({"type": "null", "x-unknown": {"a": 1}, "format": "no-format"}, ["null"], []),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "string", "format": "date"}, ['"2024-12-31"'], ['"2024-02-30"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"24:00:00Z"']),
    ],
)  # fmt: skip
def test_a_schema_accepts_and_rejects_these_texts(schema, accepted, rejected):
    automaton = to_automaton(schema)
    for text in accepted:
        assert automaton.matches(text), text
    for text in rejected:
        assert not automaton.matches(text), text


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(-1200, 1200), st.integers(0, 1500), st.booleans())
def test_integer_bounds_accept_exactly_the_integers_between_them(low, width, is_open):
    bounds = {"minimum": low} | ({} if is_open else {"maximum": low + width})
    automaton = to_automaton({"type": "integer", **bounds})
    for number in {low - 1, low, low + 1, low + width, low + width + 1, 0, -1, 10**6}:
        is_valid = low <= number and (is_open or number <= low + width)
        assert automaton.matches(str(number)) == is_valid, number
    assert not automaton.matches("-0")
    assert not automaton.matches("00")
    below = to_automaton({"type": "integer", "maximum": low})
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
        ({"properties": {"a": {"items": {"type": "object"}, "uniqueItems": True}}},
         "json/properties/a/items: the keyword 'uniqueItems' is not supported for ite"),
        ({"contains": True, "minContains": 300}, "json/contains: expected minContains"),
        ({"minContains": "1", "contains": {}}, "json/minContains: expected an integer"),
        ({"extends": {}}, "json: the keyword 'extends' is not supported; remove it"),
        ({"type": "integer", "multipleOf": 12345}, "json: multipleOf: expected at mo"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "format": "uuid"}]},
         "json/oneOf: expected alternatives that differ by a type"),
        ({"anyOf": []}, "json/anyOf: expected a list of schemas"),
        ({"$ref": "#/$defs/x"}, r"json/\$ref: there is no '#/\$defs/x' in the schema"),
        ({"$ref": "http://x"}, "there is no 'http://x' in the schema; other documents"),
        ({"$ref": "#"}, "expected at most 100 schemas .* refers to itself"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "accepts none, or "),
        ({"properties": {"a": False}, "required": ["a"]}, "accepts some value, got"),
        ({"required": "a"}, "json/required: expected a list of names, got 'a'"),
        ({"type": "string", "pattern": "(a"}, "json/pattern: regex: .*position 0: mis"),
        ({"pattern": "(?<=a)b"}, "json/pattern: regex: .* with look-behind at "),
        ({"type": "string", "minLength": -1}, "json/minLength: expected an integer"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "accepts some value"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "accepts some value"),
        ({"type": "integer", "minimum": "1"}, "json/minimum: expected a number"),
        ({"enum": ["a"], "type": "null"}, "expected a schema that accepts some value"),
        ({"enum": "a"}, "json/enum: expected a list, got 'a'"),
        ({"multipleOf": 0}, "json/multipleOf: expected a number above 0"),
        (False, "expected a schema that accepts some value"),
        ([], "json: expected a JSON schema"),
    ],
)  # fmt: skip
def test_unsupported_schemas_are_refused_with_the_path(schema, message):
    with pytest.raises(ValueError, match=message):
        to_automaton(schema)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("depth", [150, 2_000, 50_000])
def test_deep_schemas_are_refused_by_an_ordinary_error(depth):
    text = '{"items":' * depth + "{}" + "}" * depth
    for schema in (nested(depth), text, {"anyOf": [nested(depth)]}):
        with pytest.raises(ValueError, match="at most 100 schemas in one another"):
            automaton_of(StructuredOutputsParams(json=schema))


def test_arrays_in_arrays_need_states_in_proportion_to_their_depth():
    automaton = to_automaton(nested(60))
    assert automaton.matches("[" * 60 + '"a","b"' + "]" * 60)
    assert automaton.num_states < 400


def test_an_expansion_that_doubles_with_each_level_is_refused_early():
    definitions, previous = {}, {"type": "integer"}
    for level in range(40):
        members = {"x": previous, "y": previous}
        definitions[f"l{level}"] = {"type": "object", "properties": members}
        previous = {"$ref": f"#/$defs/l{level}"}
    small = to_automaton({"$defs": definitions, "$ref": "#/$defs/l3"})
    assert small.matches('{"x":{"y":{"x":{"x":1, "y":-2}}}}')
    start = time.process_time()
    with pytest.raises(ValueError, match="json: expected a schema that needs at most "):
        to_automaton({"$defs": definitions, "$ref": "#/$defs/l39"})
    assert time.process_time() - start < 20  # 2 s alone


def test_long_strings_are_compiled_in_a_moment():
    start = time.process_time()
    automaton = to_automaton({"type": "string", "maxLength": 2048})
    assert time.process_time() - start < 2  # 0.15 s alone; it was 6.4
    for length, is_valid in ((0, True), (2048, True), (2049, False)):
        assert automaton.matches(f'"{"é" * length}"') == is_valid


NESTED_ID = {
    "$defs": {"A": {"type": "integer"}},
    "properties": {
        "p": {
            "$id": "http://x/sub",
            "$defs": {"A": {"type": "string"}},
            "$ref": "#/$defs/A",
        }
    },
}


@pytest.mark.parametrize(
    ("schema", "accepted", "rejected"),
    [
        (NESTED_ID, '{"p":"x"}', '{"p":1}'),
        ({"$id": "http://x/a/", "properties": {"p": {"$ref": "b#/$defs/c"}},
          "$defs": {"q": {"$id": "b", "$defs": {"c": {"const": 1}}}}}, '{"p":1}',
         '{"p":2}'),
        ({"$defs": {"q": {"$anchor": "here", "const": 2}}, "$ref": "#here"}, "2", "1"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "id": "http://x/y",
          "definitions": {"a": {"id": "#a", "enum": [3]}},
          "items": {"$ref": "y#a"}}, "[3]", "[2]"),
        ({"$defs": {"a/b": {"%": {"const": 5}}}, "$ref": "#/$defs/a~1b/%25"}, "5", "4"),
        ({"prefixItems": [{"const": 1}, {"$ref": "#/prefixItems/0"}], "minItems": 2,
          "items": False}, "[1,1]", "[1]"),
    ],
)  # fmt: skip
def test_references_are_resolved_against_the_nearest_id(schema, accepted, rejected):
    automaton = to_automaton(schema)
    assert automaton.matches(accepted)
    assert not automaton.matches(rejected)
