"""Intake: what users hand in, checked before anything runs.

Place on the road: user -> [intake] -> llm. Host only.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.models.config import ModelConfig
from jpaged.requests import BeamSearchParams, SamplingParams
from jpaged.text import Tokenizer

# Parameters that the engine does not apply yet, and the value that asks for nothing.
_NOT_BUILT = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "structured_outputs": None,
    "prompt_logprobs": None,
}


@dataclasses.dataclass(frozen=True)
class Intake:
    """What a request must fit: a model, a tokenizer, an engine."""

    model: ModelConfig
    tokenizer: Tokenizer | None
    config: EngineConfig
    max_logprobs: int

    def check(self, prompt: Any, params: Any) -> tuple[list[int], str | None]:
        """The prompt's token ids, and what is wrong with the request, or None."""
        token_ids: list[int] = []
        try:
            self._check_params(params)
            token_ids = self._token_ids(prompt)
            engine.check_request(
                self.config,
                token_ids,
                # As many log-probabilities as wanted are the LLM's to arrange.
                dataclasses.replace(params, logprobs=None),
                vocab_size=self.model.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
            )
        except ValueError as error:
            return token_ids, str(error)
        return token_ids, None

    def num_logprobs(self, params: SamplingParams) -> int:
        """Most likely tokens that the engine has to keep for a request."""
        if params.logprobs is None:
            return 0
        if params.logprobs == -1:
            return self.model.vocab_size
        # The chosen token's rank is kept only along with them.
        return max(params.logprobs, 1)

    def _check_params(self, params: Any) -> None:
        if isinstance(params, BeamSearchParams):
            raise ValueError("params: beam search is not built yet; use SamplingParams")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params: wanted SamplingParams, got {params!r}")
        for name, neutral in _NOT_BUILT.items():
            value = getattr(params, name)
            if value != neutral:
                raise ValueError(
                    f"{name}: not built yet; wanted {neutral!r}, got {value!r}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop: wanted none, got {params.stop!r}: the model has no tokenizer, "
                "so there is no text; use stop_token_ids"
            )
        vocab_size = self.model.vocab_size
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise ValueError(
                    f"stop_token_ids: wanted ids from 0 to {vocab_size - 1} (the "
                    f"model's vocabulary), got {token}"
                )
        count = self.num_logprobs(params)
        if count > self.max_logprobs:
            raise ValueError(
                f"logprobs: wanted at most max_logprobs ({self.max_logprobs}), got "
                f"{count}; make the LLM with a larger max_logprobs"
            )

    def _token_ids(self, prompt: Any) -> list[int]:
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
