"""Batcher: feeds the requests of all callers into the engine, slice by slice.

Pipeline: llm -> [batcher] -> engine host -> engine, and back. Host only.

`LLM.generate`, streams and live requests are all callers of one Batcher. A caller that
waits for updates runs the next slice (`run_slice`), which serves all requests. So the
requests of different callers share the engine's batch, and each caller finds its
updates in its inbox.

Only the holder of the host's lock uses the engine. `add` and `abort` never wait for the
lock: they append to a queue that the next slice reads.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import math
from collections.abc import Callable, Generator, Sequence

import numpy as np

from jpaged.config import EngineConfig
from jpaged.engine import request_table
from jpaged.engine.limits import Params
from jpaged.params import SamplingParams
from jpaged.serving import feeding, output_reading
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.metrics import Event, MeanLatencies
from jpaged.serving.pausing import POLL_S, Pause
from jpaged.serving.readout import SequenceProgress
from jpaged.serving.request_state import OutputState, RequestState, RequestUpdate
from jpaged.serving.runner import needs_empty_table
from jpaged.serving.waiting import WaitingQueue

# Length of a slice in seconds, by what its callers need.
STREAM_S = 0.05  # a caller reads text while it grows
# If steps are slow, a slice of streams lasts `steps` steps, but at most
# `factor * STREAM_S`. The first pair applies while requests arrive, the second
# otherwise. A new request waits until the slice ends.
BUSY_STREAM, CALM_STREAM = (4, 4.0), (8, 6.0)
CALM_S = 0.5  # since the last request was added
STOP_S = 0.1  # an output can end at a stop string
PROGRESS_S = 0.3  # a caller shows progress, or requests wait for free entries
QUIET_S = 5.0  # none of these; the process can still react to Ctrl-C
LEAST_STEPS = 4  # fewer steps are not worth the call, unless a caller reads a stream

_STATE_LOST = (
    "the engine's state was lost when another call was interrupted, together with the "
    "requests of this call; send them again"
)


class Batcher:
    """The open requests of an engine: waiting on the host, or in the request table.

    Args:
      host: the engine.
      grow: maps a config and some parameters to the config with all features that
        these parameters need.

    Attributes:
      num_generated: tokens of outputs that have ended.
      pause: whether slices run.
      latencies: mean latencies of the requests that ended by themselves.
    """

    def __init__(
        self,
        host: EngineHost,
        grow: Callable[[EngineConfig, Sequence[Params]], EngineConfig],
    ):
        self.host = host
        self.num_generated = 0
        self.pause = Pause()
        self.latencies = MeanLatencies()
        self._grow = grow
        # By arrival, until the caller has the last update.
        self._open: dict[int, RequestState] = {}
        # Added since programs were last compiled for new requests.
        self._unprepared: list[RequestState] = []
        # Queues that the next slice reads.
        self._added: collections.deque[RequestState] = collections.deque()
        self._aborted: collections.deque[RequestState] = collections.deque()
        config = host.config
        self._waiting = WaitingQueue(config, host)
        self._submitted: dict[int, RequestState] = {}  # in the request table
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._slice_task: asyncio.Task[None] | None = None
        self._last_added_s = 0.0

    def find_open(self, arrival: int) -> RequestState | None:
        """Return the open request with this number, if there is one."""
        return self._open.get(arrival)

    @property
    def open_requests(self) -> list[int]:
        """Numbers of the requests that have not ended."""
        return list(self._open)

    @property
    def num_open(self) -> int:
        """Number of requests that have not ended."""
        return len(self._open)

    def add(self, requests: Sequence[RequestState]) -> None:
        """Open requests; they run in the following slices."""
        now, step = self.host.time_s(), self.host.next_step()
        for request in requests:
            request.sequence_events.append(Event("queued", now, step))
            self._open[request.arrival] = request
        self._added.extend(requests)
        self._last_added_s = now

    def abort(self, requests: Sequence[RequestState]) -> None:
        """End requests with the tokens they have; ended ones do not change.

        This happens at once, or after the slice that another thread is running.
        """
        self._aborted.extend(requests)
        if self.host.lock.acquire(blocking=False):
            try:
                self.end_aborted()
            finally:
                self.host.lock.release()

    def follow(
        self, requests: Sequence[RequestState]
    ) -> Generator[RequestUpdate, None, None]:
        """Open requests that share an inbox, and yield their updates to their end.

        If the iteration ends early, the requests that are still open are aborted.
        """
        left = {request.arrival: request for request in requests}
        try:
            self.add(requests)
            while left:
                inbox = next(iter(left.values())).inbox
                if not inbox:
                    self.run_slice()
                    continue
                update = inbox.popleft()
                if update.is_finished:
                    del left[update.request.arrival]
                if update.request.error is not None:
                    raise update.request.error
                yield update
        finally:
            if left:
                self.abort(list(left.values()))

    def run_slice(self, stream_s: float | None = None) -> None:
        """Run one slice for all open requests, and send updates to their callers.

        During a pause, wait for its end, but not for long: a request can be aborted.

        Args:
          stream_s: seconds of a slice with streamed requests; None is STREAM_S, or more
            where steps are slow.

        Raises:
          RuntimeError: the engine stalled, which is a bug; or this thread has paused
            the engine.
        """
        self.pause.wait()
        with self.host.lock:
            if not self.pause.is_set:
                self._run_slice(stream_s)

    def finish_open(self) -> None:
        """Run the open requests to their ends; others wait meanwhile."""
        with self.host.lock:
            open_requests = set(self._open)
            self.pause.admit_only(open_requests)
            try:
                while not open_requests.isdisjoint(self._open):
                    self._run_slice()
            finally:
                self.pause.admit_only(None)

    def abort_open(self) -> None:
        """End all open requests with the tokens they have."""
        with self.host.lock:
            self.host.recover()
            self.abort(list(self._open.values()))

    def _run_slice(self, stream_s: float | None = None) -> None:
        with self.host.lock:
            epoch = self.host.epoch
            try:
                self.end_aborted()
                if self._open:
                    self._submit_waiting()
                if self._submitted:
                    self._run_steps(stream_s)
                    self.end_aborted()
            except BaseException:
                self.host.recover()
                self._fail_lost(is_all=self.host.epoch != epoch)
                raise

    async def run_slice_async(self) -> None:
        """`run_slice` in another thread; concurrent waiters share one slice."""
        if self.pause.is_set:
            await asyncio.sleep(POLL_S)
            return
        task = self._slice_task
        loop = asyncio.get_running_loop()
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._slice_task = loop.create_task(self._run_slice_soon())
        # If one waiter is cancelled, the slice continues for the others.
        await asyncio.shield(task)

    async def _run_slice_soon(self) -> None:
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(1, "jpaged")
        # Waiters that wake up after the last slice can submit before this one starts.
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self.run_slice)

    def warm_up(self, params: Sequence[Params], num_rows: int) -> None:
        """Compile all sizes of up to `num_rows` rows for requests with `params`.

        Raises:
          RuntimeError: this needs an empty request table, and requests run.
        """
        with self.host.lock:
            config = self.host.config
            grown = self._grow(config, params)
            if self._submitted and needs_empty_table(config, grown):
                raise RuntimeError(
                    "warm_up: expected an engine without running requests, because "
                    "these parameters need a new request table; wait until they end"
                )
            if grown != config:
                self.host.grow(grown)
            self.host.warm_up(params, num_rows)

    def close(self) -> None:
        """Abort all open requests and release the engine."""
        with self.host.lock:
            self.abort_open()
            self.host.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def end_aborted(self) -> None:
        """End the requests that were aborted; the caller holds the host's lock."""
        while self._aborted:
            request = self._aborted.popleft()
            if request.arrival not in self._open:
                continue
            if request.arrival in self._submitted:
                self._read_aborted(request)
                output_reading.read_token_masks(self.host, [request])
                self.host.drop(request.seq_indices)
            else:
                request.create_outputs()
            for output in request.outputs:
                if output.finish_reason is None:
                    output.finish("abort")
            self._add_finished_event(request)
            self._send_update(request)

    def _read_aborted(self, request: RequestState) -> None:
        """Read the tokens that the outputs have so far.

        The outputs of other algorithms are unknown before their end.
        """
        if request.has_own_rows:
            outputs = [each for each in request.outputs if each.finish_reason is None]
            self._read_outputs(outputs, self.host.read_progress())

    # Before a slice: from waiting to submitted.

    def _submit_waiting(self) -> None:
        """Submit the first waiting requests, as many as the request tables can hold."""
        added = [self._added.popleft() for _ in range(len(self._added))]
        for request in added:
            if self.pause.admits(request.arrival):
                self._unprepared.append(request)
                self._waiting.push(request)
            else:
                self._added.append(request)
        if not self._submitted:
            self.host.clean()
        self._compile_for_waiting()
        if self.host.num_empty:
            self._waiting.order()
        groups = self._admit_waiting()
        requests = [request for group in groups for request in group]
        if requests:
            self._submitted |= {request.arrival: request for request in requests}
            entered, failed = feeding.submit_groups(self.host, groups)
            for request, seq_indices, output_indices in entered:
                request.enter_table(seq_indices, output_indices)
            for request, error in failed:
                self._fail(request, error)

    def _compile_for_waiting(self) -> None:
        """Start to compile what new requests need, and add their arrays."""
        waiting = [each for each in self._unprepared if each.arrival in self._open]
        self._unprepared.clear()
        if not waiting:
            return
        config = self.host.config
        grown, failed = feeding.grow_for(self._grow, config, waiting)
        for request, error in failed:
            self._fail(request, error)
        waiting = [each for each in waiting if each.arrival in self._open]
        if self._submitted and needs_empty_table(config, grown):
            # They wait until the request table is empty.
            self._unprepared = waiting
            return
        if grown != config:
            self.host.grow(grown)
        if waiting:
            self.host.prepare(waiting, self._submitted.values())

    def _admit_waiting(self) -> list[list[RequestState]]:
        """Take requests from the queue until one waits; return them by replica."""
        groups: list[list[RequestState]] = [[] for _ in range(self.host.num_replicas)]
        cached_lens, loads = self._cached_lens(), self.host.loads()
        unready: list[RequestState] = []
        while self._waiting.is_ordered:
            request = self._waiting.peek()
            # Aborted requests are only removed from the queue.
            if request.arrival in self._open:
                try:
                    if self._submitted and not self._is_ready(request):
                        if self._needs_empty_table(request):
                            break
                        # It waits for its programs; those after it need not.
                        unready.append(self._waiting.pop())
                        continue
                    if not feeding.place(
                        self.host,
                        self._grow,
                        request,
                        groups,
                        cached_lens.get(request.arrival),
                        loads,
                        is_alone=not (self._submitted or any(groups)),
                    ):
                        break
                except Exception as error:  # ends this request alone
                    self._fail(request, error)
            self._waiting.pop()
        for request in unready:
            self._waiting.push(request)
        return groups

    def _needs_empty_table(self, request: RequestState) -> bool:
        """Whether a request must wait until those in the request table have ended."""
        config = self.host.config
        return needs_empty_table(config, self._grow(config, [request.params]))

    def _is_ready(self, request: RequestState) -> bool:
        """Whether a request can join those in the table without waiting."""
        config = self.host.config
        if self._grow(config, [request.params]) != config:
            return False
        return self.host.prepare([request], self._submitted.values())

    def _cached_lens(self) -> dict[int, np.ndarray]:
        """Return the cached prompt tokens per replica for requests that can be next.

        Returns:
          Keyed by arrival, i32[D] each. Empty if there is only one replica.
        """
        if self.host.num_replicas == 1:
            return {}
        requests = self._waiting.first(self.host.num_empty)
        found = self.host.cached_lens(requests)
        return {
            request.arrival: lens for request, lens in zip(requests, found, strict=True)
        }

    # The slice, and what is read after it.

    def _run_steps(self, stream_s: float | None) -> None:
        requests = list(self._submitted.values())
        used = self.host.features(requests)
        compile_s = self.host.runner.compile_s
        progress = self.host.run(used, *self._slice_length(stream_s))
        self._forgive(self.host.runner.compile_s - compile_s)
        owners = {index: each for each in requests for index in each.seq_indices}
        for seq_index, event in self.host.take_events():
            if seq_index in owners:  # otherwise it is a pinned prefix's
                owners[seq_index].sequence_events.append(event)
        outputs = [
            output
            for request in requests
            for output in request.outputs
            if output.finish_reason is None
            and output_reading.has_update(output, progress)
        ]
        self._read_outputs(outputs, progress)
        finished = [request for request in requests if request.is_finished]
        output_reading.read_prompt_logprobs(self.host, finished)
        output_reading.read_token_masks(self.host, finished)
        # An entry may only be reused when no output of its request is read any more:
        # all of them read the entry of the request's first sequence.
        self.host.release(index for each in finished for index in each.seq_indices)
        for request in requests:
            self._send_update(request)

    def _forgive(self, seconds: float) -> None:
        """Leave out the time for which new requests waited for a compiler."""
        # Other threads add requests meanwhile.
        for request in list(self._open.values()) if seconds else ():
            if [event.name for event in request.sequence_events] == ["queued"]:
                (queued,) = request.sequence_events
                later = queued._replace(time_s=queued.time_s + seconds)
                request.sequence_events[:] = [later]

    def _slice_length(self, stream_s: float | None) -> tuple[float, int]:
        """Return the seconds and the minimum number of steps of the next slice."""
        requests = self._submitted.values()
        has_stop = any(request.stop and request.is_watched for request in requests)
        if any(request.is_streamed for request in requests):
            if stream_s is None:
                stream_s = self._stream_s(STOP_S if has_stop else math.inf)
            return stream_s, 1
        if has_stop:
            return STOP_S, LEAST_STEPS
        is_awaited = self._waiting or any(request.is_awaited for request in requests)
        return PROGRESS_S if is_awaited else QUIET_S, LEAST_STEPS

    def _stream_s(self, most: float) -> float:
        """Return the seconds of a slice for streams, at most `most` if steps are slow.

        An update costs a few milliseconds per slice, so slices are longer if steps are
        slow. They stay short while a request waits for its first token.
        """
        if self._waiting or self._added or self._awaits_first_token():
            return STREAM_S
        is_calm = self.host.time_s() - self._last_added_s > CALM_S
        steps, factor = CALM_STREAM if is_calm else BUSY_STREAM
        wanted = steps * self.host.runner.seconds_per_step
        return max(STREAM_S, min(wanted, factor * STREAM_S, most))

    def _awaits_first_token(self) -> bool:
        return any(
            output.finish_reason is None and not output.token_ids
            for request in self._submitted.values()
            if request.is_watched
            for output in request.outputs
        )

    def _read_outputs(
        self, outputs: Sequence[OutputState], progress: SequenceProgress
    ) -> None:
        """Read new tokens of outputs, and end those that meet a stop string."""
        stopped = output_reading.read_outputs(self.host, outputs, progress)
        ends: set[int] = set()
        for output in stopped:
            request = output.request
            self._add_finished_event(request)
            if isinstance(request.params, SamplingParams):
                ends.add(output.seq_index)
            elif request.is_finished:  # the rows of an algorithm end together
                ends.update(request.seq_indices)
        self.host.finish(ends, request_table.STOP)

    def _add_finished_event(self, request: RequestState) -> None:
        """Note that the host ended a sequence of a request, between two steps."""
        step = self.host.next_step(
            request.seq_indices[0] if request.seq_indices else None
        )
        request.sequence_events.append(Event("finished", self.host.time_s(), step))

    def _send_update(self, request: RequestState) -> None:
        """Send the caller what is new; close the request if it has ended."""
        deltas = [each.take_delta() for each in request.outputs if each.has_delta]
        is_finished = request.error is not None or request.is_finished
        if is_finished:
            self._submitted.pop(request.arrival, None)
            self._open.pop(request.arrival, None)
            self.num_generated += sum(len(each.token_ids) for each in request.outputs)
            is_aborted = any(each.finish_reason == "abort" for each in request.outputs)
            if request.error is None and not is_aborted:
                self.latencies.add(request.latencies())
        if deltas or is_finished:
            request.inbox.append(RequestUpdate(request, deltas, is_finished))

    def _fail(self, request: RequestState, error: Exception) -> None:
        """End a request that cannot continue."""
        request.error = error
        self._send_update(request)

    def _fail_lost(self, is_all: bool) -> None:
        """End requests that an interrupt lost.

        Args:
          is_all: the engine's state was lost, so all requests in it are. Otherwise only
            those are lost that were being submitted.
        """
        for request in list(self._submitted.values()):
            if is_all or not request.seq_indices:
                self._fail(request, RuntimeError(_STATE_LOST))
