"""Engine: the whole state is one pytree, and a step is EngineState -> EngineState.

Pipeline: [step] runs everything: schedule, append, decoder, sampling, bookkeeping.
`run` is a `lax.while_loop` of steps: one device call in which requests of any lengths
are admitted, wait, run and finish.

    state = init(model, config)
    state, seq_indices = submit(state, prompts, params)
    state = run(model, state)
    results = collect(state)

If the `data` axis of the mesh is larger than 1, the state holds that number of
replicas, each with its own requests and pages: `submit` and `pin` use one of them,
`step` and `run` run all at once, and `collect` returns the results of all. Sequence
index i of replica r is numbered r * max_num_requests + i.

`host` has the functions that run on the host: `submit`, `collect` and others.

Source: Kwon et al. 2023, sections 4 and 5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.config import EngineConfig
from jpaged.engine import bookkeeping, iteration, replicas
from jpaged.engine.state import EngineState, Model


def step(model: Model, state: EngineState) -> EngineState:
    """Run one iteration: schedule, append, decode, commit.

    Jit it with `state` donated, so that the pages are updated in place.

    Args:
      model: the decoder, or a target with its draft model.
      state: the engine's state.
    """

    def once(model: Model, state: EngineState) -> EngineState:
        memory = iteration.working_memory(model, state)
        return iteration.iterate(model, state, memory, state.config)[0]

    return replicas.run_on_mesh(once, model, state)


def has_work(state: EngineState) -> jax.Array:
    """bool[]: some sequence is unfinished, and the engine has not stalled."""
    status = state.requests.queue.status
    is_any = jnp.any(bookkeeping.is_unfinished(status), axis=-1)
    return jnp.any(is_any & ~state.counters.is_stalled)  # of any replica


@functools.partial(
    jax.jit,
    donate_argnames="state",
    static_argnames=("max_num_seqs", "max_num_batched_tokens"),
)
def run(
    model: Model,
    state: EngineState,
    max_steps: int | jax.Array | None = None,
    *,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
) -> EngineState:
    """Run steps until all sequences have finished, in one device call.

    Each replica runs until its own sequences have finished. Donates `state`.

    Args:
      model: the decoder, or a target with its draft model.
      state: the engine's state.
      max_steps: maximum number of steps, of each replica. It is traced: changing it
        compiles nothing.
      max_num_seqs: a lower limit than the config's, at least the number of rows that
        run already. The program then has fewer sizes, and compiles in less time.
      max_num_batched_tokens: a lower limit than the config's.
    """
    config = dataclasses.replace(
        state.config,
        max_num_seqs=max_num_seqs or state.config.max_num_seqs,
        max_num_batched_tokens=(
            max_num_batched_tokens or state.config.max_num_batched_tokens
        ),
    )
    most = jnp.iinfo(jnp.int32).max if max_steps is None else max_steps
    return replicas.run_on_mesh(
        functools.partial(_run, config), model, state, jnp.asarray(most, jnp.int32)
    )


_Carry = tuple[EngineState, iteration.WorkingMemory]


def _run(
    config: EngineConfig, model: Model, state: EngineState, max_steps: jax.Array
) -> EngineState:
    first = state.counters.num_steps

    def continues(carry: _Carry) -> jax.Array:
        state, _ = carry
        return has_work(state) & (state.counters.num_steps - first < max_steps)

    def body(carry: _Carry) -> _Carry:
        return iteration.iterate(model, *carry, config)

    carry = (state, iteration.working_memory(model, state))
    state, _ = lax.while_loop(continues, body, carry)
    return state
