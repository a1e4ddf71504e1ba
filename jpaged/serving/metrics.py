"""Metrics: the events of requests and steps, and the latencies computed from them.

Pipeline: engine host -> [metrics] -> user. Host only. Times are seconds of the host's
clock, `time.perf_counter`.

One device call runs a slice of several steps. The step of each event is exact. Its time
is interpolated between the start and the end of the call, as if all steps of the slice
took equally long. The error is therefore less than the length of the slice, which is
0.05 to 0.3 s while a caller reads a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# The metrics of requests whose means `LLM.stats` reports.
LATENCIES = (
    "queue_s",
    "first_token_s",
    "time_per_output_token_s",
    "total_s",
    "normalized_latency_s",
)


class Event(NamedTuple):
    """An event in the life of a request.

    Attributes:
      name: "queued": the request was submitted. "scheduled": one of its sequences got a
        batch row, for the first time or again. "preempted": a sequence lost its batch
        row and its blocks. "swapped": a sequence lost its batch row, and its blocks
        moved to the host pool. "first_token": the request has its first token.
        "finished": its last output ended, by itself or by an abort.
      time_s: seconds of the host's clock.
      step: step of the engine; for an event between two steps, the later one.
    """

    name: str
    time_s: float
    step: int


class StepRecord(NamedTuple):
    """One step of the engine, as `LLM.timeline` returns it.

    Blocks and slots include those that the step's own tokens fill.
    """

    step: int
    time_s: float  # end of the step
    num_used_blocks: int
    num_token_states: int  # slots of used blocks with a token's keys and values
    num_reserved_slots: int  # slots of used blocks that are still empty
    num_saved_blocks: int  # further blocks that would be needed without sharing
    num_waiting: int  # sequences in the request table without a batch row
    num_running: int  # sequences with a batch row
    num_tokens: int  # tokens that the decoder computed
    num_generated: int  # tokens that decoding produced


def request_events(sequence_events: Iterable[Event]) -> list[Event]:
    """Return the events of a request from those of its sequences, in order.

    Equal events of several sequences in one step become one event. The request's
    "first_token" is that of its first sequence, its "finished" that of its last.

    >>> first, last = Event("finished", 1.0, 2), Event("finished", 3.0, 7)
    >>> request_events([Event("queued", 0.0, 0), first, last, last]) == [
    ...     Event("queued", 0.0, 0), last]
    True
    """
    events = list(dict.fromkeys(sequence_events))
    first = next((event for event in events if event.name == "first_token"), None)
    ends = [event for event in events if event.name == "finished"]
    return [
        event
        for event in events
        if event.name not in ("first_token", "finished")
        or event is first
        or event is ends[-1]
    ]


def latencies(events: Sequence[Event], num_tokens: int) -> dict[str, float | None]:
    """Return the latencies of a request in seconds.

    queue_s: from "queued" to the first "scheduled".
    first_token_s: from "queued" to "first_token", time to first token (TTFT).
    total_s: from "queued" to "finished", end-to-end latency.
    time_per_output_token_s: (total_s - first_token_s) / (num_tokens - 1), the mean time
      between tokens (TPOT).
    normalized_latency_s: total_s / num_tokens.

    A latency is None if it cannot be measured: the request has no token, only one
    token, or the host lost the event.

    Args:
      events: events of the request, see `request_events`.
      num_tokens: tokens of its longest output, because outputs are generated in
        parallel.

    Source: paper section 6.1, normalized latency. The other definitions are those of
    serving benchmarks.
    """
    at: dict[str, float] = {}
    for event in events:
        at.setdefault(event.name, event.time_s)

    def since_queued(name: str) -> float | None:
        return at[name] - at["queued"] if name in at else None

    first, total = since_queued("first_token"), since_queued("finished")
    between = normalized = None
    if total is not None and num_tokens > 0:
        normalized = total / num_tokens
        if first is not None and num_tokens > 1:
            between = (total - first) / (num_tokens - 1)
    return dict(
        queue_s=since_queued("scheduled"),
        first_token_s=first,
        time_per_output_token_s=between,
        total_s=total,
        normalized_latency_s=normalized,
    )


class MeanLatencies:
    """Mean latencies of the requests that ended by themselves."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._sums = dict.fromkeys(LATENCIES, 0.0)
        self._counts = dict.fromkeys(LATENCIES, 0)

    def add(self, found: dict[str, float | None]) -> None:
        """Include a request, with its latencies as `latencies` returns them."""
        self.num_requests += 1
        for name in LATENCIES:
            value = found[name]
            if value is not None:
                self._sums[name] += value
                self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """Return the means, named `mean_NAME`; 0 if there was no measurement."""
        return {
            f"mean_{name}": total / max(self._counts[name], 1)
            for name, total in self._sums.items()
        }
