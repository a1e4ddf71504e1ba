"""Batch: the requests of one call, fed into the engine and read back in slices.

Place on the road: llm -> [batch] -> serving -> engine, and tokens -> [batch] -> text.
Host only.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

from jpaged import request_limits, request_table, scheduler
from jpaged.request_limits import Params
from jpaged.requests import (
    BeamSearchParams,
    CompletionOutput,
    Logprob,
    Logprobs,
    RequestOutput,
    SamplingParams,
)
from jpaged.serving import EngineHost, Progress, Tokens
from jpaged.submission import FINISH_REASONS
from jpaged.text import OutputText, Tokenizer

# Slices are as short as what they serve needs: text that someone reads, text that may
# stop, progress and places that become free, Ctrl-C.
STREAM_S = 0.05
STOP_S = 0.1
PROGRESS_S = 0.3
QUIET_S = 5.0
LEAST_STEPS = 4  # of a slice that nobody reads: fewer are not worth the call


class Sample:
    """One output of a request, as far as it has come."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer | None):
        self.job = job
        self.index = index
        self.place = -1
        self.num_read = len(job.prompt_token_ids)  # tokens known here
        self.token_ids: list[int] = []
        self.cumulative_logprob = 0.0
        self.logprobs: Logprobs | None = [] if job.num_logprobs is not None else None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.new_text = ""  # since `take_news`
        self.num_shown = 0  # tokens given to `take_news`
        self.first_step = self.last_step = request_table.NEVER
        self.num_preemptions = 0
        self._tokenizer = tokenizer
        self._text = OutputText(
            tokenizer, job.prompt_token_ids, job.stop, job.min_tokens
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
                self.logprobs.append(_logprobs_at(tokens, i, count, self._tokenizer))
            # The token that ends the sequence is no text.
            is_end = reason == "stop" and i == len(tokens.ids) - 1
            if not (is_end and token in self.job.stop_ids):
                self.new_text += self._text.push(token)
            if self._text.stop_reason is not None:
                self._end("stop", self._text.stop_reason)
                return
        if reason is not None:
            self._end(reason, self._stop_token() if reason == "stop" else None)

    def _end(self, reason: str, stop_reason: int | str | None) -> None:
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

    def take_news(self) -> tuple[str, list[int]]:
        """Text and token ids that came since the last time."""
        text, self.new_text = self.new_text, ""
        token_ids = self.token_ids[self.num_shown :]
        self.num_shown = len(self.token_ids)
        return text, token_ids

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


@dataclasses.dataclass
class Job:
    """A checked request of a call."""

    index: int  # in the call
    arrival: int  # in the LLM's life
    prompt: str | None
    prompt_token_ids: list[int]
    params: Params
    eos_token_ids: Sequence[int]
    is_streamed: bool
    num_places: int  # of its sequences in the request table
    places: list[int] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    start_s: float = 0.0
    first_token_s: float | None = None
    end_s: float | None = None

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
        return request_limits.stop_ids(self.params, self.eos_token_ids)

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
        return all(sample.finish_reason is not None for sample in self.samples)

    def start(
        self,
        places: Sequence[int],
        outputs: Sequence[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Its sequences sit in the request table now, those of its outputs at
        `outputs`."""
        if isinstance(self.params, BeamSearchParams):
            outputs = outputs[: self.params.num_return]
        self.places = list(places)
        self.samples = [Sample(self, i, tokenizer) for i in range(len(outputs))]
        for sample, place in zip(self.samples, outputs, strict=True):
            sample.place = place

    def output(self) -> RequestOutput:
        """What the user gets. Times count from the call, and are those of slices."""
        first_steps = [sample.first_step for sample in self.samples]
        first_token_s = None
        if self.first_token_s is not None:
            first_token_s = self.first_token_s - self.start_s
        end_s = time.perf_counter() if self.end_s is None else self.end_s
        return RequestOutput(
            request_id=self.arrival,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sample.output() for sample in self.samples],
            prompt_logprobs=self.prompt_logprobs,
            metrics={
                "num_prompt_tokens": len(self.prompt_token_ids),
                "num_generated_tokens": sum(
                    len(sample.token_ids) for sample in self.samples
                ),
                "first_step": min(first_steps),
                "last_step": max(sample.last_step for sample in self.samples),
                "num_preemptions": sum(
                    sample.num_preemptions for sample in self.samples
                ),
                "first_token_s": first_token_s,
                "total_s": end_s - self.start_s,
            },
        )


def _logprobs_at(
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


def serve(
    host: EngineHost,
    jobs: Sequence[Job],
    tokenizer: Tokenizer | None,
    *,
    is_watched: bool = False,
) -> Iterator[list[Sample]]:
    """Runs jobs to their end; gives after each slice the samples that have news.

    Jobs wait here, by priority and arrival, until the request table has places for all
    their samples. Whatever ends the iteration, the table is left without them.

    Args:
      host: the engine.
      jobs: checked requests.
      tokenizer: None leaves the text empty.
      is_watched: somebody waits for each job's end, not only for the last one's.
    """
    is_priority = host.config.policy == "priority"
    order = sorted(
        jobs, key=lambda job: (job.params.priority * is_priority, job.arrival)
    )
    waiting = collections.deque(order)
    live: dict[int, Sample] = {}  # by place
    kept: dict[int, list[int]] = {}  # by job: places until all its samples have ended
    start = time.perf_counter()
    for job in jobs:
        job.start_s = start
    epoch = host.enter()
    try:
        while waiting or live:
            if host.epoch != epoch:
                raise RuntimeError(
                    "the engine's state was lost when another call was interrupted, "
                    "and with it the requests of this one; send them again"
                )
            for job in _feed(host, waiting, tokenizer):
                live |= {sample.place: sample for sample in job.samples}
                kept[job.index] = job.places
            if not live:
                raise RuntimeError(
                    "the request table is full of sequences of streams that were not "
                    "read to their end; read or close them, or raise max_num_requests"
                )
            progress = host.run(*_slice(live, is_watched or bool(waiting)))
            news = _read_news(host, live, progress)
            for sample in news:
                if sample.finish_reason is not None:
                    del live[sample.place]
            _rate_prompts(host, news, tokenizer)
            # A place may be taken again only when no sample looks for its leader there.
            done = {s.job.index: s.job for s in news if s.job.is_finished}
            host.release(place for index in done for place in kept.pop(index))
            for job in done.values():
                job.end_s = time.perf_counter()
            yield news
    finally:
        host.leave((place for places in kept.values() for place in places), epoch)


def _rate_prompts(
    host: EngineHost, news: Sequence[Sample], tokenizer: Tokenizer | None
) -> None:
    """Reads the prompts' log-probabilities of the jobs that have ended."""
    jobs = {s.job.index: s.job for s in news if s.job.is_finished}
    jobs = [job for job in jobs.values() if request_limits.rates_prompt(job.params)]
    for job in jobs:
        job.prompt_logprobs = [None]
    # The first token has none, and a prompt may have no other.
    jobs = [job for job in jobs if len(job.prompt_token_ids) > 1]
    wanted = [(job.places[0], 1, len(job.prompt_token_ids)) for job in jobs]
    for job, tokens in zip(jobs, host.read(wanted), strict=True):
        count = job.params.prompt_logprobs
        job.prompt_logprobs += [
            _logprobs_at(tokens, i, count, tokenizer) for i in range(len(tokens.ids))
        ]


def _feed(
    host: EngineHost, waiting: collections.deque[Job], tokenizer: Tokenizer | None
) -> list[Job]:
    """The first waiting jobs, as many as the table has places for; submitted."""
    num_empty, jobs = host.num_empty, []
    while waiting and waiting[0].num_places <= num_empty:
        if not host.has_room([*jobs, waiting[0]]):
            break
        num_empty -= waiting[0].num_places
        jobs.append(waiting.popleft())
    if jobs:
        for job, placed in zip(jobs, host.submit(jobs), strict=True):
            job.start(*placed, tokenizer)
    return jobs


def _slice(live: dict[int, Sample], is_watched: bool) -> tuple[float, int]:
    """Seconds, and least steps, that the device may run before the host looks again."""
    if any(sample.job.is_streamed for sample in live.values()):
        return STREAM_S, 1
    if any(sample.job.is_watched for sample in live.values()):
        return STOP_S, LEAST_STEPS
    return PROGRESS_S if is_watched else QUIET_S, LEAST_STEPS


def _read_news(
    host: EngineHost, live: dict[int, Sample], progress: Progress
) -> list[Sample]:
    """The samples that have ended, and the watched ones with new tokens; read."""
    now = time.perf_counter()
    news, wanted = [], []
    for place, sample in live.items():
        end, job = int(progress.num_tokens[place]), sample.job
        has_ended = progress.status[place] == scheduler.FINISHED
        num_known = progress.num_tokens[job.places[0]]
        if job.first_token_s is None and num_known > len(job.prompt_token_ids):
            job.first_token_s = now
        if has_ended or (job.is_watched and end > sample.num_read):
            news.append(sample)
            wanted.append((place, sample.num_read, end))
    stopped = []
    for sample, tokens, (place, _, end) in zip(
        news, host.read(wanted), wanted, strict=True
    ):
        sample.num_read = end
        sample.first_step = int(progress.first_steps[place])
        sample.last_step = int(progress.last_steps[place])
        row = (
            place
            if isinstance(sample.job.params, SamplingParams)
            else (sample.job.places[0])
        )
        sample.num_preemptions = int(progress.num_preemptions[row])
        has_ended = progress.status[place] == scheduler.FINISHED
        reason = FINISH_REASONS[progress.finish_reasons[place]] if has_ended else None
        sample.take(tokens, reason)
        if sample.finish_reason is not None and not has_ended:
            stopped.append(place)
    host.finish(stopped, request_table.STOP)
    return news
