"""Common: what `/v1/completions` and `/v1/chat/completions` share.

Pipeline: fields -> [common] -> completions, chat. Host only.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from jpaged.outputs import CompletionOutput, RequestOutput
from jpaged.params import StructuredOutputsParams
from jpaged.server.bridge import EngineBridge
from jpaged.server.errors import invalid
from jpaged.server.fields import Fields
from jpaged.server.logprob_forms import TokenNames
from jpaged.server.sampling import Generation, Params
from jpaged.server.settings import ServerSettings
from jpaged.structured import compile_constraint


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a response needs beside the outputs.

    Attributes:
      head: fields of the response and of each chunk: id, object, created, model.
      generation: how outputs are generated.
      names: names of tokens.
      stream: whether the response is a stream of chunks.
      include_usage: whether the stream ends with the numbers of tokens.
      continuous_usage: whether each chunk has them.
      returns_ids: whether the response has token ids.
    """

    head: dict[str, Any]
    generation: Generation
    names: TokenNames
    stream: bool
    include_usage: bool
    continuous_usage: bool
    returns_ids: bool

    def chunk(self, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        """Return one chunk of a stream."""
        found = {**self.head, "choices": choices}
        if self.include_usage or usage is not None:
            found["usage"] = usage
        return found


def read_stream(fields: Fields) -> tuple[bool, bool, bool]:
    """Return whether to stream, to end with usage, and to send usage in each chunk."""
    stream = fields.flag("stream")
    given = fields.mapping("stream_options")
    if given and not stream:
        raise invalid(
            "stream_options", "stream_options: expected none without stream, got some"
        )
    options = Fields(given, "stream_options")
    include = options.flag("include_usage")
    continuous = options.flag("continuous_usage_stats")
    # No random padding is added, so both values mean the same.
    options.flag("include_obfuscation")
    options.finish()
    return stream, include, include and continuous


def new_head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return the first fields of a response."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def settings_of(request: Request) -> ServerSettings:
    """Return the settings of the application that has a request."""
    return request.app.state.settings


def bridge_of(request: Request) -> EngineBridge:
    """Return the bridge of the application that has a request."""
    return request.app.state.bridge


def prepared(bridge: EngineBridge, generation: Generation) -> Params:
    """Return the parameters with their constraint compiled; can take seconds.

    Raises:
      ValueError: the constraint is invalid, or the model cannot follow it.
    """
    params = generation.params
    constraint = params.structured_outputs
    if not isinstance(constraint, StructuredOutputsParams):
        return params
    llm = bridge.llm
    automaton = compile_constraint(
        constraint,
        llm.tokenizer,
        llm.model.config.vocab_size,
        llm.model.config.eos_token_ids,
        params.max_tokens,
        params.stop_token_ids,
    )
    return dataclasses.replace(params, structured_outputs=automaton)


def usage(
    num_prompt: int, num_generated: int, num_cached: int | None = None
) -> dict[str, Any]:
    """Return the numbers of tokens of a response."""
    found: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }
    if num_cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return found


def usage_of(outputs: Sequence[RequestOutput], reply: Reply) -> dict[str, Any]:
    """Return the numbers of tokens of finished requests."""
    metrics = [output.metrics or {} for output in outputs]
    generated = sum(each.get("num_generated_tokens", 0) for each in metrics)
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        0 if reply.generation.drops_token else generated,
        sum(each.get("num_cached_tokens", 0) for each in metrics),
    )


def chosen(output: RequestOutput, generation: Generation) -> list[CompletionOutput]:
    """Return the outputs that the client gets: all, or the best of `best_of`."""
    outputs = list(output.outputs)
    if len(outputs) > generation.n:
        outputs.sort(
            key=lambda each: each.cumulative_logprob / max(len(each.token_ids), 1),
            reverse=True,
        )
    return outputs[: generation.n]
