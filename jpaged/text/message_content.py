"""Content of chat messages: texts, or lists of text parts as OpenAI's clients send.

Pipeline: messages -> [message_content] -> chat. Host only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from jpaged.validation import error

_TEXT_TYPES = ("text", "input_text", "output_text")
_TOOL_ROLES = ("tool", "function", "ipython")  # templates write their content as JSON


def with_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose content is a text, a list of text parts or None.

    Raises:
      ValueError: a content or a part is something else, such as an image.
    """
    found = []
    for index, message in enumerate(messages):
        checked = dict(message)
        content = message.get("content")
        name = f"messages[{index}]['content']"
        is_tool = message["role"] in _TOOL_ROLES
        if _is_list(content) and not (is_tool and not _are_parts(content)):
            checked["content"] = [
                _text_part(f"{name}[{i}]", part) for i, part in enumerate(content)
            ]
        elif not isinstance(content, str | None) and not (
            is_tool and isinstance(content, Mapping | Sequence) and _is_json(content)
        ):
            raise error(name, "a text or a list of text parts", content)
        found.append(checked)
    return found


def has_parts(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the content of a message is a list of parts."""
    return any(_are_parts(message.get("content")) for message in messages)


def joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose text parts are one text, joined by line ends."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if _are_parts(message.get("content"))
        else dict(message)
        for message in messages
    ]


def shows_parts(messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether a rendered text shows a list of parts as code, or drops its text.

    Args:
      messages: messages as the template gets them.
      text: what the template wrote.
    """
    for message in messages:
        content = message.get("content")
        if not _are_parts(content):
            continue
        if any(str(part) in text or json.dumps(part) in text for part in content):
            return True
        # Templates may strip or escape a text, but not change its words.
        words = [word for part in content for word in part["text"].split()[:1]]
        if not all(word in text or not word.isalnum() for word in words):
            return True
    return False


def _text_part(name: str, part: Any) -> dict[str, Any]:
    """Return a part as {"type": "text", "text": ...}."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise error(name, "a text or a dict with 'type' and 'text'", part)
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT_TYPES:
        raise ValueError(
            f"{name}: expected a part of type 'text', got {kind!r}: the model reads "
            "text only"
        )
    if not isinstance(part.get("text"), str):
        raise error(f"{name}['text']", "a text", part.get("text"))
    return {"type": "text", "text": part["text"]}


def _is_list(content: Any) -> TypeGuard[Sequence[Any]]:
    is_text = isinstance(content, str | bytes | bytearray)
    return isinstance(content, Sequence) and not is_text


def _are_parts(content: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a content is a list of parts, and not a result of a tool."""
    return _is_list(content) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and "type" in part)
        for part in content
    )


def _is_json(value: Any) -> bool:
    """Whether a value has only types of JSON."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and _is_json(
            list(value.values())
        )
    if _is_list(value):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float | bool)
