"""Prompts: the types of what `LLM.generate` accepts, with vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class TextPrompt(TypedDict):
    """A prompt of text."""

    prompt: str


class _Tokens(TypedDict):
    prompt_token_ids: Sequence[int]


class TokensPrompt(_Tokens, total=False):
    """A prompt of token ids, and optionally the text that they were made from."""

    prompt: str | None


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt | Mapping[str, Any]
PromptType = Prompt  # its name in vLLM
