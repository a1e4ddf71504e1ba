"""Chat: `/v1/chat/completions`, conversations in, answers out.

Pipeline: HTTP request -> [chat] -> bridge, and back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.server import common
from jpaged.server.body import read_object
from jpaged.server.common import Reply
from jpaged.server.errors import invalid, json_response, wrong_value
from jpaged.server.fields import Fields, check_model
from jpaged.server.live_requests import LiveRequest
from jpaged.server.logprob_forms import TokenNames, chat_logprobs, prompt_logprobs
from jpaged.server.sampling import Params, read_generation
from jpaged.server.settings import ServerSettings
from jpaged.server.streams import EventStream, event, merged, respond
from jpaged.text import chat as text_chat

MAX_TOOLS = 128
MAX_MESSAGES = 4096
# Variables that the server sets; a request's `chat_template_kwargs` may not.
_RESERVED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "template",
    "tokenizer",
    "special_tokens",
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a chat template renders.

    Attributes:
      messages: the messages.
      tools: JSON schemas of functions, or None.
      add_generation_prompt: whether the prompt ends with the header of the answer.
      continue_final_message: whether it ends within the last message.
      variables: further variables of the template.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chat(Reply):
    """The fields of a chat request.

    Attributes:
      conversation: what the prompt is rendered from.
      logprobs: most probable tokens to return per token, or None.
      prompt_logprobs: the same for the prompt, in vLLM's form.
    """

    conversation: Conversation
    logprobs: int | None
    prompt_logprobs: int | None


def read_conversation(fields: Fields) -> Conversation:
    """Return the fields of a conversation.

    Raises:
      ApiError: a field is invalid.
    """
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong_value("messages", "a list with at least one message", messages)
    if len(messages) > MAX_MESSAGES:
        raise invalid(
            "messages",
            f"messages: expected at most {MAX_MESSAGES} messages, got {len(messages)}",
        )
    if fields.take("chat_template") is not None:
        raise invalid(
            "chat_template",
            "chat_template: expected none: a template is a program, and requests may "
            "not bring one; start the server with --chat_template",
        )
    variables = fields.mapping("chat_template_kwargs")
    for name in variables:
        if not name.isidentifier() or name in _RESERVED or name.startswith("_"):
            raise invalid(
                "chat_template_kwargs",
                f"chat_template_kwargs: expected names of variables other than "
                f"{', '.join(_RESERVED)}, got {name[:100]!a}",
            )
    continues = fields.flag("continue_final_message")
    adds = fields.flag("add_generation_prompt", not continues)
    if continues and adds:
        raise invalid(
            "continue_final_message",
            "continue_final_message: expected false with add_generation_prompt, got "
            "true: a prompt ends within a message, or with the header of the next",
        )
    return Conversation(
        messages=[_message(index, each) for index, each in enumerate(messages)],
        tools=_tools(fields),
        add_generation_prompt=adds,
        continue_final_message=continues,
        variables=variables,
    )


def _message(index: int, message: Any) -> dict[str, Any]:
    """Return a message, with the arguments of its tool calls as objects.

    OpenAI's API has them as JSON texts, chat templates expect objects.
    """
    name = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong_value("messages", "an object with a role", message, name)
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
        name = f"{name}.tool_calls"
        raise wrong_value("messages", "a list of objects", calls, name)
    return {**message, "tool_calls": [_tool_call(one) for one in calls]}


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    tools = fields.take("tools")
    choice = fields.take("tool_choice", "auto")
    fields.flag("parallel_tool_calls", True)  # the model's text is not divided
    if choice not in ("auto", "none"):
        raise invalid(
            "tool_choice",
            "tool_choice: expected 'auto' or 'none', got "
            f"{choice!r:.200}; constrain the text with response_format instead",
        )
    if tools is None:
        return None
    is_list = isinstance(tools, list) and len(tools) <= MAX_TOOLS
    if not is_list or not all(
        isinstance(tool, dict)
        and tool.get("type") == "function"
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        for tool in tools
    ):
        expected = (
            f'a list of at most {MAX_TOOLS} objects {{"type": "function", "function": '
            '{"name": ...}}'
        )
        raise wrong_value("tools", expected, tools)
    return tools if tools and choice == "auto" else None


def render(llm: LLM, conversation: Conversation, template: str | None) -> list[int]:
    """Return the token ids of a conversation's prompt.

    Args:
      llm: the LLM.
      conversation: the messages.
      template: source or name of a chat template; None is the model's.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    try:
        (token_ids,) = text_chat.chat_prompts(
            llm.tokenizer,
            conversation.messages,
            chat_template=template,
            add_generation_prompt=conversation.add_generation_prompt,
            tools=conversation.tools,
            continue_final_message=conversation.continue_final_message,
            **conversation.variables,
        )
    except RecursionError:
        raise ValueError("messages: expected values that nest less") from None
    return token_ids


def read(body: Mapping[str, Any], llm: LLM, settings: ServerSettings) -> Chat:
    """Return the fields of a body.

    Raises:
      ApiError: a field is invalid.
    """
    fields = Fields(body)
    check_model(fields, settings)
    fields.labels()
    modalities = fields.take("modalities", ["text"])
    if modalities != ["text"]:
        raise invalid(
            "modalities", f"modalities: expected text, got {modalities!r:.100}"
        )
    conversation = read_conversation(fields)
    has_logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", None, 0)
    if top is not None and not has_logprobs:
        raise invalid("top_logprobs", "top_logprobs: expected none without logprobs")
    most = fields.integer("max_completion_tokens", None, 1)
    older = fields.integer("max_tokens", None, 1)
    if most is not None and older is not None and most != older:
        raise invalid(
            "max_tokens",
            f"max_tokens: expected max_completion_tokens ({most}) or none, got {older}",
        )
    stream, include, continuous = common.read_stream(fields)
    as_ids = fields.flag("return_tokens_as_token_ids")
    returns_ids = fields.flag("return_token_ids")
    of_prompt = fields.integer("prompt_logprobs", None, -1)
    logprobs = (top or 0) if has_logprobs else None
    names = {} if top is None else {"logprobs": "top_logprobs"}
    if most is not None:
        names["max_tokens"] = "max_completion_tokens"
    generation = read_generation(
        fields,
        settings,
        max_tokens=older if most is None else most,
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
        names=names,
    )
    fields.finish()
    if generation.is_best_of:
        raise invalid("best_of", "best_of: expected none: only completions have it")
    kind = "chat.completion.chunk" if stream else "chat.completion"
    return Chat(
        head=common.new_head(kind, "chatcmpl", settings.model_names[0]),
        generation=generation,
        names=TokenNames(llm.tokenizer, as_ids),
        stream=stream,
        include_usage=include,
        continuous_usage=continuous,
        returns_ids=returns_ids,
        conversation=conversation,
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
    )


async def endpoint(request: Request) -> Response:
    """Serve `/v1/chat/completions`."""
    settings, bridge = common.settings_of(request), common.bridge_of(request)
    call = read(await read_object(request, settings), bridge.llm, settings)
    bridge.check_capacity(call.generation.num_run)
    template = request.app.state.chat_template

    def prepare() -> tuple[list[int], Params]:
        prompt = render(bridge.llm, call.conversation, template)
        return prompt, common.prepared(bridge, call.generation)

    variables = call.conversation.variables
    names = {
        "prompt": "messages",
        "prompt_token_ids": "messages",
        "chat_template": "chat_template_kwargs" if variables else "messages",
        **call.generation.names,
    }
    prompt, params = await bridge.prepare(prepare, names)
    lives = await bridge.submit([prompt], params, call.generation.num_run, names)
    if call.stream:
        return EventStream(
            lives, lambda: _events(call, lives[0], prompt), settings.write_timeout_s
        )
    return await respond(request, lives, _whole(call, lives[0]))


async def _whole(call: Chat, live: LiveRequest) -> Response:
    """Return the response once the request has ended."""
    output = await live.output()
    found = {
        **call.head,
        "choices": [
            _choice(call, index, one)
            for index, one in enumerate(common.chosen(output, call.generation))
        ],
        "usage": common.usage_of([output], call),
    }
    return json_response(_with_prompt(call, found, output))


def _with_prompt(
    call: Chat, found: dict[str, Any], output: RequestOutput
) -> dict[str, Any]:
    if call.prompt_logprobs is not None:
        entries = output.prompt_logprobs or []
        found["prompt_logprobs"] = prompt_logprobs(call.names, entries)
    if call.returns_ids:
        found["prompt_token_ids"] = list(output.prompt_token_ids)
    return found


def _choice(call: Chat, index: int, one: Any) -> dict[str, Any]:
    logprobs = None
    if call.logprobs is not None:
        logprobs = chat_logprobs(
            call.names, one.token_ids, one.logprobs or [], call.logprobs
        )
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": one.text},
        "logprobs": logprobs,
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
    }
    if one.score is not None:
        choice |= {"score": one.score, "cumulative_logprob": one.cumulative_logprob}
    if call.returns_ids:
        choice["token_ids"] = list(one.token_ids)
    return choice


async def _events(
    call: Chat, live: LiveRequest, prompt: Sequence[int]
) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream."""
    first = {"role": "assistant", "content": ""}
    yield b"".join(
        event(call.chunk([_part(call, index, first)]))
        for index in range(call.generation.n)
    )
    num_generated = 0
    async for _, deltas in merged([live]):
        parts = []
        for delta in deltas:
            logprobs = None
            if call.logprobs is not None:
                logprobs = chat_logprobs(
                    call.names, delta.token_ids, delta.logprobs or [], call.logprobs
                )
            content = {"content": delta.text} if delta.text or delta.token_ids else {}
            part = _part(call, delta.sample, content, logprobs, delta.finish_reason)
            if delta.finish_reason is not None:
                part["stop_reason"] = delta.stop_reason
            if call.returns_ids:
                part["token_ids"] = delta.token_ids
            num_generated += len(delta.token_ids)
            now = None
            if call.continuous_usage:
                now = common.usage(len(prompt), num_generated)
            parts.append(event(call.chunk([part], now)))
        yield b"".join(parts)
    output = live.request.output()
    if call.prompt_logprobs is not None or call.returns_ids:
        yield event(_with_prompt(call, call.chunk([]), output))
    if call.include_usage:
        yield event(call.chunk([], common.usage_of([output], call)))


def _part(
    call: Chat,
    index: int,
    delta: dict[str, Any],
    logprobs: Any = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
