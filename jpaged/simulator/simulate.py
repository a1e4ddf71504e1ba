"""Simulate: a workload through a system, and what came of it, on the host.

Place on the road: loop -> [simulate] -> numbers for tables and plots.

    system = EngineSystem(EngineConfig(num_blocks=983, max_num_requests=512))
    outcome = simulate(system, paper_trace("sharegpt", 2.0, 600, seed=0), cost_model)
    outcome.summary()["normalized_latency_s"]
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.simulator import loop
from jpaged.simulator.costs.load import CostModel
from jpaged.simulator.loop import Simulation, Totals, Trace
from jpaged.simulator.systems.base import System
from jpaged.simulator.workloads.workload import Workload

_STEPS_PER_CALL = 4096
# What a step's slots are, by the paper's figure 2; together with `free` they are all.
COMPOSITION = ("token_states", "reservation", "internal", "external")


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a simulation brought.

    Sums count the steps that began after the warm-up and before the last arrival;
    times of requests are those of all.
    """

    workload: Workload
    num_slots: int  # of the system's memory
    first_times: np.ndarray  # f64[N], seconds, of each request's first token
    end_times: np.ndarray  # f64[N], when its last sequence was done
    num_steps: int  # of all times
    totals: Totals  # of float64 numbers
    counters: dict[str, int]  # that the system keeps for itself, of all times

    @property
    def normalized_latencies(self) -> np.ndarray:
        """f64[N], seconds per token: from arrival to the end, over the output's length.

        Source: Kwon et al. 2023, section 6.1.
        """
        return (self.end_times - self.workload.arrivals) / self.workload.output_lens

    @property
    def times_to_first_token(self) -> np.ndarray:
        """f64[N], seconds from arrival to the first token."""
        return self.first_times - self.workload.arrivals

    @property
    def times_per_token(self) -> np.ndarray:
        """f64[M], seconds between tokens, of the requests that have more than one."""
        lens = self.workload.output_lens
        took = self.end_times - self.first_times
        return took[lens > 1] / (lens[lens > 1] - 1)

    @property
    def makespan(self) -> float:
        """Seconds from the first arrival to the last end."""
        return float(np.max(self.end_times) - self.workload.arrivals[0])

    @property
    def composition(self) -> dict[str, float]:
        """Shares of the slots in use or lost, over time, as in the paper's figure 2."""
        found = {name: float(getattr(self.totals.usage, name)) for name in COMPOSITION}
        total = sum(found.values())
        return {name: value / total if total else 0.0 for name, value in found.items()}

    def mean(self, name: str) -> float:
        """Over time, of a field of `Usage`."""
        return float(getattr(self.totals.usage, name)) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(float(self.totals.seconds), 1e-12)

    @property
    def saved_share(self) -> float:
        """Blocks that sharing saved, of those needed without, over time (figure 15)."""
        return float(self.totals.saved_share) / self._seconds

    def summary(self) -> dict[str, Any]:
        """The numbers of a run, by the names of `experiments.simulate`."""
        latencies = self.normalized_latencies
        tokens = int(np.sum(self.workload.output_lens * self._num_sequences))
        prompt_tokens = self.counters.get("num_prompt_tokens", 0)
        cached = self.counters.get("num_cached_tokens", 0)
        return {
            "num_requests": len(self.workload),
            "num_skipped": self.workload.num_skipped,
            "num_steps": self.num_steps,
            "makespan_s": self.makespan,
            "mean_batched_requests": self.mean("num_requests"),
            "mean_waiting_requests": self.mean("num_waiting"),
            "normalized_latency_s": float(np.mean(latencies)),
            "normalized_latency_p50_s": float(np.percentile(latencies, 50)),
            "normalized_latency_p99_s": float(np.percentile(latencies, 99)),
            "mean_ttft_s": float(np.mean(self.times_to_first_token)),
            "mean_tpot_s": _mean(self.times_per_token),
            "output_tokens_per_s": tokens / max(self.makespan, 1e-12),
            "kv_composition": self.composition,
            "kv_free_share": self.mean("free") / self.num_slots,
            "kv_saved_share": self.saved_share,
            "num_preemptions": self.counters.get("num_preemptions", 0),
            "num_swapped_blocks": self.counters.get("num_swapped_blocks", 0),
            "prefix_hit_ratio": cached / prompt_tokens if prompt_tokens else 0.0,
        }

    @property
    def _num_sequences(self) -> np.ndarray:
        return np.maximum(self.workload.num_samples, self.workload.beam_widths)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def simulate(
    system: System,
    workload: Workload,
    cost_model: CostModel,
    *,
    warmup: float = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """What comes of the workload on the system, on a clock that the cost model drives.

    Args:
      system: the engine (`EngineSystem`) or a baseline.
      workload: requests; each must fit into the system's memory.
      cost_model: seconds of a step's load.
      warmup: share of the time between the first arrival and the last that means of
        memory and batch leave out at its begin.
      on_progress: called with the requests that have ended and all of them, now and
        then.

    Raises:
      ValueError: the workload is empty, or has a request that the system cannot serve.
      RuntimeError: the system stands still with requests that wait.
    """
    (outcome,) = _simulate([system], [workload], [cost_model], warmup, on_progress)
    return outcome


def sweep(
    systems: System | Sequence[System],
    workloads: Workload | Sequence[Workload],
    cost_models: CostModel | Sequence[CostModel],
    *,
    warmup: float = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """`simulate` of many settings side by side: policies, rates, seeds, machines.

    One compiled program, whose batch axis the simulations are (`jax.vmap`); it goes on
    until the longest has ended.

    Args:
      systems: one for all, or one for each; engines may differ in the scheduler's
        numbers (`EngineSystem.program`), baselines not at all.
      workloads: as for `simulate`, one for all, or one for each.
      cost_models: one for all, or one for each, all of one kind.
      warmup, on_progress: as for `simulate`.

    Returns:
      The outcomes in order.

    Raises:
      ValueError, RuntimeError: as `simulate`; or numbers of them that differ, or
        systems that no one program serves.
    """
    given = {"systems": systems, "workloads": workloads, "cost_models": cost_models}
    counts = {name: len(v) for name, v in given.items() if isinstance(v, Sequence)}
    if len(set(counts.values())) != 1:
        raise ValueError(
            "systems, workloads, cost_models: expected one or more lists, of equal "
            f"lengths, got lists of {counts}"
        )
    (count,) = set(counts.values())
    each = [
        list(value) if name in counts else [value] * count
        for name, value in given.items()
    ]
    return _simulate(*each, warmup, on_progress)


def _simulate(systems, workloads, cost_models, warmup, on_progress) -> list[Outcome]:
    for system, workload in zip(systems, workloads, strict=True):
        _check(system, workload, warmup)
    program = systems[0].program(systems[1:])
    size = max(map(len, workloads))
    size = max(1024, 1 << (size - 1).bit_length())  # few shapes, few compilations
    width = max(_num_pieces(workload) for workload in workloads)
    traces = [
        loop.trace(one, size=size, num_pieces=width, warmup=warmup) for one in workloads
    ]
    simulations = [
        _enter(system, loop.init(program, trace))
        for system, trace in zip(systems, traces, strict=True)
    ]
    if len(workloads) == 1:
        carry = (cost_models[0], traces[0], simulations[0])
        advance = functools.partial(loop.advance, program)
    else:
        carry = tuple(map(_stack, (cost_models, traces, simulations)))
        advance = functools.partial(_advance_all, program)
    simulation, totals = _run(advance, *carry, on_progress)
    ended = jax.device_get((simulation, totals))
    if len(workloads) == 1:
        return [_outcome(systems[0], workloads[0], *ended)]
    return [
        _outcome(system, workload, *jax.tree.map(operator.itemgetter(index), ended))
        for index, (system, workload) in enumerate(zip(systems, workloads, strict=True))
    ]


def _enter(system: System, simulation: Simulation) -> Simulation:
    return dataclasses.replace(simulation, state=system.enter(simulation.state))


def _num_pieces(workload: Workload) -> int:
    return 0 if workload.contents is None else workload.contents.shape[1]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance_all(
    system: System,
    cost_model: CostModel,
    trace: Trace,
    simulation: Simulation,
    max_steps: int,
) -> Simulation:
    """`loop.advance` of simulations side by side."""
    one = functools.partial(loop.advance, system)
    return jax.vmap(one, in_axes=(0, 0, 0, None))(
        cost_model, trace, simulation, max_steps
    )


def _check(system: System, workload: Workload, warmup: float) -> None:
    if not len(workload):
        raise ValueError("workload: expected at least one request, got none")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a share from 0 to below 1, got {warmup}")
    system.check(workload)


def _run(advance, cost_model, trace, simulation, on_progress):
    """The simulation at its end, and its totals in float64."""
    totals, before = None, None
    count = int(np.sum(trace.num_requests))
    while True:
        simulation = advance(cost_model, trace, simulation, _STEPS_PER_CALL)
        part, ended, steps, came = jax.device_get(
            (
                simulation.totals,
                simulation.num_ended,
                simulation.num_steps,
                simulation.num_submitted,
            )
        )
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        totals = part if totals is None else jax.tree.map(np.add, totals, part)
        done = int(np.sum(ended))
        if on_progress is not None:
            on_progress(done, count)
        if done == count:
            return simulation, totals
        now = (done, int(np.sum(came)), float(np.sum(part.num_tokens)))
        if before is not None and now[:2] == before[:2] and now[2] == 0:
            raise RuntimeError(
                f"system: it stands still after {int(np.max(steps))} steps with "
                f"{count - done} requests that have not ended; this is a bug"
            )
        before = now


def _outcome(system, workload, simulation: Simulation, totals: Totals) -> Outcome:
    count = len(workload)
    return Outcome(
        workload=workload,
        num_slots=system.num_slots,
        first_times=simulation.first_times.as_seconds()[:count],
        end_times=simulation.end_times.as_seconds()[:count],
        num_steps=int(simulation.num_steps),
        totals=totals,
        counters=system.counters(simulation.state),
    )
