"""Jobs: checked requests, and their outputs as far as they have come.

Place on the road: llm -> [jobs] -> batch, and tokens -> [jobs] -> text. Host only.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from jpaged.engine import limits, request_table
from jpaged.engine.limits import Params
from jpaged.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import metrics
from jpaged.serving.metrics import Event
from jpaged.serving.readout import Tokens
from jpaged.text.tokenizer import OutputText, Tokenizer


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one output of a request gained."""

    request: int  # the prompt's place in the call; of a live request, its request_id
    sample: int  # 0 to n - 1
    text: str
    token_ids: list[int]
    # "stop", "length", "abort" or "dead_end" in the output's last delta
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Sample:
    """One output of a request, as far as it has come."""

    def __init__(self, job: Job, index: int):
        self.job = job
        self.index = index
        self.seq_index = -1
        self.num_read = len(job.prompt_token_ids)  # tokens known here
        self.token_ids: list[int] = []
        self.cumulative_logprob = 0.0
        self.logprobs: Logprobs | None = [] if job.num_logprobs is not None else None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.new_text = ""  # since `take_delta`
        self.num_shown = 0  # tokens that `take_delta` gave
        self.is_end_shown = False
        self.first_step = self.last_step = request_table.NEVER
        self.num_preemptions = 0
        self._text = OutputText(
            job.tokenizer, job.prompt_token_ids, job.stop, job.min_tokens
        )

    def take(self, tokens: Tokens, reason: str | None) -> None:
        """Goes on by `tokens`; `reason` is why the engine ended behind them, or None.

        Tokens behind a stop string are not the output's.
        """
        for i, token in enumerate(tokens.ids):
            self.token_ids.append(token)
            self.cumulative_logprob += float(tokens.logprobs[i])
            if self.logprobs is not None:
                count = self.job.num_logprobs or 0
                self.logprobs.append(logprobs_at(tokens, i, count, self.job.tokenizer))
            # The token that ends the sequence is no text.
            is_end = reason == "stop" and i == len(tokens.ids) - 1
            if not (is_end and token in self.job.stop_ids):
                self.new_text += self._text.push(token)
            if self._text.stop_reason is not None:
                self.end("stop", self._text.stop_reason)
                return
        if reason is not None:
            self.end(reason, self._stop_token() if reason == "stop" else None)

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Nothing more will come; text that was held back is the output's now."""
        self.new_text += self._text.finish()
        # The last bytes may have become a stop string in the end.
        if self._text.stop_reason is not None:
            reason, stop_reason = "stop", self._text.stop_reason
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _stop_token(self) -> int | None:
        """The stop token that came last; None where it was the model's EOS."""
        token, params = self.token_ids[-1], self.job.params
        is_eos = token in self.job.eos_token_ids and not params.ignore_eos
        return token if token in self.job.stop_ids and not is_eos else None

    @property
    def has_news(self) -> bool:
        """Whether `take_delta` has something to tell."""
        is_end_new = self.finish_reason is not None and not self.is_end_shown
        return is_end_new or len(self.token_ids) > self.num_shown

    def take_delta(self) -> Delta:
        """What came since the last time."""
        text, self.new_text = self.new_text, ""
        token_ids = self.token_ids[self.num_shown :]
        self.num_shown = len(self.token_ids)
        reasons = self.finish_reason, self.stop_reason
        self.is_end_shown = self.finish_reason is not None
        return Delta(self.job.index, self.index, text, token_ids, *reasons)

    def output(self) -> CompletionOutput:
        """What the user gets."""
        return CompletionOutput(
            index=self.index,
            token_ids=self.token_ids,
            text=self._text.text,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            score=self._score(),
        )

    def _score(self) -> float | None:
        """What beams compete with: see `BeamSearchParams`."""
        params = self.job.params
        if not isinstance(params, BeamSearchParams) or not self.token_ids:
            return None
        length = len(self.token_ids)
        return self.cumulative_logprob / length**params.length_penalty


class News(NamedTuple):
    """What a job's caller learns after a slice."""

    job: Job
    deltas: list[Delta]
    is_over: bool  # nothing more will come: all outputs ended, or `job.error` is set


@dataclasses.dataclass(eq=False)
class Job:
    """A checked request."""

    index: int  # what its deltas call it
    arrival: int  # in the LLM's life
    prompt: str | None
    prompt_token_ids: list[int]
    params: Params
    eos_token_ids: Sequence[int]
    tokenizer: Tokenizer | None  # None leaves the text empty
    table_size: int  # of its sequences in the request table
    num_outputs: int
    inbox: collections.deque[News]  # of its caller, who may have more jobs
    is_streamed: bool = False  # somebody reads it as it comes
    is_awaited: bool = False  # somebody waits for this job's end, not only the last's
    seq_indices: list[int] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    happened: list[Event] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0  # of its prompt, that were mapped from others
    error: Exception | None = None  # why it could not go on

    @property
    def stop(self) -> Sequence[str]:
        """Strings that end an output."""
        return self.params.stop if isinstance(self.params, SamplingParams) else ()

    @property
    def min_tokens(self) -> int:
        """Tokens before which no stop string ends an output."""
        is_sampled = isinstance(self.params, SamplingParams)
        return self.params.min_tokens if is_sampled else 0

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an output."""
        return limits.stop_ids(self.params, self.eos_token_ids)

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report with each token; None: no log-probabilities."""
        is_sampled = isinstance(self.params, SamplingParams)
        return self.params.logprobs if is_sampled else None

    @property
    def is_watched(self) -> bool:
        """Whether its text matters while it runs.

        The outputs of an algorithm are not known before it ends.
        """
        is_sampled = isinstance(self.params, SamplingParams)
        return is_sampled and (self.is_streamed or bool(self.stop))

    @property
    def is_finished(self) -> bool:
        """Whether all outputs have ended."""
        ends = [sample.finish_reason is not None for sample in self.samples]
        return bool(ends) and all(ends)

    def begin(self) -> None:
        """Makes its outputs, of which nothing is known yet."""
        self.samples = [Sample(self, i) for i in range(self.num_outputs)]

    def start(self, seq_indices: Sequence[int], outputs: Sequence[int]) -> None:
        """Its sequences sit in the request table now, at `seq_indices`.

        Those of its outputs, the best first, sit at `outputs`.
        """
        self.begin()
        self.seq_indices = list(seq_indices)
        for sample, seq_index in zip(self.samples, outputs, strict=False):
            sample.seq_index = seq_index

    def latencies(self) -> dict[str, float | None]:
        """See `metrics.latencies`."""
        longest = max((len(sample.token_ids) for sample in self.samples), default=0)
        return metrics.latencies(metrics.request_events(self.happened), longest)

    def output(self) -> RequestOutput:
        """What the user gets."""
        samples = self.samples
        first_steps = [one.first_step for one in samples]
        first_steps = [step for step in first_steps if step != request_table.NEVER]
        return RequestOutput(
            request_id=self.arrival,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sample.output() for sample in samples],
            prompt_logprobs=self.prompt_logprobs,
            metrics={
                "num_prompt_tokens": len(self.prompt_token_ids),
                "num_cached_tokens": self.num_cached_tokens,
                "num_generated_tokens": sum(len(one.token_ids) for one in samples),
                "first_step": min(first_steps, default=request_table.NEVER),
                "last_step": max(one.last_step for one in samples),
                "num_preemptions": sum(one.num_preemptions for one in samples),
                **self.latencies(),
            },
            events=metrics.request_events(self.happened),
        )


def logprobs_at(
    tokens: Tokens, i: int, count: int, tokenizer: Tokenizer | None
) -> dict[int, Logprob]:
    """The entry of token number i, then those of the `count` most likely ones.

    All that are kept where `count` is -1.
    """
    found = [(tokens.ids[i], tokens.logprobs[i], tokens.ranks[i])]
    most_likely = zip(tokens.top_ids[i], tokens.top_logprobs[i], strict=True)
    chosen = itertools.islice(most_likely, count if count >= 0 else None)
    for rank, (token, logprob) in enumerate(chosen, start=1):
        if int(token) != tokens.ids[i]:
            found.append((int(token), logprob, rank))
    decode = tokenizer and tokenizer.decoded_token
    return {
        token: Logprob(float(logprob), int(rank), decode and decode(token))
        for token, logprob, rank in found
    }
