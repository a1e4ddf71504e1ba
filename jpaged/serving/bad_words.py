"""Bad words of a request: what of them is an automaton, and what is token ids.

Pipeline: intake -> [bad_words] -> engine. Host only.
"""

from __future__ import annotations

import functools

import numpy as np

from jpaged.decoding.automaton import DEAD, TokenAutomaton, shortest
from jpaged.models.config import ModelConfig
from jpaged.params import SamplingParams
from jpaged.structured import bad_words as structured
from jpaged.structured import token_bytes
from jpaged.text.bad_words import bad_word_token_ids, special_token_ids
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import error

_TokenIds = list[tuple[int, ...]]


def bad_words_of(
    params: SamplingParams,
    constraint: TokenAutomaton | None,
    tokenizer: Tokenizer | None,
    model: ModelConfig,
) -> tuple[TokenAutomaton | None, _TokenIds]:
    """Return the automaton of a request, and the token sequences it must not generate.

    Args:
      params: the request's parameters.
      constraint: the automaton of `params.structured_outputs`, or None.
      tokenizer: the model's tokenizer, or None.
      model: the model's config.

    Raises:
      ValueError: there is no tokenizer to read a text, or no token is left.
    """
    words = tuple(word for word in params.bad_words if isinstance(word, str))
    token_ids = [tuple(w) for w in params.bad_words if not isinstance(w, str)]
    if not words:
        return constraint, token_ids
    if tokenizer is None:
        raise ValueError(
            f"bad_words: expected none, got {words!r}: the model has no tokenizer to "
            "encode words; use token ids, logit_bias or allowed_token_ids"
        )
    special = special_token_ids(tokenizer, words)
    token_ids += [word for word in special if word[0] < model.vocab_size]
    if not _knows_bytes(tokenizer):
        return constraint, token_ids + bad_word_token_ids(tokenizer, words)
    automaton = structured.compile_bad_words(
        words, tokenizer, model.vocab_size, tuple(model.eos_token_ids)
    )
    if constraint is not None:
        automaton = structured.intersection(constraint, automaton)
        fewest = shortest(automaton)
        if params.max_tokens is not None and params.max_tokens < fewest:
            raise ValueError(
                f"max_tokens: expected at least {fewest}, the number of tokens of the "
                "shortest text for structured_outputs without bad_words including "
                f"EOS, got {params.max_tokens}"
            )
    _check_a_token_is_left(params, automaton)
    return automaton, token_ids


@functools.lru_cache(maxsize=4)
def _knows_bytes(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of the tokenizer have known bytes."""
    try:
        token_bytes(tokenizer)
    except ValueError:
        return False
    return True


def _check_a_token_is_left(params: SamplingParams, automaton: TokenAutomaton) -> None:
    """Raise ValueError if the words forbid every first token that is allowed."""
    allowed = params.allowed_token_ids
    if allowed is None:
        return
    known = [token for token in allowed if token < automaton.vocab_size]
    first = automaton.transitions[0, automaton.classes[known]]
    if known and bool(np.all(first == DEAD)):
        raise error(
            "bad_words",
            "at least one token of allowed_token_ids to be left for the start",
            params.bad_words,
        )
