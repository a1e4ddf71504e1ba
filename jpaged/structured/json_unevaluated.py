"""Unevaluated: `unevaluatedProperties` and `unevaluatedItems`, on shapes.

Pipeline: shapes -> [structured.json_unevaluated] -> json_alternatives. Host only.

A shape has the keywords that hold for its values, and so the members and items that
they evaluate. A value of several alternatives is in the shape of each. Members that
only another alternative evaluates must meet the condition too, so the shapes can lack
some values, but contain no wrong ones.

Source: JSON Schema 2020-12, section 11. https://json-schema.org/draft/2020-12
"""

import dataclasses
from collections.abc import Mapping

from jpaged.structured.json_keywords import Child
from jpaged.structured.json_shapes import Arrays, Items, Members, Objects, Part, Shape


def with_unevaluated(
    shapes: list[Shape], schema: Mapping, child: Child, contains_evaluates: bool
) -> list[Shape]:
    """Return the shapes with the conditions that a schema has for unevaluated parts.

    Args:
        shapes: of all other keywords of the schema.
        schema: the schema.
        child: returns the part of a subschema.
        contains_evaluates: whether `contains` evaluates items; it does not in 2019-09.
    """
    found: list[Shape | None] = []
    for shape in shapes:
        if isinstance(shape, Objects) and "unevaluatedProperties" in schema:
            shape = _objects(shape, schema["unevaluatedProperties"], child)
        elif isinstance(shape, Arrays) and "unevaluatedItems" in schema:
            rest = schema["unevaluatedItems"]
            shape = _arrays(shape, rest, child, contains_evaluates)
        found.append(shape)
    return [shape for shape in found if shape is not None]


def without_evaluated(shapes: list[Shape]) -> list[Shape]:
    """Return the shapes of a negation: nothing counts as evaluated by it."""
    return [_forgotten(shape) for shape in shapes]


def _forgotten(shape: Shape) -> Shape:
    def unmarked(parts: tuple) -> tuple:
        return tuple(dataclasses.replace(one, evaluates=False) for one in parts)

    if isinstance(shape, Objects):
        return dataclasses.replace(shape, members=unmarked(shape.members))
    if isinstance(shape, Arrays):
        items, contains = unmarked(shape.items), unmarked(shape.contains)
        return dataclasses.replace(shape, items=items, contains=contains)
    return shape


def _objects(shape: Objects, others: object, child: Child) -> Shape | None:
    evaluated = [one for one in shape.members if one.evaluates]
    if any(one.others is not None for one in evaluated):
        return shape
    true = child(True, "unevaluatedProperties")
    members = Members(
        {name: true for one in evaluated for name in one.properties},
        {pattern: true for one in evaluated for pattern in one.patterns},
        child(others, "unevaluatedProperties"),
    )
    return dataclasses.replace(shape, members=(*shape.members, members))


def _arrays(
    shape: Arrays, others: object, child: Child, contains_evaluates: bool
) -> Shape | None:
    evaluated = [one for one in shape.items if one.evaluates]
    if any(one.rest is not None for one in evaluated):
        return shape
    num_first = max((len(one.first) for one in evaluated), default=0)
    true = child(True, "unevaluatedItems")
    rest = child(others, "unevaluatedItems")
    contained: list[Part] = []
    if contains_evaluates:
        contained = [one.part for one in shape.contains if one.evaluates]
    most = shape.most
    if contained:
        rest = child({"anyOf": [rest, *contained]}, "unevaluatedItems")
    elif others is False:
        most = num_first if most is None else min(most, num_first)
        if shape.least > most:
            return None
    items = Items((true,) * num_first, rest)
    return dataclasses.replace(shape, items=(*shape.items, items), most=most)
