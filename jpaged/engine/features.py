"""Features: what a program computes beside greedy decoding, and the state it needs.

Pipeline: request parameters -> [features] -> programs.

A state has arrays for all features that its config allows. A program includes only the
features that the requests at hand use, and gets only their arrays: its view of the
state. So it stays valid when the state grows arrays for other features.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.config import SAMPLING, EngineConfig
from jpaged.engine import algorithms, replicas, request_table
from jpaged.engine.limits import (
    Params,
    keeps_prompt_logprobs,
    rule_sizes,
    sampling_level,
    sees_more,
)
from jpaged.engine.processing import ProcessorRows
from jpaged.engine.state import EngineState
from jpaged.params import SamplingParams


class Features(NamedTuple):
    """What programs compute beside greedy decoding."""

    sampling: int = 0  # index in `SAMPLING`: greedy, random, filtered
    rules: bool = False
    automata: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    algorithms: bool = False  # beam search and decoding algorithms
    token_masks: bool = False
    processors: bool = False  # logits processors
    seen: bool = False  # what algorithms need of the decoder beside logits

    @classmethod
    def of(cls, params: Params, vocab_size: int | None) -> Features:
        """Return what a request with these parameters uses."""
        automata = params.structured_outputs is not None
        processors = bool(params.logits_processors)
        if not isinstance(params, SamplingParams):
            return cls(
                automata=automata,
                algorithms=True,
                processors=processors,
                logprobs=getattr(params, "logprobs", None) is not None,
                seen=sees_more(params),
            )
        return cls(
            sampling=sampling_level(params),
            rules=rule_sizes(params, vocab_size) is not None,
            automata=automata,
            logprobs=(params.logprobs, params.prompt_logprobs) != (None, None),
            prompt_logprobs=keeps_prompt_logprobs(params),
            token_masks=params.token_masks,
            processors=processors,
        )

    def union(self, other: Features) -> Features:
        """Return the features of both."""
        return Features._make(map(max, self, other))

    def covers(self, other: Features) -> bool:
        """Return whether a program with these features serves `other`."""
        return self.union(other) == self

    def __str__(self) -> str:
        found = [("greedy", "sampling", "sampling with filters")[self.sampling]]
        for field in self._fields[1:]:
            if getattr(self, field):
                found.append(field.replace("_", " "))
        return ", ".join(found)


def program_config(config: EngineConfig, features: Features) -> EngineConfig:
    """Return the config of a program that computes only these features."""
    # Each step looks up several of them, so the config caches them.
    known = vars(config).setdefault("_program_configs", {})
    if features not in known:
        known[features] = _program_config(config, features)
    return known[features]


def _program_config(config: EngineConfig, features: Features) -> EngineConfig:
    changes: dict = dict(sampling=SAMPLING[features.sampling])
    if not features.rules:
        changes["rules"] = None
    if not features.automata:
        changes["automata"] = None
    if not features.logprobs:
        changes["num_logprobs"] = 0
    if not features.token_masks:
        changes["num_mask_words"] = 0
    if not features.prompt_logprobs:
        changes["prompt_logprobs"] = False
    if not features.algorithms:
        changes |= dict(max_beam_width=0, algorithms=())
    if not features.processors:
        changes["processors"] = ()
    if not features.seen:
        changes |= dict(seen_hidden=False, seen_layers=(), seen_draft=False)
    return dataclasses.replace(config, **changes)


def view(state: EngineState, features: Features) -> EngineState:
    """Return the part of the state that a program with these features needs.

    It has no pages.
    """
    table, host = state.requests, state.host
    config = program_config(state.config, features)
    changes: dict = {}
    if config.automata is None:
        changes |= dict(automata=None, digests=None)
    if not config.num_logprobs:
        changes |= dict(ranks=None, top_ids=None, top_logprobs=None)
    if not config.num_mask_words:
        changes["masks"] = None
    params = table.params
    if config.rules is None:
        params = dataclasses.replace(params, rules=None)
    if not config.processors:
        params = dataclasses.replace(params, processors=None)
        changes["processor_states"] = None
    if host is not None:
        host = dataclasses.replace(host, cache=None, draft_cache=None)
    return dataclasses.replace(
        state,
        requests=dataclasses.replace(table, params=params, **changes),
        states=state.states if features.algorithms else (),
        cache=None,
        draft_cache=None,
        host=host,
        config=config,
    )


def merge(state: EngineState, after: EngineState) -> EngineState:
    """Return the state with the arrays that a program returned for its view."""

    def present(part: object, *names: str) -> dict:
        found = {name: getattr(part, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    table = after.requests
    fields = (
        field.name for field in dataclasses.fields(table) if field.name != "params"
    )
    params, before = table.params, state.requests.params
    if params.rules is None:
        params = dataclasses.replace(params, rules=before.rules)
    if params.processors is None:
        params = dataclasses.replace(params, processors=before.processors)
    changes = present(table, *fields) | {"params": params}
    host = state.host
    if host is not None and after.host is not None:
        host = dataclasses.replace(
            host, **present(after.host, "blocks", "cache", "draft_cache")
        )
    return dataclasses.replace(
        after,
        requests=dataclasses.replace(state.requests, **changes),
        states=after.states or state.states,
        cache=state.cache if after.cache is None else after.cache,
        draft_cache=(
            state.draft_cache if after.draft_cache is None else after.draft_cache
        ),
        host=host,
        config=state.config,
    )


def grow(state: EngineState, config: EngineConfig) -> EngineState:
    """Return the state with larger arrays for the features of another config.

    Sequences keep what they have, and may run.

    Args:
      state: the state.
      config: differs from the state's in its features, none of which is smaller.

    Raises:
      ValueError: the config allows wider beams, and the state already has beams.
    """
    if 0 < state.config.max_beam_width < config.max_beam_width:
        raise ValueError(
            f"max_beam_width: expected {state.config.max_beam_width} while the request "
            f"table has beams of this width, got {config.max_beam_width}"
        )

    def make() -> tuple:
        return request_table.init_table(config), algorithms.init_states(config)

    table, states = replicas.init_on_mesh(make, state.mesh)
    old = state.requests
    # Beam search becomes algorithm 0, in front of those of the config.
    shift = int(config.max_beam_width > 0) - int(state.config.max_beam_width > 0)
    kinds = old.params.algorithms
    params = dataclasses.replace(
        old.params,
        algorithms=jnp.where(kinds >= 0, kinds + shift, kinds) if shift else kinds,
        rules=_padded(old.params.rules, table.params.rules),
        processors=_with_more_chains(old.params.processors, table.params.processors),
    )
    wider = {
        name: _padded(getattr(old, name), getattr(table, name))
        for name in ("automata", "digests", "ranks", "top_ids", "top_logprobs", "masks")
    }
    if table.processor_states is not None:
        known = old.processor_states or ()
        fresh = table.processor_states[len(known) :]
        wider["processor_states"] = (*known, *fresh)
    grown = list(states)
    grown[shift : shift + len(state.states)] = state.states
    return dataclasses.replace(
        state,
        requests=dataclasses.replace(old, params=params, **wider),
        states=tuple(grown),
        config=config,
    )


def _with_more_chains(
    old: ProcessorRows | None, fresh: ProcessorRows | None
) -> ProcessorRows | None:
    """Return the rows of `fresh` with those of `old` for the chains that it has."""
    if old is None or fresh is None:
        return fresh
    values = (*old.values, *fresh.values[len(old.values) :])
    return ProcessorRows(old.chains, values)


def _padded(old: object, fresh: object) -> object:
    """Return the arrays of `fresh` with those of `old` in their leading corners."""
    if old is None:
        return fresh

    def put(old: jax.Array, fresh: jax.Array) -> jax.Array:
        if old.shape == fresh.shape:
            return old
        return fresh.at[tuple(map(slice, old.shape))].set(old)

    return jax.tree.map(put, old, fresh)
