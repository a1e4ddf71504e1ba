"""Intake: what users hand in, checked before anything runs.

Place on the road: user -> [intake] -> llm. Host only.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.decoding.constraints import AutomataSizes
from jpaged.engine import algorithms as groups
from jpaged.engine import limits
from jpaged.engine.limits import Params
from jpaged.models.config import ModelConfig
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.structured import compile_constraint
from jpaged.text.tokenizer import Tokenizer, bad_word_token_ids


class Checked(NamedTuple):
    """A request after the checks."""

    token_ids: list[int]  # of the prompt
    params: Any  # in the form that the engine takes
    error: str | None  # what is wrong with it


@dataclasses.dataclass(frozen=True)
class Intake:
    """What a request must fit: a model, a tokenizer, an engine."""

    model: ModelConfig
    tokenizer: Tokenizer | None
    config: EngineConfig
    max_logprobs: int
    num_blocks: int  # that are not pinned

    def check(self, prompt: Any, params: Any) -> Checked:
        """The request as the engine takes it, and what is wrong with it, or None."""
        token_ids: list[int] = []
        try:
            self._check_params(params)
            params = self._resolve(params)
            token_ids = self.token_ids(prompt)
            engine.check_request(
                grow(self.config, [params], self.model.vocab_size),
                token_ids,
                params,
                vocab_size=self.model.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
                num_blocks=self.num_blocks,
            )
        except ValueError as error:
            return Checked(token_ids, params, str(error))
        return Checked(token_ids, params, None)

    def _check_params(self, params: Any) -> None:
        if not isinstance(params, Params):
            raise ValueError(
                "params: wanted SamplingParams, BeamSearchParams or AlgorithmParams, "
                f"got {params!r}"
            )
        vocab_size = self.model.vocab_size
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise ValueError(
                    f"stop_token_ids: wanted ids from 0 to {vocab_size - 1} (the "
                    f"model's vocabulary), got {token}"
                )
        limits.check_rows(params, self.config)
        if isinstance(params, AlgorithmParams):
            groups.num_sequences(params.algorithm, params.num_rows, vocab_size)
        if not isinstance(params, SamplingParams):
            return
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop: wanted none, got {params.stop!r}: the model has no tokenizer, "
                "so there is no text; use stop_token_ids"
            )
        if (count := num_logprobs_of(params, vocab_size)) > self.max_logprobs:
            name = "logprobs" if params.prompt_logprobs is None else "prompt_logprobs"
            raise ValueError(
                f"{name}: wanted at most max_logprobs ({self.max_logprobs}), got "
                f"{count}; make the LLM with a larger max_logprobs"
            )

    def _resolve(self, params: Params) -> Params:
        """`params` with token ids and automata in place of text."""
        structured = params.structured_outputs
        if isinstance(structured, StructuredOutputsParams):
            automaton = compile_constraint(
                structured,
                self.tokenizer,
                self.model.vocab_size,
                self.model.eos_token_ids,
                params.max_tokens,
            )
            params = dataclasses.replace(params, structured_outputs=automaton)
        if not isinstance(params, SamplingParams) or not params.bad_words:
            return params
        texts = [word for word in params.bad_words if isinstance(word, str)]
        ids = [word for word in params.bad_words if not isinstance(word, str)]
        if texts:
            ids += bad_word_token_ids(self.tokenizer, texts)
        return dataclasses.replace(params, bad_words=ids)

    def token_ids(self, prompt: Any) -> list[int]:
        """The prompt's token ids; a ValueError where it is none."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "prompt: wanted token ids, got text: the model has no tokenizer"
                )
            return self.tokenizer.encode(prompt)
        if not _is_token_ids(prompt):
            raise ValueError(
                f"prompt: wanted text or a list of token ids, got {prompt!r:.80} "
                f"({type(prompt).__name__})"
            )
        return [int(token) for token in prompt]


def grow(
    config: EngineConfig, params: Sequence[Params], vocab_size: int
) -> EngineConfig:
    """The engine's config with what all of the requests need compiled.

    Nothing that it has is taken away, and sizes are powers of two: few programs.
    """
    num_logprobs, width = config.num_logprobs, config.max_beam_width
    rules, algorithms = config.rules, list(config.algorithms)
    for param in params:
        if isinstance(param, SamplingParams):
            num_logprobs = max(num_logprobs, num_logprobs_of(param, vocab_size))
            mine = limits.rule_sizes(param, vocab_size)
            if mine is not None:
                rules = mine if rules is None else rules.grown(mine)
        elif isinstance(param, BeamSearchParams):
            width = max(width, _power_of_two(param.beam_width))
        elif (param.algorithm, param.num_rows) not in algorithms:
            algorithms.append((param.algorithm, param.num_rows))
    # Requests' distinct automata are in the pool together.
    automata = {
        param.structured_outputs.digest.tobytes(): param.structured_outputs
        for param in params
        if param.structured_outputs is not None
    }
    sizes = config.automata
    if automata:
        sizes = AutomataSizes.of(list(automata.values()))
        sizes = sizes.grown(config.automata or AutomataSizes())
    if num_logprobs > config.num_logprobs:
        num_logprobs = min(_power_of_two(num_logprobs), vocab_size)
    return dataclasses.replace(
        config,
        num_logprobs=num_logprobs,
        prompt_logprobs=config.prompt_logprobs
        or any(map(limits.keeps_prompt_logprobs, params)),
        max_beam_width=min(width, config.max_num_seqs),
        rules=rules,
        automata=sizes,
        algorithms=tuple(algorithms),
    )


def num_logprobs_of(params: SamplingParams, vocab_size: int) -> int:
    """Most likely tokens that the engine has to keep for a request."""
    wanted = 0
    for count in (params.logprobs, params.prompt_logprobs):
        if count is not None:
            # The chosen token's rank is kept only along with them.
            count = vocab_size if count == -1 else max(count, 1)
            wanted = max(wanted, count)
    return wanted


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def pairs(prompts: Any, params: Any) -> tuple[list[Any], list[Any]]:
    """Prompts and params, side by side."""
    is_one = isinstance(prompts, str) or (_is_token_ids(prompts) and len(prompts) > 0)
    prompts = [prompts] if is_one else prompts
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(
            "prompts: wanted text, a list of token ids, or a list of either, got "
            f"{prompts!r:.80} ({type(prompts).__name__})"
        )
    if params is None:
        params = SamplingParams()
    if not isinstance(params, Sequence):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(
            f"params: wanted one, or one for each of {len(prompts)} prompts, got "
            f"{len(params)}"
        )
    return list(prompts), list(params)


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, Sequence) and all(
        isinstance(token, numbers.Integral) and not isinstance(token, bool)
        for token in value
    )
