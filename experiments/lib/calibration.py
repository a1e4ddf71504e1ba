"""The engine measured on this machine's clock, and a cost model fitted to it.

Pipeline: workload -> [engine, one step per call] -> seconds -> fit -> cost model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.lib.engine_loads import random_prompts
from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.models import Decoder
from jpaged.params import SamplingParams
from jpaged.policies import NO_DEADLINE, NO_USER, SchedulerParams
from jpaged.simulator import loop
from jpaged.simulator.costs.buckets import Bucketed, fit_buckets
from jpaged.simulator.costs.fit import FitReport
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.lengths import builtin_lengths
from jpaged.simulator.workloads.workload import Workload


class MeasuredRun(NamedTuple):
    """Times of a workload on the engine, in seconds from its start."""

    first_times: np.ndarray  # f64[N], first token of each request
    end_times: np.ndarray  # f64[N], last token of each request
    step_seconds: np.ndarray  # f64[T], time of each call of `engine.run`
    host_seconds: float  # time between steps while there was work: submissions


_has_work = jax.jit(engine.has_work)


def run_workload(
    model: Decoder,
    config: EngineConfig,
    workload: Workload,
    scheduler_params: SchedulerParams | None = None,
) -> MeasuredRun:
    """Runs a workload on the engine; requests are submitted when they arrive.

    Each call of the engine is one step. The engine is compiled before the clock starts.
    Prompts are random tokens, and outputs have the lengths of the workload.

    Args:
      model: The model.
      config: Sizes of the engine, whose request table has to hold all requests.
      workload: Requests of one sequence each.
      scheduler_params: In place of those of the config; others compile nothing.
    """
    state = engine.init(model, config)
    if scheduler_params is not None:
        state = dataclasses.replace(state, scheduler_params=scheduler_params)
    state, _ = engine.submit(state, [[0]], _params(workload, 0, 1))  # compiles
    state = engine.release(
        engine.run(model, state, 1), np.ones(config.max_num_requests, bool)
    )
    prompts = random_prompts(
        workload.prompt_lens.tolist(), model.config.vocab_size, seed=0
    )
    first_step = int(state.counters.num_steps)
    ends: list[float] = []
    seconds: list[float] = []
    num_submitted, host_seconds = 0, 0.0
    begin = time.perf_counter()
    while True:
        before = time.perf_counter() - begin
        arrived = int(np.searchsorted(workload.arrivals, before, side="right"))
        for number in range(num_submitted, arrived):  # one per call: one program
            state, _ = engine.submit(
                state,
                [prompts[number]],
                _params(workload, number),
                submitted_ms=[int(workload.arrivals[number] * 1000)],
            )
        num_submitted = arrived
        if not bool(_has_work(state)):
            if num_submitted == len(workload):
                break
            wait_s = workload.arrivals[num_submitted] - (time.perf_counter() - begin)
            time.sleep(max(wait_s, 0))
            continue
        start = time.perf_counter() - begin
        host_seconds += start - before
        state = engine.set_clock(state, int(start * 1000))
        state = engine.run(model, state, 1)
        jax.block_until_ready(state.counters)
        ends.append(time.perf_counter() - begin)
        seconds.append(ends[-1] - start)
    results = engine.collect(state)
    times = np.array(ends)
    return MeasuredRun(
        first_times=times[[result.first_step - first_step for result in results]],
        end_times=times[[result.last_step - first_step for result in results]],
        step_seconds=np.array(seconds),
        host_seconds=host_seconds,
    )


def _params(
    workload: Workload, number: int, output_len: int | None = None
) -> SamplingParams:
    """Parameters that give a request of the workload its length."""
    user, deadline = int(workload.users[number]), int(workload.deadlines_ms[number])
    if output_len is None:
        output_len = int(workload.output_lens[number])
    return SamplingParams(
        temperature=0.0,
        max_tokens=output_len,
        ignore_eos=True,
        deadline_ms=None if deadline == NO_DEADLINE else deadline,
        user=None if user == NO_USER else user,
    )


def mean_times(
    workload: Workload, first_times: np.ndarray, end_times: np.ndarray
) -> dict[str, float]:
    """Mean latencies and the makespan of a run, in seconds.

    Args:
      workload: The requests.
      first_times: f64[N], time of each request's first token.
      end_times: f64[N], time of each request's last token.
    """
    latencies = end_times - workload.arrivals
    return {
        "latency_s": float(np.mean(latencies)),
        "normalized_latency_s": float(np.mean(latencies / workload.output_lens)),
        "ttft_s": float(np.mean(first_times - workload.arrivals)),
        "makespan_s": float(np.max(end_times) - workload.arrivals[0]),
    }


def fit_engine(
    config: EngineConfig, workload: Workload, runs: Sequence[MeasuredRun]
) -> tuple[Bucketed, FitReport]:
    """Fits a cost model to the steps of runs of one workload that arrived at once.

    The median over the runs is fitted, since single steps may be disturbed.
    """
    seconds = np.median([run.step_seconds for run in runs], axis=0)
    took = seconds.astype(np.float32)
    loads = loop.loads(EngineSystem(config), loop.trace(workload), took)
    return fit_buckets(config, loads, seconds)


def short_requests(count: int, longest: int, seed: int) -> Workload:
    """Requests that arrive at once, with Alpaca's lengths up to `longest` tokens.

    Longer prompts and outputs are shortened to `longest`.
    """
    lengths = builtin_lengths("alpaca", count, seed)
    return Workload(
        np.zeros(count),
        np.minimum(lengths.prompt_lens, longest),
        np.minimum(lengths.output_lens, longest),
    )


def with_poisson_arrivals(workload: Workload, rate: float, seed: int) -> Workload:
    """The same requests as a Poisson process of `rate` per second, starting at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(workload))
    return dataclasses.replace(workload, arrivals=np.cumsum(gaps) - gaps[0])


def calibration_config(
    workloads: Sequence[Workload], *, max_num_seqs: int, num_blocks: int, **more: Any
) -> EngineConfig:
    """An engine whose request table holds every request of the largest workload.

    Raises:
      ValueError: As `EngineConfig`, or for a request that can never run.
    """
    config = EngineConfig(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=max(
            int(np.max(one.prompt_lens + one.output_lens)) for one in workloads
        ),
        max_num_batched_tokens=max(64, max_num_seqs),
        max_num_requests=max(max_num_seqs, *map(len, workloads)),
        max_num_stop_ids=1,
        **more,
    )
    for one in workloads:
        EngineSystem(config).check(one)
    return config
