"""Live: requests that come and go while others run.

Place on the road: user -> [live] -> batch. Host only.
"""

from __future__ import annotations

import collections
from collections.abc import AsyncIterator, Generator, Iterator

from jpaged.outputs import RequestOutput
from jpaged.serving.batcher import Batch
from jpaged.serving.jobs import Delta, Job


class Request:
    """A request that was submitted; see `LLM.submit`.

    It is its own iterator, with `for` and `async for`: what its outputs gain, each
    Delta once. So a second loop goes on where the first one was left, and a loop behind
    the end gives nothing. The request runs while somebody waits: for this one, for
    another one, or for a call of the LLM.

    Raises, where it is iterated or waited for:
      ValueError: it does not fit beside prefixes that were pinned since.
      RuntimeError: an interrupt in another call took the engine's state with it.
    """

    def __init__(self, batch: Batch, job: Job):
        self._batch = batch
        self._job = job
        self._deltas: collections.deque[Delta] = collections.deque()
        self._is_over = False

    @property
    def request_id(self) -> int:
        """Its number in the LLM's life, which `LLM.abort` takes."""
        return self._job.arrival

    @property
    def finished(self) -> bool:
        """Whether it has ended, as far as is known here; asks nobody, runs nothing."""
        self._take_news()
        return self._is_over

    def abort(self) -> None:
        """Ends it with what it has, finish_reason "abort"; blocks and places are free.

        One that has ended already stays as it is.
        """
        self._batch.abort([self._job])

    def output(self) -> RequestOutput:
        """Waits for its end; what it gave. Deltas that nobody took are still there."""
        while not self.finished:
            self._batch.turn()
        return self._output()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._has_delta():
            if self._is_over:
                raise StopIteration
            self._batch.turn()
        return self._deltas.popleft()

    def __await__(self) -> Generator[None, None, RequestOutput]:
        """`await request` is `request.output()` that lets other coroutines run."""
        return self._wait().__await__()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._has_delta():
            if self._is_over:
                raise StopAsyncIteration
            await self._batch.turn_async()
        return self._deltas.popleft()

    def __repr__(self) -> str:
        state = "finished" if self.finished else "open"
        return f"Request({self.request_id}, {state})"

    async def _wait(self) -> RequestOutput:
        while not self.finished:
            await self._batch.turn_async()
        return self._output()

    def _take_news(self) -> None:
        while self._job.inbox:
            news = self._job.inbox.popleft()
            self._deltas += news.deltas
            self._is_over |= news.is_over

    def _has_delta(self) -> bool:
        self._take_news()
        if self._job.error is not None and not self._deltas:
            raise self._job.error
        return bool(self._deltas)

    def _output(self) -> RequestOutput:
        if self._job.error is not None:
            raise self._job.error
        return self._job.output()
