"""Simulate: run a workload on a system and summarise the result, on the host.

Pipeline: loop -> [simulate] -> numbers for tables and plots.

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
# Kinds of KV slots in the paper's figure 2; with `free` they add up to all slots.
COMPOSITION = ("token_states", "reservation", "internal", "external")


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a simulation.

    Totals count the steps that start after the warm-up and before the last arrival.
    Times and counters include all requests and all steps.
    """

    workload: Workload
    num_slots: int  # KV slots of the system
    first_times: np.ndarray  # f64[N], seconds, time of each request's first token
    end_times: np.ndarray  # f64[N], seconds, when its last sequence finished
    num_steps: int
    totals: Totals  # of float64 numbers
    counters: dict[str, int]  # the system's own

    @property
    def normalized_latencies(self) -> np.ndarray:
        """f64[N], seconds from arrival to end, divided by the output's length.

        Source: Kwon et al. 2023, section 6.1.
        """
        return (self.end_times - self.workload.arrivals) / self.workload.output_lens

    @property
    def times_to_first_token(self) -> np.ndarray:
        """f64[N], seconds from arrival to the first token."""
        return self.first_times - self.workload.arrivals

    @property
    def times_per_token(self) -> np.ndarray:
        """f64[M], seconds between tokens, of requests with more than one token."""
        lens = self.workload.output_lens
        took = self.end_times - self.first_times
        return took[lens > 1] / (lens[lens > 1] - 1)

    @property
    def makespan(self) -> float:
        """Seconds from the first arrival until the last request ends."""
        return float(np.max(self.end_times) - self.workload.arrivals[0])

    @property
    def composition(self) -> dict[str, float]:
        """Mean shares of the KV slots in use or lost, as in the paper's figure 2."""
        found = {name: float(getattr(self.totals.usage, name)) for name in COMPOSITION}
        total = sum(found.values())
        return {name: value / total if total else 0.0 for name, value in found.items()}

    def mean(self, name: str) -> float:
        """Return the mean over time of a field of `Usage`."""
        return float(getattr(self.totals.usage, name)) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(float(self.totals.seconds), 1e-12)

    @property
    def saved_share(self) -> float:
        """Mean share of blocks that sharing saves, as in the paper's figure 15."""
        return float(self.totals.saved_share) / self._seconds

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the run, with the keys of `experiments.simulate`."""
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
    """Run a workload on a system, on a clock that the cost model drives.

    Args:
      system: the engine (`EngineSystem`) or a baseline.
      workload: the requests; each must fit into the system's memory.
      cost_model: seconds of a step's load.
      warmup: share of the time between the first and the last arrival that means over
        time leave out at the beginning.
      on_progress: called now and then with the number of ended requests and the number
        of all requests.

    Returns:
      The result.

    Raises:
      ValueError: the workload is empty, or the system cannot serve a request of it.
      RuntimeError: the system makes no progress although requests wait; this is a bug.
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
    """Run many simulations side by side: policies, rates, seeds, machines.

    One compiled program runs them all, with the simulations as its batch axis
    (`jax.vmap`). It runs until the longest simulation has ended.

    Args:
      systems: one for all simulations, or one for each. Engines may differ in their
        scheduler parameters (`EngineSystem.program`); baselines must be equal.
      workloads: as for `simulate`; one for all simulations, or one for each.
      cost_models: one for all simulations, or one for each, all of one class.
      warmup, on_progress: as for `simulate`.

    Returns:
      The results, in order.

    Raises:
      ValueError: as `simulate`; or lists of different lengths, or systems that one
        program cannot run.
      RuntimeError: as `simulate`.
    """
    given: dict[str, Any] = {
        "systems": systems,
        "workloads": workloads,
        "cost_models": cost_models,
    }
    counts = {name: len(v) for name, v in given.items() if isinstance(v, Sequence)}
    if len(set(counts.values())) != 1:
        raise ValueError(
            "systems, workloads, cost_models: expected one or more lists, of equal "
            f"lengths, got lists of {counts}"
        )
    (count,) = set(counts.values())
    each = {
        name: list(value) if name in counts else [value] * count
        for name, value in given.items()
    }
    return _simulate(**each, warmup=warmup, on_progress=on_progress)


def _simulate(
    systems: Sequence[System],
    workloads: Sequence[Workload],
    cost_models: Sequence[CostModel],
    warmup: float,
    on_progress: Callable[[int, int], None] | None,
) -> list[Outcome]:
    for system, workload in zip(systems, workloads, strict=True):
        _check(system, workload, warmup)
    program = systems[0].program(systems[1:])
    size = max(map(len, workloads))
    size = max(1024, 1 << (size - 1).bit_length())  # few shapes to compile
    width = max(_num_pieces(workload) for workload in workloads)
    traces = [
        loop.trace(one, size=size, num_pieces=width, warmup=warmup) for one in workloads
    ]
    simulations = [
        _enter(system, loop.init_simulation(program, trace))
        for system, trace in zip(systems, traces, strict=True)
    ]
    if len(workloads) == 1:
        cost_model, trace, simulation = cost_models[0], traces[0], simulations[0]
        run_steps = functools.partial(loop.run_steps, program)
    else:
        cost_model, trace, simulation = map(_stack, (cost_models, traces, simulations))
        run_steps = functools.partial(_run_all_steps, program)
    simulation, totals = _run(run_steps, cost_model, trace, simulation, on_progress)
    ended = jax.device_get((simulation, totals))
    if len(workloads) == 1:
        return [_outcome(systems[0], workloads[0], *ended)]
    outcomes = []
    for index, (system, workload) in enumerate(zip(systems, workloads, strict=True)):
        simulation, totals = jax.tree.map(operator.itemgetter(index), ended)
        outcomes.append(_outcome(system, workload, simulation, totals))
    return outcomes


def _enter(system: System, simulation: Simulation) -> Simulation:
    return dataclasses.replace(simulation, state=system.enter(simulation.state))


def _num_pieces(workload: Workload) -> int:
    return 0 if workload.contents is None else workload.contents.shape[1]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _run_all_steps(
    system: System,
    cost_model: CostModel,
    trace: Trace,
    simulation: Simulation,
    max_steps: int,
) -> Simulation:
    """Run a slice of simulations side by side; see `loop.run_steps`."""
    one = functools.partial(loop.run_steps, system)
    return jax.vmap(one, in_axes=(0, 0, 0, None))(
        cost_model, trace, simulation, max_steps
    )


def _check(system: System, workload: Workload, warmup: float) -> None:
    if not len(workload):
        raise ValueError("workload: expected at least one request, got none")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a share from 0 to below 1, got {warmup}")
    system.check(workload)


def _run(
    run_steps: Callable[..., Simulation],
    cost_model: CostModel,
    trace: Trace,
    simulation: Simulation,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Simulation, Totals]:
    """Run slices until all requests have ended; sum their totals in float64."""
    totals, before = None, None
    count = int(np.sum(trace.num_requests))
    while True:
        simulation = run_steps(cost_model, trace, simulation, _STEPS_PER_CALL)
        part, ended, steps, submitted = jax.device_get(
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
        now = (done, int(np.sum(submitted)), float(np.sum(part.num_tokens)))
        if before is not None and now[:2] == before[:2] and now[2] == 0:
            raise RuntimeError(
                f"system: expected progress, got none after {int(np.max(steps))} "
                f"steps with {count - done} requests that have not ended; this is a bug"
            )
        before = now


def _outcome(
    system: System, workload: Workload, simulation: Simulation, totals: Totals
) -> Outcome:
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
