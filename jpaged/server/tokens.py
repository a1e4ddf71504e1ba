"""Tokens: `/tokenize`, `/detokenize` and `/tokenizer_info`.

Pipeline: HTTP request -> [tokens] -> tokenizer, and back. The forms are vLLM's.
"""

from __future__ import annotations

import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jpaged import validation
from jpaged.server import chat, common
from jpaged.server.body import read_object
from jpaged.server.errors import ApiError, invalid, json_response
from jpaged.server.fields import Fields, check_model, checked
from jpaged.text import chat as text_chat
from jpaged.text.tokenizer import Tokenizer

_MOST_TOKENS = 1_000_000  # that are converted to text at once


def _tokenizer(request: Request) -> Tokenizer:
    tokenizer = common.bridge_of(request).llm.tokenizer
    if tokenizer is None:
        raise ApiError(
            404,
            "the model has no tokenizer: its folder has no tokenizer.json",
            code="no_tokenizer",
        )
    return tokenizer


async def tokenize(request: Request) -> Response:
    """Return the tokens of a text or of a conversation."""
    settings, bridge = common.settings_of(request), common.bridge_of(request)
    fields = Fields(await read_object(request, settings))
    tokenizer = _tokenizer(request)
    check_model(fields, settings)
    prompt = fields.text("prompt")
    has_names = fields.flag("return_token_strs")
    if prompt is None:
        conversation = chat.read_conversation(fields)
        template = request.app.state.chat_template
        fields.flag("add_special_tokens")  # a template writes its own
        fields.finish()
        found = await bridge.prepare(
            functools.partial(chat.render, bridge.llm, conversation, template),
            {"prompt": "messages", "chat_template": "messages"},
        )
    else:
        adds_special = fields.flag("add_special_tokens", True)
        fields.finish()
        found = await bridge.prepare(
            functools.partial(tokenizer.encode, prompt, adds_special)
        )
    content: dict[str, Any] = {
        "count": len(found),
        "max_model_len": bridge.llm.config.max_model_len,
        "tokens": found,
        "token_strs": None,
    }
    if has_names:
        content["token_strs"] = [tokenizer.decoded_token(token) for token in found]
    return json_response(content)


async def detokenize(request: Request) -> Response:
    """Return the text of tokens."""
    settings, bridge = common.settings_of(request), common.bridge_of(request)
    fields = Fields(await read_object(request, settings))
    tokenizer = _tokenizer(request)
    check_model(fields, settings)
    tokens = checked(validation.token_ids, "tokens", fields.take("tokens", None))
    fields.finish()
    if len(tokens) > _MOST_TOKENS:
        raise invalid(
            "tokens", f"tokens: expected at most {_MOST_TOKENS}, got {len(tokens)}"
        )
    text = await bridge.prepare(functools.partial(tokenizer.decode, tokens, False))
    return json_response({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens and the chat template of the model."""
    tokenizer = _tokenizer(request)
    bridge = common.bridge_of(request)
    templates = await bridge.prepare(
        functools.partial(text_chat.templates_of, tokenizer)
    )
    template = request.app.state.chat_template
    if template is None:
        template = templates.templates.get("default")
    special = templates.special_tokens
    return json_response(
        {
            "tokenizer_class": "Tokenizer",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": bridge.llm.config.max_model_len,
            **{name: special.get(name) for name in _SPECIAL},
            "chat_template": template,
        }
    )


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
