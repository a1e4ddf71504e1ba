"""The output of a request: texts, tokens, log-probabilities and measurements."""

from __future__ import annotations

import dataclasses
import time
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
    # "stop", "length", "abort", "dead_end" or "error"; None while the output grows
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

    def finished(self) -> bool:
        """Whether the output has ended."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        """Return the output on one line, with long lists shortened."""
        return _repr(self)


class RequestMetrics(dict[str, Any]):
    """The measurements of a request: a dict, with vLLM's names as attributes.

    Every key is an attribute too. The attributes `queued_ts`, `scheduled_ts`,
    `first_token_ts` and `last_token_ts` are seconds of the host's clock, that of
    `RequestOutput.events`. `arrival_time`, `first_scheduled_time`, `first_token_time`,
    `last_token_time` and `finished_time` are the same as Unix times. `time_in_queue`
    and `first_token_latency` are seconds. A time whose event was lost is None.

    Args:
      measured: the measurements, see `RequestOutput.metrics`.
      events: the events of the request.
    """

    def __init__(self, measured: Mapping[str, Any], events: Sequence[Any] = ()):
        super().__init__(measured)
        self._at: dict[str, float] = {}
        for event in events:
            self._at.setdefault(event.name, event.time_s)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in _EVENTS_OF_METRICS:
            event, is_unix = _EVENTS_OF_METRICS[name]
            at = self._at.get(event)
            return at if at is None or not is_unix else at + _UNIX_TIME_AT_0
        if name in _METRICS_OF_VLLM:
            return self.get(_METRICS_OF_VLLM[name])
        raise AttributeError(
            f"metrics: expected one of {', '.join([*self, *_EVENTS_OF_METRICS])}, got "
            f"{name!r}"
        )

    def __reduce__(self) -> Any:
        return _restored_metrics, (dict(self), self._at)


def _restored_metrics(measured: dict[str, Any], at: dict[str, float]) -> RequestMetrics:
    found = RequestMetrics(measured)
    found._at = at
    return found


_UNIX_TIME_AT_0 = time.time() - time.perf_counter()
# vLLM's name: the event, and whether the time is a Unix time.
_EVENTS_OF_METRICS = {
    "queued_ts": ("queued", False),
    "scheduled_ts": ("scheduled", False),
    "first_token_ts": ("first_token", False),
    "last_token_ts": ("finished", False),
    "arrival_time": ("queued", True),
    "first_scheduled_time": ("scheduled", True),
    "first_token_time": ("first_token", True),
    "last_token_time": ("finished", True),
    "finished_time": ("finished", True),
}
_METRICS_OF_VLLM = {
    "time_in_queue": "queue_s",
    "first_token_latency": "first_token_s",
    "num_generation_tokens": "num_generated_tokens",
}


@dataclasses.dataclass(frozen=True, repr=False)
class RequestOutput:
    """The result of a request: its prompt, its outputs and its measurements.

    Attributes:
      request_id: number of the request since the LLM was created.
      prompt: text of the prompt; None for a prompt of token ids.
      prompt_token_ids: tokens of the prompt.
      outputs: samples in order, or beams, best first; empty if the request is invalid.
      prompt_logprobs: per token of the prompt, log-probabilities; None for the first.
      metrics: num_prompt_tokens; num_cached_tokens, those among them that were mapped
        and not computed; num_generated_tokens of all outputs; first_step and last_step,
        the first and last step that generated one of its tokens; num_preemptions of its
        sequences; num_dropped_tokens, tokens that retention has dropped of its outputs;
        and, in seconds, queue_s, first_token_s, time_per_output_token_s,
        total_s and normalized_latency_s, see `serving.metrics.latencies`. vLLM's names
        are attributes, see `RequestMetrics`.
      error: why there are no outputs, or why some end with the reason "error": a
        user's algorithm returned an invalid decision, or a logits processor NaN.
      events: what happened to the request and when, in order, see
        `serving.metrics.Event`.
    """

    request_id: int | str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: Any = None  # a mapping
    error: str | None = None
    events: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        """Give the measurements vLLM's names."""
        if self.metrics is not None:
            metrics = RequestMetrics(self.metrics, self.events or ())
            object.__setattr__(self, "metrics", metrics)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were mapped from the cache and not computed."""
        return 0 if self.metrics is None else self.metrics.get("num_cached_tokens", 0)

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


@dataclasses.dataclass(frozen=True, repr=False)
class BeamSearchSequence:
    """A beam, with the fields of vLLM's `beam_search`.

    Attributes:
      tokens: tokens of the prompt and the output, without the EOS or stop token that
        ended it.
      text: text of `tokens`, special tokens included; None without a tokenizer.
      cum_logprob: sum of the log-probabilities of the generated tokens.
      logprobs: log-probability of each generated token, as {token id: Logprob}.
      finish_reason: "stop" or "length".
      stop_reason: the stop token that ended the beam; None for EOS.
      score: see `CompletionOutput.score`.
    """

    tokens: list[int]
    text: str | None
    cum_logprob: float
    logprobs: Logprobs
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None

    def __repr__(self) -> str:
        """Return the beam on one line, with long lists shortened."""
        return _repr(self)


@dataclasses.dataclass(frozen=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


class SearchStep(NamedTuple):
    """Statistics of a tree search at the time when it chose a token."""

    token_ids: np.ndarray  # i32[A], the actions: tokens that may follow
    visits: np.ndarray  # i32[A]
    values: np.ndarray  # f32[A], mean values; 0 without visits


@dataclasses.dataclass(frozen=True, repr=False)
class TreeSearchOutput:
    """The result of `LLM.tree_search` for one prompt.

    Attributes:
      prompt: text of the prompt; None for a prompt of token ids.
      prompt_token_ids: tokens of the prompt.
      outputs: the text whose tokens were chosen, one by one, by their visits; its
        `score` is its value. Empty if there is an error.
      best: the text with the largest value among all complete texts that the search
        has seen; None if it has seen none.
      steps: for each chosen token, the visits and values of the root's actions.
      metrics: num_nodes, texts that were computed, including the prompt;
        num_cached_tokens of the prompt; num_steps of the decoder, of all searches of
        the batch; max_used_blocks, the most blocks that the search used at a time;
        max_blocks_without_sharing, the blocks that its nodes would have used then if
        each had a copy of its text; num_block_copies, of all searches of the batch.
      error: why there are no outputs.
    """

    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    best: CompletionOutput | None
    steps: Sequence[SearchStep]
    metrics: Mapping[str, int]
    error: str | None = None

    def __repr__(self) -> str:
        """Return the output on one line, with long lists shortened."""
        return _repr(self)
