"""Compile: from a constraint on a text to the automaton of its tokens.

Pipeline: requests -> [structured.compile] -> TokenAutomaton -> decoding. Host only.

This runs once per constraint, before its request is submitted.
"""

import functools
import json
from collections.abc import Sequence

from jpaged.decoding.automaton import TokenAutomaton, shortest, token_automaton
from jpaged.params import StructuredOutputsParams
from jpaged.structured.byte_automata import from_choices
from jpaged.structured.json_schema import to_automaton
from jpaged.structured.over_tokens import TokenText, over_tokens
from jpaged.structured.regex import from_regex
from jpaged.structured.token_bytes import token_bytes
from jpaged.text.tokenizer import Tokenizer

_CACHE_SIZE = 64  # compiled constraints


def compile_constraint(
    params: StructuredOutputsParams,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    max_tokens: int | None = None,
    stop_token_ids: Sequence[int] = (),
) -> TokenAutomaton:
    """Return the automaton of all token sequences whose text satisfies `params`.

    Every way to split the text into tokens is allowed, followed by EOS. Special tokens
    are not allowed. Recent results are cached: equal arguments return the same object.

    Args:
        params: the constraint.
        tokenizer: of the model.
        vocab_size: of the model; may be larger than that of the tokenizer.
        eos_token_ids: tokens that end the text, at least one.
        max_tokens: limit of the request; None is not checked.
        stop_token_ids: further tokens that end the text, of the request. Like EOS they
            are allowed where the text may end, and nowhere else.

    Raises:
        ValueError: `tokenizer` is None, there is no EOS token, the regex is invalid,
            the schema is not supported, the vocabulary cannot spell a choice or any
            allowed text, or every allowed text with its EOS has more than `max_tokens`
            tokens.
    """
    if tokenizer is None:
        raise ValueError(
            "structured_outputs: expected a model with a tokenizer, got none: "
            "without tokenizer.json in the folder there is no text to constrain"
        )
    if not eos_token_ids:
        raise ValueError(
            "structured_outputs: expected a model with an EOS token, got none: a "
            "constrained text could not end"
        )
    ends = tuple(sorted({*eos_token_ids, *stop_token_ids}))
    automaton = _compiled(params, tokenizer, vocab_size, ends)
    fewest = shortest(automaton)
    if max_tokens is not None and max_tokens < fewest:
        raise ValueError(
            f"max_tokens: expected at least {fewest}, the number of tokens of the "
            f"shortest text for structured_outputs including EOS, got {max_tokens}"
        )
    return automaton


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _compiled(
    params: StructuredOutputsParams,
    tokenizer: Tokenizer,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
) -> TokenAutomaton:
    tokens = _token_text(tokenizer, vocab_size)
    if params.choice is not None:
        _check_spelling(params.choice, tokens)
        automaton = from_choices(params.choice)
    elif params.regex is not None:
        automaton = from_regex(params.regex)
    else:
        automaton = to_automaton(json.loads(str(params.json)))
    transitions, classes = over_tokens(automaton, tokens)
    return token_automaton(transitions, automaton.is_accepting, eos_token_ids, classes)


@functools.lru_cache(maxsize=4)
def _token_text(tokenizer: Tokenizer, vocab_size: int) -> TokenText:
    pieces = token_bytes(tokenizer)[:vocab_size]
    return TokenText.of([*pieces, *[None] * (vocab_size - len(pieces))])


def _check_spelling(choices: Sequence[str], tokens: TokenText) -> None:
    for i, choice in enumerate(choices):
        text = choice.encode("utf-8")
        is_reached = [True] + [False] * len(text)
        for start in range(len(text)):
            if is_reached[start]:
                for end in range(start + 1, len(text) + 1):
                    is_reached[end] |= text[start:end] in tokens.distinct
        if not is_reached[-1]:
            raise ValueError(
                f"choice[{i}]: expected a text that the model's tokens can spell, got "
                f"{choice!r}"
            )
