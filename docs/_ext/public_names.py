"""Sphinx extension: the API reference, from the public names of the package.

    .. public-names:: jpaged.decoding

       greedy
       sampling

shows a table of these names and the documentation of each. With the option `:rest:` it
shows all public names of the module that no other directive shows, so that a new name
is documented without a change of the page. With `:optional:`, a module that cannot be
imported, because an extra is not installed, is left out with a remark.

Docstrings are read as they are written for people: an indented example is code, and the
comments beside the fields of a dataclass or NamedTuple, with their shapes, become its
list of attributes.
"""

import ast
import importlib
import inspect
import io
import pathlib
import re
import textwrap
import tokenize
import types
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:", "Example:")


def public_names(module: types.ModuleType) -> list[str]:
    """List the public names of a module: `__all__`, or what jpaged defines in it."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    tree = ast.parse(inspect.getsource(module))
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    reexported = {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }

    def is_public(name: str, value: Any) -> bool:
        if name.startswith("_") or isinstance(value, types.ModuleType):
            return False
        own = getattr(value, "__module__", None) == module.__name__
        is_definition = inspect.isclass(value) or inspect.isfunction(value)
        return name in reexported or (own if is_definition else name in assigned)

    return [name for name, value in vars(module).items() if is_public(name, value)]


def defining_module(module: types.ModuleType, name: str) -> types.ModuleType:
    """Follow the imports of a name to the module that defines it."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = importlib.import_module(node.module or "")
                    if isinstance(getattr(source, alias.name, None), types.ModuleType):
                        break
                    return defining_module(source, alias.name)
    return module


def comments_of(source: str) -> dict[str, str]:
    r"""Return the comment of each assigned name at the first level of a source.

    It is the comment on the lines above, and the one behind the assignment.

    >>> comments_of("# An index.\nA = 1  # i32[S]\nB: int = 2\n")
    {'A': 'i32[S]. An index.'}
    """
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    body = ast.parse(source).body
    if len(body) == 1 and isinstance(body[0], ast.ClassDef):
        body = body[0].body
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if not isinstance(target, ast.Name):
            continue
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        ends = [
            comments[n]
            for n in range(node.lineno, (node.end_lineno or 0) + 1)
            if n in comments
        ]
        parts = [" ".join(ends), " ".join(above)]
        text = ". ".join(part.rstrip(".") for part in parts if part)
        if text:
            found[target.id] = f"{text}." if parts[1] else text
    return found


def field_comments(cls: type) -> dict[str, str]:
    """Return the comments of the fields of a dataclass or NamedTuple."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    names = {*getattr(cls, "__dataclass_fields__", ()), *getattr(cls, "_fields", ())}
    return {
        name: text
        for name, text in comments_of(source).items()
        if name in names and not name.startswith("_")
    }


def as_code(text: str) -> str:
    """Escape a comment: it is text, in which brackets and stars mean themselves."""
    text = re.sub(r"^([a-z]+\d*\[[^]]*\])", r"``\1``", text)
    return re.sub(r"(?<![`\\])([*|])", r"\\\1", text)


def with_lists(lines: list[str]) -> list[str]:
    """Make lists of indented lines that directly follow a line with a colon.

    >>> with_lists(["The sum of:", "  a term", "    of two lines", "  b", "End."])
    ['The sum of:', '', '* a term', '  of two lines', '* b', '', 'End.']
    >>> with_lists(["Args:", "  name: text"])
    ['Args:', '  name: text']
    """
    result: list[str] = []
    in_list = False
    for before, line in zip(["", *lines], lines, strict=False):
        is_item = line.startswith("  ") and line[2:3].strip() != ""
        starts = before.endswith(":") and before[:1].strip() and before not in SECTIONS
        if is_item and starts and not in_list:
            in_list = True
            result.append("")
        if in_list and line.startswith("  "):
            result.append(f"* {line[2:]}" if is_item else line[2:])
            continue
        if in_list:
            result.append("")
        in_list = False
        result.append(line)
    return result


def with_code_blocks(lines: list[str]) -> list[str]:
    """Mark indented paragraphs outside of sections as code."""
    result: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        before = next((one for one in reversed(result) if one.strip()), "")
        starts = (
            line.startswith("    ")
            and (not result or not result[-1].strip())
            and not before.startswith(" ")
        )
        if not starts:
            result.append(line)
            index += 1
            continue
        end = index
        while end < len(lines) and (not lines[end].strip() or lines[end][:1] == " "):
            end += 1
        block = lines[index:end]
        try:
            ast.parse(textwrap.dedent("\n".join(block)))
            language = "python"
        except SyntaxError:
            language = "text"
        result += [f".. code-block:: {language}", "", *block, ""]
        index = end
    return result


def _with_plural(match: re.Match[str]) -> str:
    """Separate the plural of a name, `Decoder`s, for reStructuredText."""
    return f"{match[1]}\\ s" if match[2] else match[1]


def _on_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Rewrite a docstring before napoleon reads it."""
    lines[:] = with_code_blocks(with_lists(lines))
    lines[:] = [re.sub(r"\|(\w+)\|", r"\|\1\|", line) for line in lines]
    lines[:] = [re.sub(r"(`[^`]+`)(s?)", _with_plural, line) for line in lines]
    if what == "class" and not any(line == "Attributes:" for line in lines):
        if comments := field_comments(obj):
            lines += ["", "Attributes:"]
            lines += [f"    {key}: {as_code(text)}" for key, text in comments.items()]
            lines += [""]


class PublicNames(SphinxDirective):
    """The directive `public-names`."""

    required_arguments = 1
    option_spec: ClassVar = {
        "rest": directives.flag,
        "optional": directives.flag,
    }
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table and the entries."""
        try:
            module = importlib.import_module(self.arguments[0])
        except ImportError:
            if "optional" not in self.options:
                raise
            text = f"{self.arguments[0]} is not installed where this site was built."
            return [nodes.paragraph(text, text)]
        names = [name for line in self.content for name in line.split()]
        names += self._others(module.__name__) if "rest" in self.options else []
        if not names:
            return []
        lines = [".. autosummary::", "   :nosignatures:", ""]
        kinds = {name: self._kind(module, name) for name in names}
        listed = [name for name in names if kinds[name] != "data"]
        lines += [f"   ~{module.__name__}.{name}" for name in listed]
        lines = lines if listed else []
        for name in names:
            lines += ["", *_entry(module, name, kinds[name])]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, module.__name__), 0, node)
        return node.children

    @staticmethod
    def _kind(module: types.ModuleType, name: str) -> str:
        value = getattr(module, name)
        if inspect.isclass(value) and not hasattr(value, "__origin__"):
            return "class"
        # A jitted function is an object that wraps one.
        return "function" if hasattr(inspect.unwrap(value), "__code__") else "data"

    def _others(self, module: str) -> list[str]:
        """Public names of a module that no directive of the reference lists."""
        folder = pathlib.Path(self.env.doc2path(self.env.docname)).parent
        text = "\n".join(path.read_text("utf-8") for path in folder.glob("*.md"))
        blocks = re.findall(
            rf"^\.\. public-names:: {re.escape(module)}\n((?:[ \t]+.*\n|\n)*)",
            text,
            re.MULTILINE,
        )
        listed = {
            name
            for block in blocks
            for line in block.splitlines()
            if not line.strip().startswith(":")
            for name in line.split()
        }
        names = public_names(importlib.import_module(module))
        return [name for name in names if name not in listed]


def _entry(module: types.ModuleType, name: str, kind: str) -> list[str]:
    """Return the directive that documents a name."""
    full = f"{module.__name__}.{name}"
    if kind != "data":
        lines = [f".. auto{kind}:: {full}"]
        if kind == "class":
            fields = getattr(getattr(module, name), "_fields", ())
            lines.append("   :members:")
            if fields:
                lines.append(f"   :exclude-members: {', '.join(fields)}")
        return lines
    source = inspect.getsource(defining_module(module, name))
    value = repr(getattr(module, name))
    lines = [f".. py:data:: {full}"]
    if len(value) < 70 and "\n" not in value:
        lines.append(f"   :value: {value}")
    comment = comments_of(source).get(name, "")
    return [*lines, "", f"   {as_code(comment)}", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the rewriting of docstrings."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", _on_docstring, priority=400)
    return {"parallel_read_safe": True}
