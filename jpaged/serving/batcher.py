"""Batch: the requests of all callers, fed into the engine and read back in slices.

Place on the road: llm -> [batch] -> serving -> engine, and back. Host only.

`LLM.generate`, streams and live requests are all callers of one Batch: whoever waits
for news runs the next slice (`turn`), for everybody. So requests of different callers
share the engine's batch, and each caller finds its own news in its inbox.

Only who holds the host's lock touches the engine. `add` and `abort` never wait for it:
they leave a note that the next turn finds.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.engine import FINISH_REASONS, limits, request_table
from jpaged.engine.limits import Params
from jpaged.params import SamplingParams
from jpaged.serving import routing
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.jobs import Job, News, Sample, logprobs_at
from jpaged.serving.metrics import Event, Means
from jpaged.serving.readout import Progress, Wanted

# Slices are as short as what they serve needs: text that someone reads, text that may
# stop, progress and places that become free, Ctrl-C.
STREAM_S = 0.05
STOP_S = 0.1
PROGRESS_S = 0.3
QUIET_S = 5.0
LEAST_STEPS = 4  # of a slice that nobody reads: fewer are not worth the call


class Batch:
    """The open requests on an engine: those that wait on the host, and those in it.

    Args:
      host: the engine.
      grow: of a config and some params, the config with all that they need compiled.
    """

    def __init__(
        self,
        host: EngineHost,
        grow: Callable[[EngineConfig, Sequence[Params]], EngineConfig],
    ):
        self.host = host
        self.num_generated = 0  # tokens of outputs that have ended
        self.means = Means()
        self._grow = grow
        self._open: dict[int, Job] = {}  # by arrival, until the caller is told the end
        self._new: collections.deque[Job] = collections.deque()  # for the next turn
        self._aborted: collections.deque[Job] = collections.deque()  # as well
        self._waiting: list[tuple[int, int, Job]] = []  # heap: priority and arrival
        self._running: dict[int, Job] = {}  # by arrival: in the request table
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._turning: asyncio.Task[None] | None = None

    def open_job(self, arrival: int) -> Job | None:
        """The open request of this number, if there is one."""
        return self._open.get(arrival)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def add(self, jobs: Sequence[Job]) -> None:
        """Opens requests; they run in the turns that follow."""
        now, step = self.host.clock(), self.host.next_step()
        for job in jobs:
            job.happened.append(Event("queued", now, step))
            self._open[job.arrival] = job
        self._new.extend(jobs)

    def abort(self, jobs: Sequence[Job]) -> None:
        """Ends requests with what they have; nothing happens to those that ended.

        At once, or behind the slice that another thread runs now.
        """
        self._aborted.extend(jobs)
        if self.host.lock.acquire(blocking=False):
            try:
                self.end_aborted()
            finally:
                self.host.lock.release()

    def follow(self, jobs: Sequence[Job]) -> Iterator[News]:
        """Opens requests of one inbox, and gives their news to their end.

        Ends those that are left, whatever ends the iteration.
        """
        left = {job.arrival: job for job in jobs}
        try:
            self.add(jobs)
            while left:
                inbox = next(iter(left.values())).inbox
                if not inbox:
                    self.turn()
                    continue
                news = inbox.popleft()
                if news.is_over:
                    del left[news.job.arrival]
                if news.job.error is not None:
                    raise news.job.error
                yield news
        finally:
            if left:
                self.abort(list(left.values()))

    def turn(self) -> None:
        """Runs one slice for all open requests, and tells their callers.

        Raises:
          RuntimeError: the engine stalled, which is a bug.
        """
        with self.host.lock:
            epoch = self.host.epoch
            try:
                self.end_aborted()
                if self._open:
                    self._feed()
                if self._running:
                    self._run_slice()
                    self.end_aborted()
            except BaseException:
                self.host.recover()
                self._fail_lost(is_all=self.host.epoch != epoch)
                raise

    async def turn_async(self) -> None:
        """A `turn` in a thread of its own; all who wait at a time wait for the same."""
        task = self._turning
        loop = asyncio.get_running_loop()
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._turning = loop.create_task(self._turn_soon())
        # Who is cancelled leaves the turn to the others.
        await asyncio.shield(task)

    async def _turn_soon(self) -> None:
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(1, "jpaged")
        # Those who wake up behind the last turn may submit before this one begins.
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self.turn)

    def close(self) -> None:
        """Aborts what is open, and lets go of the engine."""
        with self.host.lock:
            self.host.recover()
            self.abort(list(self._open.values()))
            self.host.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def end_aborted(self) -> None:
        """Ends the requests that were aborted; the caller holds the host's lock."""
        while self._aborted:
            job = self._aborted.popleft()
            if job.arrival not in self._open:
                continue
            if job.arrival in self._running:
                self._read_aborted(job)
                self.host.drop(job.seq_indices)
            else:
                job.begin()
            for sample in job.samples:
                if sample.finish_reason is None:
                    sample.end("abort")
            self._note_end(job)
            self._tell(job)

    def _read_aborted(self, job: Job) -> None:
        """Reads what the samples of a request have until now.

        What an algorithm's outputs are is not known before it ends.
        """
        if isinstance(job.params, SamplingParams):
            samples = [one for one in job.samples if one.finish_reason is None]
            self._read(samples, self.host.look())

    def _feed(self) -> None:
        """Submits the first waiting requests, as many as the table has places for."""
        is_priority = self.host.config.policy == "priority"
        while self._new:
            job = self._new.popleft()
            priority = job.params.priority * is_priority
            heapq.heappush(self._waiting, (priority, job.arrival, job))
        if not self._running:
            self.host.clean()
            self._compile_for_waiting()
        placed: list[list[Job]] = [[] for _ in range(self.host.num_replicas)]
        hits, loads = self._hits(), self.host.loads()
        while self._waiting:
            *_, job = self._waiting[0]
            # Others than the aborted are told here why they can never run.
            if job.arrival in self._open:
                is_alone = not (self._running or any(placed))
                # The engine cannot be compiled anew while others run; who waits behind
                # them comes along then.
                config = self.host.config
                if self._grow(config, [job.params]) != config:
                    break
                refusal = self.host.refusal(job)
                replica = self._replica(job, placed, hits.get(job.arrival), loads)
                if refusal is None and replica is None and not is_alone:
                    break
                if refusal is not None:
                    self._fail(job, ValueError(refusal))
                elif replica is None:
                    self._fail(job, RuntimeError(_NO_PLACES))
                else:
                    placed[replica].append(job)
                    loads[replica] += len(job.prompt_token_ids) * job.table_size
            heapq.heappop(self._waiting)
        jobs = [job for mine in placed for job in mine]
        if jobs:
            self._running |= {job.arrival: job for job in jobs}
            found = [
                seq_indices for mine in self.host.submit(placed) for seq_indices in mine
            ]
            for job, seq_indices in zip(jobs, found, strict=True):
                job.start(*seq_indices)

    def _compile_for_waiting(self) -> None:
        """Compiles what all waiting requests need, so that they run together."""
        waiting = [job for *_, job in self._waiting if job.arrival in self._open]
        config = self.host.config
        grown = self._grow(config, [job.params for job in waiting])
        if grown != config:
            self.host.reconfigure(grown)

    def _hits(self) -> dict[int, np.ndarray]:
        """Of those who may have their turn now, by arrival, the tokens i32[D] that each
        replica's prefix cache holds; of nobody where there is no choice."""
        if self.host.num_replicas == 1:
            return {}
        first = heapq.nsmallest(self.host.num_empty, self._waiting)
        jobs = [job for *_, job in first]
        found = self.host.hits(jobs)
        return {job.arrival: mine for job, mine in zip(jobs, found, strict=True)}

    def _replica(
        self,
        job: Job,
        placed: Sequence[Sequence[Job]],
        hits: np.ndarray | None,
        loads: np.ndarray,
    ) -> int | None:
        """The replica with room for a request beside those placed, by `routing`."""
        has_room = [
            self.host.has_room([*mine, job], replica)
            for replica, mine in enumerate(placed)
        ]
        config = self.host.config
        return routing.choose(
            np.zeros_like(loads) if hits is None else hits,
            loads,
            np.array(has_room),
            margin=routing.MARGIN * config.num_blocks * config.block_size,
        )

    def _run_slice(self) -> None:
        progress = self.host.run(*self._slice())
        jobs = list(self._running.values())
        owners = {seq_index: job for job in jobs for seq_index in job.seq_indices}
        for seq_index, event in self.host.take_events():
            if seq_index in owners:  # and is no pinned prefix's
                owners[seq_index].happened.append(event)
        self._read(
            [
                sample
                for job in jobs
                for sample in job.samples
                if sample.finish_reason is None and _is_news(sample, progress)
            ],
            progress,
        )
        done = [job for job in jobs if job.is_finished]
        self._rate_prompts(done)
        # A place may be taken again only when no sample looks for its leader there.
        self.host.release(seq_index for job in done for seq_index in job.seq_indices)
        for job in jobs:
            self._tell(job)

    def _slice(self) -> tuple[float, int]:
        """Seconds, and least steps, that the device may run before the host looks."""
        jobs = self._running.values()
        if any(job.is_streamed for job in jobs):
            return STREAM_S, 1
        if any(job.is_watched for job in jobs):
            return STOP_S, LEAST_STEPS
        is_awaited = self._waiting or any(job.is_awaited for job in jobs)
        return PROGRESS_S if is_awaited else QUIET_S, LEAST_STEPS

    def _read(self, samples: Sequence[Sample], progress: Progress) -> None:
        """Reads what these samples have that is new, and ends those that it ends."""
        ends = [int(progress.num_tokens[sample.seq_index]) for sample in samples]
        wanted = [
            Wanted(sample.seq_index, sample.num_read, end)
            for sample, end in zip(samples, ends, strict=True)
        ]
        stopped = []
        for sample, tokens in zip(samples, self.host.read(wanted), strict=True):
            seq_index, job = sample.seq_index, sample.job
            sample.num_read = int(progress.num_tokens[seq_index])
            sample.first_step = int(progress.first_steps[seq_index])
            sample.last_step = int(progress.last_steps[seq_index])
            is_alone = isinstance(job.params, SamplingParams)
            row = seq_index if is_alone else job.seq_indices[0]
            sample.num_preemptions = int(progress.num_preemptions[row])
            job.num_cached_tokens = int(progress.num_cached[job.seq_indices[0]])
            has_ended = progress.status[seq_index] == scheduler.FINISHED
            code = progress.finish_reasons[seq_index]
            sample.take(tokens, FINISH_REASONS[code] if has_ended else None)
            if sample.finish_reason is not None and not has_ended:
                stopped.append(seq_index)
                self._note_end(job)
        self.host.finish(stopped, request_table.STOP)

    def _rate_prompts(self, jobs: Sequence[Job]) -> None:
        """Reads the prompts' log-probabilities of jobs that have ended."""
        jobs = [job for job in jobs if limits.keeps_prompt_logprobs(job.params)]
        for job in jobs:
            job.prompt_logprobs = [None]
        # The first token has none, and a prompt may have no other.
        jobs = [job for job in jobs if len(job.prompt_token_ids) > 1]
        wanted = [
            Wanted(job.seq_indices[0], 1, len(job.prompt_token_ids)) for job in jobs
        ]
        for job, tokens in zip(jobs, self.host.read(wanted), strict=True):
            count = job.params.prompt_logprobs
            job.prompt_logprobs += [
                logprobs_at(tokens, i, count, job.tokenizer)
                for i in range(len(tokens.ids))
            ]

    def _note_end(self, job: Job) -> None:
        """Notes that the host ended a sequence of a request, between two steps."""
        step = self.host.next_step(job.seq_indices[0] if job.seq_indices else None)
        job.happened.append(Event("finished", self.host.clock(), step))

    def _tell(self, job: Job) -> None:
        """Hands the caller what is new, and closes the request if that is all."""
        deltas = [sample.take_delta() for sample in job.samples if sample.has_news]
        is_over = job.error is not None or job.is_finished
        if is_over:
            self._running.pop(job.arrival, None)
            self._open.pop(job.arrival, None)
            self.num_generated += sum(len(one.token_ids) for one in job.samples)
            is_aborted = any(one.finish_reason == "abort" for one in job.samples)
            if job.error is None and not is_aborted:
                self.means.add(job.latencies())
        if deltas or is_over:
            job.inbox.append(News(job, deltas, is_over))

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends a request that cannot go on."""
        job.error = error
        self._tell(job)

    def _fail_lost(self, is_all: bool) -> None:
        """Tells callers whose requests an interrupt lost: all in the engine's state, or
        those that were on their way into it."""
        for job in list(self._running.values()):
            if is_all or not job.seq_indices:
                self._fail(job, RuntimeError(_LOST))


_LOST = (
    "the engine's state was lost when another call was interrupted, and with it the "
    "requests of this one; send them again"
)
_NO_PLACES = (
    "the request table has no places for all sequences of this request, even with "
    "nothing else in it; release pinned prefixes, or raise max_num_requests"
)


def _is_news(sample: Sample, progress: Progress) -> bool:
    """Whether a sample has ended, or is watched and has new tokens."""
    seq_index = sample.seq_index
    if progress.status[seq_index] == scheduler.FINISHED:
        return True
    return sample.job.is_watched and progress.num_tokens[seq_index] > sample.num_read
