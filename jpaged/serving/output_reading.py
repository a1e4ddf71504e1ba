"""Output reading: new tokens and log-probabilities, from the engine to the outputs.

Pipeline: engine host -> [output reading] -> request state. Host only.
"""

from __future__ import annotations

from collections.abc import Sequence

from jpaged import scheduler
from jpaged.engine import FINISH_REASONS, limits
from jpaged.params import SamplingParams
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.readout import SequenceProgress, TokenSpan
from jpaged.serving.request_state import OutputState, RequestState, logprobs_at


def has_update(output: OutputState, progress: SequenceProgress) -> bool:
    """Whether an output has ended, or is watched and has new tokens."""
    seq_index = output.seq_index
    if progress.status[seq_index] == scheduler.FINISHED:
        return True
    return (
        output.request.is_watched and progress.num_tokens[seq_index] > output.num_read
    )


def read_outputs(
    host: EngineHost, outputs: Sequence[OutputState], progress: SequenceProgress
) -> list[OutputState]:
    """Append new tokens to outputs.

    Args:
      host: the engine.
      outputs: outputs that have not ended.
      progress: progress of all sequences.

    Returns:
      The outputs that a stop string ended; the engine still runs their sequences.
    """
    ends = [int(progress.num_tokens[output.seq_index]) for output in outputs]
    spans = [
        TokenSpan(output.seq_index, output.num_read, end)
        for output, end in zip(outputs, ends, strict=True)
    ]
    stopped = []
    for output, end, tokens in zip(outputs, ends, host.read_tokens(spans), strict=True):
        seq_index, request = output.seq_index, output.request
        output.num_read = end
        output.first_step = int(progress.first_steps[seq_index])
        output.last_step = int(progress.last_steps[seq_index])
        # All rows of an algorithm are preempted together; its first row counts.
        first = request.seq_indices[0]
        is_sampled = isinstance(request.params, SamplingParams)
        counted = seq_index if is_sampled else first
        output.num_preemptions = int(progress.num_preemptions[counted])
        if progress.num_dropped is not None:
            output.num_dropped_tokens = int(progress.num_dropped[counted])
        request.num_cached_tokens = int(progress.num_cached[first])
        has_ended = progress.status[seq_index] == scheduler.FINISHED
        code = progress.finish_reasons[seq_index]
        output.append(tokens, FINISH_REASONS[code] if has_ended else None)
        if output.finish_reason is not None and not has_ended:
            stopped.append(output)
    return stopped


def read_token_masks(host: EngineHost, requests: Sequence[RequestState]) -> None:
    """Read which tokens could be sampled, for requests that have ended."""
    for request in requests:
        if isinstance(request.params, SamplingParams) and request.params.token_masks:
            start = len(request.prompt_token_ids)
            for output in request.outputs:
                end = start + len(output.token_ids)
                span = TokenSpan(output.seq_index, start, end)
                output.token_masks = host.read_masks(span)


def read_prompt_logprobs(host: EngineHost, requests: Sequence[RequestState]) -> None:
    """Read the prompt log-probabilities of requests that have ended."""
    requests = [each for each in requests if limits.keeps_prompt_logprobs(each.params)]
    for request in requests:
        request.prompt_logprobs = [None]  # the first token has none
    requests = [each for each in requests if len(each.prompt_token_ids) > 1]
    spans = [
        TokenSpan(each.seq_indices[0], 1, len(each.prompt_token_ids))
        for each in requests
    ]
    for request, tokens in zip(requests, host.read_tokens(spans), strict=True):
        assert isinstance(request.params, SamplingParams)
        count = request.params.prompt_logprobs
        assert count is not None
        entries = [
            logprobs_at(tokens, i, count, request.tokenizer)
            for i in range(len(tokens.ids))
        ]
        request.prompt_logprobs = [None, *entries]
