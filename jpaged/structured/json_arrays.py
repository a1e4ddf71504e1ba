"""JSON arrays as nodes of an automaton.

Pipeline: json_shapes -> [structured.json_arrays] -> json_schema. Host only.
"""

import itertools
from collections.abc import Iterator

from jpaged.structured.json_keywords import SchemaError
from jpaged.structured.json_literals import Writer
from jpaged.structured.json_shapes import Arrays, Counted, Parts, all_of
from jpaged.structured.json_unique import unique_items_before

_MAX_COUNTS = 256  # combinations of counts, for `contains`

Counts = tuple[int, ...]  # per `contains`, items that were written to meet it


def array_before(
    writer: Writer, shape: Arrays, reached: int, free_depth: int
) -> int | None:
    """Write an array before a node; None if there is none."""
    close = writer.text_before("]", reached)
    if shape.is_unique and shape.most not in (0, 1):
        start = unique_items_before(writer, shape, close)
    else:
        start = _Array(writer, shape, close, free_depth).start()
    return None if start is None else writer.text_before("[", start)


class _Array:
    """Writes items from the last to the first, with a node per index and counts."""

    def __init__(
        self, writer: Writer, shape: Arrays, close: int, free_depth: int
    ) -> None:
        self._writer, self._shape = writer, shape
        self._close, self._free_depth = close, free_depth
        self._counted = [
            one for one in shape.contains if one.least or one.most is not None
        ]
        bounds = [range(_bound(one) + 1) for one in self._counted]
        self._all_counts: list[Counts] = list(
            itertools.islice(itertools.product(*bounds), _MAX_COUNTS + 1)
        )
        if len(self._all_counts) > _MAX_COUNTS:
            raise SchemaError(
                f"{self._counted[0].part.where}: expected minContains and maxContains "
                f"with at most {_MAX_COUNTS} combinations of counts, got more"
            )
        # Items from this index on have equal conditions.
        self._num_single = max(
            [shape.num_first, 1, *(one.first for one in self._counted)]
        )
        self._num_single = max(self._num_single, shape.least)

    def start(self) -> int | None:
        """Return the node after the opening bracket."""
        writer, most = self._writer, self._shape.most
        if most is None:
            nodes, first = self._loops(), self._num_single
        else:
            single = max([self._num_single, *(one.least for one in self._counted)])
            writer.is_limited |= most > single
            first = min(most, max(single, writer.limits.repetitions))
            nodes = {counts: self._end(first, counts) for counts in self._all_counts}
        for index in reversed(range(first)):
            nodes = {
                counts: self._joined(
                    [*self._items(index, counts, nodes), self._end(index, counts)]
                )
                for counts in self._all_counts
            }
        return nodes[(0,) * len(self._counted)]

    def _loops(self) -> dict[Counts, int | None]:
        """Return the nodes before any number of further items."""
        nodes: dict[Counts, int | None] = {}
        for counts in reversed(self._all_counts):
            # Counts only grow, so the nodes of larger counts exist already.
            end = self._end(self._num_single, counts)
            loop = self._writer.nfa.node(*([] if end is None else [end]))
            nodes[counts] = loop
            further = {**nodes, counts: None}
            is_live = end is not None or any(
                True for _ in self._items(self._num_single, counts, further)
            )
            for item in self._items(self._num_single, counts, nodes):
                self._writer.nfa.step(loop, item)
            nodes[counts] = loop if is_live else None
        return nodes

    def _end(self, index: int, counts: Counts) -> int | None:
        """Return the node before the bracket if the array can end here."""
        is_complete = index >= self._shape.least and all(
            count >= one.least for count, one in zip(counts, self._counted, strict=True)
        )
        return self._close if is_complete else None

    def _joined(self, nodes: list[int | None]) -> int | None:
        found = [node for node in nodes if node is not None]
        if len(found) < 2:
            return found[0] if found else None
        return self._writer.nfa.node(*found)

    def _items(
        self, index: int, counts: Counts, nodes: dict[Counts, int | None]
    ) -> Iterator[int]:
        """Yield the nodes before an item, its comma included, and what follows."""
        own = self._shape.parts_at(index)
        choices = [
            _choices(one, index, count)
            for one, count in zip(self._counted, counts, strict=True)
        ]
        for choice in itertools.product(*choices):
            after = nodes[tuple(count for _, count in choice)]
            if after is None:
                continue
            parts = all_of(own, *(parts for parts, _ in choice))
            node = self._writer.value_before(parts, after, self._free_depth)
            if node is not None:
                yield self._writer.separator_before(",", node) if index else node


def _bound(counted: Counted) -> int:
    """Return the largest count that matters."""
    return counted.least if counted.most is None else counted.most


def _choices(counted: Counted, index: int, count: int) -> list[tuple[Parts, int]]:
    """Return the conditions that an item can have, and the count after each."""
    if index < counted.first:
        return [((), count)]
    found: list[tuple[Parts, int]] = []
    if count < _bound(counted):
        found.append(((counted.part,), count + 1))
    # Without an upper bound, an item that meets the condition need not be counted.
    is_free = counted.most is None
    found.append((() if is_free else (counted.part.negated(),), count))
    return found
