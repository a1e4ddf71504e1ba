"""Request state: a checked request on the host, and its outputs so far.

Pipeline: intake -> [request state] -> batcher, and tokens -> [request state] -> text.
Host only.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jpaged.engine import limits, request_table
from jpaged.engine.limits import Params
from jpaged.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams
from jpaged.serving import metrics
from jpaged.serving.metrics import Event
from jpaged.serving.readout import SequenceTokens
from jpaged.text.output_text import OutputText
from jpaged.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one output of a request gained since its last delta.

    Attributes:
      request: index of the prompt in the call; for a live request, its request_id.
      sample: index of the output, 0 to n - 1.
      text: new text.
      token_ids: new tokens.
      finish_reason: "stop", "length", "abort", "dead_end" or "error" in the
        output's last delta, None before.
      stop_reason: the stop token or stop string that ended the output; None for EOS.
      logprobs: log-probabilities at each of token_ids, if they were asked for.
    """

    request: int
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None


class OutputState:
    """One output of a request so far: a sample, a beam, or a row of an algorithm."""

    def __init__(self, request: RequestState, index: int):
        self.request = request
        self.index = index
        self.seq_index = -1
        # Tokens that the host has read, prompt included.
        self.num_read = len(request.prompt_token_ids)
        self.token_ids: list[int] = []
        self.cumulative_logprob = 0.0
        self._is_beam = isinstance(request.params, BeamSearchParams)
        has_logprobs = self._is_beam or request.num_logprobs is not None
        self.logprobs: Logprobs | None = [] if has_logprobs else None
        self.token_logprobs: list[float] = []
        self.token_masks: np.ndarray | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.new_text = ""  # since the last `take_delta`
        self.num_shown = 0  # tokens in the deltas so far
        self.is_end_shown = False
        self.first_step = self.last_step = request_table.NEVER
        self.num_preemptions = 0
        self._text = OutputText(
            request.tokenizer,
            request.prompt_token_ids,
            request.stop,
            request.min_tokens,
            **request.text_options,
        )

    def append(self, tokens: SequenceTokens, finish_reason: str | None) -> None:
        """Append new tokens; tokens after a stop string are dropped.

        Args:
          tokens: tokens that the engine generated.
          finish_reason: why the engine ended the sequence after them, or None.
        """
        for i, token in enumerate(tokens.ids):
            self.token_ids.append(token)
            self.cumulative_logprob += float(tokens.logprobs[i])
            self.token_logprobs.append(float(tokens.logprobs[i]))
            if self.logprobs is not None:
                count = None if self._is_beam else self.request.num_logprobs
                self.logprobs.append(
                    logprobs_at(tokens, i, count, self.request.tokenizer)
                )
            # The token that ends the sequence has no text, unless it is asked for.
            is_last = finish_reason == "stop" and i == len(tokens.ids) - 1
            is_end = is_last and token in self.request.stop_ids
            if not is_end or self.request.includes_stop:
                self.new_text += self._text.push(token)
            if self._text.stop_reason is not None:
                self.finish("stop", self._text.stop_reason)
                return
        if finish_reason is not None:
            is_stopped = finish_reason == "stop"
            self.finish(finish_reason, self._stop_token() if is_stopped else None)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End the output; text that was held back becomes part of it."""
        self.new_text += self._text.finish()
        # The last bytes can complete a stop string.
        if self._text.stop_reason is not None:
            reason, stop_reason = "stop", self._text.stop_reason
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _stop_token(self) -> int | None:
        """The stop token that ended the output; None if it was the model's EOS."""
        token, params = self.token_ids[-1], self.request.params
        is_eos = token in self.request.eos_token_ids and not params.ignore_eos
        return token if token in self.request.stop_ids and not is_eos else None

    @property
    def has_delta(self) -> bool:
        """Whether there are tokens or an end that no delta has shown."""
        is_end_new = self.finish_reason is not None and not self.is_end_shown
        return is_end_new or len(self.token_ids) > self.num_shown

    def take_delta(self) -> Delta:
        """Return what is new since the last call."""
        text, self.new_text = self.new_text, ""
        token_ids = self.token_ids[self.num_shown :]
        logprobs = None
        if self.logprobs is not None:
            logprobs = self.logprobs[self.num_shown :]
        self.num_shown = len(self.token_ids)
        reasons = self.finish_reason, self.stop_reason
        self.is_end_shown = self.finish_reason is not None
        return Delta(
            self.request.index, self.index, text, token_ids, *reasons, logprobs
        )

    def completion(self) -> CompletionOutput:
        """Return the output as users get it."""
        return CompletionOutput(
            index=self.index,
            token_ids=self.token_ids,
            text=self._text.text,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs,
            token_logprobs=np.asarray(self.token_logprobs, np.float32),
            token_masks=self.token_masks,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            score=self._score(),
        )

    def _score(self) -> float | None:
        """The score by which beams are ranked, see `BeamSearchParams`."""
        params = self.request.params
        if not isinstance(params, BeamSearchParams) or not self.token_ids:
            return None
        length = len(self.token_ids)
        return self.cumulative_logprob / length**params.length_penalty


class RequestUpdate(NamedTuple):
    """What the caller of a request learns after a slice."""

    request: RequestState
    deltas: list[Delta]
    is_finished: bool  # all outputs have ended, or `request.error` is set


@dataclasses.dataclass(eq=False)
class RequestState:
    """A checked request, from its submission to its output.

    Attributes:
      index: value of `Delta.request` in its deltas.
      arrival: number of the request since the LLM was created.
      prompt: text of the prompt; None for a prompt of token ids.
      prompt_token_ids: tokens of the prompt.
      params: parameters, with token ids in place of text.
      eos_token_ids: the model's EOS tokens.
      tokenizer: the model's tokenizer; None leaves the text of outputs empty.
      table_size: number of its sequences in the request table.
      num_outputs: number of outputs to return.
      inbox: updates for the caller, who may share it among several requests.
      is_streamed: whether a caller reads the outputs while they grow.
      is_awaited: whether a caller waits for the end of this request in particular,
        not only for the last one of a call.
      seq_indices: indices of its sequences in the request table, once submitted.
      outputs: its outputs, once submitted.
      prompt_logprobs: log-probabilities of the prompt's tokens, if requested.
      sequence_events: events of all its sequences.
      num_cached_tokens: tokens of the prompt that were mapped and not computed.
      error: why the request could not continue.
    """

    index: int
    arrival: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: Params
    eos_token_ids: Sequence[int]
    tokenizer: Tokenizer | None
    table_size: int
    num_outputs: int
    inbox: collections.deque[RequestUpdate]
    is_streamed: bool = False
    is_awaited: bool = False
    seq_indices: list[int] = dataclasses.field(default_factory=list)
    outputs: list[OutputState] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    sequence_events: list[Event] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0
    error: Exception | None = None

    @property
    def submitted_s(self) -> float:
        """When it was submitted, on the host's clock."""
        return self.sequence_events[0].time_s if self.sequence_events else 0.0

    @property
    def stop(self) -> Sequence[str]:
        """Strings that end an output."""
        return getattr(self.params, "stop", ())

    @property
    def includes_stop(self) -> bool:
        """Whether the text includes the stop string or token that ended it."""
        params = self.params
        return isinstance(params, SamplingParams) and params.include_stop_str_in_output

    @property
    def text_options(self) -> dict[str, bool]:
        """The options of `OutputText` that parameters set."""
        params = self.params
        if not isinstance(params, SamplingParams):
            return {}
        return {
            "include_stop": params.include_stop_str_in_output,
            "skip_special_tokens": params.skip_special_tokens,
            "spaces_between_special_tokens": params.spaces_between_special_tokens,
        }

    @property
    def min_tokens(self) -> int:
        """Number of tokens before which no stop string ends an output."""
        params = self.params
        return params.min_tokens if isinstance(params, SamplingParams) else 0

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an output, EOS included unless it is ignored."""
        return limits.stop_ids(self.params, self.eos_token_ids)

    @property
    def num_logprobs(self) -> int | None:
        """Most probable tokens to report per position; None reports nothing."""
        return getattr(self.params, "logprobs", None)

    @property
    def is_watched(self) -> bool:
        """Whether the host reads the outputs after every slice.

        The outputs of an algorithm whose rows can continue each other, beams included,
        are unknown before its end.
        """
        return self.has_own_rows and (self.is_streamed or bool(self.stop))

    @property
    def has_own_rows(self) -> bool:
        """Whether the tokens of an output never change."""
        params = self.params
        if isinstance(params, AlgorithmParams):
            return getattr(params.algorithm, "keeps_rows", False)
        return isinstance(params, SamplingParams)

    @property
    def is_finished(self) -> bool:
        """Whether all outputs have ended."""
        ends = [output.finish_reason is not None for output in self.outputs]
        return bool(ends) and all(ends)

    def create_outputs(self) -> None:
        """Create its outputs, which are empty."""
        self.outputs = [OutputState(self, i) for i in range(self.num_outputs)]

    def enter_table(
        self, seq_indices: Sequence[int], output_indices: Sequence[int]
    ) -> None:
        """Note where its sequences are in the request table.

        Args:
          seq_indices: indices of all its sequences.
          output_indices: indices of the sequences that are its outputs, best first.
        """
        self.create_outputs()
        self.seq_indices = list(seq_indices)
        for output, seq_index in zip(self.outputs, output_indices, strict=False):
            output.seq_index = seq_index

    def latencies(self) -> dict[str, float | None]:
        """Return its latencies, see `metrics.latencies`."""
        longest = max((len(output.token_ids) for output in self.outputs), default=0)
        events = metrics.request_events(self.sequence_events)
        return metrics.latencies(events, longest)

    def request_output(self) -> RequestOutput:
        """Return the request's output as users get it."""
        outputs = self.outputs
        first_steps = [output.first_step for output in outputs]
        first_steps = [step for step in first_steps if step != request_table.NEVER]
        return RequestOutput(
            request_id=self.arrival,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[output.completion() for output in outputs],
            prompt_logprobs=self.prompt_logprobs,
            metrics={
                "num_prompt_tokens": len(self.prompt_token_ids),
                "num_cached_tokens": self.num_cached_tokens,
                "num_generated_tokens": sum(len(each.token_ids) for each in outputs),
                "first_step": min(first_steps, default=request_table.NEVER),
                "last_step": max(each.last_step for each in outputs),
                "num_preemptions": sum(each.num_preemptions for each in outputs),
                **self.latencies(),
            },
            error=self._fault(),
            events=metrics.request_events(self.sequence_events),
        )

    def _fault(self) -> str | None:
        """Why outputs ended with the reason "error"; None if none did."""
        ends = [len(o.token_ids) for o in self.outputs if o.finish_reason == "error"]
        if not ends:
            return None
        found = f"of a token after {min(ends)} generated tokens"
        if isinstance(self.params, AlgorithmParams):
            return (
                "algorithm: expected a Decision with tokens of the vocabulary (or "
                "NO_TOKEN), parents from 0 to Q - 1, and processed logits without NaN, "
                f"got another one instead {found}; the outputs end there"
            )
        return (
            "logits_processors: expected finite logits or -inf, got NaN or +inf "
            f"instead {found}; the outputs end there"
        )


def logprobs_at(
    tokens: SequenceTokens, i: int, count: int | None, tokenizer: Tokenizer | None
) -> dict[int, Logprob]:
    """Return the log-probabilities to report for one position.

    Args:
      tokens: tokens of a sequence, with what the engine keeps of each position.
      i: index into `tokens`.
      count: number of most probable tokens to report; -1 reports all that are kept.
        None reports the token alone, without its rank, which may not be kept.
      tokenizer: decodes the tokens; None leaves their text out.

    Returns:
      The sampled token's entry, followed by those of the most probable tokens.
    """
    decode = tokenizer and tokenizer.decoded_token
    if count is None:
        token = tokens.ids[i]
        text = decode and decode(token)
        return {token: Logprob(float(tokens.logprobs[i]), None, text)}
    found = [(tokens.ids[i], tokens.logprobs[i], tokens.ranks[i])]
    most_likely = zip(tokens.top_ids[i], tokens.top_logprobs[i], strict=True)
    chosen = itertools.islice(most_likely, count if count >= 0 else None)
    for rank, (token, logprob) in enumerate(chosen, start=1):
        if int(token) != tokens.ids[i]:
            found.append((int(token), logprob, rank))
    return {
        token: Logprob(float(logprob), int(rank), decode and decode(token))
        for token, logprob, rank in found
    }
