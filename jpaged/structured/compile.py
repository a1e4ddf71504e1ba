"""From what a text must be to the automaton of its tokens.

Place on the road: requests -> [structured] -> TokenAutomaton -> decoding. Host only:
everything here happens once per constraint, before its request is taken.
"""

import functools
import json
from collections.abc import Sequence

from jpaged.decoding.automaton import TokenAutomaton, shortest, token_automaton
from jpaged.params import StructuredOutputsParams
from jpaged.structured.byte_automata import TokenText, from_choices, over_tokens
from jpaged.structured.json_schema import to_regex
from jpaged.structured.regex import from_regex
from jpaged.structured.token_bytes import token_bytes
from jpaged.text.tokenizer import Tokenizer

_NUM_KEPT = 64  # compiled constraints that are kept for the next request


def compile_constraint(
    params: StructuredOutputsParams,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    max_tokens: int | None = None,
) -> TokenAutomaton:
    """Return the automaton of all token sequences whose text is as `params` wants it.

    Any way to cut the text into tokens is allowed, then EOS. Special tokens are not.
    The automata that were asked for last are kept: the same arguments give the same
    object.

    Args:
        params: what the text must be.
        tokenizer: the model's; None raises.
        vocab_size: the model's, which may be above the tokenizer's.
        eos_token_ids: the tokens that end the text; none raises.
        max_tokens: the request's limit, checked where given.

    Raises:
        ValueError: the regex does not parse, the schema is not supported, the
            vocabulary cannot spell a choice or any text at all, or no text with its
            EOS is as short as `max_tokens`.
    """
    if tokenizer is None:
        raise ValueError(
            "structured_outputs: wanted a model with a tokenizer, got none: the "
            "folder has no tokenizer.json, so there is no text to constrain"
        )
    if not eos_token_ids:
        raise ValueError(
            "structured_outputs: wanted a model with an EOS token, got none: a "
            "constrained text could not end"
        )
    automaton = _compiled(params, tokenizer, vocab_size, tuple(eos_token_ids))
    fewest = shortest(automaton)
    if max_tokens is not None and max_tokens < fewest:
        raise ValueError(
            f"max_tokens: wanted at least {fewest}, the fewest tokens of a text that "
            f"meets structured_outputs, EOS included; got {max_tokens}"
        )
    return automaton


@functools.lru_cache(maxsize=_NUM_KEPT)
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
        automaton = from_regex(to_regex(json.loads(str(params.json))))
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
                f"choice[{i}]: wanted a text that the model's tokens can spell, got "
                f"{choice!r}"
            )
