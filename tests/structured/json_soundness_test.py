"""Soundness: texts of an automaton are valid for the package jsonschema.

The schemas combine keywords at random. Each text is a random walk over bytes.
"""

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
        {"$defs": {"n": parts[0]}, "anyOf": [{"$ref": "#/$defs/n"}, parts[1]]},
    ]  # fmt: skip
    # The last kind refers to the root.
    return kinds[rng.integers(len(kinds) - (not is_root))]


def text(automaton, rng, most: int) -> str:
    """A random text; after `most` bytes it takes the shortest way to an end."""
    transitions = automaton.transitions
    distance = np.where(automaton.is_accepting, 0, 10**6)
    while True:
        one_more = np.where(transitions == DEAD, 10**6, distance[transitions] + 1)
        shorter = np.minimum(distance, one_more.min(axis=1))
        if np.array_equal(shorter, distance):
            break
        distance = shorter
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
    for _ in range(90):
        one = schema(rng, depth, is_root=True)
        try:
            automaton = to_automaton(one)
        except SchemaError as error:
            # Contradictions, and alternatives of oneOf that cannot be told apart.
            reasons.append(str(error))
            continue
        num_taken += 1
        validator = jsonschema.Draft202012Validator(one)
        for _ in range(5):
            found = text(automaton, rng, int(rng.integers(5, 80)))
            validator.validate(json.loads(found))
    assert num_taken > 60
    for reason in reasons:
        assert "accepts some value" in reason or "/oneOf: " in reason
