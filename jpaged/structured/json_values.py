"""JSON values: whether a constant meets conditions.

Pipeline: json_shapes -> [structured.json_values] -> json_alternatives. Host only.
"""

from typing import Any

from jpaged.structured.json_keywords import parts_of
from jpaged.structured.json_shapes import (
    Arrays,
    Constants,
    Numbers,
    Objects,
    Part,
    Parts,
    Shape,
    Strings,
    type_of,
)
from jpaged.structured.json_texts import cache_key


class Values:
    """Decides which constants meet conditions, by the shapes of the conditions.

    Attributes:
        is_upper: whether a constant that may meet a condition counts as one that does.
    """

    is_upper = False

    def of(self, part: Part) -> list[Shape]:
        """Return the shapes of one part."""
        raise NotImplementedError

    def accepts(self, parts: Parts, value: Any) -> bool:
        """Return whether a constant certainly meets all parts."""
        return all(
            any(self.has(shape, value) for shape in self.of(part)) for part in parts
        )

    def has(self, shape: Shape, value: Any) -> bool:
        """Return whether a constant is certainly one of a shape's values."""
        if shape.type != type_of(value):
            return False
        if isinstance(shape, Constants):
            return cache_key(value) in map(cache_key, shape.values)
        if isinstance(shape, Strings):
            return shape.accepts(value, is_upper=self.is_upper)
        if isinstance(shape, Numbers):
            return shape.accepts(value)
        if isinstance(shape, Arrays):
            return self._has_items(shape, value)
        assert isinstance(shape, Objects)
        return (
            max(shape.least, 0) <= len(value)
            and (shape.most is None or len(value) <= shape.most)
            and set(shape.required) <= set(value)
            and shape.forbidden.isdisjoint(value)
            and all(self.accepts(shape.names, name) for name in value)
            and all(
                self.accepts(parts_of(shape, name), member)
                for name, member in value.items()
            )
        )

    def _has_items(self, shape: Arrays, value: list) -> bool:
        keys = {cache_key(item) for item in value}
        return (
            shape.least <= len(value)
            and (shape.most is None or len(value) <= shape.most)
            and (not shape.is_unique or len(keys) == len(value))
            and all(self.accepts(shape.parts_at(i), v) for i, v in enumerate(value))
            and self.has_counts(shape, value)
        )

    def has_counts(self, shape: Arrays, value: list) -> bool:
        """Return whether an array certainly meets the bounds of `contains`."""
        for one in shape.contains:
            items = value[one.first :]
            if sum(self.accepts((one.part,), item) for item in items) < one.least:
                return False
            others = sum(self.accepts((one.part.negated(),), item) for item in items)
            if one.most is not None and len(items) - others > one.most:
                return False
        return True
