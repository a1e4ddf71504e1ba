"""Intake: prompts and parameters of users, checked before anything runs.

Pipeline: user -> [intake] -> batcher. Host only.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.decoding.bit_masks import MASK_BITS, num_words
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.repeated import repeated_params
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.engine import algorithms as groups
from jpaged.engine import limits, processing
from jpaged.engine.limits import Params
from jpaged.names import rechecked
from jpaged.outputs import RequestOutput
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.serving.bad_words import bad_words_of
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.request_state import RequestState, RequestUpdate
from jpaged.structured import compile_constraint
from jpaged.text import prompts as text_prompts
from jpaged.text.tokenizer import Tokenizer


class CheckedRequest(NamedTuple):
    """The result of checking a request."""

    token_ids: list[int]  # of the prompt
    params: Any  # with token ids and automata in place of text
    error: str | None  # why the request is invalid


class Intake:
    """Checks, tokenizes and numbers the requests of an LLM.

    Args:
      host: the engine that runs the requests.
      tokenizer: the model's tokenizer, or None.
      max_logprobs: limit of `logprobs` and `prompt_logprobs`; -1: none.
      default_params: returns the parameters of requests that have none.
    """

    def __init__(
        self,
        host: EngineHost,
        tokenizer: Tokenizer | None,
        max_logprobs: int,
        default_params: Callable[[], Params] = SamplingParams,
    ):
        self.num_arrivals = 0  # requests so far
        self.num_prompt_tokens = 0  # of all requests so far
        self._host = host
        self._model = host.model.config
        self._tokenizer = tokenizer
        self._max_logprobs = max_logprobs
        self._default_params = default_params

    def call(
        self, prompts: Any, params: Any, on_error: str = "raise", name: str = "prompts"
    ) -> tuple[list[RequestState], list[RequestOutput | None]]:
        """Create the requests of one call, which share an inbox.

        Args:
          prompts: one prompt or several.
          params: parameters for all prompts, or one for each; None for the defaults.
          on_error: "raise" or "return", see `LLM.generate`.
          name: what the caller names the prompts, for messages.

        Returns:
          The valid requests; and per prompt the output if it is invalid, else None.

        Raises:
          ValueError: a request is invalid and `on_error` is "raise".
        """
        params = self._default_params() if params is None else params
        prompts, params = match_params(prompts, params)
        inbox: collections.deque[RequestUpdate] = collections.deque()
        states: list[RequestState] = []
        outputs: list[RequestOutput | None] = []
        errors: list[str] = []
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            arrival = self.num_arrivals + index
            found = self._request(prompt, param, index, arrival, inbox)
            if isinstance(found, RequestState):
                states.append(found)
                outputs.append(None)
            else:
                outputs.append(found)
                errors.append(f"{name}[{index}]: {found.error}")
        if errors and on_error == "raise":
            head = (
                f"{len(errors)} of {len(prompts)} requests are invalid, none was run:"
            )
            message = "\n  ".join([head, *errors]) if len(prompts) > 1 else errors[0]
            raise ValueError(message)
        self.num_arrivals += len(prompts)
        self.num_prompt_tokens += sum(len(each.prompt_token_ids) for each in states)
        return states, outputs

    def live(self, prompt: Any, params: Any) -> RequestState:
        """Create a request of its own, with an inbox of its own.

        Raises:
          ValueError: the request is invalid.
        """
        params = self._default_params() if params is None else params
        number = self.num_arrivals
        found = self._request(prompt, params, number, number, collections.deque())
        if not isinstance(found, RequestState):
            raise ValueError(found.error)
        found.is_streamed = True
        self.num_arrivals += 1
        self.num_prompt_tokens += len(found.prompt_token_ids)
        return found

    def errors(self, prompts: Any, params: Any) -> list[str | None]:
        """Return for each request why it is invalid, or None."""
        params = self._default_params() if params is None else params
        pairs = zip(*match_params(prompts, params), strict=True)
        return [self._check(prompt, param).error for prompt, param in pairs]

    def check_all(self, params: Any) -> list[Params]:
        """Return one or several parameters as the engine gets them.

        Raises:
          ValueError: some are invalid.
        """
        if params is None or isinstance(params, Params):
            params = [self._default_params() if params is None else params]
        found = []
        for one in map(rechecked, params):
            self._check_params(one)
            found.append(self._resolve(one))
        return found

    def token_ids(self, prompt: Any) -> list[int]:
        """Return a prompt's token ids; raise ValueError if it is not a prompt."""
        return text_prompts.token_ids(self._tokenizer, "prompt", prompt)

    def _truncated(self, token_ids: list[int], params: Params) -> list[int]:
        """Return the last tokens of a prompt, as many as its parameters ask for."""
        length = getattr(params, "truncate_prompt_tokens", None)
        if length == -1:
            length = self._host.config.max_model_len - 1
        return token_ids if length is None else token_ids[-length:]

    def _request(
        self,
        prompt: Any,
        params: Any,
        index: int,
        arrival: int,
        inbox: collections.deque[RequestUpdate],
    ) -> RequestState | RequestOutput:
        """Return the request if it is valid, else an output with its error."""
        token_ids, params, error = self._check(prompt, params)
        text = text_prompts.text_of(prompt)
        if error is not None:
            return RequestOutput(arrival, text, token_ids, [], error=error)
        vocab_size = self._model.vocab_size
        config = grown_config(self._host.config, [params], vocab_size)
        shape = limits.request_shape(params, config, vocab_size)
        num_outputs = len(shape.outputs(shape.numbers))
        num_outputs = getattr(params, "num_return", None) or num_outputs
        has_text = getattr(params, "detokenize", True)
        return RequestState(
            index=index,
            arrival=arrival,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=self._model.eos_token_ids,
            tokenizer=self._tokenizer if has_text else None,
            table_size=len(shape.numbers),
            num_outputs=num_outputs,
            inbox=inbox,
        )

    def _check(self, prompt: Any, params: Any) -> CheckedRequest:
        """Convert a request for the engine; errors are returned, not raised."""
        token_ids: list[int] = []
        try:
            params = rechecked(params)
            self._check_params(params)
            params = self._resolve(params)
            token_ids = self._truncated(self.token_ids(prompt), params)
            engine.check_request(
                grown_config(self._host.config, [params], self._model.vocab_size),
                token_ids,
                params,
                vocab_size=self._model.vocab_size,
                eos_token_ids=self._model.eos_token_ids,
                num_blocks=self._host.num_open_blocks(),
            )
        except ValueError as error:
            return CheckedRequest(token_ids, params, str(error))
        return CheckedRequest(token_ids, params, None)

    def _check_params(self, params: Any) -> None:
        """Raise ValueError if the parameters do not fit the model or the engine."""
        if not isinstance(params, Params):
            raise ValueError(
                "params: expected SamplingParams, BeamSearchParams or AlgorithmParams, "
                f"got {params!r}"
            )
        vocab_size = self._model.vocab_size
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise ValueError(
                    f"stop_token_ids: expected ids from 0 to {vocab_size - 1} (the "
                    f"model's vocabulary), got {token}"
                )
        limits.check_rows(params, self._host.config)
        if isinstance(params, AlgorithmParams):
            self._check_algorithm(params)
        if isinstance(params, BeamSearchParams):
            return
        if params.stop and self._tokenizer is None:
            raise ValueError(
                f"stop: expected none, got {params.stop!r}: the model has no "
                "tokenizer, so there is no text; use stop_token_ids"
            )
        count = _num_logprobs(params, vocab_size)
        most = vocab_size if self._max_logprobs == -1 else self._max_logprobs
        is_prompt = getattr(params, "prompt_logprobs", None) is not None
        name = "prompt_logprobs" if is_prompt else "logprobs"
        if count > most:
            raise ValueError(
                f"{name}: expected at most max_logprobs ({most}), got {count}; create "
                "the LLM with a larger max_logprobs"
            )
        if count > vocab_size:
            raise ValueError(
                f"{name}: expected at most {vocab_size}, the model's vocabulary, or -1 "
                f"for all of it, got {count}"
            )

    def _check_algorithm(self, params: AlgorithmParams) -> None:
        """Raise ValueError if an algorithm's functions fail, or fit another model."""
        algorithm = params.algorithm
        try:
            groups.num_sequences(algorithm, params.num_rows, self._model.vocab_size)
        except ValueError:
            raise
        except Exception as cause:  # whatever a user's function raises
            step = getattr(algorithm.step, "__name__", type(algorithm.step).__name__)
            raise ValueError(
                "algorithm: expected functions init(num_rows) and step(keys, logits, "
                "state), with a Context as fourth argument if it has needs or "
                f"parameters, that jax can trace, got {type(cause).__name__} with step "
                f"{step}: {cause!s:.500}"
            ) from cause
        self._check_needs(algorithm)

    def _check_needs(self, algorithm: Any) -> None:
        """Raise ValueError if an algorithm was created for another model."""
        model, size = self._model, getattr(algorithm, "hidden_size", 0)
        if size not in (0, model.hidden_size):
            raise ValueError(
                f"algorithm: expected the model's hidden_size ({model.hidden_size}), "
                f"got {size}"
            )
        layers = getattr(algorithm, "layers", ())
        if max(layers, default=0) >= model.num_layers:
            raise ValueError(
                f"algorithm: expected layers from 0 to {model.num_layers - 1} (the "
                f"model's), got {layers}"
            )

    def _resolve(self, params: Params) -> Params:
        """Replace text in the parameters by token ids and automata.

        The result shares no dict with the caller, who may change it later.
        """
        automaton = params.structured_outputs
        if isinstance(automaton, StructuredOutputsParams):
            automaton = compile_constraint(
                automaton,
                self._tokenizer,
                self._model.vocab_size,
                self._model.eos_token_ids,
                params.max_tokens,
                params.stop_token_ids,
            )
        if isinstance(params, AlgorithmParams):
            prompts = [
                tuple(
                    text_prompts.token_ids(self._tokenizer, f"companions[{i}]", prompt)
                )
                for i, prompt in enumerate(params.companions)
            ]
            params = dataclasses.replace(
                params, structured_outputs=automaton, companions=prompts
            )
            return repeated_params(params)
        if not isinstance(params, SamplingParams):
            return dataclasses.replace(params, structured_outputs=automaton)
        automaton, bad_words = bad_words_of(
            params, automaton, self._tokenizer, self._model
        )
        return dataclasses.replace(
            params, structured_outputs=automaton, bad_words=bad_words
        )


def match_params(prompts: Any, params: Any) -> tuple[list[Any], list[Any]]:
    """Return lists of prompts and of their parameters, of one length.

    Raises:
      ValueError: `prompts` is not a prompt or several, or there are several
        parameters but not one for each prompt.
    """
    prompts = text_prompts.prompt_list("prompts", prompts)
    if isinstance(params, Iterator | np.ndarray):
        params = list(params)
    if not isinstance(params, Sequence):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(
            f"params: expected one, or one for each of {len(prompts)} prompts, got "
            f"{len(params)}"
        )
    return prompts, list(params)


# Sizes of the arrays for a feature when it is used first.
LEAST_LOGPROBS = 20
LEAST_BEAM_WIDTH = 8
LEAST_RULES = RuleSizes(num_bias=64, num_bad_words=32, bad_word_len=8)
LEAST_AUTOMATA = AutomataSizes(
    num_automata=8, num_states=256, num_classes=64, num_allowed_sets=64
)


def grown_config(
    config: EngineConfig, params: Sequence[Params], vocab_size: int
) -> EngineConfig:
    """Return a config with all features that `config` or the requests need.

    Features are never removed. Sizes start so large that most requests fit, and are
    then rounded up to powers of two, so that few programs are compiled.

    Args:
      config: the engine's config.
      params: parameters of requests, as `Intake` resolves them.
      vocab_size: size of the model's vocabulary.
    """
    num_logprobs, width = config.num_logprobs, config.max_beam_width
    num_allowed = num_words(vocab_size) * MASK_BITS
    least_rules = dataclasses.replace(LEAST_RULES, num_allowed=num_allowed)
    rules, algorithms = config.rules, list(config.algorithms)
    num_mask_words = config.num_mask_words
    processors = list(config.processors)
    for param in params:
        chain = processing.chain_of(param)
        if chain and chain not in processors:
            processors.append(chain)
        num_logprobs = max(num_logprobs, _num_logprobs(param, vocab_size))
        if isinstance(param, SamplingParams):
            if param.token_masks:
                num_mask_words = num_words(vocab_size)
            sizes = limits.rule_sizes(param, vocab_size)
            if sizes is not None:
                rules = (rules or least_rules).grown(sizes)
        elif isinstance(param, BeamSearchParams):
            width = max(width, LEAST_BEAM_WIDTH, _power_of_two(param.beam_width))
        elif (param.algorithm, param.num_rows) not in algorithms:
            algorithms.append((param.algorithm, param.num_rows))
    # The distinct automata of all requests are in the pool at the same time.
    automata = {
        param.structured_outputs.digest.tobytes(): param.structured_outputs
        for param in params
        if param.structured_outputs is not None
    }
    automata_sizes = config.automata
    if automata:
        automata_sizes = AutomataSizes.of(list(automata.values()))
        automata_sizes = automata_sizes.grown(config.automata or LEAST_AUTOMATA)
    if num_logprobs > config.num_logprobs:
        is_many = num_logprobs > LEAST_LOGPROBS
        num_logprobs = _power_of_two(num_logprobs) if is_many else LEAST_LOGPROBS
        num_logprobs = min(num_logprobs, vocab_size)
    grown = dataclasses.replace(
        config,
        num_logprobs=num_logprobs,
        num_mask_words=num_mask_words,
        prompt_logprobs=config.prompt_logprobs
        or any(map(limits.keeps_prompt_logprobs, params)),
        max_beam_width=min(width, config.max_num_seqs),
        rules=rules,
        automata=automata_sizes,
        algorithms=tuple(algorithms),
        processors=tuple(processors),
    )
    return groups.with_needs(grown)


def _num_logprobs(params: Params, vocab_size: int) -> int:
    """Return how many most probable tokens the engine keeps for a request."""
    needed = 0
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name, None)
        if count is not None:
            # The sampled token's rank is only kept together with at least one.
            count = vocab_size if count == -1 else max(count, 1)
            needed = max(needed, count)
    return needed


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
