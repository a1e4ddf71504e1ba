"""Step log: the host's copy of the replicas' timelines, with times of its clock.

Pipeline: engine host -> [step log] -> llm. Host only. The timelines in the engine's
state are rings of limited length (`engine.events`). After each slice the host copies
their new entries into this log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged.engine import events as timeline
from jpaged.serving.metrics import Event, StepRecord

_MAX_STEPS = 1 << 16  # steps that are kept per replica


class Slice(NamedTuple):
    """The steps of one device call, `first` to `last` (exclusive), and its times.

    The device has no clock. Times of steps are interpolated as if all steps of the
    slice took equally long.
    """

    first: int
    last: int
    start_s: float
    end_s: float

    def start_of(self, step: Any) -> Any:
        """Return when a step began; accepts a number or an array of steps."""
        share = (step - self.first) / (self.last - self.first)
        return self.start_s + share * (self.end_s - self.start_s)

    def end_of(self, step: Any) -> Any:
        """Return when a step ended; accepts a number or an array of steps."""
        return self.start_of(step + 1)


class StepLog:
    """The last steps of each replica, and events that were not taken yet.

    Sequence indices are those of the concatenated request tables of all replicas.
    """

    def __init__(self, num_replicas: int):
        self.num_lost_events = 0  # overwritten before the host read them
        # Events of each timeline that were read or lost.
        self._num_events = np.zeros((num_replicas,), np.int64)
        self._events: list[tuple[int, Event]] = []  # each with its sequence index
        # The timeline's row of step n, and the step's end, are at n % _MAX_STEPS.
        shape = (num_replicas, _MAX_STEPS)
        num_columns = len(timeline.StepRow._fields)
        self._rows = np.full((*shape, num_columns), -1, np.int32)
        self._ends = np.zeros(shape)

    def forget_events(self) -> None:
        """Forget all events, because the timelines start again; steps are kept."""
        self._num_events[:] = 0
        self._events.clear()

    def add(
        self, slices: Sequence[Slice], timelines: Iterable[Any], table_size: int
    ) -> None:
        """Copy the new entries of all timelines after a device call.

        Args:
          slices: per replica, the steps that the call ran.
          timelines: per replica, its timeline as `readout.read_timelines` returns it.
          table_size: entries of a replica's request table.
        """
        for replica, (ran, (num_events, events, rows)) in enumerate(
            zip(slices, timelines, strict=True)
        ):
            if ran.last > ran.first:
                num_new = int(num_events - self._num_events[replica])
                self._num_events[replica] = num_events
                self.num_lost_events += max(num_new - len(events), 0)
                new_events = events[max(len(events) - num_new, 0) :]
                self._add_events(ran, new_events, replica * table_size)
                self._add_steps(ran, rows, replica)

    def _add_events(self, ran: Slice, events: np.ndarray, first_seq_index: int) -> None:
        for step, kind, seq_index in events.tolist():
            is_after_decoder = kind >= timeline.NUM_BEFORE_DECODER
            time_s = ran.end_of(step) if is_after_decoder else ran.start_of(step)
            event = Event(timeline.EVENTS[kind], time_s, step)
            self._events.append((first_seq_index + seq_index, event))

    def _add_steps(self, ran: Slice, rows: np.ndarray, replica: int) -> None:
        rows = rows[len(rows) - min(ran.last - ran.first, len(rows)) :]
        steps = rows[:, 0]
        self._rows[replica, steps % _MAX_STEPS] = rows
        self._ends[replica, steps % _MAX_STEPS] = ran.end_of(steps)

    def take_events(self) -> list[tuple[int, Event]]:
        """Return the events since the last call, in order, with sequence indices."""
        events, self._events = self._events, []
        return events

    def records(self, replica: int, end: int, block_size: int) -> list[StepRecord]:
        """Return a replica's steps before step `end` that are kept, oldest first."""
        rows, ends = self._rows[replica], self._ends[replica]
        steps = np.arange(max(end - _MAX_STEPS, 0), end)
        at = steps[rows[steps % _MAX_STEPS, 0] == steps] % _MAX_STEPS
        return _step_records(rows[at], ends[at], block_size)


def _step_records(
    rows: np.ndarray, ends_s: np.ndarray, block_size: int
) -> list[StepRecord]:
    """Convert rows of a timeline to records.

    Args:
      rows: i32[n, N], the columns of `engine.events.StepRow`.
      ends_s: f64[n], when each step ended.
      block_size: tokens per block.
    """
    return [
        StepRecord(step, time_s, used, states, used * block_size - states, *rest)
        for (step, used, states, *rest), time_s in zip(
            rows.tolist(), ends_s.tolist(), strict=True
        )
    ]
