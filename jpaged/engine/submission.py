"""Submission: requests on their way into the table, and results on their way out.

Place on the road: params -> [submission] -> request table -> [submission] -> results.
Host code: what users ask for becomes arrays here, and is checked before anything
changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.decoding import constraints, rule_arrays
from jpaged.decoding.beam import beam_state
from jpaged.decoding.constraints import Automata
from jpaged.decoding.rule_arrays import LogitsRules
from jpaged.decoding.sample import SamplingRows
from jpaged.engine import algorithms
from jpaged.engine.limits import (
    Params,
    Shape,
    keeps_prompt_logprobs,
    shape,
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
from jpaged.params import BeamSearchParams, SamplingParams

FINISH_REASONS = (None, "stop", "length", "abort", "dead_end")


class Result(NamedTuple):
    """A finished sequence as the engine holds it."""

    seq_index: int
    arrival: int  # the request's number, in order of submission
    sample: int  # which of the request's outputs; of beams the best is 0
    prompt_token_ids: list[int]
    token_ids: list[int]  # with the token that ended it
    logprobs: np.ndarray  # f32[generated]
    ranks: np.ndarray  # i32[generated], or empty
    top_ids: np.ndarray  # i32[generated, num_logprobs]
    top_logprobs: np.ndarray  # f32[generated, num_logprobs]
    # f32[prompt], the first is 0; only sample 0 of a request that asked has them
    prompt_logprobs: np.ndarray | None
    finish_reason: str | None
    first_step: int
    last_step: int
    num_preemptions: int


class LoadAutomaton(NamedTuple):
    """An automaton that has to be in the table's pool."""

    index: int
    pool: Automata  # of this one
    digest: np.ndarray  # u32[4]


def place_automata(
    table: RequestTable, config: EngineConfig, params: Sequence[Params]
) -> tuple[list[int], list[LoadAutomaton]]:
    """Of each request its index in the pool, and what must be loaded there first.

    Raises:
      ValueError: more automata at once than the pool has room for.
    """
    wanted = [param.structured_outputs for param in params]
    if all(automaton is None for automaton in wanted):
        return [constraints.UNCONSTRAINED] * len(params), []
    status, index = jax.device_get((table.queue.status, table.params.automata))
    in_use = set(index[status != scheduler.EMPTY].tolist())
    known = {digest.tobytes(): i for i, digest in enumerate(np.asarray(table.digests))}
    digests = [automaton and automaton.digest.tobytes() for automaton in wanted]
    in_use |= {known[digest] for digest in digests if digest in known}
    open_ = [i for i in range(config.automata.num_automata) if i not in in_use]
    sizes = dataclasses.replace(config.automata, num_automata=1)
    loads = []
    for automaton, digest in zip(wanted, digests, strict=True):
        if automaton is None or digest in known:
            continue
        if not open_:
            raise ValueError(
                "structured_outputs: expected at most num_automata "
                f"({config.automata.num_automata}) of the config different ones at the "
                "same time; run, collect and release first, or raise it"
            )
        known[digest] = open_.pop(0)
        one = constraints.pool([automaton], sizes)
        loads.append(LoadAutomaton(known[digest], one, automaton.digest))
    none = constraints.UNCONSTRAINED
    return [none if d is None else known[d] for d in digests], loads


def encode(
    table: RequestTable,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    params: Sequence[Params],
    automata: Sequence[int],
    *,
    seed: int,
    arrivals: Sequence[int],
    vocab_size: int | None,
    eos_token_ids: Sequence[int],
) -> tuple[Submission | None, list[list[int]]]:
    """Checked requests as arrays, and the places that their sequences get.

    `arrivals`: of each request its number; `automata`: its index in the table's pool.

    Raises:
      ValueError: more sequences than empty places.
    """
    queue = table.queue
    status = np.asarray(queue.status)
    empty = np.flatnonzero(status == scheduler.EMPTY).tolist()
    shapes = [shape(param, config, vocab_size) for param in params]
    wanted = sum(len(one.numbers) for one in shapes)
    if wanted > len(empty):
        raise ValueError(
            f"prompts: expected at most {len(empty)} sequences, the empty places of "
            f"the request table, got {wanted}; run, collect and release first, or "
            "raise max_num_requests"
        )
    prefixes = _prefixes(table)
    seq_indices, entries = [], []
    for number, (prompt, param, one) in enumerate(
        zip(prompts, params, shapes, strict=True)
    ):
        mine, empty = empty[: len(one.numbers)], empty[len(one.numbers) :]
        seq_indices.append(mine)
        # A prompt that is rated is computed whole.
        known = [] if keeps_prompt_logprobs(param) else prefixes
        source, shared = _source(prompt, known, mine[0])
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
        )
        entries += [_entry(config, request, i) for i in range(len(mine))]
    return _stack(entries, config) if entries else None, seq_indices


def encode_prefix(
    table: RequestTable, config: EngineConfig, tokens: Sequence[int]
) -> tuple[Submission, int]:
    """A checked prefix to be computed and pinned, as arrays, and its place."""
    status = np.asarray(table.queue.status)
    seq_index = int(np.flatnonzero(status == scheduler.EMPTY)[0])
    arrival = next_arrival(table)
    request = _Request(
        prompt=list(tokens),
        params=SamplingParams(temperature=0.0),
        shape=Shape(NO_ALGORITHM, 1, [0]),
        seq_indices=[seq_index],
        arrival=arrival,
        seed=0,
        stop_ids=[],
        source=seq_index,
        shared=0,
        automaton=constraints.UNCONSTRAINED,
    )
    entry = _entry(config, request, 0)
    # Before all others, so that those that map it never wait for one behind them.
    entry.queue["priorities"] = np.int32(scheduler.BEFORE_ALL)
    mark = {"is_prefix": np.bool_(True), "outputs": np.int32(NO_OUTPUT)}
    entry = entry._replace(params=entry.params | mark)
    return _stack([entry], config), seq_index


def next_arrival(table: RequestTable) -> int:
    """The number behind all that are in the table, or in those of all replicas."""
    status, arrivals = jax.device_get((table.queue.status, table.queue.arrivals))
    return int(arrivals.max(initial=-1, where=status != scheduler.EMPTY)) + 1


class _Request(NamedTuple):
    prompt: Sequence[int]
    params: Params
    shape: Shape
    seq_indices: list[int]
    arrival: int
    seed: int
    stop_ids: list[int]
    source: int
    shared: int
    automaton: int


class _Entry(NamedTuple):
    """One sequence as numpy scalars and rows; fields as in `Submission`."""

    seq_index: np.int32
    queue: dict[str, Any]
    tokens: np.ndarray
    params: dict[str, Any]
    states: tuple[Any, ...]


def _entry(config: EngineConfig, request: _Request, index: int) -> _Entry:
    """The request's sequence number `index`."""
    params, one, seq_indices = request.params, request.shape, request.seq_indices
    length = len(request.prompt)
    tokens = np.zeros((config.max_model_len,), np.int32)
    tokens[:length] = request.prompt
    ends = np.full((config.max_num_stop_ids,), -1, np.int32)
    ends[: len(request.stop_ids)] = request.stop_ids
    is_row, is_leader = index < one.num_rows, index == 0
    # The others map the leader's prompt, up to the token whose logits come next.
    source, shared = (
        (request.source, request.shared)
        if is_leader
        else (
            seq_indices[0],
            length - 1,
        )
    )
    if shared <= 0 or not is_row:
        source, shared = seq_indices[index], 0
    is_grouped = one.kind != NO_ALGORITHM
    limit = token_limit(config, length, params)
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
        ),
        tokens=tokens,
        params=dict(
            token_limits=np.int32(limit),
            stop_ids=ends,
            algorithms=np.int32(one.kind),
            outputs=np.int32(index - (one.num_rows if one.num_held else 0)),
            is_prefix=np.bool_(False),
            keeps_prompt_logprobs=np.bool_(is_leader and keeps_prompt_logprobs(params)),
            sampling=_sampling(params, _own_seed(request), one.numbers[index]),
            rules=_rules(config, params),
            automata=np.int32(request.automaton),
        ),
        states=_states(config, request, is_leader, limit - length),
    )


def _own_seed(request: _Request) -> int:
    own = getattr(request.params, "seed", None)
    if own is not None:
        return own
    words = np.random.SeedSequence((request.seed, request.arrival)).generate_state(1)
    return int(words[0])


def _sampling(params: Params, seed: int, number: int) -> SamplingRows:
    is_sampled = isinstance(params, SamplingParams)
    return SamplingRows(
        temperature=np.float32(params.temperature if is_sampled else 0.0),
        top_k=np.int32(max(params.top_k, 0) if is_sampled else 0),
        top_p=np.float32(params.top_p if is_sampled else 1.0),
        min_p=np.float32(params.min_p if is_sampled else 0.0),
        seed=np.uint32(seed),
        sample=np.int32(number),
    )


def _rules(config: EngineConfig, params: Params) -> LogitsRules | None:
    if config.rules is None:
        return None
    if not isinstance(params, SamplingParams):
        params = SamplingParams()
    return rule_arrays.encode_rules(params, config.rules, params.bad_words)


def _states(
    config: EngineConfig, request: _Request, is_leader: bool, max_tokens: int
) -> tuple[Any, ...]:
    """Of each algorithm the state at the request's begin; another's is anything."""
    found = list(_initial_states(config))
    params, kind = request.params, request.shape.kind
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
        jax.tree.map(np.asarray, algorithm.init(num_rows))
        for algorithm, num_rows in algorithms.kinds(config)
    )


def _stack(entries: list[_Entry], config: EngineConfig) -> Submission:
    """Entries side by side, padded to a power of two so that few shapes compile."""
    size = 1 << (len(entries) - 1).bit_length()
    nobody = entries[0]._replace(seq_index=np.int32(config.max_num_requests))
    entries = entries + [nobody] * (size - len(entries))
    all_ = jax.tree.map(lambda *leaves: np.stack(leaves), *entries)
    return Submission(
        seq_indices=all_.seq_index,
        queue=all_.queue,
        tokens=all_.tokens,
        params=SequenceParams(**all_.params),
        states=all_.states,
    )


def _prefixes(table: RequestTable) -> list[tuple[int, np.ndarray]]:
    """Place and tokens of each pinned prefix, the longest first."""
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
    """The pinned prefix that shares most tokens with the prompt, and how many."""
    best = (own, 0)
    for seq_index, prefix in prefixes:
        most = min(len(prompt) - 1, len(prefix))
        is_other = np.asarray(prompt[:most]) != prefix[:most]
        common = int(np.argmax(is_other)) if is_other.any() else most
        if common > best[1]:
            best = (seq_index, common)
    return best


def results(table: RequestTable) -> list[Result]:
    """The finished outputs, by arrival and number. Changes nothing."""
    queue, params = jax.device_get((table.queue, table.params))
    numbers = params.outputs
    is_output = (queue.status == scheduler.FINISHED) & (numbers > NO_OUTPUT)
    order = sorted(
        np.flatnonzero(is_output), key=lambda p: (queue.arrivals[p], numbers[p])
    )
    host = jax.device_get(
        (table.tokens, table.logprobs, table.ranks, table.top_ids, table.top_logprobs)
    )
    rest = jax.device_get((table.finish_reasons, table.first_steps, table.last_steps))
    found: list[Result] = []
    for seq_index in map(int, order):
        start, end = int(queue.prompt_lens[seq_index]), int(queue.num_tokens[seq_index])
        tokens, *columns = host
        reason, first_step, last_step = (int(column[seq_index]) for column in rest)
        is_alone = params.algorithms[seq_index] == NO_ALGORITHM
        found.append(
            Result(
                seq_index,
                int(queue.arrivals[seq_index]),
                int(numbers[seq_index]),
                tokens[seq_index, :start].tolist(),
                tokens[seq_index, start:end].tolist(),
                *(column[seq_index, start:end] for column in columns),
                columns[0][seq_index, :start]
                if params.keeps_prompt_logprobs[seq_index]
                else None,
                FINISH_REASONS[reason],
                first_step,
                last_step,
                # Of an algorithm's sequences only the rows are preempted, all alike.
                int(
                    queue.num_preemptions[
                        seq_index if is_alone else queue.leaders[seq_index]
                    ]
                ),
            )
        )
    return found
