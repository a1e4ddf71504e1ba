"""Metrics: what happened to a request, and how long it took.

Place on the road: serving -> [metrics] -> user. Host only. Times are seconds of the
host's clock, `time.perf_counter`.

A slice of steps is one device call. Which step did what is known exactly, and the
step's time is interpolated between the begin and the end of its call, as if all steps
of a slice took equally long. So a time is wrong by less than its slice, which is about
0.05 s while somebody reads a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Of a request's metrics those whose means `LLM.stats` gives.
LATENCIES = (
    "queue_s",
    "first_token_s",
    "time_per_output_token_s",
    "total_s",
    "normalized_latency_s",
)


class Event(NamedTuple):
    """Something that happened to a request."""

    # "queued": it was handed in; "scheduled": one of its sequences got a row, for the
    # first time or again; "preempted": one lost its row and blocks; "swapped": one lost
    # its row, and its blocks went to the host's memory; "first_token"; "finished": its
    # last output ended, by itself or by an abort.
    name: str
    time_s: float  # of the host's clock
    step: int  # of the engine; of what happens between steps, the next one


class StepRecord(NamedTuple):
    """A step of the engine, as `LLM.timeline` gives it; blocks are with its tokens."""

    step: int
    time_s: float  # of its end
    num_used_blocks: int
    num_token_states: int  # slots of used blocks that hold a token's keys and values
    num_reserved_slots: int  # slots of used blocks that hold none yet
    num_saved_blocks: int  # blocks that would be needed besides, without sharing
    num_waiting: int  # sequences in the request table without a row
    num_running: int  # sequences with a row
    num_tokens: int  # that the decoder computed
    num_generated: int  # that decoding gave


def request_events(happened: Iterable[Event]) -> list[Event]:
    """What happened to a request, from what happened to its sequences, in order.

    What happened to several of them in one step is one event. There is one
    "first_token", the first sequence's, and one "finished", the last one's.

    >>> first, last = Event("finished", 1.0, 2), Event("finished", 3.0, 7)
    >>> request_events([Event("queued", 0.0, 0), first, last, last]) == [
    ...     Event("queued", 0.0, 0), last]
    True
    """
    events = list(dict.fromkeys(happened))
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
    """How long a request took, from its events.

    queue_s: from "queued" to the first "scheduled".
    first_token_s: from "queued" to "first_token", time to first token.
    total_s: from "queued" to "finished", end-to-end latency.
    time_per_output_token_s: (total_s - first_token_s) / (num_tokens - 1), the mean time
      between tokens.
    normalized_latency_s: total_s / num_tokens.

    Each is None where there is nothing to measure it by: no token, one token, or an
    event that was lost.

    Args:
      events: of the request, see `request_events`.
      num_tokens: of its longest output; outputs are generated side by side.

    Source: paper section 6.1, normalized latency; the others as serving benchmarks
    have them (TTFT, TPOT).
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


class Means:
    """Mean latencies of the requests that ended by themselves."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._sums = dict.fromkeys(LATENCIES, 0.0)
        self._counts = dict.fromkeys(LATENCIES, 0)

    def add(self, found: dict[str, float | None]) -> None:
        """Counts a request in, by what `latencies` gave."""
        self.num_requests += 1
        for name in LATENCIES:
            value = found[name]
            if value is not None:
                self._sums[name] += value
                self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """`mean_` and each name of LATENCIES; 0 where nothing was measured."""
        return {
            f"mean_{name}": total / max(self._counts[name], 1)
            for name, total in self._sums.items()
        }


def engine_stats(counters: Mapping[str, Any]) -> dict[str, int | float]:
    """What `LLM.stats` says of an engine's counters, or of the sums of several's."""
    num_steps = max(counters["num_steps"], 1)
    return {
        "max_used_blocks": counters["max_used_blocks"],
        "kv_token_share": counters["token_share"] / num_steps,
        "blocks_saved_by_sharing": counters["saved_share"] / num_steps,
        "prefix_hit_ratio": counters["num_cached_tokens"]
        / max(counters["num_prompt_tokens"], 1),
        "num_block_copies": counters["num_block_copies"],
        "num_preemptions": counters["num_preemptions"],
        "num_swapped_blocks": counters["num_swapped_blocks"],
        "draft_tokens": counters["num_drafts"],
        "accepted_tokens": counters["num_accepted"],
        "acceptance_rate": counters["num_accepted"] / max(counters["num_drafts"], 1),
        "num_steps": counters["num_steps"],
        "computed_tokens": counters["num_tokens"],
    }


class Slice(NamedTuple):
    """Steps that one device call ran, from `first` up to `last`, and its times."""

    first: int
    last: int
    start_s: float
    end_s: float

    def begin_of(self, step: Any) -> Any:
        """When a step began, all being equally long; a number or an array of them."""
        share = (step - self.first) / (self.last - self.first)
        return self.start_s + share * (self.end_s - self.start_s)

    def end_of(self, step: Any) -> Any:
        """When a step of the slice ended."""
        return self.begin_of(step + 1)


def step_records(
    rows: np.ndarray, ends_s: np.ndarray, block_size: int
) -> list[StepRecord]:
    """Records of steps.

    Args:
      rows: i32[n, C], columns of `timeline.StepRow`.
      ends_s: f64[n], when the steps ended.
      block_size: tokens per block.
    """
    return [
        StepRecord(step, time_s, used, held, used * block_size - held, *rest)
        for (step, used, held, *rest), time_s in zip(
            rows.tolist(), ends_s.tolist(), strict=True
        )
    ]
