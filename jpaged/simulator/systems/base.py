"""System: a serving system as the simulator's clock sees it.

Place on the road: workload -> [system] -> load -> cost model -> clock.

A system is a hashable object whose methods are pure functions of its own state, a
pytree. The engine is one (`served`), the paper's baselines are others (`baselines`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jpaged.simulator.costs.load import Load
from jpaged.simulator.workloads.workload import Workload

NOBODY = -1  # the number of no request


class Request(NamedTuple):
    """A request at the door: scalars, but for what its prompt holds."""

    number: jax.Array  # i32[], its index in the workload
    prompt_len: jax.Array  # i32[], tokens
    output_len: jax.Array  # i32[], tokens that each of its sequences generates
    num_samples: jax.Array  # i32[], sequences; 1 for beams
    beam_width: jax.Array  # i32[], 0: no beam search
    content: jax.Array  # i32[H], ids of the pieces of its prompt, -1 behind the last


class Usage(NamedTuple):
    """What a step's memory holds, each i32[]; the slots add up to the system's own."""

    num_requests: jax.Array  # that have memory
    num_waiting: jax.Array  # requests that were submitted and have none
    token_states: jax.Array  # slots with keys and values
    reservation: jax.Array  # slots that a request will yet use
    internal: jax.Array  # slots taken that nobody will ever use
    external: jax.Array  # slots free, but of no use where somebody waits, or lost
    free: jax.Array  # the others
    num_blocks: jax.Array  # blocks (or slots) in use
    num_saved_blocks: jax.Array  # that would be needed besides, without sharing


class Progress(NamedTuple):
    """What a step brought, by the system's places; P of them."""

    requests: jax.Array  # i32[P], their numbers in the workload, NOBODY where empty
    has_first: jax.Array  # bool[P], their first token came in this step
    has_ended: jax.Array  # bool[P], all their sequences are done, the place is free


class System(Protocol):
    """A serving system."""

    num_slots: int  # tokens whose keys and values fit into its memory

    def program(self, others: Sequence[System]) -> System:
        """A system whose compiled steps serve this one and the others, on their states.

        Raises ValueError where there is none.
        """
        ...

    def enter(self, state: Any) -> Any:
        """The first state of such a `program`, with what is this system's own."""
        ...

    def check(self, workload: Workload) -> None:
        """Raises ValueError for a workload with a request that it could not serve."""
        ...

    def counters(self, state: Any) -> dict[str, int]:
        """What it has counted for itself, such as num_preemptions; host side."""
        ...

    def init(self) -> Any:
        """Its state with nothing to do."""
        ...

    def submit(self, state: Any, request: Request) -> tuple[Any, jax.Array]:
        """The state with the request waiting, and True; or as it was, and False.

        False: there is no place for it now. Requests come in order of arrival, and one
        that is turned away is offered again in the next step.
        """
        ...

    def has_work(self, state: Any) -> jax.Array:
        """bool[]: a request waits or runs."""
        ...

    def begin(self, state: Any) -> tuple[Any, Load, Usage]:
        """A step up to the decoder: what `end` takes, its load, the memory's use."""
        ...

    def end(self, scheduled: Any) -> tuple[Any, Progress]:
        """The state after the step, and what it brought."""
        ...
