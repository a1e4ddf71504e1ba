"""Request limits: what a request needs of the engine, and whether it can ever run.

Pipeline: params -> [limits] -> submission. Host code: a request is checked here before
anything changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jpaged import scheduler
from jpaged.arithmetic import cdiv
from jpaged.config import SAMPLING, EngineConfig
from jpaged.decoding import beam
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.processor_checks import check_processors
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.decoding.rule_checks import check_rules
from jpaged.decoding.sample import GREEDY_BELOW
from jpaged.engine import algorithms, processing
from jpaged.engine.request_table import NO_ALGORITHM, RequestTable
from jpaged.kv import cache_groups
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.retention import OFF

# Parameters that are logits rules, with the values that change nothing.
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


class RequestShape(NamedTuple):
    """The sequences of a request."""

    kind: int  # index in `algorithms.config_algorithms`, or NO_ALGORITHM
    num_rows: int  # sequences that run
    numbers: list[int]  # number of each sequence, those that run first
    num_companions: int = 0  # rows with a prompt of their own, the last ones

    @property
    def num_retained(self) -> int:
        """Number of sequences that the algorithm retains and that never run."""
        return len(self.numbers) - self.num_rows

    def outputs(self, seq_indices: Sequence[int]) -> list[int]:
        """Select the request's outputs from the indices of its sequences."""
        if self.num_retained:
            return list(seq_indices[self.num_rows :])
        return list(seq_indices[: self.num_rows - self.num_companions])


def num_rows(params: Params) -> int:
    """Return the number of a request's sequences that run at the same time."""
    if isinstance(params, BeamSearchParams):
        return params.beam_width
    if isinstance(params, SamplingParams):
        return params.n
    return params.n * params.num_rows


def check_rows(params: Params, config: EngineConfig) -> None:
    """Raise ValueError if an algorithm needs more rows than a batch has."""
    rows = num_rows(params)
    if not isinstance(params, SamplingParams) and rows > config.max_num_seqs:
        name = "num_rows" if getattr(params, "n", 1) == 1 else "n * num_rows"
        name = "beam_width" if isinstance(params, BeamSearchParams) else name
        raise ValueError(
            f"{name}: expected at most max_num_seqs ({config.max_num_seqs}), because "
            f"all rows run in one batch, got {rows}"
        )


def request_shape(
    params: Params, config: EngineConfig, vocab_size: int | None
) -> RequestShape:
    """Return the sequences that a request has in an engine of this config.

    Args:
      params: the request's parameters.
      config: the engine's config.
      vocab_size: the model's vocabulary size. Algorithms that retain sequences need it.

    Raises:
      ValueError: the config has no such algorithm, or not for this number of rows.
    """
    rows = num_rows(params)
    if isinstance(params, SamplingParams):
        if rows > config.max_num_requests:
            raise ValueError(
                f"n: expected at most max_num_requests ({config.max_num_requests}), "
                f"got {rows}"
            )
        return RequestShape(NO_ALGORITHM, rows, list(range(rows)))
    check_rows(params, config)
    if isinstance(params, BeamSearchParams):
        most = config.max_beam_width
        if rows > most:
            raise ValueError(
                f"beam_width: expected at most max_beam_width ({most}) of the config, "
                f"got {rows}"
            )
        return RequestShape(0, rows, [*range(rows), *range(most, most + rows)])
    pair = (params.algorithm, rows)
    known = algorithms.config_algorithms(config)
    if pair not in known:
        raise ValueError(
            "algorithm: expected one of the config's `algorithms` for this number of "
            f"rows ({rows}), got {params.algorithm!r}"
        )
    count = rows
    if vocab_size is not None:
        count = algorithms.num_sequences(*pair, vocab_size)
    number = len(params.companions)
    return RequestShape(known.index(pair), rows, list(range(count)), number)


def check_request(
    config: EngineConfig,
    prompt: Sequence[int],
    params: Params,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    num_blocks: int | None = None,
) -> None:
    """Raise ValueError if the engine can never run a request.

    Args:
      config: the engine's config.
      prompt: token ids.
      params: the request's parameters.
      vocab_size: if given, token ids are checked against it.
      eos_token_ids: the model's EOS tokens.
      num_blocks: blocks that are not pinned; None: all blocks of the pool.
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
    if isinstance(params, AlgorithmParams):
        _check_algorithm(params, config, vocab_size)
    sequences = request_shape(params, config, vocab_size)
    if isinstance(params, AlgorithmParams) and vocab_size is not None:
        algorithms.check_examples(
            params.algorithm, params.num_rows, vocab_size, params.parameters
        )
    num_blocks = config.num_blocks if num_blocks is None else num_blocks
    _check_blocks(config, length, params, sequences, num_blocks)
    ends = stop_ids(params, eos_token_ids)
    if len(ends) > config.max_num_stop_ids:
        raise ValueError(
            f"stop_token_ids: expected at most max_num_stop_ids "
            f"({config.max_num_stop_ids}) ids, EOS included, got {len(ends)}"
        )
    if len(sequences.numbers) > config.max_num_requests:
        raise ValueError(
            f"params: expected at most max_num_requests ({config.max_num_requests}) "
            f"sequences, got {len(sequences.numbers)}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name, None) or 0) > config.num_logprobs:
            raise ValueError(
                f"{name}: expected at most num_logprobs ({config.num_logprobs}), got "
                f"{getattr(params, name)}; raise num_logprobs in the config"
            )
    if isinstance(params, SamplingParams):
        _check_sampling(config, params, vocab_size, ends)
    if isinstance(params, AlgorithmParams) and params.num_return is not None:
        outputs = len(sequences.outputs(sequences.numbers))
        if params.num_return > outputs:
            raise ValueError(
                f"num_return: expected at most {outputs}, the algorithm's outputs, got "
                f"{params.num_return}"
            )
    _check_retention(config, params)
    _check_automaton(config, params, vocab_size)
    _check_processors(config, params, vocab_size)
    if isinstance(params, AlgorithmParams) and (
        sees_more(params) or needs_draft(params)
    ):
        _check_needs(config, params.algorithm)
    if isinstance(params, BeamSearchParams) and vocab_size is not None:
        if params.beam_width > vocab_size:
            raise ValueError(
                f"beam_width: expected at most the vocabulary's size ({vocab_size}), "
                f"got {params.beam_width}"
            )
    if isinstance(params, BeamSearchParams):
        max_tokens = token_limit(config, length, params) - length
        beam.check_length_penalty(params.length_penalty, max_tokens)


def _check_algorithm(
    params: AlgorithmParams, config: EngineConfig, vocab_size: int | None
) -> None:
    """Raise ValueError if the request has several runs, or a companion cannot run."""
    if params.n > 1:
        raise ValueError(
            f"n: expected 1 in the pure engine, got {params.n}; use the parameters "
            "that jpaged.decoding.repeated.repeated_params returns"
        )
    for i, one in enumerate(params.companions):
        _check_companion(f"companions[{i}]", one, config, vocab_size)


def _check_retention(config: EngineConfig, params: Params) -> None:
    """Raise ValueError for parameters that the config's retention does not have."""
    given = getattr(params, "retention", None)
    if given is None or given == OFF:
        return
    if config.retention is None:
        raise ValueError(
            f"retention: expected None, because the engine has no retention method, "
            f"got {given!r:.100}; set LLM(retention=...), or EngineConfig.retention"
        )
    config.retention.values(given)


def _check_companion(
    name: str, prompt: Any, config: EngineConfig, vocab_size: int | None
) -> None:
    """Raise ValueError if a prompt of a row cannot run."""
    if isinstance(prompt, str):
        raise ValueError(
            f"{name}: expected token ids, because the engine has no tokenizer, got "
            f"{prompt!r:.200}"
        )
    if len(prompt) >= config.max_model_len:
        raise ValueError(
            f"{name}: expected fewer than max_model_len ({config.max_model_len}) "
            f"tokens, got {len(prompt)}"
        )
    _check_ids(name, prompt, vocab_size)


def _check_blocks(
    config: EngineConfig,
    length: int,
    params: Params,
    sequences: RequestShape,
    num_blocks: int,
) -> None:
    """Raise ValueError if a prompt of `length` tokens needs more than `num_blocks`."""
    # Samples of a request need not run at the same time.
    rows = 1 if sequences.kind == NO_ALGORITHM else sequences.num_rows
    limit = token_limit(config, length, params)
    needed = most_blocks(config, length, limit, rows - sequences.num_companions)
    for companion in getattr(params, "companions", ()):
        other = min(config.max_model_len, len(companion) + limit - length)
        needed += most_blocks(config, len(companion), other, 1)
    if needed > num_blocks:
        in_rows = f"in each of {rows} rows " * (rows > 1)
        not_pinned = " that are not pinned" * (num_blocks < config.num_blocks)
        raise ValueError(
            f"prompt: {length} tokens and up to {limit - length} generated tokens "
            f"{in_rows}need {needed} blocks of {config.block_size}, the pool has "
            f"{num_blocks}{not_pinned}; raise num_blocks, or lower max_tokens"
        )


def _check_ids(name: str, tokens: Sequence[int], vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
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
    if params.token_masks and not config.num_mask_words:
        raise ValueError(
            "token_masks: expected False, because the config has num_mask_words=0, got "
            "True"
        )
    needed = SAMPLING[sampling_level(params)]
    if SAMPLING.index(config.sampling) < sampling_level(params):
        raise ValueError(
            f"params: expected parameters for sampling={config.sampling!r} of the "
            f"config, got some that need sampling={needed!r}"
        )
    if keeps_prompt_logprobs(params) and not config.prompt_logprobs:
        raise ValueError(
            "prompt_logprobs: expected None, because the config has "
            f"prompt_logprobs=False, got {params.prompt_logprobs}"
        )
    if any(isinstance(word, str) for word in params.bad_words):
        raise ValueError(
            "bad_words: expected token ids, because the engine has no tokenizer, got "
            f"{params.bad_words!r}"
        )
    if vocab_size is not None:
        mine: Any = params  # a frozen `RuleParams`, with token ids as bad words
        check_rules(mine, vocab_size, mine.bad_words, stop_ids)
    needed = rule_sizes(params, vocab_size)
    if needed is None:
        return
    if config.rules is None or config.rules.grown(needed) != config.rules:
        raise ValueError(
            f"params: expected logits rules within rules={config.rules} of the config, "
            f"got rules that need {needed}; create the config with rules={needed}"
        )


def _check_automaton(
    config: EngineConfig, params: Params, vocab_size: int | None
) -> None:
    automaton = params.structured_outputs
    if automaton is None:
        return
    if isinstance(automaton, StructuredOutputsParams):
        raise ValueError(
            "structured_outputs: expected a TokenAutomaton, because the engine has no "
            f"tokenizer, got {type(automaton).__name__}; see "
            "jpaged.structured.compile_constraint"
        )
    if vocab_size is not None and automaton.vocab_size != vocab_size:
        raise ValueError(
            f"structured_outputs: expected an automaton for the model's vocabulary of "
            f"{vocab_size} tokens, got one for {automaton.vocab_size}"
        )
    needed = AutomataSizes.of([automaton])
    if config.automata is None or config.automata.grown(needed) != config.automata:
        raise ValueError(
            "structured_outputs: expected an automaton within "
            f"automata={config.automata} of the config, got one that needs {needed}"
        )


def _check_processors(
    config: EngineConfig, params: Params, vocab_size: int | None
) -> None:
    if not params.logits_processors:
        return
    if vocab_size is not None:
        check_processors(params.logits_processors, vocab_size)
    if processing.chain_of(params) not in config.processors:
        raise ValueError(
            "logits_processors: expected a chain of the config's `processors` "
            f"({len(config.processors)} chains), got {params.logits_processors!r}; "
            "create the config with the chain of `engine.processing.chain_of(params)`"
        )


def _check_needs(config: EngineConfig, algorithm: Any) -> None:
    is_drafted = config.speculation is not None and config.speculation.method == "model"
    if "draft" in algorithm.needs and not is_drafted:
        raise ValueError(
            "algorithm: expected an engine with a draft model for the need 'draft', "
            "got one without; create it with LLM(speculative_config={'model': ...})"
        )
    if is_drafted and {"hidden", "layers"}.intersection(algorithm.needs):
        raise ValueError(
            "algorithm: expected one without the needs 'hidden' and 'layers', because "
            "the engine has a draft model"
        )
    if not algorithms.has_needs(config, algorithm):
        raise ValueError(
            f"algorithm: expected a config with the needs of its algorithms, got "
            f"seen_hidden={config.seen_hidden}, seen_layers={config.seen_layers}; use "
            "engine.algorithms.with_needs(config)"
        )


def sees_more(params: Params) -> bool:
    """Return whether the request's algorithm needs more of the decoder than logits."""
    needs = getattr(getattr(params, "algorithm", None), "needs", ())
    return "hidden" in needs or "layers" in needs


def needs_draft(params: Params) -> bool:
    """Return whether the request's algorithm needs the logits of a draft model."""
    return "draft" in getattr(getattr(params, "algorithm", None), "needs", ())


def rule_sizes(params: Params, vocab_size: int | None) -> RuleSizes | None:
    """Return the sizes that a request's logits rules need; None if it has no rules.

    Args:
      params: the request's parameters, with `bad_words` as token ids.
      vocab_size: the model's vocabulary size.

    Raises:
      ValueError: the request has rules and `vocab_size` is None.
    """
    if not isinstance(params, SamplingParams) or all(
        getattr(params, name) == neutral for name, neutral in _NO_RULES.items()
    ):
        return None
    if vocab_size is None:
        raise ValueError(
            "vocab_size: expected the model's, because the request has logits rules, "
            "got None"
        )
    mine: Any = params  # a frozen `RuleParams`, with token ids as bad words
    return RuleSizes.of_request(mine, vocab_size, mine.bad_words)


def sampling_level(params: Params) -> int:
    """Return how much sampling a request needs, an index in `SAMPLING`."""
    if not isinstance(params, SamplingParams) or params.temperature < GREEDY_BELOW:
        return 0
    return 2 if params.top_k > 0 or params.top_p < 1 or params.min_p > 0 else 1


def most_blocks(config: EngineConfig, prompt_len: int, limit: int, rows: int) -> int:
    """Return the maximum number of blocks of a request's rows.

    The rows share the whole blocks of the prompt without its last token, also after a
    preemption.

    Args:
      config: the engine's config.
      prompt_len: tokens of the prompt.
      limit: tokens at which each row ends, prompt included.
      rows: number of rows.
    """
    shared = (prompt_len - 1) // config.block_size
    whole = shared + rows * (cdiv(limit, config.block_size) - shared)
    # In a group with a window, a row has few blocks at a time.
    alone = cache_groups.group_blocks(
        config.group_windows, config.block_size, limit, config.largest_chunk
    )
    return sum(min(whole, rows * blocks) for blocks in alone)


def largest_request(table: RequestTable, config: EngineConfig) -> int:
    """Return the maximum number of blocks that any unfinished request needs alone."""
    queue, params = jax.device_get((table.queue, table.params))
    unfinished = (scheduler.WAITING, scheduler.RUNNING, scheduler.SWAPPED)
    is_live = np.isin(queue.status, unfinished)
    is_live &= ~params.is_prefix
    most = 1
    for leader in np.unique(queue.leaders[is_live]).tolist():
        mine = np.flatnonzero(is_live & (queue.leaders == leader))
        rows = len(mine) if params.algorithms[mine[0]] != NO_ALGORITHM else 1
        length = int(queue.prompt_lens[mine[0]])
        limit = int(params.token_limits[mine[0]])
        needed = most_blocks(config, length, limit, rows)
        if len(set(queue.prompt_lens[mine].tolist())) > 1:  # prompts of companions
            needed = sum(
                most_blocks(config, 1, int(limit), 1)
                for limit in params.token_limits[mine]
            )
        most = max(most, needed)
    return most


def num_pinned_blocks(table: RequestTable, config: EngineConfig) -> int:
    """Count the blocks of pinned prefixes in all groups, computed or not."""
    is_prefix = np.array(table.params.is_prefix)
    is_prefix &= np.asarray(table.queue.status) != scheduler.EMPTY
    lens = np.asarray(table.queue.num_tokens)[is_prefix]
    return int(cdiv(lens, config.block_size).sum()) * len(config.group_windows)


def token_limit(config: EngineConfig, prompt_len: int, params: Params) -> int:
    """Return the number of tokens at which a sequence ends, prompt included."""
    if params.max_tokens is None:
        return config.max_model_len
    return min(config.max_model_len, prompt_len + params.max_tokens)


def keeps_prompt_logprobs(params: Params) -> bool:
    """Whether the request asks for log-probabilities of its prompt."""
    is_sampled = isinstance(params, SamplingParams)
    return is_sampled and params.prompt_logprobs is not None


def stop_ids(params: Params, eos_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens that end a sequence, sorted."""
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
    """Raise ValueError if a prefix cannot be pinned now.

    Args:
      table: the request table.
      config: the engine's config.
      tokens: token ids of the prefix.
      num_pinned_blocks: blocks of the prefixes that are already pinned.
      vocab_size: if given, token ids are checked against it.
    """
    length = len(tokens)
    if not 0 < length < config.max_model_len:
        raise ValueError(
            f"prefix: expected at least 1 token and fewer than max_model_len "
            f"({config.max_model_len}), got {length}"
        )
    _check_ids("prefix", tokens, vocab_size)
    queue, params = jax.device_get((table.queue, table.params))
    is_live = queue.status != scheduler.EMPTY
    num_pinned = int((params.is_prefix & is_live).sum())
    if num_pinned >= config.max_num_prefixes:
        raise ValueError(
            f"prefix: expected at most max_num_prefixes ({config.max_num_prefixes}) "
            f"pinned prefixes, got another one while {num_pinned} are pinned; unpin "
            "one, or raise max_num_prefixes"
        )
    if is_live.all():
        raise ValueError(
            "prefix: expected a free sequence index in the request table, got none; "
            "run, collect and release first, or raise max_num_requests"
        )
    # Every submitted request must still fit alone beside all pinned blocks.
    most = largest_request(table, config)
    num_blocks = cdiv(length, config.block_size) * len(config.group_windows)
    if num_pinned_blocks + num_blocks + most > config.num_blocks:
        raise ValueError(
            f"prefix: {length} tokens need {num_blocks} blocks, beside "
            f"{num_pinned_blocks} pinned blocks and {most} for the largest request "
            f"that runs or waits, the pool has {config.num_blocks}"
        )
