"""Pausing: whether the engine may run, and which requests may start.

Pipeline: llm -> [pausing] -> batcher. Host only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

MODES = ("keep", "wait", "abort")
POLL_S = 0.02  # how often callers that wait for `resume` look


class Pause:
    """The pause of an engine: it is set, or not.

    Other threads than the one that paused wait for `resume`. The thread that paused
    would wait for itself, so it gets an error.
    """

    def __init__(self) -> None:
        self._may_run = threading.Event()
        self._may_run.set()
        self._thread: int | None = None
        self._admitted: frozenset[int] | None = None

    @property
    def is_set(self) -> bool:
        """Whether the engine is paused."""
        return not self._may_run.is_set()

    def set(self) -> None:
        """Pause."""
        self._thread = threading.get_ident()
        self._may_run.clear()

    def clear(self) -> None:
        """End the pause."""
        self._may_run.set()

    def wait(self) -> None:
        """Wait a moment for the end of the pause.

        Raises:
          RuntimeError: this thread has paused the engine.
        """
        if self._may_run.is_set():
            return
        self.check()
        self._may_run.wait(POLL_S)

    def check(self) -> None:
        """Raise RuntimeError if the engine is paused by this thread."""
        if self.is_set and self._thread == threading.get_ident():
            raise RuntimeError(
                "this LLM is paused, and this thread has paused it; call resume() first"
            )

    def admit_only(self, arrivals: Iterable[int] | None) -> None:
        """Let only these requests start; None: all."""
        self._admitted = None if arrivals is None else frozenset(arrivals)

    def admits(self, arrival: int) -> bool:
        """Whether a request may start."""
        return self._admitted is None or arrival in self._admitted
