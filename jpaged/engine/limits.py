"""Request limits: what a request takes of the engine, and whether it ever fits.

Place on the road: params -> [request_limits] -> submission. Host code: a request is
checked here before anything changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jpaged import scheduler
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.decoding.rule_checks import check_rules
from jpaged.engine import algorithms
from jpaged.engine.request_table import NO_ALGORITHM, RequestTable
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)

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

    def outputs(self, seq_indices: Sequence[int]) -> list[int]:
        """Of the request's places, those whose sequences are its outputs, in order."""
        return list(seq_indices[self.num_rows :] if self.num_held else seq_indices)


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
    known = algorithms.kinds(config)
    if pair not in known:
        raise ValueError(
            "algorithm: expected one of the config's `algorithms`, with its number of "
            f"rows ({rows}), got {params.algorithm!r}"
        )
    count = rows
    if vocab_size is not None:
        count = algorithms.num_sequences(*pair, vocab_size)
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
    if keeps_prompt_logprobs(params) and not config.prompt_logprobs:
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
    return shared + rows * (cdiv(limit, config.block_size) - shared)


def largest_request(table: RequestTable, config: EngineConfig) -> int:
    """Blocks that the largest of the requests that wait or run needs alone, at most."""
    queue, params = jax.device_get((table.queue, table.params))
    going = (scheduler.WAITING, scheduler.RUNNING, scheduler.SWAPPED)
    is_live = np.isin(queue.status, going)
    is_live &= ~params.is_prefix
    most = 1
    for leader in np.unique(queue.leaders[is_live]).tolist():
        mine = np.flatnonzero(is_live & (queue.leaders == leader))
        rows = len(mine) if params.algorithms[mine[0]] != NO_ALGORITHM else 1
        sizes = (queue.prompt_lens[mine[0]], params.token_limits[mine[0]])
        most = max(most, most_blocks(config, *map(int, sizes), rows))
    return most


def num_pinned_blocks(table: RequestTable, block_size: int) -> int:
    """Blocks that pinned prefixes hold, or will hold when they are computed."""
    is_prefix = np.array(table.params.is_prefix)
    is_prefix &= np.asarray(table.queue.status) != scheduler.EMPTY
    lens = np.asarray(table.queue.num_tokens)[is_prefix]
    return int(cdiv(lens, block_size).sum())


def token_limit(config: EngineConfig, prompt_len: int, params: Params) -> int:
    """Tokens at which a sequence ends, prompt included."""
    return min(config.max_model_len, prompt_len + params.max_tokens)


def keeps_prompt_logprobs(params: Params) -> bool:
    """Whether the prompt's log-probabilities are wanted."""
    is_sampled = isinstance(params, SamplingParams)
    return is_sampled and params.prompt_logprobs is not None


def stop_ids(params: Params, eos_token_ids: Sequence[int]) -> list[int]:
    """The tokens that end a sequence, sorted."""
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    return sorted({*params.stop_token_ids, *eos})


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
    queue, params = jax.device_get((table.queue, table.params))
    is_live = queue.status != scheduler.EMPTY
    num_pinned = int((params.is_prefix & is_live).sum())
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
    most = largest_request(table, config)
    pinned = num_pinned_blocks - (-length // config.block_size)
    if pinned + most > config.num_blocks:
        raise ValueError(
            f"prefix: {length} tokens need {cdiv(length, config.block_size)} blocks, "
            f"with {num_pinned_blocks} pinned and {most} for the largest request that "
            f"runs or waits; the pool has {config.num_blocks}"
        )
