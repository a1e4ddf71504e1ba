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

from jpaged import groups, scheduler
from jpaged.config import EngineConfig
from jpaged.decoding import constraints, rule_arrays
from jpaged.decoding.beam import beam_state
from jpaged.decoding.constraints import Automata, AutomataSizes
from jpaged.decoding.rule_arrays import LogitsRules, RuleSizes
from jpaged.decoding.rule_checks import check_rules
from jpaged.decoding.sample import SamplingRows
from jpaged.request_table import (
    NO_ALGORITHM,
    NO_OUTPUT,
    Asked,
    RequestTable,
    Submission,
)
from jpaged.requests import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)

FINISH_REASONS = (None, "stop", "length", "abort", "dead_end")
# Parameters that are rules of the logits, and their values that change nothing.
_NO_RULES = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
}
Params = SamplingParams | BeamSearchParams | AlgorithmParams


class Shape(NamedTuple):
    """The sequences of a request."""

    kind: int  # index in `groups.kinds`, or NO_ALGORITHM
    num_rows: int  # sequences that run
    numbers: list[int]  # of all sequences, those that are only held last

    @property
    def num_held(self) -> int:
        """Sequences that the algorithm only holds."""
        return len(self.numbers) - self.num_rows

    def outputs(self, places: Sequence[int]) -> list[int]:
        """Of the request's places, those whose sequences are its outputs, in order."""
        return list(places[self.num_rows :] if self.num_held else places)


class Result(NamedTuple):
    """A finished sequence as the engine holds it."""

    place: int
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


def num_rows(params: Params) -> int:
    """Sequences of a request that run at the same time."""
    if isinstance(params, BeamSearchParams):
        return params.beam_width
    return params.n if isinstance(params, SamplingParams) else params.num_rows


def check_rows(params: Params, config: EngineConfig) -> None:
    """Raises ValueError where an algorithm has more rows than one batch."""
    rows = num_rows(params)
    if not isinstance(params, SamplingParams) and rows > config.max_num_seqs:
        name = "beam_width" if isinstance(params, BeamSearchParams) else "num_rows"
        raise ValueError(
            f"{name}: expected at most max_num_seqs ({config.max_num_seqs}), for all "
            f"run in one batch, got {rows}"
        )


def shape(params: Params, config: EngineConfig, vocab_size: int | None) -> Shape:
    """The sequences of a request, in an engine of this config.

    Raises:
      ValueError: the config does not compile the algorithm, or not for so many rows.
    """
    rows = num_rows(params)
    if isinstance(params, SamplingParams):
        if rows > config.max_num_requests:
            raise ValueError(
                f"n: expected at most max_num_requests ({config.max_num_requests}), "
                f"got {rows}"
            )
        return Shape(NO_ALGORITHM, rows, list(range(rows)))
    check_rows(params, config)
    if isinstance(params, BeamSearchParams):
        most = config.max_beam_width
        if rows > most:
            raise ValueError(
                f"beam_width: expected at most max_beam_width ({most}) of the config, "
                f"got {rows}"
            )
        return Shape(0, rows, [*range(rows), *range(most, most + rows)])
    pair = (params.algorithm, rows)
    known = groups.kinds(config)
    if pair not in known:
        raise ValueError(
            "algorithm: expected one of the config's `algorithms`, with its number of "
            f"rows ({rows}), got {params.algorithm!r}"
        )
    count = rows
    if vocab_size is not None:
        count = groups.num_sequences(*pair, vocab_size)
    return Shape(known.index(pair), rows, list(range(count)))


def check_request(
    config: EngineConfig,
    prompt: Sequence[int],
    params: Params,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    num_blocks: int | None = None,
) -> None:
    """Raises ValueError where the engine could not run a request.

    `num_blocks`: blocks that are not pinned; None is the whole pool.
    """
    length = len(prompt)
    if length == 0:
        raise ValueError("prompt: expected at least one token, got none")
    if length >= config.max_model_len:
        raise ValueError(
            f"prompt: expected fewer than max_model_len ({config.max_model_len}) "
            f"tokens, so that one can be generated, got {length}; shorten the prompt "
            "or raise max_model_len"
        )
    _check_ids("prompt", prompt, vocab_size)
    sequences = shape(params, config, vocab_size)
    num_blocks = config.num_blocks if num_blocks is None else num_blocks
    needed = most_blocks(
        config,
        length,
        token_limit(config, length, params),
        # Samples can take turns.
        1 if sequences.kind == NO_ALGORITHM else sequences.num_rows,
    )
    if needed > num_blocks:
        raise ValueError(
            f"prompt: {length} tokens and up to {params.max_tokens} generated ones "
            f"{_in_rows(sequences)}need {needed} blocks of {config.block_size}, the "
            f"pool has {num_blocks}"
            f"{' that are not pinned' * (num_blocks < config.num_blocks)}; raise "
            "num_blocks, or lower max_tokens"
        )
    num_stop_ids = len(stop_ids(params, eos_token_ids))
    if num_stop_ids > config.max_num_stop_ids:
        raise ValueError(
            f"stop_token_ids: expected at most max_num_stop_ids "
            f"({config.max_num_stop_ids}) ids, EOS included, got {num_stop_ids}"
        )
    if len(sequences.numbers) > config.max_num_requests:
        raise ValueError(
            f"params: expected at most max_num_requests ({config.max_num_requests}) "
            f"sequences, got {len(sequences.numbers)}"
        )
    if isinstance(params, SamplingParams):
        _check_sampling(config, params, vocab_size, stop_ids(params, eos_token_ids))
    _check_automaton(config, params, vocab_size)
    if isinstance(params, BeamSearchParams) and vocab_size is not None:
        if params.beam_width > vocab_size:
            raise ValueError(
                f"beam_width: expected at most the vocabulary's size ({vocab_size}), "
                f"got {params.beam_width}"
            )


def _check_ids(name: str, tokens: Sequence[int], vocab_size: int | None) -> None:
    wrong = [t for t in tokens if vocab_size is not None and not 0 <= t < vocab_size]
    if wrong:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocab_size - 1} "
            f"(the model's vocabulary), got {wrong[0]}"
        )


def _check_sampling(
    config: EngineConfig,
    params: SamplingParams,
    vocab_size: int | None,
    stop_ids: Sequence[int],
) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > config.num_logprobs:
            raise ValueError(
                f"{name}: expected at most num_logprobs ({config.num_logprobs}), got "
                f"{getattr(params, name)}; raise num_logprobs in the config"
            )
    if rates_prompt(params) and not config.prompt_logprobs:
        raise ValueError(
            "prompt_logprobs: expected None, for the config has prompt_logprobs=False, "
            f"got {params.prompt_logprobs}"
        )
    if any(isinstance(word, str) for word in params.bad_words):
        raise ValueError(
            "bad_words: expected token ids, for the engine has no tokenizer, got "
            f"{params.bad_words!r}"
        )
    if vocab_size is not None:
        check_rules(params, vocab_size, params.bad_words, stop_ids)
    wanted = rule_sizes(params, vocab_size)
    if wanted is None:
        return
    if config.rules is None or config.rules.grown(wanted) != config.rules:
        raise ValueError(
            f"params: expected logits rules for which the config has room ({wanted}), "
            f"rules={config.rules} has not; make the config with rules={wanted}"
        )


def _check_automaton(
    config: EngineConfig, params: Params, vocab_size: int | None
) -> None:
    automaton = params.structured_outputs
    if automaton is None:
        return
    if isinstance(automaton, StructuredOutputsParams):
        raise ValueError(
            "structured_outputs: expected a TokenAutomaton, for the engine has no "
            "tokenizer; see jpaged.structured.compile_constraint"
        )
    if vocab_size is not None and automaton.vocab_size != vocab_size:
        raise ValueError(
            f"structured_outputs: expected an automaton for the model's vocabulary of "
            f"{vocab_size} tokens, got one for {automaton.vocab_size}"
        )
    wanted = AutomataSizes.of([automaton])
    if config.automata is None or config.automata.grown(wanted) != config.automata:
        raise ValueError(
            "structured_outputs: expected an automaton for which the config has room, "
            f"automata={config.automata}, got one that needs {wanted}"
        )


def rule_sizes(params: Params, vocab_size: int | None) -> RuleSizes | None:
    """The room that a request's logits rules take; None where it has none.

    `bad_words` are token ids here.
    """
    if not isinstance(params, SamplingParams) or all(
        getattr(params, name) == neutral for name, neutral in _NO_RULES.items()
    ):
        return None
    if vocab_size is None:
        raise ValueError("vocab_size: expected the model's, for its logits have rules")
    return RuleSizes.of_request(params, vocab_size, params.bad_words)


def _in_rows(sequences: Shape) -> str:
    """How many sequences must fit together, for a message."""
    if sequences.kind == NO_ALGORITHM or sequences.num_rows == 1:
        return ""
    return f"in each of {sequences.num_rows} rows "


def most_blocks(config: EngineConfig, prompt_len: int, limit: int, rows: int) -> int:
    """Blocks that so many rows of a request hold at most, all at their limit of tokens.

    All but the last prompt token is shared, also after a preemption.
    """
    shared = (prompt_len - 1) // config.block_size
    return shared + rows * (-(-limit // config.block_size) - shared)


def token_limit(config: EngineConfig, prompt_len: int, params: Params) -> int:
    """Tokens at which a sequence ends, prompt included."""
    return min(config.max_model_len, prompt_len + params.max_tokens)


def rates_prompt(params: Params) -> bool:
    """Whether the prompt's log-probabilities are wanted."""
    is_sampled = isinstance(params, SamplingParams)
    return is_sampled and params.prompt_logprobs is not None


def stop_ids(params: Params, eos_token_ids: Sequence[int]) -> list[int]:
    """The tokens that end a sequence, sorted."""
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    return sorted({*params.stop_token_ids, *eos})


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
    status, index = jax.device_get((table.queue.status, table.asked.automata))
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
    first_arrival: int | None,
    vocab_size: int | None,
    eos_token_ids: Sequence[int],
) -> tuple[Submission | None, list[list[int]]]:
    """Checked requests as arrays, and the places that their sequences get.

    `automata`: of each request its index in the table's pool.

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
    if first_arrival is None:
        arrivals = np.asarray(queue.arrivals)[status != scheduler.EMPTY]
        first_arrival = int(arrivals.max()) + 1 if len(arrivals) else 0
    prefixes = _prefixes(table)
    places, entries = [], []
    for number, (prompt, param, one) in enumerate(
        zip(prompts, params, shapes, strict=True)
    ):
        mine, empty = empty[: len(one.numbers)], empty[len(one.numbers) :]
        places.append(mine)
        # A prompt that is rated is computed whole.
        known = [] if rates_prompt(param) else prefixes
        source, shared = _source(prompt, known, mine[0])
        request = _Request(
            prompt=prompt,
            params=param,
            shape=one,
            places=mine,
            arrival=first_arrival + number,
            seed=seed,
            stop_ids=stop_ids(param, eos_token_ids),
            source=source,
            shared=shared,
            automaton=automata[number],
        )
        entries += [_entry(config, request, i) for i in range(len(mine))]
    return _stack(entries, config) if entries else None, places


def check_prefix(
    table: RequestTable,
    config: EngineConfig,
    tokens: Sequence[int],
    *,
    num_pinned_blocks: int,
    vocab_size: int | None = None,
) -> None:
    """Raises ValueError where a prefix could not be pinned now."""
    length = len(tokens)
    if not 0 < length < config.max_model_len:
        raise ValueError(
            f"prefix: expected from 1 token to fewer than max_model_len "
            f"({config.max_model_len}), got {length}"
        )
    _check_ids("prefix", tokens, vocab_size)
    queue, asked = jax.device_get((table.queue, table.asked))
    is_live = queue.status != scheduler.EMPTY
    num_pinned = int((asked.is_prefix & is_live).sum())
    if num_pinned >= config.max_num_prefixes:
        raise ValueError(
            f"prefix: expected at most max_num_prefixes ({config.max_num_prefixes}) at "
            f"the same time, {num_pinned} are pinned; unpin one, or raise it"
        )
    if is_live.all():
        raise ValueError(
            "prefix: expected an empty place in the request table, found none; run, "
            "collect and release first, or raise max_num_requests"
        )
    # Every request that was let in must still fit alone beside all pinned blocks.
    is_going = np.isin(queue.status, (scheduler.WAITING, scheduler.RUNNING))
    is_going &= ~asked.is_prefix
    most = 1
    for leader in np.unique(queue.leaders[is_going]).tolist():
        mine = np.flatnonzero(is_going & (queue.leaders == leader))
        rows = len(mine) if asked.algorithms[mine[0]] != NO_ALGORITHM else 1
        sizes = (queue.prompt_lens[mine[0]], asked.token_limits[mine[0]])
        most = max(most, most_blocks(config, *map(int, sizes), rows))
    pinned = num_pinned_blocks - (-length // config.block_size)
    if pinned + most > config.num_blocks:
        raise ValueError(
            f"prefix: {length} tokens need {-(-length // config.block_size)} blocks, "
            f"with {num_pinned_blocks} pinned and {most} for the largest request that "
            f"runs or waits; the pool has {config.num_blocks}"
        )


def encode_prefix(
    table: RequestTable, config: EngineConfig, tokens: Sequence[int]
) -> tuple[Submission, int]:
    """A checked prefix to be computed and pinned, as arrays, and its place."""
    status = np.asarray(table.queue.status)
    place = int(np.flatnonzero(status == scheduler.EMPTY)[0])
    arrivals = np.asarray(table.queue.arrivals)[status != scheduler.EMPTY]
    arrival = int(arrivals.max()) + 1 if len(arrivals) else 0
    request = _Request(
        prompt=list(tokens),
        params=SamplingParams(temperature=0.0),
        shape=Shape(NO_ALGORITHM, 1, [0]),
        places=[place],
        arrival=arrival,
        seed=0,
        stop_ids=[],
        source=place,
        shared=0,
        automaton=constraints.UNCONSTRAINED,
    )
    entry = _entry(config, request, 0)
    # Before all others, so that those that map it never wait for one behind them.
    entry.queue["priorities"] = np.int32(np.iinfo(np.int32).min)
    mark = {"is_prefix": np.bool_(True), "outputs": np.int32(NO_OUTPUT)}
    entry = entry._replace(asked=entry.asked | mark)
    return _stack([entry], config), place


class _Request(NamedTuple):
    prompt: Sequence[int]
    params: Params
    shape: Shape
    places: list[int]
    arrival: int
    seed: int
    stop_ids: list[int]
    source: int
    shared: int
    automaton: int


class _Entry(NamedTuple):
    """One sequence as numpy scalars and rows; fields as in `Submission`."""

    place: np.int32
    queue: dict[str, Any]
    tokens: np.ndarray
    asked: dict[str, Any]
    states: tuple[Any, ...]


def _entry(config: EngineConfig, request: _Request, index: int) -> _Entry:
    """The request's sequence number `index`."""
    params, one, places = request.params, request.shape, request.places
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
            places[0],
            length - 1,
        )
    )
    if shared <= 0 or not is_row:
        source, shared = places[index], 0
    is_grouped = one.kind != NO_ALGORITHM
    limit = token_limit(config, length, params)
    return _Entry(
        place=np.int32(places[index]),
        queue=dict(
            status=np.int32(scheduler.WAITING if is_row else scheduler.HELD),
            arrivals=np.int32(request.arrival),
            priorities=np.int32(params.priority if config.policy == "priority" else 0),
            prompt_lens=np.int32(length),
            num_tokens=np.int32(length),
            leaders=np.int32(places[0]),
            sources=np.int32(source),
            shared_lens=np.int32(shared),
            is_lockstep=np.bool_(is_grouped and one.num_rows > 1),
            has_ended=np.bool_(not is_row),
        ),
        tokens=tokens,
        asked=dict(
            token_limits=np.int32(limit),
            stop_ids=ends,
            algorithms=np.int32(one.kind),
            outputs=np.int32(index - (one.num_rows if one.num_held else 0)),
            is_prefix=np.bool_(False),
            rates_prompt=np.bool_(is_leader and rates_prompt(params)),
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
    return rule_arrays.encode(params, config.rules, params.bad_words)


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
        for algorithm, num_rows in groups.kinds(config)
    )


def _stack(entries: list[_Entry], config: EngineConfig) -> Submission:
    """Entries side by side, padded to a power of two so that few shapes compile."""
    size = 1 << (len(entries) - 1).bit_length()
    nobody = entries[0]._replace(place=np.int32(config.max_num_requests))
    entries = entries + [nobody] * (size - len(entries))
    all_ = jax.tree.map(lambda *leaves: np.stack(leaves), *entries)
    return Submission(
        places=all_.place,
        queue=all_.queue,
        tokens=all_.tokens,
        asked=Asked(**all_.asked),
        states=all_.states,
    )


def _prefixes(table: RequestTable) -> list[tuple[int, np.ndarray]]:
    """Place and tokens of each pinned prefix, the longest first."""
    is_prefix = np.array(table.asked.is_prefix)
    is_prefix &= np.asarray(table.queue.status) != scheduler.EMPTY
    places = np.flatnonzero(is_prefix)
    if not len(places):
        return []
    lens = np.asarray(table.queue.num_tokens)[places]
    tokens = np.asarray(table.tokens[places])
    order = np.argsort(-lens, kind="stable")
    return [(int(places[i]), tokens[i, : lens[i]]) for i in order]


def _source(
    prompt: Sequence[int], prefixes: list[tuple[int, np.ndarray]], own: int
) -> tuple[int, int]:
    """The pinned prefix that shares most tokens with the prompt, and how many."""
    best = (own, 0)
    for place, prefix in prefixes:
        most = min(len(prompt) - 1, len(prefix))
        is_other = np.asarray(prompt[:most]) != prefix[:most]
        common = int(np.argmax(is_other)) if is_other.any() else most
        if common > best[1]:
            best = (place, common)
    return best


def results(table: RequestTable) -> list[Result]:
    """The finished outputs, by arrival and number. Changes nothing."""
    queue, asked = jax.device_get((table.queue, table.asked))
    numbers = asked.outputs
    is_output = (queue.status == scheduler.FINISHED) & (numbers > NO_OUTPUT)
    order = sorted(
        np.flatnonzero(is_output), key=lambda p: (queue.arrivals[p], numbers[p])
    )
    host = jax.device_get(
        (table.tokens, table.logprobs, table.ranks, table.top_ids, table.top_logprobs)
    )
    rest = jax.device_get((table.finish_reasons, table.first_steps, table.last_steps))
    found: list[Result] = []
    for place in map(int, order):
        start, end = int(queue.prompt_lens[place]), int(queue.num_tokens[place])
        tokens, *columns = host
        reason, first_step, last_step = (int(column[place]) for column in rest)
        is_alone = asked.algorithms[place] == NO_ALGORITHM
        found.append(
            Result(
                place,
                int(queue.arrivals[place]),
                int(numbers[place]),
                tokens[place, :start].tolist(),
                tokens[place, start:end].tolist(),
                *(column[place, start:end] for column in columns),
                columns[0][place, :start] if asked.rates_prompt[place] else None,
                FINISH_REASONS[reason],
                first_step,
                last_step,
                # Of an algorithm's sequences only the rows are preempted, all alike.
                int(queue.num_preemptions[place if is_alone else queue.leaders[place]]),
            )
        )
    return found
