"""Step log: what the host keeps of the replicas' timelines, with times of its clock.

Place on the road: serving -> [step_log] -> llm. Host only. The state's timelines are
rings of some steps (`timeline`); behind each slice their news are put here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jpaged.engine import events as timeline
from jpaged.serving import metrics
from jpaged.serving.metrics import Event, Slice, StepRecord

_MOST_STEPS = 1 << 16  # that are kept, of each replica


class StepLog:
    """Events since they were taken last, and the last steps, of each replica.

    Places are those of one long request table, `table_size` of each replica's.
    """

    def __init__(self, num_replicas: int):
        self.num_lost_events = 0  # overwritten before the host saw them
        # Of the timelines, as last seen.
        self._num_events = np.zeros((num_replicas,), np.int64)
        self._events: list[tuple[int, Event]] = []  # with places
        # Of step n the timeline's row, and when it ended, at n % _MOST_STEPS.
        shape = (num_replicas, _MOST_STEPS)
        num_columns = len(timeline.StepRow._fields)
        self._rows = np.full((*shape, num_columns), -1, np.int32)
        self._ends = np.zeros(shape)

    def forget_events(self) -> None:
        """The timelines are new ones; steps that are known stay so."""
        self._num_events[:] = 0
        self._events.clear()

    def take(
        self, ran: Sequence[Slice], recorded: Iterable[Any], table_size: int
    ) -> None:
        """Takes over what a slice left on the timeline of each replica.

        Args:
          ran: of each replica the steps.
          recorded: of each replica what `readout.records` gives.
          num_places: of a replica's request table.
        """
        for replica, (one, mine) in enumerate(zip(ran, recorded, strict=True)):
            if one.last > one.first:
                num_events, events, rows = mine
                num_new = int(num_events - self._num_events[replica])
                self._num_events[replica] = num_events
                self.num_lost_events += max(num_new - len(events), 0)
                news = events[max(len(events) - num_new, 0) :]
                self._take_events(one, news, replica * table_size)
                self._take_steps(one, rows, replica)

    def _take_events(self, ran: Slice, news: np.ndarray, first_seq_index: int) -> None:
        for step, kind, seq_index in news.tolist():
            is_late = kind >= timeline.NUM_BEFORE_DECODER
            time_s = ran.end_of(step) if is_late else ran.begin_of(step)
            event = Event(timeline.EVENTS[kind], time_s, step)
            self._events.append((first_seq_index + seq_index, event))

    def _take_steps(self, ran: Slice, rows: np.ndarray, replica: int) -> None:
        rows = rows[len(rows) - min(ran.last - ran.first, len(rows)) :]
        steps = rows[:, 0]
        self._rows[replica, steps % _MOST_STEPS] = rows
        self._ends[replica, steps % _MOST_STEPS] = ran.end_of(steps)

    def take_events(self) -> list[tuple[int, Event]]:
        """What happened since the last time, in order, each with its place."""
        events, self._events = self._events, []
        return events

    def records(self, replica: int, last: int, block_size: int) -> list[StepRecord]:
        """The steps before `last` of a replica that are kept, oldest first."""
        rows, ends = self._rows[replica], self._ends[replica]
        steps = np.arange(max(last - _MOST_STEPS, 0), last)
        at = steps[rows[steps % _MOST_STEPS, 0] == steps] % _MOST_STEPS
        return metrics.step_records(rows[at], ends[at], block_size)
