"""Bridge: coroutines submit requests, and one thread runs the engine for all of them.

Pipeline: completions, chat -> [bridge] -> llm, and back.

The engine's thread runs one slice after another as long as a request is open. After
each slice it wakes the event loop once; the loop then distributes the updates, while
the next slice runs already. Neither a slow client nor the work of a response holds the
device up. Tokenization, chat templates and automata run in threads of their own.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jpaged.llm import LLM
from jpaged.server.errors import ApiError, from_value_error, queue_full, unavailable
from jpaged.server.live_requests import LiveRequest
from jpaged.server.sampling import Params
from jpaged.serving.live import Request

LOGGER = logging.getLogger("jpaged.server")
T = TypeVar("T")

_NUM_PREPARERS = 2  # threads for tokenization and automata
_MOST_FAILURES = 3  # slices in a row, after which the engine counts as broken
_IDLE_SLICE_S = 1e-3  # a slice that is shorter did nothing
_PAUSE_S = 2e-3  # after such a slice
_ENTRY_S = 0.02  # most that an idle engine waits for requests that are being submitted
_RATE_S = 10.0  # over which the rate of finished sequences is measured


class EngineBridge:
    """Runs an LLM for coroutines of one event loop.

    Args:
      llm: the LLM; nothing else may use it meanwhile, except through `call`.
      max_open_sequences: sequences that may run or wait at the same time.
      on_finished: called in the event loop with each request that has ended.
      slice_s: seconds of steps between two updates, see `ServerSettings`.

    Attributes:
      num_open_sequences: sequences that run or wait.
      is_draining: whether new requests are refused.
      is_broken: whether the engine failed repeatedly.
    """

    def __init__(
        self,
        llm: LLM,
        max_open_sequences: int,
        on_finished: Callable[[LiveRequest], None] = lambda live: None,
        slice_s: float | None = None,
    ):
        self.llm = llm
        self.max_open_sequences = max_open_sequences
        self.num_open_sequences = 0
        self.is_draining = False
        self.is_broken = False
        self._on_finished = on_finished
        self._slice_s = slice_s
        self._open: dict[int, LiveRequest] = {}
        self._finish_times: collections.deque[tuple[float, int]] = collections.deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._preparers: concurrent.futures.ThreadPoolExecutor | None = None
        # Only one thread may submit. It waits for no tokenizer and no automaton.
        self._submitter: concurrent.futures.ThreadPoolExecutor | None = None
        # Shared with the engine's thread.
        self._wake = threading.Condition()
        self._is_stopping = False
        self._num_entering = 0  # calls of `submit` that are still submitting requests
        self._num_submitted = 0  # requests that the engine's thread must end
        self._aborts: collections.deque[LiveRequest] = collections.deque()
        self._calls: collections.deque[tuple[Any, concurrent.futures.Future[Any]]] = (
            collections.deque()
        )
        self._is_delivery_due = False

    @property
    def is_paused(self) -> bool:
        """Whether no slices run."""
        return self.llm.is_paused

    # In the event loop.

    def start(self) -> None:
        """Start the threads; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._preparers = concurrent.futures.ThreadPoolExecutor(
            _NUM_PREPARERS, "jpaged-prepare"
        )
        self._submitter = concurrent.futures.ThreadPoolExecutor(1, "jpaged-submit")
        self._thread = threading.Thread(
            target=self._run, name="jpaged-engine", daemon=True
        )
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, and wait for open ones; abort what remains."""
        self.is_draining = True
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end and not self.is_broken:
            await asyncio.sleep(0.02)
        for live in list(self._open.values()):
            self.abort(live)
        end = time.monotonic() + 5
        while self._open and time.monotonic() < end and not self.is_broken:
            await asyncio.sleep(0.02)

    async def wait_for_open(self) -> None:
        """Wait until the requests that are open now have ended."""
        while_open = list(self._open.values())
        while not all(live.is_finished for live in while_open):
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End the threads."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 30)
        for executor in (self._preparers, self._submitter):
            if executor is not None:
                executor.shutdown(wait=False, cancel_futures=True)

    async def prepare(
        self, function: Callable[[], T], names: Mapping[str, str] | None = None
    ) -> T:
        """Run a function in a thread that prepares requests.

        Args:
          function: the function.
          names: names of arguments whose field of the body has another name.

        Raises:
          ApiError: the function raised a ValueError.
        """
        assert self._loop is not None
        try:
            return await self._loop.run_in_executor(self._preparers, function)
        except ValueError as error:
            raise from_value_error(error, names or {}) from None

    async def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params,
        num_sequences: int,
        names: Mapping[str, str] | None = None,
    ) -> list[LiveRequest]:
        """Submit prompts: all of them, or none if one is invalid.

        Args:
          prompts: token ids of each prompt.
          params: parameters for all of them.
          num_sequences: sequences that run for each prompt.
          names: names of arguments whose field of the body has another name.

        Raises:
          ApiError: a prompt is invalid, the queue is full, or the server ends.
        """
        self.check_capacity(len(prompts) * num_sequences)
        count = len(prompts) * num_sequences
        self.num_open_sequences += count
        requests: list[Request] = []
        assert self._loop is not None
        with self._wake:
            self._num_entering += 1
        work = self._loop.run_in_executor(
            self._submitter, self._submit_all, prompts, params, requests
        )
        try:
            # A client that goes away now must not leave requests behind.
            await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(
                lambda _: self._adopt(requests, num_sequences, count, abandon=True)
            )
            raise
        except ValueError as error:
            self._adopt(requests, num_sequences, count, abandon=True)
            raise from_value_error(error, names or {}) from None
        except RuntimeError as error:  # the LLM is closed
            self._adopt(requests, num_sequences, count, abandon=True)
            raise unavailable(str(error)) from None
        return self._adopt(requests, num_sequences, count)

    def check_capacity(self, num_sequences: int) -> None:
        """Raise ApiError if so many sequences cannot be accepted now."""
        most = self.max_open_sequences
        if num_sequences > most:
            raise ApiError(
                400,
                f"prompt: expected at most {most} sequences (prompts times n), got "
                f"{num_sequences}; send fewer at once",
                param="prompt",
            )
        if self.is_broken:
            raise unavailable("the engine failed; restart the server")
        if self.is_draining:
            raise unavailable("the server ends and accepts no further requests")
        if self.num_open_sequences + num_sequences > most:
            raise queue_full(most, self.retry_after_s())

    def retry_after_s(self) -> int:
        """Return the seconds in which a tenth of the queue probably ends, 1 to 60."""
        now = time.monotonic()
        while self._finish_times and self._finish_times[0][0] < now - _RATE_S:
            self._finish_times.popleft()
        rate = sum(count for _, count in self._finish_times) / _RATE_S
        if not rate:
            return 5
        return min(max(math.ceil(self.num_open_sequences / 10 / rate), 1), 60)

    def abort(self, live: LiveRequest) -> None:
        """End a request before the next slice."""
        self._aborts.append(live)
        with self._wake:
            self._wake.notify()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two slices."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.append((function, future))
        with self._wake:
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _adopt(
        self,
        requests: Sequence[Request],
        num_sequences: int,
        reserved: int,
        abandon: bool = False,
    ) -> list[LiveRequest]:
        """Follow requests that were submitted; they replace `reserved` sequences."""
        self.num_open_sequences -= reserved - len(requests) * num_sequences
        found = [LiveRequest(each, num_sequences, self.abort) for each in requests]
        for live in found:
            self._open[live.request.request_id] = live
            if abandon:
                live.abandon()
        # They may have finished before they were known here.
        self._deliver()
        return found

    def _deliver(self) -> None:
        """Distribute the updates of the last slices."""
        self._is_delivery_due = False
        finished = [live for live in self._open.values() if live.pump()]
        for live in finished:
            del self._open[live.request.request_id]
            self.num_open_sequences -= live.num_sequences
            self._finish_times.append((time.monotonic(), live.num_sequences))
            if len(self._finish_times) > 10_000:
                self._finish_times.popleft()
            try:
                self._on_finished(live)
            except Exception:
                LOGGER.exception("metrics of a request")

    def _fail_all(self, error: Exception) -> None:
        """End all requests of an engine that is broken."""
        for live in self._open.values():
            live.fail(error)
        self.num_open_sequences = 0
        self._open.clear()

    # In the thread that submits.

    def _submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params,
        requests: list[Request],
    ) -> None:
        """Submit prompts one by one, and append what `LLM.submit` returns."""
        try:
            for index, prompt in enumerate(prompts):
                try:
                    requests.append(self.llm.submit(prompt, params))
                except ValueError as error:
                    if len(prompts) == 1:
                        raise
                    raise ValueError(f"prompts[{index}]: {error}") from None
                with self._wake:
                    self._num_submitted += 1
                    self._wake.notify()
        finally:
            with self._wake:
                self._num_entering -= 1
                self._wake.notify()

    # In the engine's thread.

    def _run(self) -> None:
        num_failures = 0
        is_open = False
        while True:
            with self._wake:
                while not self._has_work(is_open):
                    self._wake.wait()
                if not is_open and not self.is_paused:
                    # Requests that arrive together run together from the first step.
                    self._wake.wait_for(self._has_entered, _ENTRY_S)
                if self._is_stopping:
                    break
                is_open |= self._num_submitted > 0
                self._num_submitted = 0
            self._run_calls()
            self._end_aborted()
            if self.is_paused or not is_open:
                self._notify_loop()
                continue
            start = time.perf_counter()
            try:
                is_open = self.llm.run_slice(self._slice_s)
                num_failures = 0
            except Exception as error:
                LOGGER.exception("the engine failed")
                num_failures += 1
                if num_failures >= _MOST_FAILURES or "closed" in str(error):
                    self._break(error)
                    break
            self._notify_loop()
            if time.perf_counter() - start < _IDLE_SLICE_S:
                time.sleep(_PAUSE_S)  # requests wait for a compiler
        self._refuse_calls()

    def _has_work(self, is_open: bool) -> bool:
        if self._is_stopping or self._calls or self._aborts:
            return True
        return not self.is_paused and (is_open or self._num_submitted > 0)

    def _has_entered(self) -> bool:
        return self._is_stopping or not self._num_entering

    def _run_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _refuse_calls(self) -> None:
        error = unavailable("the engine has ended")
        while self._calls:
            _, future = self._calls.popleft()
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)

    def _end_aborted(self) -> None:
        while self._aborts:
            live = self._aborts.popleft()
            try:
                live.request.abort()
            except Exception:
                LOGGER.exception("aborting a request")

    def _break(self, error: Exception) -> None:
        self.is_broken = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._fail_all, error)

    def _notify_loop(self) -> None:
        """Let the event loop distribute updates, once for all of them."""
        if self._is_delivery_due:
            return
        self._is_delivery_due = True
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._deliver)
