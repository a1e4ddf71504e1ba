"""Checks of request parameters that need more than a type and a range. Host only.

Each returns the value in one form, or raises ValueError.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.decoding.processors import LogitsProcessor, as_processor
from jpaged.validation import (
    LARGEST_INT32,
    error,
    integer,
    items,
    number,
    text,
    token_ids,
)

MAX_SEED = 2**64 - 1


def seed(value: Any) -> int | None:
    """Return a seed; None and -1 both mean None."""
    if value is None:
        return None
    found = integer("seed", value, low=-1, high=MAX_SEED)
    return None if found == -1 else found


def priority(value: Any) -> int:
    """Return a priority; the smallest int32 is that of pinned prefixes."""
    return integer("priority", value, low=-LARGEST_INT32, high=LARGEST_INT32)


def deadline_ms(value: Any) -> int | None:
    """Return milliseconds from submission; None is no deadline."""
    if value is None:
        return None
    return integer("deadline_ms", value, low=0, high=LARGEST_INT32 - 1)


def retention(value: Any) -> dict[str, float] | str | None:
    """Return numbers of a retention method by name, "off" or None."""
    if value is None or (isinstance(value, str) and value == "off"):
        return value
    if not isinstance(value, Mapping):
        raise error("retention", "None, 'off' or a dict of numbers", value)
    return {
        str(name): number(f"retention[{name!r}]", one) for name, one in value.items()
    }


def user(value: Any) -> str | int | None:
    """Return the name or the number of a user; None is none."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, str) or isinstance(value, bool):
        raise error("user", "a name that is not empty, a number or None", value)
    return integer("user", value, low=0, high=LARGEST_INT32)


def max_tokens(value: Any) -> int | None:
    """Return a limit of generated tokens; None is the limit of the engine."""
    return None if value is None else integer("max_tokens", value, low=1)


def stop_token_ids(value: Any) -> tuple[int, ...]:
    """Return stop tokens; None is none."""
    return token_ids("stop_token_ids", () if value is None else value)


def companions(value: Any, num_rows: int) -> tuple[Any, ...]:
    """Return prompts of fewer rows than `num_rows`: texts, or tuples of token ids."""
    prompts = items("companions", () if value is None else value, "prompts")
    if len(prompts) >= num_rows:
        expected = f"fewer prompts than num_rows ({num_rows}), one per row"
        raise error("companions", expected, prompts)
    checked: list[Any] = []
    for i, prompt in enumerate(prompts):
        name = f"companions[{i}]"
        is_text = isinstance(prompt, str)
        found = text(name, prompt) if is_text else token_ids(name, prompt)
        if not found:
            raise error(name, "a text or token ids, at least one token", prompt)
        checked.append(found)
    return tuple(checked)


def logits_processors(value: Any) -> tuple[LogitsProcessor, ...]:
    """Return logits processors; a function becomes one without parameters."""
    name = "logits_processors"
    expected = "a sequence of LogitsProcessor or functions (logits, row) -> logits"
    given = () if value is None else items(name, value, expected)
    return tuple(as_processor(f"{name}[{i}]", one) for i, one in enumerate(given))


def bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return bad words: strings that are not empty, or tuples of token ids."""
    if isinstance(value, str):
        value = (value,)
    expected = "strings or sequences of token ids"
    words = () if value is None else items("bad_words", value, expected)
    checked: list[str | tuple[int, ...]] = []
    for i, word in enumerate(words):
        name = f"bad_words[{i}]"
        word = text(name, word) if isinstance(word, str) else token_ids(name, word)
        if not word:
            raise error(name, "a string that is not empty, or token ids", word)
        checked.append(word)
    return tuple(checked)


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """Return a dict of token id -> finite number."""
    if not isinstance(value, Mapping):
        raise error(name, "a dict of token id -> number", value)
    found: dict[int, float] = {}
    for key, bias in value.items():
        # Keys of JSON objects are text.
        is_text = isinstance(key, str) and key.isascii() and key.isdigit()
        key = int(key) if is_text and len(key) < 20 else key
        token = integer(f"{name} key", key, low=0, high=LARGEST_INT32)
        if token in found:
            raise ValueError(f"{name}: expected each token id once, got {token} twice")
        found[token] = number(f"{name}[{token}]", bias)
    return found
