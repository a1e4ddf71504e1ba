"""The output of a request: texts, tokens, log-probabilities and measurements."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Logprob(NamedTuple):
    """The log-probability of one token; `LLM(logprobs_mode=...)` says of which kind."""

    logprob: float
    rank: int | None = None  # 1 + number of more probable tokens
    decoded_token: str | None = None  # text of the token; None without a tokenizer


# Per position: log-probabilities of the sampled token and the most probable tokens.
Logprobs = list[dict[int, Logprob]]


@dataclasses.dataclass(frozen=True, repr=False)
class CompletionOutput:
    """One output of a request: a sample, or a beam."""

    index: int
    token_ids: Sequence[int]  # including the token that ended the output
    text: str  # excluding the stop token or string; empty without a tokenizer
    cumulative_logprob: float
    logprobs: Logprobs | None = None
    # "stop", "length", "abort" or "dead_end"; None while the output grows
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token or string; None for EOS
    score: float | None = None  # beams: cumulative_logprob / length ** length_penalty
    # f32[n], log-probabilities of `token_ids`; their sum is `cumulative_logprob`
    token_logprobs: np.ndarray | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    # bool[n, V], tokens that could be sampled, with SamplingParams.token_masks
    token_masks: np.ndarray | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    def __repr__(self) -> str:
        """Return the output on one line, with long lists shortened."""
        return _repr(self)


@dataclasses.dataclass(frozen=True, repr=False)
class RequestOutput:
    """The result of a request: its prompt, its outputs and its measurements.

    Attributes:
      request_id: number of the request since the LLM was created.
      prompt: text of the prompt; None for a prompt of token ids.
      prompt_token_ids: tokens of the prompt.
      outputs: samples in order, or beams, best first; empty if there is an error.
      prompt_logprobs: per token of the prompt, log-probabilities; None for the first.
      metrics: num_prompt_tokens; num_cached_tokens, those among them that were mapped
        and not computed; num_generated_tokens of all outputs; first_step and last_step,
        the first and last step that generated one of its tokens; num_preemptions of its
        sequences; and, in seconds, queue_s, first_token_s, time_per_output_token_s,
        total_s and normalized_latency_s, see `serving.metrics.latencies`.
      error: why there are no outputs.
      events: what happened to the request and when, in order, see
        `serving.metrics.Event`.
    """

    request_id: int | str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: Mapping[str, Any] | None = None
    error: str | None = None
    events: Sequence[Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether all outputs have ended, or there was an error."""
        if self.error is not None:
            return True
        return all(output.finish_reason is not None for output in self.outputs)

    def __repr__(self) -> str:
        """Return the request on one line, with long lists shortened."""
        return _repr(self)


def _repr(record: Any) -> str:
    """Return `Name(field=value, ...)` without fields that are None."""
    fields = [
        f"{field.name}={_short(value)}"
        for field in dataclasses.fields(record)
        if field.repr and (value := getattr(record, field.name)) is not None
    ]
    return f"{type(record).__name__}({', '.join(fields)})"


def _short(value: Any, most: int = 8) -> str:
    """Return the repr of `value`; of a long list its first items and its length."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > most and not isinstance(value[0], CompletionOutput):
            start = ", ".join(repr(item) for item in value[:most])
            return f"[{start}, ... {len(value)} in all]"
        return f"[{', '.join(repr(item) for item in value)}]"
    return repr(value)
