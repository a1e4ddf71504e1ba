"""Special: the special tokens and the chat template of a model, for harnesses.

Pipeline: folder of a checkpoint -> [special] -> evals. Host only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jpaged.llm import LLM
from jpaged.text import chat


class SpecialTokens(NamedTuple):
    """Ids and texts of special tokens; None for those that a model does not have."""

    bos_id: int | None
    eos_id: int | None
    bos: str | None
    eos: str | None


def special_tokens(llm: LLM) -> SpecialTokens:
    """Return the BOS and the EOS token of a model.

    They are those of the tokenizer's files; the EOS is otherwise that of the config.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        eos = next(iter(llm.model.config.eos_token_ids), None)
        return SpecialTokens(None, eos, None, None)
    names = chat.templates_of(tokenizer).special_tokens

    def id_of(name: str) -> int | None:
        text = names.get(name)
        return None if text is None else tokenizer.backend.token_to_id(text)

    bos_id, eos_id = id_of("bos_token"), id_of("eos_token")
    eos = names.get("eos_token")
    if eos_id is None:
        eos_id = next(iter(llm.model.config.eos_token_ids), None)
        eos = None if eos_id is None else tokenizer.backend.id_to_token(eos_id)
    return SpecialTokens(bos_id, eos_id, names.get("bos_token"), eos)


def render(
    llm: LLM,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a conversation's prompt.

    Args:
      llm: the model.
      messages: the messages.
      add_generation_prompt: end with the header of the answer. Otherwise the text ends
        with the content of the last message, which the model continues.
      template: source or name of a template; None is the model's.
      variables: further variables of the template.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    (text,) = chat.chat_texts(
        llm.tokenizer,
        list(messages),
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        continue_final_message=not add_generation_prompt,
        **(variables or {}),
    )
    return text
