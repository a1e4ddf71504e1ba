"""Processing: logits processors of requests, as arrays and as a part of sampling.

Pipeline: rules, constraints -> logits -> [processing] -> sampling, algorithms.

The config lists chains: the processors of a request in their order, without the values
of their parameters. A request refers to one of them. Without chains nothing of this is
in a program, and the request table has no arrays for it.

Shape symbols: R sequences of the request table, S rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.config import EngineConfig
from jpaged.decoding import processors
from jpaged.decoding.processors import Chain, Processed, Row

NO_CHAIN = -1
ChainStates = tuple[tuple[Any, ...], ...]  # of each processor of each chain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProcessorRows:
    """The processors of R sequences; those of one sequence have no axis R."""

    chains: jax.Array  # i32[R], index in the config's `processors`, or NO_CHAIN
    # Parameters of each processor of each chain.
    values: tuple[tuple[dict[str, jax.Array], ...], ...]


def chain_of(params: Any) -> Chain:
    """Return what is compiled of a request's processors; () if it has none."""
    return tuple(one.kind for one in getattr(params, "logits_processors", ()))


def encode(config: EngineConfig, params: Any) -> tuple[ProcessorRows, ChainStates]:
    """Return parameters and initial states of one sequence, as numpy arrays.

    Args:
      config: has the request's chain, if it has one.
      params: the request's parameters; None: no processors.
    """
    mine = chain_of(params)
    values, states = [], []
    for chain in config.processors:
        own = [kind.zeros() for kind in chain]
        if chain == mine:
            own = [dict(one.parameters) for one in params.logits_processors]
        values.append(tuple(own))
        pairs = zip(chain, own, strict=True)
        states.append(tuple(kind.init_state(value) for kind, value in pairs))
    index = config.processors.index(mine) if mine else NO_CHAIN
    return ProcessorRows(np.int32(index), tuple(values)), tuple(states)  # type: ignore


def init_rows(config: EngineConfig) -> tuple[ProcessorRows | None, ChainStates | None]:
    """Return parameters and states of a table without requests; None without chains."""
    if not config.processors:
        return None, None
    size = config.max_num_requests
    with jax.ensure_compile_time_eval():
        one = _idle(config)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *np.shape(x))), one)


@functools.lru_cache(maxsize=64)
def _idle(config: EngineConfig) -> tuple[ProcessorRows, ChainStates]:
    return encode(config, None)


class Processing(NamedTuple):
    """A batch of rows with processed logits, and what comes after their tokens."""

    config: EngineConfig
    mine: ProcessorRows  # arrays with the axis S
    rows: Row  # the same
    states: ChainStates  # before the tokens
    found: tuple[Processed, ...]  # of each chain
    logits: jax.Array  # f32[S, V]
    temperature: jax.Array  # f32[S], what is left to apply

    @property
    def is_faulty(self) -> jax.Array:
        """bool[S]: a processor returned NaN or +inf, so no token is allowed."""
        return functools.reduce(jnp.logical_or, (one.is_faulty for one in self.found))

    def of_rows(self, index: jax.Array) -> Processing:
        """Return the rows `index` i32[Q] of this batch."""
        parts = (self.mine, self.rows, self.states, self.found)
        parts = (*parts, self.logits, self.temperature)
        return Processing(self.config, *jax.tree.map(lambda x: x[index], parts))

    def next_states(self, tokens: jax.Array) -> ChainStates:
        """Return the states after `tokens` i32[S]."""
        return tuple(
            processors.next_states(
                chain,
                self.mine.chains == i,
                self.found[i].inputs,
                self.rows,
                self.mine.values[i],
                self.states[i],
                tokens,
            )
            for i, chain in enumerate(self.config.processors)
        )


def process(
    config: EngineConfig,
    mine: ProcessorRows,
    states: ChainStates,
    rows: Row,
    logits: jax.Array,
    temperature: jax.Array,
) -> Processing:
    """Apply the processors of S rows to their logits.

    Args:
      config: the engine's config.
      mine: the rows' processors.
      states: their states.
      rows: what processors see; tokens after the last are replaced.
      logits: f32[S, V].
      temperature: f32[S]; below GREEDY_BELOW: greedy, and not divided by.
    """
    length, vocab_size = rows.tokens.shape[1], logits.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None, :]
    is_known = index < rows.num_tokens[:, None]
    rows = rows._replace(tokens=jnp.where(is_known, rows.tokens, vocab_size))
    found = []
    for i, chain in enumerate(config.processors):
        one = processors.process(
            chain,
            mine.chains == i,
            logits,
            rows,
            mine.values[i],
            states[i],
            temperature,
        )
        found.append(one)
        logits, temperature = one.logits, one.temperature
    return Processing(config, mine, rows, states, tuple(found), logits, temperature)
