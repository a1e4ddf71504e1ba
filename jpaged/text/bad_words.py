"""Bad words as sequences of tokens, where the bytes of tokens are unknown.

Pipeline: request parameters -> [bad_words] -> decoding.rules. Host only.

`structured.bad_words` forbids a text however it is divided into tokens. It must know
the bytes of each token. This module serves other tokenizers, and special tokens, which
have no bytes.
"""

import functools
from collections.abc import Iterable

from jpaged.text.output_text import special_tokens
from jpaged.text.tokenizer import Tokenizer


def special_token_ids(
    tokenizer: Tokenizer, words: Iterable[str]
) -> list[tuple[int, ...]]:
    """Return the special tokens that contain one of `words`, each as a sequence."""
    words = tuple(words)
    return [
        (token_id,)
        for token_id, text in sorted(special_tokens(tokenizer).items())
        if any(word in text for word in words)
    ]


def bad_word_token_ids(
    tokenizer: Tokenizer, words: Iterable[str]
) -> list[tuple[int, ...]]:
    """Return token sequences that must not be generated, so that no word appears.

    These are every token whose text contains the word, the word as the tokenizer
    encodes it without its leading blanks, and with one leading blank, as it appears
    within a text. A word that consists of blanks is used as it is. A word that is
    divided into other tokens is not found.

    Returns:
        The token sequences in order, without duplicates.

    Raises:
        ValueError: the tokenizer cannot encode a word.
    """
    found: dict[tuple[int, ...], None] = {}
    for position, word in enumerate(words):
        bare = word.lstrip(" ")
        plain = _token_ids(tokenizer, bare or word, word, position)
        spaced = _token_ids(tokenizer, " " + bare, word, position) if bare else plain
        for token_id, text in enumerate(_texts(tokenizer)):
            if (bare or word) in text:
                found[(token_id,)] = None
        found[plain] = None
        if spaced[-len(plain) :] != plain:
            found[spaced] = None
    return list(found)


@functools.lru_cache(maxsize=4)
def _texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token on its own."""
    return [tokenizer.decoded_token(token) for token in range(tokenizer.vocab_size)]


def _token_ids(
    tokenizer: Tokenizer, text: str, word: str, position: int
) -> tuple[int, ...]:
    """Return the tokens of `text`; raise ValueError about `word` if it has none."""
    token_ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    if not token_ids or (
        unknown is not None and tokenizer.backend.token_to_id(unknown) in token_ids
    ):
        raise ValueError(
            f"bad_words[{position}]: expected text that the tokenizer can encode, got "
            f"{word!r}"
        )
    return tuple(token_ids)
