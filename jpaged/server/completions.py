"""Completions: `/v1/completions`, text or tokens in, text out.

Pipeline: HTTP request -> [completions] -> bridge, and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
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
from jpaged.server.logprob_forms import CompletionLogprobs, TokenNames, prompt_logprobs
from jpaged.server.sampling import Params, read_generation
from jpaged.server.settings import ServerSettings
from jpaged.server.streams import EventStream, event, merged, respond
from jpaged.serving.request_state import Delta
from jpaged.text import prompts as text_prompts

Prompt = str | list[int]
DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


@dataclasses.dataclass(frozen=True)
class Completions(Reply):
    """The fields of a completion request.

    Attributes:
      prompts: the prompts.
      echo: whether the text begins with the prompt.
      logprobs: most probable tokens to return per token, or None.
      prompt_logprobs: the same for the prompt, in vLLM's form.
      adds_special: whether the tokenizer adds its special tokens to a text.
    """

    prompts: list[Prompt]
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    adds_special: bool


def read(body: dict[str, Any], llm: LLM, settings: ServerSettings) -> Completions:
    """Return the fields of a body.

    Raises:
      ApiError: a field is invalid.
    """
    fields = Fields(body)
    check_model(fields, settings)
    fields.labels()
    prompts = _prompts(fields, settings)
    if fields.take("suffix", "") != "":
        raise invalid("suffix", "suffix: expected none: the model cannot insert text")
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", None, 0)
    of_prompt = fields.integer("prompt_logprobs", None, -1)
    most = fields.integer("max_tokens", DEFAULT_MAX_TOKENS, 0)
    stream, include, continuous = common.read_stream(fields)
    as_ids = fields.flag("return_tokens_as_token_ids")
    returns_ids = fields.flag("return_token_ids")
    adds_special = fields.flag("add_special_tokens", True)
    counts = [c for c in (of_prompt, logprobs if echo else None) if c is not None]
    generation = read_generation(
        fields,
        settings,
        max_tokens=most,
        logprobs=logprobs,
        prompt_logprobs=-1 if -1 in counts else max(counts, default=None),
        names={} if of_prompt is not None else {"prompt_logprobs": "logprobs"},
    )
    fields.finish()
    if stream and generation.is_best_of:
        raise invalid("best_of", "best_of: expected n or none with stream, got more")
    return Completions(
        head=common.new_head("text_completion", "cmpl", settings.model_names[0]),
        generation=generation,
        names=TokenNames(llm.tokenizer, as_ids),
        stream=stream,
        include_usage=include,
        continuous_usage=continuous,
        returns_ids=returns_ids,
        prompts=prompts,
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
        adds_special=adds_special,
    )


def _prompts(fields: Fields, settings: ServerSettings) -> list[Prompt]:
    """Return the prompts: texts, or lists of token ids."""
    value = fields.take("prompt")
    is_one = isinstance(value, str) or (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token) is int for token in value)
    )
    found = [value] if is_one else value
    if not isinstance(found, list) or not found:
        raise wrong_value("prompt", "a text, token ids, or a list of either", value)
    if len(found) > settings.max_prompts:
        raise invalid(
            "prompt",
            f"prompt: expected at most {settings.max_prompts} prompts, got "
            f"{len(found)}; send several requests",
        )
    for index, prompt in enumerate(found):
        is_ids = isinstance(prompt, list) and all(type(each) is int for each in prompt)
        if not isinstance(prompt, str) and not is_ids:
            name = f"prompt[{index}]"
            raise wrong_value("prompt", "a text or token ids", prompt, name)
        if not prompt:
            raise invalid("prompt", f"prompt[{index}]: expected some text, got none")
    return found


async def endpoint(request: Request) -> Response:
    """Serve `/v1/completions`."""
    settings, bridge = common.settings_of(request), common.bridge_of(request)
    call = read(await read_object(request, settings), bridge.llm, settings)
    bridge.check_capacity(len(call.prompts) * call.generation.num_run)

    def prepare() -> tuple[list[list[int]], Params]:
        tokenizer = bridge.llm.tokenizer
        token_ids = [
            text_prompts.token_ids(tokenizer, "prompt", prompt, call.adds_special)
            for prompt in call.prompts
        ]
        return token_ids, common.prepared(bridge, call.generation)

    names = {"prompt_token_ids": "prompt", **call.generation.names}
    prompts, params = await bridge.prepare(prepare, names)
    lives = await bridge.submit(prompts, params, call.generation.num_run, names)
    if call.stream:
        return EventStream(
            lives,
            lambda: _events(call, lives, prompts, bridge.llm),
            settings.write_timeout_s,
        )
    return await respond(request, lives, _whole(call, lives, prompts, bridge.llm))


def _echoes(call: Completions, prompts: Sequence[list[int]], llm: LLM) -> list[str]:
    """Return the texts that the outputs of each prompt begin with."""
    if not call.echo:
        return [""] * len(prompts)

    def text(prompt: Prompt, token_ids: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return "" if llm.tokenizer is None else llm.tokenizer.decode(token_ids, False)

    return list(map(text, call.prompts, prompts))


async def _whole(
    call: Completions,
    lives: Sequence[LiveRequest],
    prompts: Sequence[list[int]],
    llm: LLM,
) -> Response:
    """Return the response once all requests have ended."""
    texts = _echoes(call, prompts, llm)
    outputs = [await live.output() for live in lives]
    choices = [
        choice
        for index, output in enumerate(outputs)
        for choice in _choices(call, index, output, texts[index])
    ]
    found = {**call.head, "choices": choices, "usage": common.usage_of(outputs, call)}
    return json_response(found)


def _choices(
    call: Completions, index: int, output: RequestOutput, prompt_text: str
) -> list[dict[str, Any]]:
    """Return the choices of one prompt."""
    choices = []
    drops = call.generation.drops_token
    for number, one in enumerate(common.chosen(output, call.generation)):
        token_ids = [] if drops else list(one.token_ids)
        entries = [] if drops else list(one.logprobs or [])
        form = None
        if call.logprobs is not None:
            shown = token_ids, entries
            if call.echo:
                shown = (
                    [*output.prompt_token_ids, *token_ids],
                    [*(output.prompt_logprobs or []), *entries],
                )
            form = _new_logprobs(call).part(*shown)
        choice = _choice(
            index * call.generation.n + number,
            prompt_text + ("" if drops else one.text),
            form,
            "length" if drops else one.finish_reason,
            None if drops else one.stop_reason,
        )
        if one.score is not None:
            choice["score"] = one.score
            choice["cumulative_logprob"] = one.cumulative_logprob
        if call.returns_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = list(output.prompt_token_ids)
        if call.prompt_logprobs is not None:
            entries = output.prompt_logprobs or []
            choice["prompt_logprobs"] = prompt_logprobs(call.names, entries)
        choices.append(choice)
    return choices


def _new_logprobs(call: Completions) -> CompletionLogprobs:
    assert call.logprobs is not None
    skips = getattr(call.generation.params, "skip_special_tokens", True)
    return CompletionLogprobs(call.names, call.logprobs, skips)


def _delta_choice(
    call: Completions, index: int, delta: Delta, forms: dict[int, CompletionLogprobs]
) -> dict[str, Any]:
    """Return the choice of a delta; `forms` has the logprobs of each choice so far."""
    form = None
    if call.logprobs is not None:
        if index not in forms:
            forms[index] = _new_logprobs(call)
        form = forms[index].part(delta.token_ids, delta.logprobs or [])
    choice = _choice(index, delta.text, form, delta.finish_reason, delta.stop_reason)
    if call.returns_ids:
        choice["token_ids"] = delta.token_ids
    return choice


def _choice(
    index: int,
    text: str,
    logprobs: Any,
    finish_reason: str | None,
    stop_reason: Any,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


async def _events(
    call: Completions,
    lives: Sequence[LiveRequest],
    prompts: Sequence[list[int]],
    llm: LLM,
) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream."""
    n, texts = call.generation.n, _echoes(call, prompts, llm)
    if (
        call.generation.drops_token
        or call.prompt_logprobs is not None
        or (call.echo and call.logprobs is not None)
    ):
        # Log-probabilities of prompts are known at the end.
        for index, live in enumerate(lives):
            output = await live.output()
            for choice in _choices(call, index, output, texts[index]):
                yield event(call.chunk([choice]))
    else:
        if call.echo:
            for number in range(len(lives) * n):
                choice = _choice(number, texts[number // n], None, None, None)
                yield event(call.chunk([choice]))
        forms: dict[int, CompletionLogprobs] = {}
        num_prompt, num_generated = sum(map(len, prompts)), 0
        async for index, deltas in merged(lives):
            parts = []
            for delta in deltas:
                choice = _delta_choice(call, index * n + delta.sample, delta, forms)
                num_generated += len(delta.token_ids)
                now = None
                if call.continuous_usage:
                    now = common.usage(num_prompt, num_generated)
                parts.append(event(call.chunk([choice], now)))
            yield b"".join(parts)
    if call.include_usage:
        outputs = [live.request.output() for live in lives]
        yield event(call.chunk([], common.usage_of(outputs, call)))
