"""System: the interface of a simulated serving system, and its registry record.

Pipeline: workload -> [system] -> step load -> cost model -> clock.

A system is a hashable object whose methods are pure functions of its state, a pytree.
The engine is one system (`engine_system`); the baselines of the paper are others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jpaged.policies import NO_DEADLINE, NO_USER
from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.options import Option
from jpaged.simulator.workloads.workload import Workload

NO_REQUEST_NUMBER = -1  # in place of a request number where there is no request


class SimulatedRequest(NamedTuple):
    """A request that arrives: scalars, except for `content`."""

    number: jax.Array  # i32[], its index in the workload
    prompt_len: jax.Array  # i32[], tokens
    output_len: jax.Array  # i32[], tokens that each of its sequences generates
    num_samples: jax.Array  # i32[], sequences; 1 for beam search
    beam_width: jax.Array  # i32[], 0: no beam search
    content: jax.Array  # i32[H], ids of the prompt's pieces, -1 after the last
    arrival_ms: jax.Array | int = 0  # i32[], on the clock of `System.at_time`
    deadline_ms: jax.Array | int = NO_DEADLINE  # i32[], from arrival
    user: jax.Array | int = NO_USER  # i32[], or policies.NO_USER


class Usage(NamedTuple):
    """How a step uses the KV memory, each i32[].

    The five kinds of slots add up to the system's `num_slots`.
    """

    num_requests: jax.Array  # requests with memory
    num_waiting: jax.Array  # submitted requests without memory
    token_states: jax.Array  # slots that hold keys and values
    reservation: jax.Array  # slots that their request fills later
    internal: jax.Array  # allocated slots that are never filled
    external: jax.Array  # lost slots, and free ones that a waiting request cannot use
    free: jax.Array  # the remaining slots
    num_blocks: jax.Array  # allocated blocks (or slots)
    num_saved_blocks: jax.Array  # further blocks that would be needed without sharing


class StepProgress(NamedTuple):
    """What a step finished, for each of the P request slots of a system."""

    requests: jax.Array  # i32[P], request numbers, NO_REQUEST_NUMBER where empty
    has_first: jax.Array  # bool[P], the first token was generated in this step
    has_ended: jax.Array  # bool[P], all sequences finished; the request slot is empty


class System(Protocol):
    """A simulated serving system."""

    @property
    def num_slots(self) -> int:
        """KV slots: tokens whose keys and values fit into the memory."""
        ...

    def program(self, others: Sequence[System]) -> System:
        """Return a system whose compiled steps run the states of all given systems.

        Args:
          others: the systems that share the program with this one.

        Raises:
          ValueError: no single program can run all of them.
        """
        ...

    def enter(self, state: Any) -> Any:
        """Set the parameters of this system in the initial state of its `program`."""
        ...

    def check(self, workload: Workload) -> None:
        """Raise ValueError if the system can never serve a request of the workload."""
        ...

    def counters(self, state: Any) -> dict[str, int]:
        """Return the system's own counters, such as num_preemptions; host only."""
        ...

    def init(self) -> Any:
        """Return the state without requests."""
        ...

    def submit(self, state: Any, request: SimulatedRequest) -> tuple[Any, jax.Array]:
        """Add a request to those that wait.

        Requests are submitted in order of arrival. A rejected request is submitted
        again in the next step.

        Returns:
          The state, and bool[]: whether there was space for the request. If not, the
          state is unchanged.
        """
        ...

    def has_work(self, state: Any) -> jax.Array:
        """Return bool[]: a request waits or runs."""
        ...

    def at_time(self, state: Any, milliseconds: jax.Array) -> Any:
        """Set the time, i32[], at which the next step begins."""
        ...

    def begin_step(self, state: Any) -> tuple[Any, StepLoad, Usage]:
        """Run a step up to the decoder.

        Returns:
          The scheduled step, which is the argument of `end_step`; its load; and its
          use of the memory.
        """
        ...

    def end_step(self, scheduled: Any) -> tuple[Any, StepProgress]:
        """Run the rest of a step; return the state and what the step finished."""
        ...


def _same_keywords(
    workload: Workload, num_slots: int, **options: Any
) -> dict[str, Any]:
    del workload, num_slots
    return options


@dataclasses.dataclass(frozen=True)
class SystemEntry:
    """A system in the registry.

    Attributes:
      name: as in flags.
      build: `build(workload, num_slots, *, max_num_seqs, ...)` returns the system for
        a workload and a memory of `num_slots` tokens.
      max_request_len: `max_request_len(num_slots, num_beams, options)` returns the
        number of tokens, prompt and output, of the longest request that can be served.
      is_engine: whether the system is the engine, whose `build` also accepts the
        fields of `EngineConfig`.
      options: settings that a runner offers as flags.
      keywords: `keywords(workload, num_slots, **options)` returns the keywords of
        `build` for values of `options`.
    """

    name: str
    build: Callable[..., System]
    max_request_len: Callable[[int, int, Mapping[str, Any]], int]
    is_engine: bool = False
    options: tuple[Option, ...] = ()
    keywords: Callable[..., dict[str, Any]] = _same_keywords

    def from_options(
        self,
        workload: Workload,
        num_slots: int,
        options: Mapping[str, Any],
        **sizes: Any,
    ) -> System:
        """Build the system from values of `options`, by name, and further keywords."""
        keywords = self.keywords(workload, num_slots, **options)
        return self.build(workload, num_slots, **sizes, **keywords)
