"""Loop: a system, a workload and a cost model on one clock; one XLA program.

Place on the road: [requests at the door -> system -> load -> cost model -> clock].

A step lets in who has arrived, begins the system's step, asks the cost model how long
it takes, and notes who got a first token and who ended when it is over. All is arrays,
so `vmap` runs many simulations side by side (`sweep`).

Letters: N requests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.compat import when
from jpaged.simulator.clock import Clock
from jpaged.simulator.costs.load import CostModel, Load
from jpaged.simulator.systems.base import Progress, Request, System, Usage
from jpaged.simulator.workloads.workload import NO_CONTENT, Workload

_NEVER = -1  # seconds of a moment that has not come


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """A workload as arrays, padded behind `num_requests`."""

    num_requests: jax.Array  # i32[]
    arrivals: Clock  # [N]
    requests: Request  # of arrays [N]
    begin: Clock  # from here to `end` the totals count
    end: Clock


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the steps of a slice that began between the trace's begin and end."""

    num_steps: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], computed
    seconds: jax.Array  # f32[]
    usage: Usage  # f32[] each, times the steps' seconds
    saved_share: jax.Array  # f32[], blocks saved / blocks unshared, times seconds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Simulation:
    """Everything that a step of a simulation reads and writes."""

    state: Any  # the system's
    clock: Clock
    num_arrived: jax.Array  # i32[], requests that have come
    num_submitted: jax.Array  # i32[], of them those that found a place
    num_ended: jax.Array  # i32[]
    num_steps: jax.Array  # i32[], of all times
    first_times: Clock  # [N], of the first token; _NEVER before
    end_times: Clock  # [N]
    totals: Totals


def trace(
    workload: Workload,
    *,
    size: int | None = None,
    num_pieces: int | None = None,
    warmup: float = 0.1,
) -> Trace:
    """The workload as arrays.

    Args:
      workload: at least one request.
      size: N to pad to; None is the number of requests.
      num_pieces: ids of a prompt's pieces to pad to; None is the workload's.
      warmup: share of the time between the first arrival and the last that the totals
        leave out at its begin; behind the last arrival they count nothing, unless all
        arrive at once.
    """
    count = len(workload.arrivals)
    size = count if size is None else size

    def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
        shape = (size - count, *values.shape[1:])
        return np.concatenate([values, np.full(shape, fill, values.dtype)])

    contents = workload.contents
    if contents is None:
        contents = np.zeros((count, 0), np.int32)
    if num_pieces is not None:
        room = ((0, 0), (0, num_pieces - contents.shape[1]))
        contents = np.pad(contents, room, constant_values=NO_CONTENT)
    first, last = float(workload.arrivals[0]), float(workload.arrivals[-1])
    begin = first + warmup * (last - first)
    end = last if last > first else np.iinfo(np.int32).max
    host = Trace(
        num_requests=np.int32(count),
        arrivals=Clock(*map(padded, Clock.at(workload.arrivals))),
        requests=Request(
            number=np.arange(size, dtype=np.int32),
            prompt_len=padded(workload.prompt_lens, 1),
            output_len=padded(workload.output_lens, 1),
            num_samples=padded(workload.num_samples, 1),
            beam_width=padded(workload.beam_widths),
            content=padded(contents, NO_CONTENT),
        ),
        begin=Clock.at(np.array(begin)),
        end=Clock.at(np.array(end)),
    )
    return jax.tree.map(jnp.asarray, host)


def _no_totals() -> Totals:
    zero = jnp.float32(0)
    return Totals(
        num_steps=jnp.int32(0),
        num_tokens=jnp.int32(0),
        seconds=zero,
        usage=Usage(*[zero] * len(Usage._fields)),
        saved_share=zero,
    )


@functools.partial(jax.jit, static_argnames="system")
def init(system: System, trace: Trace) -> Simulation:
    """A simulation before its first step."""
    never = jnp.full_like(trace.requests.number, _NEVER)
    return Simulation(
        state=system.init(),
        clock=Clock.zero(),
        num_arrived=jnp.int32(0),
        num_submitted=jnp.int32(0),
        num_ended=jnp.int32(0),
        num_steps=jnp.int32(0),
        first_times=Clock(never, never),
        end_times=Clock(never, never),
        totals=_no_totals(),
    )


def is_live(simulation: Simulation, trace: Trace) -> jax.Array:
    """bool[]: a request has not ended."""
    return simulation.num_ended < trace.num_requests


def step(
    system: System, cost_model: CostModel, trace: Trace, simulation: Simulation
) -> Simulation:
    """The simulation after one step of the system."""
    return _step(system, cost_model, trace, simulation)[0]


def _step(system, cost_model, trace, simulation) -> tuple[Simulation, Load]:
    simulation = _let_in(system, trace, simulation)
    scheduled, load, usage = system.begin(simulation.state)
    at_the_door = simulation.num_arrived - simulation.num_submitted
    usage = usage._replace(num_waiting=usage.num_waiting + at_the_door)
    seconds = cost_model(load).astype(jnp.float32)
    begin, clock = simulation.clock, simulation.clock.after(seconds)
    state, progress = system.end(scheduled)
    counts = ~begin.is_before(trace.begin) & begin.is_before(trace.end)
    totals = when(
        counts,
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
    return _note(simulation, progress), load


@functools.partial(jax.jit, static_argnames="system")
def loads(system: System, trace: Trace, seconds: jax.Array) -> Load:
    """What each step asked of the machine, of steps whose times are known.

    Args:
      system: as of `step`.
      trace: the workload.
      seconds: f32[T], what the steps took; the schedule follows them.

    Returns:
      Loads, with a leading axis of T in each field.
    """

    def advance(simulation: Simulation, took: jax.Array) -> tuple[Simulation, Load]:
        return _step(system, lambda load: took, trace, simulation)

    return lax.scan(advance, init(system, trace), seconds)[1]


def _let_in(system: System, trace: Trace, simulation: Simulation) -> Simulation:
    """Who has arrived is submitted; an idle system waits for the next to arrive."""

    def is_next(number: jax.Array, clock: Clock) -> jax.Array:
        has_come = ~clock.is_before(trace.arrivals.take(number))
        return (number < trace.num_requests) & has_come

    number = simulation.num_submitted
    is_idle = ~system.has_work(simulation.state) & (number < trace.num_requests)
    waited = simulation.clock.latest(trace.arrivals.take(number))
    clock = jax.tree.map(
        lambda a, b: jnp.where(is_idle, a, b), waited, simulation.clock
    )

    def submit(carry):
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


def _add(totals: Totals, load, usage: Usage, seconds: jax.Array) -> Totals:
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


def _note(simulation: Simulation, progress: Progress) -> Simulation:
    """The simulation with the times of those who got a first token, or ended."""
    (size,) = simulation.end_times.seconds.shape

    def put(times: Clock, is_now: jax.Array) -> Clock:
        at = jnp.where(is_now, progress.requests, size)
        return jax.tree.map(
            lambda part, value: part.at[at].set(value, mode="drop"),
            times,
            simulation.clock,
        )

    def note(carry):
        first_times, end_times = carry
        return put(first_times, progress.has_first), put(end_times, progress.has_ended)

    first_times, end_times = when(
        jnp.any(progress.has_first | progress.has_ended),
        note,
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
def advance(
    system: System,
    cost_model: CostModel,
    trace: Trace,
    simulation: Simulation,
    max_steps: jax.Array | int,
) -> Simulation:
    """The simulation after `max_steps` more steps, or when all requests have ended.

    One device call; donates `simulation`. Its totals are those of these steps alone, so
    that float32 sums stay short.
    """
    limit = simulation.num_steps + max_steps
    simulation = dataclasses.replace(simulation, totals=_no_totals())
    return lax.while_loop(
        lambda s: is_live(s, trace) & (s.num_steps < limit),
        functools.partial(step, system, cost_model, trace),
        simulation,
    )
