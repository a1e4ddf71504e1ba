"""Live requests: a request that runs, as coroutines see it.

Pipeline: bridge -> [live_requests] -> completions, chat. Host only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from jpaged.outputs import RequestOutput
from jpaged.server.errors import from_value_error, unavailable
from jpaged.serving.live import Request
from jpaged.serving.request_state import Delta

LOGGER = logging.getLogger("jpaged.server")


class LiveRequest:
    """A request that runs: its updates, as the event loop gets them.

    Args:
      request: what `LLM.submit` returned.
      num_sequences: sequences that run for it.
      abort: called with this object to end the request.
    """

    def __init__(
        self, request: Request, num_sequences: int, abort: Callable[[LiveRequest], None]
    ):
        self.request = request
        self.num_sequences = num_sequences
        self.is_finished = False
        self.error: Exception | None = None
        self.is_abandoned = False
        self._abort = abort
        self._deltas: list[Delta] = []
        self._changed = asyncio.Event()

    def pump(self) -> bool:
        """Take over the updates of the last slice; return whether it has finished."""
        try:
            deltas = self.request.deltas()
            if not self.is_abandoned:
                self._deltas += deltas
            self.is_finished = self.request.finished
        except Exception as error:
            self.fail(error)
        if self._deltas or self.is_finished:
            self._changed.set()
        return self.is_finished

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self.error = error
        self.is_finished = True
        self._changed.set()

    async def updates(self) -> AsyncIterator[list[Delta]]:
        """Yield the deltas since the last time, several at once, to the end.

        Raises:
          ApiError: the engine lost the request.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            is_finished = self.is_finished
            deltas, self._deltas = self._deltas, []
            if deltas:
                yield deltas
            if is_finished:
                break
        self._raise_error()

    async def output(self) -> RequestOutput:
        """Wait for the end and return the output.

        Raises:
          ApiError: the engine lost the request.
        """
        while not self.is_finished:
            await self._changed.wait()
            self._changed.clear()
            self._deltas.clear()
        self._raise_error()
        return self.request.output()

    def _raise_error(self) -> None:
        if isinstance(self.error, ValueError):
            raise from_value_error(self.error)
        if self.error is not None:
            LOGGER.error("a request failed: %s", self.error)
            raise unavailable("the engine lost this request; send it again", 1)

    def abandon(self) -> None:
        """Abort the request if it runs: no one waits for it any more."""
        self.is_abandoned = True
        self._deltas.clear()
        if not self.is_finished:
            self._abort(self)
