"""Loop: a system, a workload and a cost model on one clock, in one XLA program.

Pipeline: arrivals -> [system -> step load -> cost model -> clock].

Each step submits the requests that have arrived, schedules the system's step, asks the
cost model how long the step takes, and records which requests got their first token and
which ended. Everything is arrays, so `vmap` runs many simulations side by side
(`simulate.sweep`).

Shape symbols: N requests, T steps, H pieces of a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged import policies
from jpaged.compat import when
from jpaged.simulator.clock import VirtualTime
from jpaged.simulator.costs.load import CostModel, StepLoad
from jpaged.simulator.systems.base import (
    SimulatedRequest,
    StepProgress,
    System,
    Usage,
)
from jpaged.simulator.workloads.workload import NO_CONTENT, Workload

_NEVER = -1  # seconds of a time that has not come


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """A workload as arrays, padded after `num_requests`."""

    num_requests: jax.Array  # i32[]
    arrivals: VirtualTime  # [N]
    requests: SimulatedRequest  # of arrays [N]
    begin: VirtualTime  # totals count steps that start from here until `end`
    end: VirtualTime


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the steps of a slice that start between the trace's begin and end."""

    num_steps: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], computed tokens
    seconds: jax.Array  # f32[]
    usage: Usage  # f32[] each, weighted by the seconds of the steps
    saved_share: jax.Array  # f32[], saved blocks / blocks without sharing, weighted too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Simulation:
    """Everything that a step of a simulation reads and writes."""

    state: Any  # the system's state
    clock: VirtualTime
    num_arrived: jax.Array  # i32[], requests that have arrived
    num_submitted: jax.Array  # i32[], of them, those that the system has accepted
    num_ended: jax.Array  # i32[]
    num_steps: jax.Array  # i32[], since the start
    first_times: VirtualTime  # [N], time of the first token; _NEVER before
    end_times: VirtualTime  # [N]
    totals: Totals


def trace(
    workload: Workload,
    *,
    size: int | None = None,
    num_pieces: int | None = None,
    warmup: float = 0.1,
) -> Trace:
    """Convert a workload to arrays.

    Args:
      workload: at least one request.
      size: N to pad to; None: the number of requests.
      num_pieces: H to pad to; None: the workload's.
      warmup: share of the time between the first and the last arrival that the totals
        leave out at the beginning. Totals end with the last arrival, unless all
        requests arrive at once.
    """
    count = len(workload.arrivals)
    size = count if size is None else size

    def padded(values: np.ndarray | jax.Array, fill: int = 0) -> jax.Array:
        values = np.asarray(values)
        shape = (size - count, *values.shape[1:])
        padding = np.full(shape, fill, values.dtype)
        return jnp.asarray(np.concatenate([values, padding]))

    contents = workload.contents
    if contents is None:
        contents = np.zeros((count, 0), np.int32)
    if num_pieces is not None:
        padding = ((0, 0), (0, num_pieces - contents.shape[1]))
        contents = np.pad(contents, padding, constant_values=NO_CONTENT)
    first, last = float(workload.arrivals[0]), float(workload.arrivals[-1])
    begin = first + warmup * (last - first)
    end = last if last > first else np.iinfo(np.int32).max
    times = VirtualTime.at(workload.arrivals)
    return Trace(
        num_requests=jnp.int32(count),
        arrivals=VirtualTime(padded(times.seconds), padded(times.micros)),
        requests=SimulatedRequest(
            number=jnp.arange(size, dtype=jnp.int32),
            prompt_len=padded(workload.prompt_lens, 1),
            output_len=padded(workload.output_lens, 1),
            num_samples=padded(workload.num_samples, 1),
            beam_width=padded(workload.beam_widths),
            content=padded(contents, NO_CONTENT),
            arrival_ms=padded(times.milliseconds),
            deadline_ms=padded(workload.deadlines_ms, policies.NO_DEADLINE),
            user=padded(workload.users, policies.NO_USER),
        ),
        begin=VirtualTime.at(np.array(begin)),
        end=VirtualTime.at(np.array(end)),
    )


def _zero_totals() -> Totals:
    zero = jnp.float32(0)
    return Totals(
        num_steps=jnp.int32(0),
        num_tokens=jnp.int32(0),
        seconds=zero,
        usage=Usage(*[zero] * len(Usage._fields)),
        saved_share=zero,
    )


@functools.partial(jax.jit, static_argnames="system")
def init_simulation(system: System, trace: Trace) -> Simulation:
    """Return a simulation before its first step."""
    never = jnp.full_like(trace.requests.number, _NEVER)
    return Simulation(
        state=system.init(),
        clock=VirtualTime.zero(),
        num_arrived=jnp.int32(0),
        num_submitted=jnp.int32(0),
        num_ended=jnp.int32(0),
        num_steps=jnp.int32(0),
        first_times=VirtualTime(never, never),
        end_times=VirtualTime(never, never),
        totals=_zero_totals(),
    )


def has_unfinished(simulation: Simulation, trace: Trace) -> jax.Array:
    """Return bool[]: a request of the trace has not ended."""
    return simulation.num_ended < trace.num_requests


def _step(
    system: System, cost_model: CostModel, trace: Trace, simulation: Simulation
) -> tuple[Simulation, StepLoad]:
    """Run one step of the system; return the simulation and the load of the step."""
    simulation = _submit_arrived(system, trace, simulation)
    state = system.at_time(simulation.state, simulation.clock.milliseconds)
    scheduled, load, usage = system.begin_step(state)
    num_queued = simulation.num_arrived - simulation.num_submitted
    usage = usage._replace(num_waiting=usage.num_waiting + num_queued)
    seconds = cost_model(load).astype(jnp.float32)
    begin, clock = simulation.clock, simulation.clock.after(seconds)
    state, progress = system.end_step(scheduled)
    is_counted = ~begin.is_before(trace.begin) & begin.is_before(trace.end)
    totals = when(
        is_counted,
        lambda totals: _add(totals, load, usage, seconds),
        simulation.totals,
    )
    simulation = dataclasses.replace(
        simulation,
        state=state,
        clock=clock,
        num_steps=simulation.num_steps + 1,
        totals=totals,
    )
    return _record(simulation, progress), load


@functools.partial(jax.jit, static_argnames="system")
def loads(system: System, trace: Trace, seconds: jax.Array) -> StepLoad:
    """Compute the loads of steps whose durations are known.

    Args:
      system: the system.
      trace: the workload.
      seconds: f32[T], duration of each step. Arrivals, and with them the schedule,
        follow from it.

    Returns:
      The loads, with a leading axis of T in each field.
    """

    def advance(simulation: Simulation, took: jax.Array) -> tuple[Simulation, StepLoad]:
        return _step(system, lambda load: took, trace, simulation)

    return lax.scan(advance, init_simulation(system, trace), seconds)[1]


def _submit_arrived(system: System, trace: Trace, simulation: Simulation) -> Simulation:
    """Submit the requests that have arrived.

    If the system has no work, the clock moves to the next arrival.
    """

    def is_next(number: jax.Array, clock: VirtualTime) -> jax.Array:
        has_arrived = ~clock.is_before(trace.arrivals.take(number))
        return (number < trace.num_requests) & has_arrived

    number = simulation.num_submitted
    is_idle = ~system.has_work(simulation.state) & (number < trace.num_requests)
    next_arrival = simulation.clock.latest(trace.arrivals.take(number))
    clock = jax.tree.map(
        lambda a, b: jnp.where(is_idle, a, b), next_arrival, simulation.clock
    )

    def submit(
        carry: tuple[Any, jax.Array, jax.Array],
    ) -> tuple[Any, jax.Array, jax.Array]:
        state, number, _ = carry
        request = jax.tree.map(lambda x: x.at[number].get(mode="clip"), trace.requests)
        state, ok = system.submit(state, request)
        return state, number + ok.astype(jnp.int32), ok

    carry = (simulation.state, number, jnp.bool_(True))
    state, number, _ = lax.while_loop(
        lambda carry: carry[2] & is_next(carry[1], clock), submit, carry
    )
    num_arrived = lax.while_loop(
        lambda arrived: is_next(arrived, clock),
        lambda arrived: arrived + 1,
        jnp.maximum(simulation.num_arrived, number),
    )
    return dataclasses.replace(
        simulation,
        state=state,
        clock=clock,
        num_arrived=num_arrived,
        num_submitted=number,
    )


def _add(totals: Totals, load: StepLoad, usage: Usage, seconds: jax.Array) -> Totals:
    """Add a step to the totals."""
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    unshared = jnp.maximum(usage.num_blocks + usage.num_saved_blocks, 1)
    share = as_float(usage.num_saved_blocks) / as_float(unshared)
    return Totals(
        num_steps=totals.num_steps + 1,
        num_tokens=totals.num_tokens + jnp.sum(load.query_lens),
        seconds=totals.seconds + seconds,
        usage=jax.tree.map(
            lambda total, value: total + as_float(value) * seconds, totals.usage, usage
        ),
        saved_share=totals.saved_share + share * seconds,
    )


def _record(simulation: Simulation, progress: StepProgress) -> Simulation:
    """Record the time of first tokens and of ended requests."""
    (size,) = simulation.end_times.seconds.shape

    def put(times: VirtualTime, is_now: jax.Array) -> VirtualTime:
        at = jnp.where(is_now, progress.requests, size)
        return jax.tree.map(
            lambda part, value: part.at[at].set(value, mode="drop"),
            times,
            simulation.clock,
        )

    def put_both(
        carry: tuple[VirtualTime, VirtualTime],
    ) -> tuple[VirtualTime, VirtualTime]:
        first_times, end_times = carry
        return put(first_times, progress.has_first), put(end_times, progress.has_ended)

    first_times, end_times = when(
        jnp.any(progress.has_first | progress.has_ended),
        put_both,
        (simulation.first_times, simulation.end_times),
    )
    num_ended = jnp.sum(progress.has_ended, dtype=jnp.int32)
    return dataclasses.replace(
        simulation,
        first_times=first_times,
        end_times=end_times,
        num_ended=simulation.num_ended + num_ended,
    )


@functools.partial(jax.jit, static_argnames="system", donate_argnames="simulation")
def run_steps(
    system: System,
    cost_model: CostModel,
    trace: Trace,
    simulation: Simulation,
    max_steps: jax.Array | int,
) -> Simulation:
    """Run a slice of `max_steps` more steps, or fewer if all requests end before.

    One device call; donates `simulation`. Its totals are those of this slice only, so
    that float32 sums stay short.
    """
    limit = simulation.num_steps + max_steps
    simulation = dataclasses.replace(simulation, totals=_zero_totals())
    return lax.while_loop(
        lambda s: has_unfinished(s, trace) & (s.num_steps < limit),
        lambda s: _step(system, cost_model, trace, s)[0],
        simulation,
    )
