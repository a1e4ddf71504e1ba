"""Prompt files: requests from files, a prompt or a JSON object on each line.

Pipeline: file -> [prompt files] -> prompts and parameters.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import pathlib
from typing import Any

from jpaged.engine.limits import Params
from jpaged.params import BeamSearchParams, SamplingParams, StructuredOutputsParams

_PARAMS = (SamplingParams, BeamSearchParams)


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """A request and its origin; invalid lines have an error and no parameters."""

    where: str
    prompt: Any
    params: Params | None
    error: str | None = None
    shown: str | None = None  # what is printed instead of the prompt


def make_params(defaults: dict[str, Any], own: dict[str, Any]) -> Params:
    """Builds the parameters of a request.

    Args:
      defaults: Fields from the flags. Those that do not belong to the request's kind
        are ignored.
      own: Fields of the request itself, which replace the defaults.

    Raises:
      ValueError: A value is invalid, or the request's own fields do not go together.
    """
    known = {cls: [f.name for f in dataclasses.fields(cls)] for cls in _PARAMS}
    chosen = defaults | own
    cls = BeamSearchParams if chosen["beam_width"] else SamplingParams
    if unknown := sorted(set(own) - {*known[cls], "beam_width"}):
        kind = "beam search parameter" if cls is BeamSearchParams else "parameter"
        names = ", ".join(known[cls])
        raise ValueError(f"{kind}: expected one of {names}, got {unknown[0]!r}")
    chosen = {name: value for name, value in chosen.items() if name in known[cls]}
    if isinstance(structured := chosen.get("structured_outputs"), dict):
        chosen["structured_outputs"] = StructuredOutputsParams(**structured)
    if isinstance(bias := chosen.get("logit_bias"), dict):
        # Keys of JSON objects are strings.
        chosen["logit_bias"] = {
            int(token) if str(token).isdigit() else token: value
            for token, value in bias.items()
        }
    return cls(**chosen)


def read_lines(path: pathlib.Path, defaults: dict[str, Any]) -> list[PromptLine]:
    """Reads a prompt file.

    Args:
      path: The file, with a prompt or, in `.jsonl` files, a JSON object on each line.
      defaults: Fields of the parameters that a line does not give itself.

    Returns:
      The requests, including invalid ones with their errors. Empty lines are skipped.

    Raises:
      OSError: The file cannot be read.
    """
    is_json = path.suffix == ".jsonl"
    lines = []
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, raw in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8").removesuffix("\r")
            prompt, own = _parse(text) if is_json else (text, {})
            lines.append(PromptLine(where, prompt, make_params(defaults, own)))
        except (ValueError, TypeError) as error:
            lines.append(PromptLine(where, None, None, str(error)))
        except RecursionError:
            error = "line: expected JSON, got one that is nested too deeply"
            lines.append(PromptLine(where, None, None, error))
    return lines


def _parse(text: str) -> tuple[Any, dict[str, Any]]:
    """The prompt of a JSON line, and the line's own parameters."""
    request = json.loads(text)
    if not isinstance(request, dict) or "prompt" not in request:
        raise ValueError(f'line: expected a JSON object with "prompt", got {text:.60}')
    prompt = request.pop("prompt")
    if not isinstance(prompt, str | list | dict):
        raise ValueError(f"prompt: expected a text or token ids, got {prompt!r:.60}")
    return prompt, request
