"""Calibration: the engine on this machine's clock, and a cost model fitted to it.

Beside the road: workload -> [engine, a step at a time] -> seconds -> fit -> cost model.
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
from jpaged.simulator import loop
from jpaged.simulator.costs.buckets import Bucketed, fit_buckets
from jpaged.simulator.costs.fit import FitReport
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.lengths import builtin_lengths
from jpaged.simulator.workloads.workload import Workload


class Served(NamedTuple):
    """What a workload took on the engine; seconds from its begin."""

    first_times: np.ndarray  # f64[N], each request's first token
    end_times: np.ndarray  # f64[N], its last token
    step_seconds: np.ndarray  # f64[T], in `engine.run`, one step a call
    host_seconds: float  # spent between steps while there was work: submissions


_has_work = jax.jit(engine.has_work)


def serve(model: Decoder, config: EngineConfig, workload: Workload) -> Served:
    """The workload on the engine, each request submitted when its time has come.

    The engine is driven one step a call, and compiled before the clock starts. Prompts
    are random tokens; outputs have the lengths that the workload says.

    Args:
      model: decodes.
      config: room for all requests of the workload at once.
      workload: requests of one sequence each.
    """
    state = engine.init(model, config)
    state, _ = engine.submit(state, [[0]], _params(1))  # compiles
    state = engine.release(
        engine.run(model, state, 1), np.ones(config.max_num_requests, bool)
    )
    prompts = random_prompts(workload.prompt_lens, model.config.vocab_size, seed=0)
    first_step = int(state.counters.num_steps)
    ends: list[float] = []
    seconds: list[float] = []
    come, host_seconds = 0, 0.0
    begin = time.perf_counter()
    while True:
        before = time.perf_counter() - begin
        arrived = int(np.searchsorted(workload.arrivals, before, side="right"))
        for number in range(come, arrived):  # one a call: one compiled program
            state, _ = engine.submit(
                state, [prompts[number]], _params(workload.output_lens[number])
            )
        come = arrived
        if not bool(_has_work(state)):
            if come == len(workload):
                break
            time.sleep(max(workload.arrivals[come] - (time.perf_counter() - begin), 0))
            continue
        start = time.perf_counter() - begin
        host_seconds += start - before
        state = engine.run(model, state, 1)
        jax.block_until_ready(state.counters)
        ends.append(time.perf_counter() - begin)
        seconds.append(ends[-1] - start)
    results = engine.collect(state)
    at = np.array(ends)
    return Served(
        first_times=at[[result.first_step - first_step for result in results]],
        end_times=at[[result.last_step - first_step for result in results]],
        step_seconds=np.array(seconds),
        host_seconds=host_seconds,
    )


def _params(output_len: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=int(output_len), ignore_eos=True)


def means(
    workload: Workload, first_times: np.ndarray, end_times: np.ndarray
) -> dict[str, float]:
    """Seconds, of a run whose requests had their first and last tokens then."""
    latencies = end_times - workload.arrivals
    return {
        "latency_s": float(np.mean(latencies)),
        "normalized_latency_s": float(np.mean(latencies / workload.output_lens)),
        "ttft_s": float(np.mean(first_times - workload.arrivals)),
        "makespan_s": float(np.max(end_times) - workload.arrivals[0]),
    }


def fit_engine(
    config: EngineConfig, workload: Workload, runs: Sequence[Served]
) -> tuple[Bucketed, FitReport]:
    """The cost model of the steps of `runs` of one workload that came all at once.

    Of each step the median over the runs counts: a run is disturbed here and there.
    """
    seconds = np.median([run.step_seconds for run in runs], axis=0)
    took = seconds.astype(np.float32)
    loads = loop.loads(EngineSystem(config), loop.trace(workload), took)
    return fit_buckets(config, loads, seconds)


def short_requests(count: int, longest: int, seed: int) -> Workload:
    """Alpaca's lengths cut to `longest` tokens for a prompt and for an output, all at
    once."""
    lengths = builtin_lengths("alpaca", count, seed)
    return Workload(
        np.zeros(count),
        np.minimum(lengths.prompt_lens, longest),
        np.minimum(lengths.output_lens, longest),
    )


def arriving(workload: Workload, rate: float, seed: int) -> Workload:
    """The same requests as a Poisson process of `rate` a second, the first one at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(workload))
    return dataclasses.replace(workload, arrivals=np.cumsum(gaps) - gaps[0])


def engine_config(
    workloads: Sequence[Workload], *, max_num_seqs: int, num_blocks: int, **more: Any
) -> EngineConfig:
    """An engine with a place for each request of the largest of the workloads.

    Raises:
      ValueError: as `EngineConfig`; or a request that could never run.
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
