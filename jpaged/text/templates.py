"""Chat: from messages to the text of a prompt, by the template of a checkpoint.

Place on the road: messages -> [chat] -> text -> llm. Host only.

A template is a program of whoever made the checkpoint. It runs in jinja2's sandbox, as
in transformers and with the same helpers, so that prompts are equal to the character;
and within limits of its own, so that it can neither reach the interpreter, nor run for
ever, nor fill the memory.
"""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000  # bodies of loops and macros that one rendering may run
MAX_CHARACTERS = 50_000_000  # of one rendering, and of each string on the way
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_WIDE = re.compile(r"\d{7,}")  # a width in a format string


class ChatTemplates:
    """The chat templates of a folder, by name, and its special tokens."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]):
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, folder: pathlib.Path) -> ChatTemplates:
        """Those of chat_template.jinja, or else of tokenizer_config.json.

        Raises:
          ValueError: a file is no JSON object.
        """
        config = _read_json(folder / "tokenizer_config.json")
        tokens = _read_json(folder / "special_tokens_map.json") | config
        special = {}
        for kind in _SPECIAL_TOKENS:
            token = tokens.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[f"{kind}_token"] = token
        found = config.get("chat_template")
        if isinstance(found, list):
            templates = {entry["name"]: entry["template"] for entry in found}
        else:
            templates = {"default": found} if isinstance(found, str) else {}
        for file in (folder / "additional_chat_templates").glob("*.jinja"):
            templates[file.stem] = file.read_text("utf-8")
        if (folder / "chat_template.jinja").is_file():
            templates["default"] = (folder / "chat_template.jinja").read_text("utf-8")
        return cls(templates, special)

    def choose(self, wanted: str | None, tools: Any) -> str:
        """The source of a template: `wanted`, a name or the source itself, or ours.

        Raises:
          ValueError: the folder has no template and none is given.
        """
        if wanted is not None:
            return self.templates.get(wanted, wanted)
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        raise ValueError(
            "chat_template: expected one in the model's folder (chat_template.jinja or "
            f"tokenizer_config.json), found {sorted(self.templates) or 'none'} without "
            "a default; pass chat_template="
        )


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text that a template makes of messages, as transformers renders it.

    Args:
      messages: `{"role": ..., "content": ...}` and whatever else the template reads.
      template: source of a jinja2 template.
      special_tokens: `bos_token` and so on.
      add_generation_prompt: ask for the head of an answer at the end.
      tools: JSON schemas of functions that the model may call.
      variables: more names that the template reads.

    Raises:
      ValueError: messages that are none, a template that is wrong, refuses the
        messages, or does what a template may not.
    """
    check_messages(messages)
    chat = [
        _with_reasoning(
            {key: value for key, value in each.items() if value is not None}
        )
        for each in messages
    ]
    names = {**(special_tokens or {}), **variables}
    try:
        compiled = _compiled(template)
        compiled.environment.num_steps = 0
        pieces, length = [], 0
        for piece in compiled.generate(
            messages=_plain(chat),
            tools=_plain(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **_plain(names),
        ):
            length += len(piece)
            _check_length(length)
            pieces.append(piece)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template: wrong in line {error.lineno}: {error}"
        ) from error
    except RecursionError as error:
        raise ValueError("chat_template: calls itself too deeply") from error
    # What a template computes can fail in any way, as a program can.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"chat_template: it refused the messages: {reason}") from error
    return "".join(pieces)


def check_messages(messages: Any) -> None:
    """Raises ValueError unless `messages` is a list of mappings with a role."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not messages:
        raise ValueError(
            f"messages: expected a list with at least one message, got {messages!r:.80}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"messages[{index}]: expected a dict with a 'role', got {message!r:.80}"
            )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: expected a JSON object, got {contents!r:.40}")
    return contents


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under each of the names that templates read it by."""
    found = [message[name] for name in _REASONING if name in message]
    if not found:
        return message
    return {"thinking": found[0], **message, "reasoning_content": found[0]}


def _plain(value: Any) -> Any:
    """`value` of plain JSON types: other objects have methods that a sandbox allows."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Iterable) and isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise jinja2.sandbox.SecurityError(
            f"expected at most {MAX_CHARACTERS} characters, got more"
        )


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | bytes) else 0


class _Bounded(NodeTransformer):
    """Puts a count into each loop and macro, and a check into each concatenation."""

    def _counted(self, node: Any) -> Any:
        node = self.generic_visit(node)
        count = nodes.Call(nodes.EnvironmentAttribute("count"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> Any:
        node = self.generic_visit(node)
        joined = nodes.EnvironmentAttribute("joined")
        return nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with limits on what a rendering may cost."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    num_steps = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _Bounded().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises where the plain sandbox would let a template print nothing."""
        raise jinja2.sandbox.SecurityError(
            f"expected no access to {attribute!r} of a {type(obj).__name__}"
        )

    def count(self) -> None:
        """Counts a body of a loop or macro."""
        self.num_steps += 1
        if self.num_steps > MAX_STEPS:
            raise jinja2.sandbox.SecurityError(
                f"expected at most {MAX_STEPS} rounds of loops, got more"
            )

    def joined(self, *parts: Any) -> str:
        """What `~` gives."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, once its result is known to be small."""
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
        """A call, whose numbers and replacements are not out of all proportion."""
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            _check_text_method(called.__name__, owner, args, kwargs)
        return super().call(context, called, *args, **kwargs)


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise jinja2.sandbox.SecurityError("expected no width of 7 digits in a format")


def _check_text_method(
    name: str, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    for value in (*args, *kwargs.values()):
        # Widths for ljust, center, zfill; tab sizes.
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
    """The filters whose results can be far larger than what goes in, with checks."""

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
    """`{% generation %}`, which marks an answer in a template and changes no text."""

    tags = frozenset(["generation"])

    def parse(self, parser: Any) -> Any:
        """The body as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

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
        raise jinja2.sandbox.SecurityError(
            f"expected names without an underscore in front, got {name!r}"
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
    """JSON without jinja2's HTML escapes, as transformers has it."""
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


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
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
        # `dict` itself has attributes that lead out of the sandbox.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    return environment.from_string(template)
