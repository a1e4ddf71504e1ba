"""Live requests: handles of requests that run beside all others.

Pipeline: user -> [live] -> batcher. Host only.
"""

from __future__ import annotations

import collections
from collections.abc import AsyncIterator, Generator, Iterator

from jpaged.outputs import RequestOutput
from jpaged.serving.batcher import Batcher
from jpaged.serving.request_state import Delta, RequestState


class Request:
    """Handle of a submitted request; see `LLM.submit`.

    The handle is its own iterator, for `for` and `async for`. It yields the deltas of
    the outputs, each Delta once: a second loop continues where the first one stopped,
    and a loop after the end yields nothing. The request runs while a caller waits for
    it, for another live request, or for a call of the LLM.

    Raises, when it is iterated or waited for:
      ValueError: it does not fit into the blocks beside prefixes that were pinned after
        its submission.
      RuntimeError: an interrupt in another call lost the engine's state.
    """

    def __init__(self, batcher: Batcher, state: RequestState):
        self._batcher = batcher
        self._state = state
        self._deltas: collections.deque[Delta] = collections.deque()
        self._is_finished = False

    @property
    def request_id(self) -> int:
        """Number of the request since the LLM was created; `LLM.abort` accepts it."""
        return self._state.arrival

    @property
    def finished(self) -> bool:
        """Whether the request has ended, as of the last slice; runs no steps."""
        self._read_inbox()
        return self._is_finished

    def abort(self) -> None:
        """End the request with the tokens it has, finish_reason "abort".

        Its blocks and its entries in the request table become free. A request that has
        ended does not change.
        """
        self._batcher.abort([self._state])

    def deltas(self) -> list[Delta]:
        """Return the deltas that are there now; runs no steps.

        For callers of `LLM.run_slice`.
        """
        if not self._has_delta():
            return []
        found = list(self._deltas)
        self._deltas.clear()
        return found

    def output(self) -> RequestOutput:
        """Wait until the request ends and return its output.

        Deltas that were not read remain available.
        """
        while not self.finished:
            self._batcher.run_slice()
        return self._output()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._has_delta():
            if self._is_finished:
                raise StopIteration
            self._batcher.run_slice()
        return self._deltas.popleft()

    def __await__(self) -> Generator[None, None, RequestOutput]:
        """`await request` is `request.output()` that lets other coroutines run."""
        return self._wait().__await__()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._has_delta():
            if self._is_finished:
                raise StopAsyncIteration
            await self._batcher.run_slice_async()
        return self._deltas.popleft()

    def __repr__(self) -> str:
        state = "finished" if self.finished else "open"
        return f"Request({self.request_id}, {state})"

    async def _wait(self) -> RequestOutput:
        while not self.finished:
            await self._batcher.run_slice_async()
        return self._output()

    def _read_inbox(self) -> None:
        while self._state.inbox:
            update = self._state.inbox.popleft()
            self._deltas += update.deltas
            self._is_finished |= update.is_finished

    def _has_delta(self) -> bool:
        self._read_inbox()
        if self._state.error is not None and not self._deltas:
            raise self._state.error
        return bool(self._deltas)

    def _output(self) -> RequestOutput:
        if self._state.error is not None:
            raise self._state.error
        return self._state.request_output()
