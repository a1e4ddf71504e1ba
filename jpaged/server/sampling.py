"""Sampling: the fields of a request that say how its tokens are generated.

Pipeline: fields -> [sampling] -> SamplingParams or BeamSearchParams. Host only.

The names and defaults are those of OpenAI's API; further fields have the names of
`SamplingParams` and `BeamSearchParams`, as in vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.server.constraints import read_constraint
from jpaged.server.errors import from_value_error, invalid
from jpaged.server.fields import Fields
from jpaged.server.settings import ServerSettings

Params = SamplingParams | BeamSearchParams

# Fields of SamplingParams that do not have the field of that name in a body.
_OWN = (
    *("n", "logprobs", "max_tokens", "structured_outputs", "prompt_logprobs"),
    "token_masks",  # no response has them
)
_SAMPLING = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.name not in _OWN
)
_BEAMS = tuple(
    field.name
    for field in dataclasses.fields(BeamSearchParams)
    if field.name not in ("beam_width", "max_tokens", "num_return", *_OWN)
)
# Names with which errors about a constraint begin.
_OF_CONSTRAINTS = ("structured_outputs", "automaton", "regex", "choice", "json")
_ONLY_BEAMS = tuple(name for name in _BEAMS if name not in _SAMPLING)


class Generation(NamedTuple):
    """How the outputs of a request are generated.

    Attributes:
      params: of the LLM. For `max_tokens` of 0 they generate one token, which the
        client does not get.
      n: outputs per prompt that the client gets.
      drops_token: whether `max_tokens` is 0.
      names: fields of the body by the names of arguments of `params`, where they
        differ, for errors.
    """

    params: Params
    n: int
    drops_token: bool = False
    names: Mapping[str, str] = {}

    @property
    def num_run(self) -> int:
        """Number of sequences that run for one prompt."""
        if isinstance(self.params, BeamSearchParams):
            return self.params.beam_width
        return self.params.n

    @property
    def is_best_of(self) -> bool:
        """Whether more samples run than the client gets."""
        return isinstance(self.params, SamplingParams) and self.params.n > self.n


def read_generation(
    fields: Fields,
    settings: ServerSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    names: Mapping[str, str],
) -> Generation:
    """Return how a request generates its outputs.

    Args:
      fields: the fields of its body that have not been read.
      settings: the limits.
      max_tokens: most tokens of an output; None: as many as the model can.
      logprobs: most probable tokens to report per token; None reports nothing.
      prompt_logprobs: the same for the tokens of the prompt.
      names: fields of the body for those arguments whose field has another name.

    Raises:
      ApiError: a value is invalid; it names the field.
    """
    n = fields.integer("n", 1, 1, settings.max_n)
    best_of = fields.integer("best_of", None, 1, settings.max_n)
    width = fields.integer("beam_width", None, 1, settings.max_n)
    is_beam = fields.flag("use_beam_search", width is not None)
    assert n is not None
    if width is not None and not is_beam:
        raise invalid(
            "beam_width", "beam_width: expected none without use_beam_search, got one"
        )
    common: dict[str, Any] = {"max_tokens": max_tokens}
    if max_tokens == 0:
        common["max_tokens"] = 1  # the engine generates at least one
    names = dict(names)
    constraint = read_constraint(fields, settings)
    if constraint is not None:
        common["structured_outputs"], field = constraint
        names |= dict.fromkeys(_OF_CONSTRAINTS, field)
    if is_beam:
        names |= {"num_return": "n"}
        if width is None:
            names["beam_width"] = "n" if best_of is None else "best_of"
    elif best_of is not None:
        names["n"] = "best_of"
    try:
        if is_beam:
            if prompt_logprobs is not None:
                message = "prompt_logprobs: expected none with use_beam_search"
                raise invalid(names.get("prompt_logprobs", "prompt_logprobs"), message)
            found = _beams(fields, n, width or best_of or n, common, logprobs)
        else:
            found = _samples(
                fields, settings, n, best_of, common, logprobs, prompt_logprobs
            )
    except ValueError as error:
        raise from_value_error(error, names) from None
    return found._replace(drops_token=max_tokens == 0, names=names)


def _beams(
    fields: Fields, n: int, width: int, common: dict[str, Any], logprobs: int | None
) -> Generation:
    if logprobs is not None:
        raise invalid(
            "logprobs",
            "logprobs: expected none with beam search, got some: beams "
            "have a cumulative_logprob only",
        )
    if fields.take("temperature", 0) != 0:
        raise invalid(
            "temperature",
            "temperature: expected none, or 0, with use_beam_search, got another value",
        )
    if n > width:
        raise invalid("n", f"n: expected at most beam_width ({width}), got {n}")
    given = fields.take_all(_BEAMS)
    params = BeamSearchParams(beam_width=width, num_return=n, **given, **common)
    return Generation(params, n)


def _samples(
    fields: Fields,
    settings: ServerSettings,
    n: int,
    best_of: int | None,
    common: dict[str, Any],
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> Generation:
    for name in _ONLY_BEAMS:
        if fields.take(name) is not None:
            raise invalid(name, f"{name}: expected none without use_beam_search")
    if best_of is not None and best_of < n:
        raise invalid("best_of", f"best_of: expected at least n ({n}), got {best_of}")
    given = fields.take_all(_SAMPLING)
    _check_sizes(given, settings)
    params = SamplingParams(
        n=best_of or n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **given,
        **common,
    )
    return Generation(params, n)


def _check_sizes(given: dict[str, Any], settings: ServerSettings) -> None:
    """Raise ApiError if a field has more items than the server allows."""
    for name in ("stop", "logit_bias", "bad_words"):
        value = given.get(name)
        most = getattr(settings, f"max_{name}")
        if isinstance(value, list | dict) and len(value) > most:
            raise invalid(name, f"{name}: expected at most {most}, got {len(value)}")
    stops = given.get("stop", ())
    stops = (stops,) if isinstance(stops, str) else stops
    if isinstance(stops, list | tuple):
        size = sum(len(stop) for stop in stops if isinstance(stop, str))
        if size > settings.max_stop_chars:
            raise invalid(
                "stop",
                f"stop: expected at most {settings.max_stop_chars} characters "
                f"together, got {size}",
            )
