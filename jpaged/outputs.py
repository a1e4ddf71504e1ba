"""What a request returns: its outputs, log-probabilities and measurements."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """One token's log-probability under the raw model, as reported to the user."""

    logprob: float
    rank: int | None = None  # 1 + number of more probable tokens
    decoded_token: str | None = None  # None without a tokenizer


# Per position: the chosen token's and the most probable tokens' log-probabilities.
Logprobs = list[dict[int, Logprob]]


@dataclasses.dataclass(frozen=True, repr=False)
class CompletionOutput:
    """One output of a request: a sample, or a beam."""

    index: int
    token_ids: Sequence[int]  # with the token that ended it
    text: str  # without what ended it; empty without a tokenizer
    cumulative_logprob: float
    logprobs: Logprobs | None = None
    finish_reason: str | None = None  # "stop", "length" or "abort"; None while it runs
    stop_reason: int | str | None = None  # the stop token or string; None for EOS
    score: float | None = None  # beams: cumulative_logprob / length ** length_penalty

    def __repr__(self) -> str:
        """Return the output on one line, with long lists cut."""
        return _repr(self)


@dataclasses.dataclass(frozen=True, repr=False)
class RequestOutput:
    """What a request gave: its prompt, its outputs, what was measured.

    `metrics`: num_prompt_tokens, and of them num_cached_tokens that were not computed
    for it; num_generated_tokens of all outputs; first_step and last_step that gave it a
    token; num_preemptions of its sequences; and the seconds queue_s, first_token_s,
    time_per_output_token_s, total_s and normalized_latency_s, see `metrics.latencies`.
    `events`: what happened to it and when, in order, see `metrics.Event`.
    """

    request_id: int | str
    prompt: str | None  # None for a prompt of token ids
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # [0] is None
    metrics: Mapping[str, Any] | None = None
    error: str | None = None  # why there are no outputs
    events: Sequence[Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: all outputs ended, or there was an error."""
        if self.error is not None:
            return True
        return all(output.finish_reason is not None for output in self.outputs)

    def __repr__(self) -> str:
        """Return the request on one line, with long lists cut."""
        return _repr(self)


def _repr(record: Any) -> str:
    """Return Name(field=value, ...) without fields that are None."""
    fields = [
        f"{field.name}={_short(value)}"
        for field in dataclasses.fields(record)
        if (value := getattr(record, field.name)) is not None
    ]
    return f"{type(record).__name__}({', '.join(fields)})"


def _short(value: Any, most: int = 8) -> str:
    """Return repr of `value`; long lists by their first items and their length."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > most and not isinstance(value[0], CompletionOutput):
            start = ", ".join(repr(item) for item in value[:most])
            return f"[{start}, ... {len(value)} in all]"
        return f"[{', '.join(repr(item) for item in value)}]"
    return repr(value)
