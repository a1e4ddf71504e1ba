"""Conversations: chats, and texts to be scored, as token ids.

Place on the road: user -> [conversations] -> llm. Host only.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpaged.text import templates as chat
from jpaged.text.templates import ChatTemplates
from jpaged.text.tokenizer import Tokenizer


def prompts(
    tokenizer: Tokenizer | None,
    messages: Any,
    *,
    chat_template: str | None,
    add_generation_prompt: bool,
    tools: Any,
) -> list[list[int]]:
    """Token ids of each conversation's prompt.

    The template writes the special tokens, so the tokenizer adds none of its own.

    Raises:
      ValueError: no tokenizer, no template, or what `chat.render` raises.
    """
    if tokenizer is None:
        raise ValueError(
            "messages: chat needs a tokenizer, and the model's folder has no "
            "tokenizer.json"
        )
    is_one = (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and isinstance(messages[0], Mapping)
    )
    many = [messages] if is_one else messages
    if not isinstance(many, Sequence) or isinstance(many, str):
        chat.check_messages(many)
    templates = ChatTemplates({}, {})
    if tokenizer.folder is not None:
        templates = ChatTemplates.from_folder(tokenizer.folder)
    template = templates.choose(chat_template, tools)
    found = []
    for each in many:
        text = chat.render(
            each,
            template,
            special_tokens=templates.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )
        found.append(tokenizer.encode(text, add_special_tokens=False))
    return found


def pairs(
    tokenizer: Tokenizer | None, prompts: Any, continuations: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts, and of the continuation of each.

    Raises:
      ValueError: numbers that differ, or what is neither text nor token ids.
    """
    prompts, continuations = (
        _many("prompts", prompts),
        _many("continuations", continuations),
    )
    if len(prompts) != len(continuations):
        raise ValueError(
            f"continuations: expected one for each of {len(prompts)} prompts, got "
            f"{len(continuations)}"
        )
    return (
        [token_ids(tokenizer, f"prompts[{i}]", p) for i, p in enumerate(prompts)],
        [
            token_ids(tokenizer, f"continuations[{i}]", c, add_special_tokens=False)
            for i, c in enumerate(continuations)
        ],
    )


def token_ids(
    tokenizer: Tokenizer | None, name: str, value: Any, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text, or as they are.

    Raises:
      ValueError: `value` is neither, or a text where there is no tokenizer.
    """
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(
                f"{name}: expected token ids, got text: the model has no tokenizer"
            )
        return tokenizer.encode(value, add_special_tokens)
    if not _is_token_ids(value):
        raise ValueError(
            f"{name}: expected text or a list of token ids, got {value!r:.80} "
            f"({type(value).__name__})"
        )
    return [int(token) for token in value]


def _many(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or (_is_token_ids(values) and len(values)):
        return [values]
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise ValueError(
            f"{name}: expected text, token ids, or a list of either, got "
            f"{values!r:.80} ({type(values).__name__})"
        )
    return list(values)


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, Sequence) and all(
        isinstance(token, numbers.Integral) and not isinstance(token, bool)
        for token in value
    )
