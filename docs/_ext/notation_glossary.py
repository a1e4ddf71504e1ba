"""Sphinx extension: the glossary, from the tables of docs/notation.md.

A table of terms or arrays becomes entries of one sorted glossary, so each definition is
written once. In a page: a fence `{notation-glossary}` with the name of the page.
"""

import pathlib
import re
from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FIRST_COLUMNS = ("term", "array")


def table_rows(text: str) -> Iterator[dict[str, str]]:
    r"""Yield the rows of all Markdown tables, as column -> cell.

    >>> list(table_rows("| term | meaning |\n| --- | --- |\n| `a`, b | c |\n"))
    [{'term': '`a`, b', 'meaning': 'c'}]
    """
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not header:
            header = cells
        elif not set("".join(cells)) <= set("-: "):
            yield dict(zip(header, cells, strict=True))


def entries(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield the names and the definition, in reStructuredText, of each term."""
    for row in table_rows(text):
        first = next(iter(row))
        if first not in FIRST_COLUMNS:
            continue
        names = [name.strip("` ") for name in row[first].split(", ")]
        meaning = row["meaning"].rstrip(".")
        parts = [f"{meaning[:1].upper()}{meaning[1:]}."] if meaning else []
        if row.get("shape"):
            parts.insert(0, f"`{row['shape']}`.")
        if row.get("elsewhere"):
            parts.append(f"Elsewhere: {row['elsewhere']}.")
        definition = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(parts))
        yield names, re.sub(r"`([^`]+)`", r"``\1``", definition)


class NotationGlossary(SphinxDirective):
    """The directive `notation-glossary`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the glossary."""
        path = pathlib.Path(self.env.srcdir, self.arguments[0])
        self.env.note_dependency(str(path))
        lines = [".. glossary::", "   :sorted:", ""]
        for names, definition in entries(path.read_text("utf-8")):
            lines += [f"   {name}" for name in names]
            lines += [f"      {definition}", ""]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, str(path)), 0, node)
        return node.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("notation-glossary", NotationGlossary)
    return {"parallel_read_safe": True}
