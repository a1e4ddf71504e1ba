"""Algorithm states: the algorithms of a config, and their states in the request table.

Pipeline: config -> [algorithm_states] -> submission, algorithms.

Shape symbols: R sequences of the request table, W rows of one request.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpaged.config import EngineConfig
from jpaged.decoding import beam
from jpaged.decoding.base import DecodingAlgorithm, parameters_of
from jpaged.engine import request_table

# For each algorithm the states of all requests, [R, ...]: a request's state is stored
# at the sequence index of its leader.
States = tuple[Any, ...]


def as_arrays(state: Any) -> Any:
    """Return a user's state with jax arrays as leaves."""
    return jax.tree.map(jnp.asarray, state)


def config_algorithms(
    config: EngineConfig,
) -> tuple[tuple[DecodingAlgorithm, int], ...]:
    """Return the algorithms of the config, each with its rows; beam search is first."""
    if not config.max_beam_width:
        return config.algorithms
    beams = _beam_search(config.max_num_stop_ids)
    return ((beams, config.max_beam_width), *config.algorithms)


def with_needs(config: EngineConfig) -> EngineConfig:
    """Return the config with the decoder outputs that its algorithms need."""
    needs = [one for one, _ in config.algorithms if hasattr(one, "needs")]
    hidden = any("hidden" in one.needs for one in needs)
    layers = sorted({layer for one in needs for layer in one.layers})
    return dataclasses.replace(
        config,
        seen_hidden=hidden,
        seen_layers=tuple(layers),
        seen_draft=any("draft" in one.needs for one in needs),
    )


def has_needs(config: EngineConfig, algorithm: Any) -> bool:
    """Whether a program of this config computes what an algorithm needs."""
    needs = getattr(algorithm, "needs", ())
    layers = getattr(algorithm, "layers", ())
    return (
        (config.seen_hidden or "hidden" not in needs)
        and (config.seen_draft or "draft" not in needs)
        and set(layers) <= set(config.seen_layers)
    )


@functools.cache
def _beam_search(num_stop_ids: int) -> DecodingAlgorithm:
    """Beam search for all requests: its parameters come with each request."""

    def init(num_rows: int) -> beam.BeamState:
        return beam.beam_state(
            num_rows,
            width=num_rows,
            max_tokens=1,
            length_penalty=1.0,
            early_stopping=False,
            stop_ids=(),
            num_stop_ids=num_stop_ids,
        )

    return DecodingAlgorithm(init, beam.step)


class Parametrised(NamedTuple):
    """The state of an algorithm with parameters."""

    state: Any
    parameters: dict[str, Any]


def initial_state(
    algorithm: Any, num_rows: int, parameters: Mapping[str, Any] | None = None
) -> Any:
    """Return the state of a new request's algorithm in the request table.

    Args:
      algorithm: the algorithm.
      num_rows: rows of the request.
      parameters: the request's values of some of the algorithm's parameters.
    """
    state = as_arrays(algorithm.init(num_rows))
    if not getattr(algorithm, "specs", ()):
        return state
    return Parametrised(state, parameters_of(algorithm, parameters))


def init_states(config: EngineConfig) -> States:
    """Create the algorithms' states without any request."""

    def empty(algorithm: DecodingAlgorithm, num_rows: int) -> Any:
        one = jax.eval_shape(lambda: initial_state(algorithm, num_rows))
        size = config.max_num_requests
        return jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), one)

    return tuple(empty(*pair) for pair in config_algorithms(config))


def insert_states(states: States, new: request_table.Submission) -> States:
    """Insert the states of new requests, at their leaders' sequence indices."""

    def put(kind: int, column: jax.Array, values: jax.Array) -> jax.Array:
        is_mine = (new.params.algorithms == kind) & (new.params.sampling.sample == 0)
        seq_indices = jnp.where(is_mine, new.seq_indices, column.shape[0])
        return column.at[seq_indices].set(values, mode="drop")

    return tuple(
        jax.tree.map(functools.partial(put, kind), old, fresh)
        for kind, (old, fresh) in enumerate(zip(states, new.states, strict=True))
    )
