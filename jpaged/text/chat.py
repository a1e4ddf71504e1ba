"""Chat: converts messages to prompts with the chat template of a checkpoint.

Pipeline: messages -> [chat] -> token ids -> llm. Host only.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from jpaged import gguf_file
from jpaged.text import gguf_tokenizer, message_content, sandbox
from jpaged.text.added_tokens import read_json
from jpaged.text.tokenizer import Tokenizer

_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def chat_prompts(
    tokenizer: Tokenizer | None,
    messages: Any,
    *,
    chat_template: str | None,
    add_generation_prompt: bool,
    tools: Any,
) -> list[list[int]]:
    """Return the token ids of the prompt of each conversation.

    The template writes the special tokens, so the tokenizer adds none.

    Args:
      tokenizer: the model's tokenizer, or None if it has none.
      messages: one conversation (a list of messages), or a list of conversations.
      chat_template: source or name of a template; None uses the folder's own.
      add_generation_prompt: end each prompt with the header of the answer.
      tools: JSON schemas of functions that the model may call, or None.

    Raises:
      ValueError: there is no tokenizer or no template, or see `render`.
    """
    if tokenizer is None:
        raise ValueError(
            "messages: expected a model with a tokenizer for chat, got one whose "
            "folder has no tokenizer.json; pass token ids to generate instead"
        )
    is_one = (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and isinstance(messages[0], Mapping)
    )
    conversations = [messages] if is_one else messages
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        check_messages(conversations)
    templates = ChatTemplates({}, {})
    if tokenizer.folder is not None:
        templates = ChatTemplates.from_folder(tokenizer.folder)
    template = templates.choose(chat_template, tools)
    texts = [
        render(
            conversation,
            template,
            special_tokens=templates.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )
        for conversation in conversations
    ]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


class ChatTemplates:
    """The chat templates of a folder, by name, and its special tokens."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]):
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, folder: pathlib.Path) -> ChatTemplates:
        """Read the templates where transformers stores them, or from a GGUF file.

        `chat_template.jinja` takes precedence over `tokenizer_config.json`.

        Args:
          folder: of a model, or a GGUF file.

        Raises:
          ValueError: a file is not a JSON object, or the GGUF file is invalid.
        """
        if gguf_file.is_gguf(folder):
            file = gguf_file.load(folder)
            templates = gguf_tokenizer.chat_templates(file)
            return cls(templates, gguf_tokenizer.special_tokens(file))
        config = read_json(folder / "tokenizer_config.json")
        tokens = read_json(folder / "special_tokens_map.json") | config
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

    def choose(self, requested: str | None, tools: Any) -> str:
        """Return the source of a template.

        Args:
          requested: the name of a template or its source. None chooses "tool_use" if
            there are tools and such a template, otherwise "default".
          tools: the conversation's tools, or None.

        Raises:
          ValueError: no template is requested and the folder has no default.
        """
        if requested is not None:
            return self.templates.get(requested, requested)
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        raise ValueError(
            "chat_template: expected one in the model's folder (chat_template.jinja or "
            "tokenizer_config.json) or GGUF file, got "
            f"{sorted(self.templates) or 'none'} without a default; pass chat_template="
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
    """Render messages with a chat template, as transformers does.

    Args:
      messages: `{"role": ..., "content": ...}`, with any other keys that the template
        reads. The content is a text or a list of text parts,
        `{"type": "text", "text": ...}`. A template that does not read parts gets their
        texts, joined by line ends.
      template: source of a jinja2 template.
      special_tokens: `bos_token` and so on.
      add_generation_prompt: end the text with the header of the answer.
      tools: JSON schemas of functions that the model may call.
      variables: further variables of the template.

    Returns:
      The text of the prompt.

    Raises:
      ValueError: `messages` is not a list of messages; the template is invalid, refuses
        the messages, or exceeds the limits of the sandbox.
    """
    check_messages(messages)
    messages = message_content.with_text(messages)
    chat = [
        _with_reasoning(
            {key: value for key, value in each.items() if value is not None}
        )
        for each in messages
    ]
    names = {**(special_tokens or {}), **variables}

    def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
        return _render(
            template,
            messages=_plain(messages),
            tools=_plain(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **_plain(names),
        )

    if not message_content.has_parts(chat):
        return rendered(chat)
    if _reads_parts(template, _plain(names)):
        text = rendered(chat)
        # The template may read the parts of some roles only.
        if not message_content.shows_parts(_plain(chat), text):
            return text
    return rendered(message_content.joined(chat))


def _reads_parts(template: str, names: Mapping[str, Any]) -> bool:
    """Whether a template reads content that is a list of parts."""
    probe = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
    settings = {"tools": None, "documents": None, "add_generation_prompt": False}
    try:
        text = _render(template, **{**settings, **names, "messages": [probe]})
    except ValueError:
        return False
    return not message_content.shows_parts([probe], text)


def _render(template: str, **variables: Any) -> str:
    """Render a template; every failure of it is a ValueError."""
    try:
        return sandbox.compile_template(template).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template: expected a jinja2 template, got a syntax error in line "
            f"{error.lineno}: {error}"
        ) from error
    except RecursionError as error:
        raise ValueError(
            "chat_template: expected a template that ends, got one that calls itself "
            "too deeply"
        ) from error
    # A template is a program: it can fail in any way.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"chat_template: the template refused the messages: {reason}"
        ) from error


def check_messages(messages: Any) -> None:
    """Raise ValueError unless `messages` is a list of mappings with a role."""
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


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Store a message's reasoning under each of the names that templates use."""
    found = [message[name] for name in _REASONING if name in message]
    if not found:
        return message
    return {"thinking": found[0], **message, "reasoning_content": found[0]}


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON types.

    Other objects have methods that the sandbox would let a template call.
    """
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
