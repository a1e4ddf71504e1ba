"""Soundness: texts of an automaton are valid for the package jsonschema.

The schemas combine keywords at random. Each text is a random walk over bytes.
"""

import itertools
import json

import numpy as np
import pytest

from jpaged.structured.json_keywords import SchemaError
from jpaged.structured.json_schema import to_automaton
from jpaged.structured.minimisation import DEAD

jsonschema = pytest.importorskip("jsonschema")


def scalar(rng) -> dict:
    kinds = [
        {"type": "string", "pattern": r"^\w{1,3}$", "maxLength": 2},
        {"type": "string", "minLength": 1, "not": {"enum": ["a", "b"]}},
        {"type": "integer", "minimum": -7, "exclusiveMaximum": 12},
        {"type": "number", "exclusiveMinimum": 0.25, "maximum": 3},
        {"type": ["integer", "null"], "multipleOf": 3},
        {"enum": ["a", 1, None, {"x": [True]}, "b", False]},
        {"const": 2},
        {"type": "boolean", "title": "x", "x-unknown": 1},
        {"not": {"type": ["object", "array", "string"]}},
        {"minLength": 2, "type": ["string", "number"]},
    ]
    return kinds[rng.integers(len(kinds))]


def schema(rng, depth: int, *, is_root: bool = False) -> dict:
    if not depth:
        return scalar(rng)
    names = ["a", "b", "c", "d"]
    parts = [schema(rng, depth - 1) for _ in range(3)]
    some = [str(name) for name in rng.choice(names, int(rng.integers(0, 3)), False)]
    properties = {name: parts[i % 3] for i, name in enumerate(names[: rng.integers(5)])}
    kinds = [
        {"type": "object", "properties": properties, "required": some},
        {"properties": properties, "minProperties": 2,
         "additionalProperties": parts[0]},
        {"patternProperties": {"^a": parts[0], "b$": parts[1]}, "type": "object"},
        {"type": "array", "items": parts[0], "minItems": 1, "maxItems": 3},
        {"prefixItems": parts[:2], "items": parts[2]},
        {"anyOf": parts}, {"oneOf": parts}, {"allOf": parts[:2]},
        {"properties": properties, "if": {"required": ["a"]},
         "then": {"required": some}, "else": {"properties": {"b": False}}},
        {"properties": properties, "dependentRequired": {"a": some}},
        {"properties": properties, "propertyNames": {"pattern": "^[abc]"}},
        {"properties": properties, "not": {"required": ["b"]}, "type": "object"},
        {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": properties},
        {"type": "array", "contains": parts[0], "maxContains": 2, "items": parts[1]},
        {"prefixItems": parts[:1], "contains": parts[1], "minContains": 2,
         "unevaluatedItems": parts[2]},
        {"type": "array", "items": parts[0], "uniqueItems": True, "maxItems": 3},
        {"allOf": [{"properties": properties}], "unevaluatedProperties": parts[0],
         "anyOf": [{"properties": {"d": parts[1]}}, {"required": ["a"]}]},
        {"type": "array", "not": {"items": parts[0]}},
        {"type": "array", "not": {"contains": parts[0]}, "maxItems": 2},
        {"if": parts[0], "then": parts[1], "else": parts[2]},
        {"properties": properties, "dependentSchemas": {"a": parts[0]}},
        {"$defs": {"n": parts[0]}, "anyOf": [{"$ref": "#/$defs/n"}, parts[1]]},
    ]  # fmt: skip
    # The last kind refers to the root.
    return kinds[rng.integers(len(kinds) - (not is_root))]


def distances(automaton):
    """The number of bytes from each state to the nearest end of a text."""
    columns = np.unique(automaton.transitions, axis=1)
    distance = np.where(automaton.is_accepting, 0, 10**6)
    while True:
        one_more = np.where(columns == DEAD, 10**6, distance[columns] + 1)
        shorter = np.minimum(distance, one_more.min(axis=1))
        if np.array_equal(shorter, distance):
            return distance
        distance = shorter


def text(automaton, distance, rng, most: int) -> str:
    """A random text; after `most` bytes it takes the shortest way to an end."""
    transitions = automaton.transitions
    state, found = 0, bytearray()
    while True:
        allowed = np.flatnonzero(transitions[state] != DEAD)
        is_end = automaton.is_accepting[state]
        if is_end and (not len(allowed) or len(found) >= most or rng.random() < 0.3):
            return found.decode()
        if len(found) >= most:
            allowed = allowed[distance[transitions[state, allowed]] < distance[state]]
        # Each next state is equally likely, so that rare bytes occur.
        reached = rng.choice(np.unique(transitions[state, allowed]))
        byte = rng.choice(allowed[transitions[state, allowed] == reached])
        found.append(int(byte))
        state = int(reached)


@pytest.mark.parametrize("depth", [1, 2])
def test_random_texts_of_random_schemas_are_valid(depth):
    rng = np.random.default_rng(depth)
    num_taken, reasons = 0, []
    for _ in range(140 - 40 * depth):
        one = schema(rng, depth, is_root=True)
        try:
            automaton = to_automaton(one)
        except SchemaError as error:
            # Contradictions, and alternatives of oneOf that cannot be told apart.
            reasons.append(str(error))
            continue
        num_taken += 1
        validator = jsonschema.Draft202012Validator(one)
        distance = distances(automaton)
        for _ in range(5):
            found = text(automaton, distance, rng, int(rng.integers(5, 80)))
            validator.validate(json.loads(found))
    assert num_taken > 45
    # Contradictions, alternatives of oneOf that cannot be told apart, and uniqueItems.
    known = ("accepts some value", "/oneOf: ", "'uniqueItems' is not supported")
    for reason in reasons:
        assert any(text in reason for text in known), reason


# These are exact for arrays of up to four of the items below.
ITEMS = [1, 2.5, "a", None]
EXACT_ARRAYS = [
    {"contains": {"const": 1}},
    {"contains": {"type": "number"}, "minContains": 2},
    {"contains": {"type": "string"}, "maxContains": 1},
    {"contains": {"type": "null"}, "minContains": 0, "maxContains": 2},
    {"contains": {"const": 1}, "allOf": [{"contains": {"const": "a"}}]},
    {"contains": {"const": 1}, "minItems": 2, "maxItems": 3},
    {"prefixItems": [{"type": "number"}], "contains": {"const": 1}},
    {"not": {"contains": {"type": "integer"}}},
    {"not": {"contains": {"const": 1}, "minContains": 2, "maxContains": 2}},
    {"not": {"items": {"type": ["string", "null"]}}},
    {"not": {"prefixItems": [{"type": "number"}, {"const": "a"}]}},
    {"not": {"prefixItems": [True], "items": {"type": "null"}}},
    {"items": {"enum": [1, "a", None]}, "uniqueItems": True},
    {"items": {"enum": [1, "a", None]}, "uniqueItems": True, "contains": {"const": 1}},
    {"prefixItems": [{"enum": [1, "a"]}], "items": {"enum": ["a", None]},
     "uniqueItems": True, "minItems": 2},
    {"prefixItems": [True, True], "unevaluatedItems": {"type": "string"}},
    {"prefixItems": [True], "contains": {"const": "a"}, "unevaluatedItems": False},
    {"anyOf": [{"prefixItems": [{"const": 1}]},
               {"prefixItems": [True, {"const": "a"}]}], "unevaluatedItems": False},
    {"if": {"prefixItems": [{"const": 1}]}, "unevaluatedItems": {"type": "null"}},
    {"allOf": [{"prefixItems": [True]}, {"unevaluatedItems": False}]},
    {"allOf": [{"items": True}], "unevaluatedItems": False},
    {"not": {"not": {"prefixItems": [True]}}, "unevaluatedItems": {"type": "null"}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(EXACT_ARRAYS)))
def test_every_short_array_is_decided_as_by_jsonschema(number):
    one = {"type": "array", **EXACT_ARRAYS[number]}
    automaton, validator = to_automaton(one), jsonschema.Draft202012Validator(one)
    for length in range(5):
        for value in itertools.product(ITEMS, repeat=length):
            found = automaton.matches(json.dumps(value))
            assert found == validator.is_valid(list(value)), (one, value)


MEMBERS = {"a": [1, "x"], "b": [1, "x"], "c": [1, None]}
A, B = {"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": "x"}}}
EXACT_OBJECTS = [
    {**A, "unevaluatedProperties": False},
    {"allOf": [A, B], "unevaluatedProperties": {"type": "null"}},
    {"allOf": [A, {**B, "unevaluatedProperties": {"const": 1}}]},
    {"anyOf": [{**A, "required": ["a"]}, {**B, "required": ["b"]}],
     "unevaluatedProperties": False},
    {"if": {**A, "required": ["a"]}, "then": B, "unevaluatedProperties": False},
    {"if": {**A, "required": ["a"]}, "unevaluatedProperties": {"type": "null"}},
    {**A, "dependentSchemas": {"a": B}, "unevaluatedProperties": False},
    {"allOf": [{"unevaluatedProperties": {"const": 1}}],
     "unevaluatedProperties": False},
    {"$ref": "#/$defs/a", "unevaluatedProperties": False, "$defs": {"a": A}},
    {"patternProperties": {"^[ab]": {"const": 1}}, "unevaluatedProperties": False},
    {"not": {"required": ["a"]}, "additionalProperties": True},
    {"not": {"dependentRequired": {"a": ["b"]}}, "additionalProperties": True},
    {"not": {"dependentSchemas": {"a": {"required": ["c"]}}},
     "additionalProperties": True},
    {"not": {**A, "required": ["a"]}, "additionalProperties": True},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(EXACT_OBJECTS)))
def test_every_small_object_is_decided_as_by_jsonschema(number):
    one = {"type": "object", **EXACT_OBJECTS[number]}
    automaton, validator = to_automaton(one), jsonschema.Draft202012Validator(one)
    choices = [[None, *((name, v) for v in vs)] for name, vs in MEMBERS.items()]
    for chosen in itertools.product(*choices):
        members = [pair for pair in chosen if pair is not None]
        orders = itertools.permutations(members)
        found = any(automaton.matches(json.dumps(dict(order))) for order in orders)
        assert found == validator.is_valid(dict(members)), (one, members)


TREE = {
    "$id": "https://x/strict", "$dynamicAnchor": "node", "$ref": "tree",
    "unevaluatedProperties": False,
    "$defs": {"tree": {
        "$id": "tree", "$dynamicAnchor": "node", "type": "object",
        "properties": {"data": {"type": "integer"},
                       "below": {"items": {"$dynamicRef": "#node"}}},
    }},
}  # fmt: skip


def test_a_dynamic_reference_reaches_the_outermost_schema():
    recursive = json.loads(
        json.dumps(TREE)
        .replace('"$dynamicAnchor": "node"', '"$recursiveAnchor": true')
        .replace('"$dynamicRef": "#node"', '"$recursiveRef": "#"')
    )
    kinds = [
        (TREE, jsonschema.Draft202012Validator(TREE)),
        (recursive, jsonschema.Draft201909Validator(recursive)),
    ]
    for one, validator in kinds:
        automaton = to_automaton(one)
        for value in ({"data": 1, "below": [{"data": 2}]},
                      {"data": 1, "below": [{"more": 2}]}, {"more": 1},
                      {"below": [{"below": [{"data": "x"}]}]}):  # fmt: skip
            found = automaton.matches(json.dumps(value))
            assert found == validator.is_valid(value), (one, value)
