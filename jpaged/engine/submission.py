"""Submission: requests as arrays for the request table.

Pipeline: params -> [submission] -> request table. Host code: parameters become
arrays here, after `limits` has checked them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.decoding import constraints, rule_arrays
from jpaged.decoding.automaton import TokenAutomaton
from jpaged.decoding.beam import beam_state
from jpaged.decoding.constraints import Automata
from jpaged.decoding.rule_arrays import LogitsRules
from jpaged.decoding.sample import SamplingRows
from jpaged.engine import algorithms, processing, request_attributes
from jpaged.engine.limits import (
    Params,
    RequestShape,
    keeps_prompt_logprobs,
    request_shape,
    stop_ids,
    token_limit,
)
from jpaged.engine.request_table import (
    NO_ALGORITHM,
    NO_OUTPUT,
    RequestTable,
    SequenceParams,
    Submission,
)
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams
from jpaged.retention import OFF, mappable_tokens
from jpaged.validation import LARGEST_INT32


class LoadAutomaton(NamedTuple):
    """An automaton to write into the table's pool."""

    at: int  # index in the pool
    pool: Automata  # a pool of this automaton only
    digest: np.ndarray  # u32[4]


def place_automata(
    table: RequestTable, config: EngineConfig, params: Sequence[Params]
) -> tuple[list[int], list[LoadAutomaton]]:
    """Assign the requests' automata to entries of the table's pool.

    Returns:
      For each request its automaton's index in the pool, and the automata that must be
      loaded into the pool first.

    Raises:
      ValueError: there are more different automata than entries of the pool.
    """
    given = [param.structured_outputs for param in params]
    if all(automaton is None for automaton in given):
        return [constraints.UNCONSTRAINED] * len(params), []
    # `limits.check_request` refuses constraints that are not compiled.
    automata = cast(list[TokenAutomaton | None], given)
    status, index = jax.device_get((table.queue.status, table.params.automata))
    in_use = set(index[status != scheduler.EMPTY].tolist())
    known = {digest.tobytes(): i for i, digest in enumerate(np.asarray(table.digests))}
    digests = [one and one.digest.tobytes() for one in automata]
    in_use |= {known[digest] for digest in digests if digest in known}
    assert config.automata is not None
    size = config.automata.num_automata
    free = [i for i in range(size) if i not in in_use]
    one_automaton = dataclasses.replace(config.automata, num_automata=1)
    loads = []
    for automaton, digest in zip(automata, digests, strict=True):
        if automaton is None or digest is None or digest in known:
            continue
        if not free:
            raise ValueError(
                f"structured_outputs: expected at most num_automata ({size}) of the "
                "config different automata at the same time, got more; run, collect "
                "and release first, or raise num_automata"
            )
        known[digest] = free.pop(0)
        pool = constraints.pool([automaton], one_automaton)
        loads.append(LoadAutomaton(known[digest], pool, automaton.digest))
    none = constraints.UNCONSTRAINED
    return [none if d is None else known[d] for d in digests], loads


def encode_requests(
    table: RequestTable,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    params: Sequence[Params],
    automata: Sequence[int],
    *,
    seed: int,
    arrivals: Sequence[int],
    submitted_ms: Sequence[int],
    vocab_size: int | None,
    eos_token_ids: Sequence[int],
) -> tuple[Submission | None, list[list[int]]]:
    """Encode checked requests as arrays, and choose sequence indices for them.

    Args:
      table: the request table.
      config: the engine's config.
      prompts: token ids of each request.
      params: parameters of each request.
      automata: index of each request's automaton in the table's pool.
      seed: seed of requests without one, see `host.submit`.
      arrivals: number of each request.
      submitted_ms: time of each request's submission, on the engine's clock.
      vocab_size: the model's vocabulary size. Algorithms that retain sequences need it.
      eos_token_ids: the model's EOS tokens.

    Returns:
      The arrays, None if there are no requests; and the indices of each request's
      sequences.

    Raises:
      ValueError: there are more sequences than free sequence indices.
    """
    empty = _empty_indices(table)
    shapes = [request_shape(param, config, vocab_size) for param in params]
    needed = sum(len(one.numbers) for one in shapes)
    if needed > len(empty):
        raise ValueError(
            f"prompts: expected at most {len(empty)} sequences, the free indices of "
            f"the request table, got {needed}; run, collect and release first, or "
            "raise max_num_requests"
        )
    prefixes = _prefixes(table)
    seq_indices, entries = [], []
    for number, (prompt, param, one) in enumerate(
        zip(prompts, params, shapes, strict=True)
    ):
        mine, empty = empty[: len(one.numbers)], empty[len(one.numbers) :]
        seq_indices.append(mine)
        # All tokens of a prompt with log-probabilities are computed.
        known = [] if keeps_prompt_logprobs(param) else prefixes
        source, shared = _source(prompt, known, mine[0])
        shared = min(shared, _mappable(config, param, len(prompt)))
        request = _Request(
            prompt=prompt,
            params=param,
            shape=one,
            seq_indices=mine,
            arrival=arrivals[number],
            seed=seed,
            stop_ids=stop_ids(param, eos_token_ids),
            source=source,
            shared=shared,
            automaton=automata[number],
            submitted_ms=submitted_ms[number],
        )
        entries += [_entry(config, request, i) for i in range(len(mine))]
    return _stack(entries, config) if entries else None, seq_indices


def encode_prefix(
    table: RequestTable, config: EngineConfig, tokens: Sequence[int]
) -> tuple[Submission, int]:
    """Encode a checked prefix as arrays, and choose a sequence index for it."""
    seq_index = _empty_indices(table)[0]
    request = _Request(
        prompt=list(tokens),
        params=SamplingParams(temperature=0.0),
        shape=RequestShape(NO_ALGORITHM, 1, [0]),
        seq_indices=[seq_index],
        arrival=next_arrival(table),
        seed=0,
        stop_ids=[],
        source=seq_index,
        shared=0,
        automaton=constraints.UNCONSTRAINED,
    )
    entry = _entry(config, request, 0)
    # Before all others, so that no sequence waits for a source that comes after it.
    entry.queue["priorities"] = np.int32(scheduler.BEFORE_ALL)
    mark: dict[str, Any] = {"is_prefix": np.bool_(True), "outputs": np.int32(NO_OUTPUT)}
    if config.retention is not None:  # a pinned prefix keeps all its blocks
        mark["retention"] = config.retention.values(OFF)
    entry = entry._replace(params=entry.params | mark)
    return _stack([entry], config), seq_index


def next_arrival(table: RequestTable) -> int:
    """Return the number after the largest one in the table, or in all replicas'."""
    status, arrivals = jax.device_get((table.queue.status, table.queue.arrivals))
    return int(arrivals.max(initial=-1, where=status != scheduler.EMPTY)) + 1


def _empty_indices(table: RequestTable) -> list[int]:
    """The free sequence indices, ascending."""
    status = np.asarray(table.queue.status)
    return np.flatnonzero(status == scheduler.EMPTY).tolist()


class _Request(NamedTuple):
    """A request, with what all its sequences have in common."""

    prompt: Sequence[int]
    params: Params
    shape: RequestShape
    seq_indices: list[int]
    arrival: int
    seed: int
    stop_ids: list[int]
    source: int  # the sequence whose blocks the leader maps; its own index: none
    shared: int  # tokens of the source that it maps
    automaton: int
    submitted_ms: int = 0


class _Entry(NamedTuple):
    """One sequence as numpy scalars and rows, with the fields of `Submission`."""

    seq_index: np.int32
    queue: dict[str, Any]
    tokens: np.ndarray
    params: dict[str, Any]
    states: tuple[Any, ...]
    processor_states: Any


def _entry(config: EngineConfig, request: _Request, index: int) -> _Entry:
    """Encode sequence number `index` of the request."""
    params, one, seq_indices = request.params, request.shape, request.seq_indices
    prompt, max_tokens = _own_prompt(config, request, index)
    length = len(prompt)
    tokens = np.zeros((config.max_model_len,), np.int32)
    tokens[:length] = prompt
    ends = np.full((config.max_num_stop_ids,), -1, np.int32)
    ends[: len(request.stop_ids)] = request.stop_ids
    is_row, is_leader = index < one.num_rows, index == 0
    # The other sequences map the leader's prompt without its last token, which they
    # compute for its logits.
    source, shared = seq_indices[0], length - 1
    if is_leader:
        source, shared = request.source, request.shared
    if shared <= 0 or not is_row or prompt is not request.prompt:
        source, shared = seq_indices[index], 0
    is_grouped = one.kind != NO_ALGORITHM
    limit = length + max_tokens
    mine = processing.encode(config, params) if config.processors else (None, None)
    return _Entry(
        seq_index=np.int32(seq_indices[index]),
        queue=dict(
            status=np.int32(scheduler.WAITING if is_row else scheduler.RETAINED),
            arrivals=np.int32(request.arrival),
            priorities=np.int32(params.priority if config.uses_priorities else 0),
            prompt_lens=np.int32(length),
            num_tokens=np.int32(length),
            leaders=np.int32(seq_indices[0]),
            sources=np.int32(source),
            shared_lens=np.int32(shared),
            is_lockstep=np.bool_(is_grouped and one.num_rows > 1),
            has_ended=np.bool_(not is_row),
            **request_attributes.encode(
                config, request.params, limit - length, request.submitted_ms
            ),
        ),
        tokens=tokens,
        params=dict(
            token_limits=np.int32(limit),
            stop_ids=ends,
            algorithms=np.int32(one.kind),
            outputs=np.int32(index - (one.num_rows if one.num_retained else 0)),
            is_prefix=np.bool_(False),
            keeps_prompt_logprobs=np.bool_(is_leader and keeps_prompt_logprobs(params)),
            sampling=_sampling(params, _own_seed(request), one.numbers[index]),
            rules=_rules(config, params),
            automata=np.int32(request.automaton),
            processors=mine[0],
            retention=_retention(config, params),
        ),
        states=_states(config, request, is_leader, max_tokens),
        processor_states=mine[1],
    )


def _own_prompt(
    config: EngineConfig, request: _Request, index: int
) -> tuple[Sequence[int], int]:
    """The prompt of sequence number `index`, and the most tokens it generates.

    All sequences of a request generate equally many.
    """
    companions = getattr(request.params, "companions", ())
    lengths = map(len, (request.prompt, *companions))
    most = min(token_limit(config, n, request.params) - n for n in lengths)
    number = index - (request.shape.num_rows - len(companions))
    if 0 <= number < len(companions):
        return companions[number], most
    return request.prompt, most


def _mappable(config: EngineConfig, params: Params, prompt_len: int) -> int:
    """The most tokens that a request may map from another one."""
    if config.retention is None:
        return prompt_len
    values: Any = _retention(config, params)
    length: Any = np.int32(prompt_len)
    return int(mappable_tokens(config.retention, values, length))


def _own_seed(request: _Request) -> int:
    """The request's seed, or one derived from the run's seed and the arrival."""
    own = getattr(request.params, "seed", None)
    if own is not None and own < 2**32:
        return own
    # Keys have 32 bits; longer seeds are mixed into them.
    entropy = (request.seed, request.arrival) if own is None else own
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _sampling(params: Params, seed: int, number: int) -> SamplingRows:
    is_sampled = isinstance(params, SamplingParams)
    values: dict[str, Any] = dict(
        temperature=np.float32(params.temperature if is_sampled else 0.0),
        top_k=np.int32(min(params.top_k, LARGEST_INT32) if is_sampled else 0),
        top_p=np.float32(params.top_p if is_sampled else 1.0),
        min_p=np.float32(params.min_p if is_sampled else 0.0),
        seed=np.uint32(seed),
        sample=np.int32(number),
    )
    return SamplingRows(**values)


def _retention(config: EngineConfig, params: Params) -> np.ndarray | None:
    if config.retention is None:
        return None
    return config.retention.values(getattr(params, "retention", None))


def _rules(config: EngineConfig, params: Params) -> LogitsRules | None:
    if config.rules is None:
        return None
    # `limits.check_request` refuses bad words that are not token ids.
    mine: Any = params if isinstance(params, SamplingParams) else SamplingParams()
    return rule_arrays.encode_rules(mine, config.rules, mine.bad_words)


def _states(
    config: EngineConfig, request: _Request, is_leader: bool, max_tokens: int
) -> tuple[Any, ...]:
    """Initial states of all algorithms; only that of the request's own is used."""
    found = list(_initial_states(config))
    params, kind = request.params, request.shape.kind
    if is_leader and isinstance(params, AlgorithmParams):
        one = (params.algorithm, request.shape.num_rows, params.parameters)
        found[kind] = jax.tree.map(np.asarray, algorithms.initial_state(*one))
    if is_leader and isinstance(params, BeamSearchParams):
        found[kind] = jax.tree.map(
            np.asarray,
            beam_state(
                config.max_beam_width,
                width=params.beam_width,
                max_tokens=max_tokens,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                stop_ids=request.stop_ids,
                num_stop_ids=config.max_num_stop_ids,
            ),
        )
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _initial_states(config: EngineConfig) -> tuple[Any, ...]:
    return tuple(
        jax.tree.map(np.asarray, algorithms.initial_state(algorithm, num_rows))
        for algorithm, num_rows in algorithms.config_algorithms(config)
    )


def _stack(entries: list[_Entry], config: EngineConfig) -> Submission:
    """Stack the entries, padded to a power of four so that few shapes are compiled."""
    size = 1
    while size < len(entries):
        size *= 4
    size = min(size, config.max_num_requests)
    padding = entries[0]._replace(seq_index=np.int32(config.max_num_requests))
    entries = entries + [padding] * (size - len(entries))
    all_ = jax.tree.map(lambda *leaves: np.stack(leaves), *entries)
    return Submission(
        seq_indices=all_.seq_index,
        queue=all_.queue,
        tokens=all_.tokens,
        params=SequenceParams(**all_.params),
        states=all_.states,
        processor_states=all_.processor_states,
    )


def _prefixes(table: RequestTable) -> list[tuple[int, np.ndarray]]:
    """Sequence index and tokens of each pinned prefix, the longest first."""
    is_prefix = np.array(table.params.is_prefix)
    is_prefix &= np.asarray(table.queue.status) != scheduler.EMPTY
    seq_indices = np.flatnonzero(is_prefix)
    if not len(seq_indices):
        return []
    lens = np.asarray(table.queue.num_tokens)[seq_indices]
    tokens = np.asarray(table.tokens[seq_indices])
    order = np.argsort(-lens, kind="stable")
    return [(int(seq_indices[i]), tokens[i, : lens[i]]) for i in order]


def _source(
    prompt: Sequence[int], prefixes: list[tuple[int, np.ndarray]], own: int
) -> tuple[int, int]:
    """The pinned prefix with the longest common prefix, and the length of that.

    `own` is the request's own index, returned if no token is shared.
    """
    best = (own, 0)
    for seq_index, prefix in prefixes:
        most = min(len(prompt) - 1, len(prefix))
        is_other = np.asarray(prompt[:most]) != prefix[:most]
        common = int(np.argmax(is_other)) if is_other.any() else most
        if common > best[1]:
            best = (seq_index, common)
    return best
