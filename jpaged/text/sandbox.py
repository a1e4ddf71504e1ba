"""A jinja2 sandbox for chat templates, with limits on time and memory.

Pipeline: template -> [sandbox] -> compiled template -> chat. Host only.

A chat template is a program that comes with a checkpoint. It runs in jinja2's sandbox,
with the same settings and helpers as in transformers, so that prompts are equal to the
character. Additional limits keep it from reaching the interpreter, from running forever
and from filling the memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000  # loop iterations and macro calls of one rendering
MAX_CHARACTERS = 50_000_000  # of one rendering, and of each intermediate string
_WIDE = re.compile(r"\d{7,}")  # a width in a format string


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise SecurityError(f"expected at most {MAX_CHARACTERS} characters, got more")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | bytes) else 0


class _Bounded(NodeTransformer):
    """Counts each loop iteration and macro call, and checks each concatenation."""

    def _counted(self, node: Any) -> Any:
        node = self.generic_visit(node)
        count = nodes.Call(nodes.EnvironmentAttribute("count"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        joined = nodes.EnvironmentAttribute("joined")
        return nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with limits on the cost of a rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    num_steps = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _Bounded().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises an error where the plain sandbox prints nothing."""
        raise SecurityError(
            f"expected no access to {attribute!r} of a {type(obj).__name__}"
        )

    def count(self) -> None:
        """Counts one iteration of a loop or one call of a macro."""
        self.num_steps += 1
        if self.num_steps > MAX_STEPS:
            raise SecurityError(
                f"expected at most {MAX_STEPS} loop iterations, got more"
            )

    def joined(self, *parts: Any) -> str:
        """The result of `~`, if it is short enough."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, if it is small enough."""
        if operator == "+":
            _check_length(_size(left) + _size(right))
        elif operator == "*":
            times = [side for side in (left, right) if isinstance(side, int)]
            _check_length((_size(left) or _size(right)) * max([0, *times]))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function; checks string methods whose results can be large."""
        # The sandbox wraps `str.format`.
        method = getattr(called, "__wrapped__", called)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_text_method(called.__name__, owner, args, kwargs)
        return super().call(context, called, *args, **kwargs)


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise SecurityError("expected format widths below 7 digits")


def _check_text_method(
    name: str, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    for value in (*args, *kwargs.values()):
        # Widths of ljust, center and zfill; tab sizes of expandtabs.
        if isinstance(value, int):
            _check_length(value * (text.count("\t") if name == "expandtabs" else 1))
    if name == "replace" and len(args) >= 2:
        _check_replacement(text, str(args[0]), str(args[1]))
    if name == "join" and args and isinstance(args[0], list | tuple):
        _check_join(args[0], text)
    if name in ("format", "format_map"):
        _check_format(text)


def _check_replacement(text: str, old: str, new: str) -> None:
    _check_length(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_join(values: Iterable[Any], between: str) -> list[str]:
    texts = [str(value) for value in values]
    _check_length(sum(map(len, texts)) + len(between) * len(texts))
    return texts


def _guarded_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """The filters whose results can be much larger than their input, with checks."""

    def replace(eval_ctx: Any, s: str, old: str, new: str, count: Any = None) -> Any:
        _check_replacement(str(s), str(old), str(new))
        return filters["replace"](eval_ctx, s, old, new, count)

    def join(
        eval_ctx: Any, value: Iterable[Any], d: str = "", attribute: Any = None
    ) -> Any:
        value = list(value)
        if attribute is None:
            _check_join(value, str(d))
        return filters["join"](eval_ctx, value, d, attribute)

    def center(value: str, width: int = 80) -> Any:
        _check_length(width)
        return filters["center"](value, width)

    def indent(s: str, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
        size = width if isinstance(width, int) else len(width)
        _check_length(len(s) + size * (s.count("\n") + 1))
        return filters["indent"](s, width, first, blank)

    def format_text(value: str, *args: Any, **kwargs: Any) -> Any:
        _check_format(str(value))
        return filters["format"](value, *args, **kwargs)

    with_context = jinja2.pass_eval_context
    return {
        "replace": with_context(replace),
        "join": with_context(join),
        "center": center,
        "indent": indent,
        "format": format_text,
    }


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks an answer and changes no text."""

    tags = {"generation"}  # noqa: RUF012, the base class declares a set

    def parse(self, parser: Any) -> Any:
        """Returns the body unchanged."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(
            f"expected names without a leading underscore, got {name!r}"
        )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, as in transformers."""
    if isinstance(indent, int):
        _check_length(indent * 100)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(text: str) -> str:
    return datetime.datetime.now().strftime(text)


@dataclasses.dataclass(frozen=True)
class CompiledTemplate:
    """A chat template, compiled in its own sandbox."""

    environment: _Environment
    template: jinja2.Template

    def render(self, **variables: Any) -> str:
        """Render the template within the sandbox's limits.

        Raises:
          SecurityError: the template exceeds a limit.
          Exception: whatever the template itself raises.
        """
        self.environment.num_steps = 0
        pieces, length = [], 0
        for piece in self.template.generate(**variables):
            length += len(piece)
            _check_length(length)
            pieces.append(piece)
        return "".join(pieces)


@functools.lru_cache(maxsize=8)
def compile_template(template: str) -> CompiledTemplate:
    """Compile the source of a chat template in a sandbox of its own.

    Raises:
      jinja2.TemplateSyntaxError: the source is not a valid template.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters |= _guarded_filters(dict(environment.filters))
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _now,
        "namespace": _Namespace,
        # `dict` itself has attributes that give access to the interpreter.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    return CompiledTemplate(environment, environment.from_string(template))
