"""JSON arrays as nodes of an automaton.

Pipeline: json_shapes -> [structured.json_arrays] -> json_schema. Host only.
"""

from jpaged.structured.json_alternatives import stated
from jpaged.structured.json_keywords import SchemaError
from jpaged.structured.json_literals import Writer, constant_before
from jpaged.structured.json_shapes import Arrays, Constants
from jpaged.structured.json_texts import cache_key


def array_before(
    writer: Writer, shape: Arrays, reached: int, free_depth: int
) -> int | None:
    """Write an array before a node; None if there is none."""
    close = writer.text_before("]", reached)
    if shape.is_unique and shape.most not in (0, 1):
        start = _unique_items_before(writer, shape, close)
    else:
        start = _items_before(writer, shape, close, free_depth)
    return None if start is None else writer.text_before("[", start)


def _items_before(
    writer: Writer, shape: Arrays, close: int, free_depth: int
) -> int | None:
    num_single = max(shape.least, shape.num_first)
    most = shape.most
    if most is not None:
        writer.is_limited |= most > num_single
        most = min(most, max(num_single, writer.limits.repetitions))
    if most is None:
        # A loop for all items from `num_single` on.
        node: int | None = writer.nfa.node(close)
        item = writer.value_before(shape.parts_at(num_single), node, free_depth)
        if item is not None:
            writer.nfa.step(node, writer.separator_before(",", item))
            if not num_single:
                return writer.nfa.node(close, item)
        elif not num_single:
            return close
        first = num_single
    else:
        node = close if most >= shape.least else None
        first = most
    for index in reversed(range(first)):
        item = None
        if node is not None:
            item = writer.value_before(shape.parts_at(index), node, free_depth)
            if item is not None and index:
                item = writer.separator_before(",", item)
        if index < shape.least:
            node = item
        else:
            node = close if item is None else writer.nfa.node(close, item)
    return node


def _unique_items_before(writer: Writer, shape: Arrays, close: int) -> int | None:
    """Write some of the constants that items can be, in the order of the schema."""
    shapes = stated(writer.alternatives.of_all(shape.parts_at(0)))
    is_listed = all(isinstance(one, Constants) for one in shapes) and shape.items
    if not is_listed or any(first for first, _ in shape.items):
        where = next((rest.where for _, rest in shape.items if rest), "json")
        raise SchemaError(
            f"{where}: the keyword 'uniqueItems' is not supported for items other than "
            "those of an enum; a finite automaton cannot compare items"
        )
    values: dict = {}
    for one in shapes:
        assert isinstance(one, Constants)
        values.update({cache_key(value): value for value in one.values})
    most = len(values) if shape.most is None else min(shape.most, len(values))
    # after[n] and before[n] continue the text after n items, with and without a comma.
    after = {n: close if n >= shape.least else None for n in range(most + 1)}
    first = after[0]
    for value in reversed(list(values.values())):
        following = dict(after)
        for n in range(most + 1):
            rest = following.get(n + 1)
            if n == most or rest is None:
                continue
            item = constant_before(writer, value, rest)
            if n == 0:
                first = item if first is None else writer.nfa.node(first, item)
            else:
                comma, other = writer.separator_before(",", item), following[n]
                after[n] = comma if other is None else writer.nfa.node(other, comma)
    return first
