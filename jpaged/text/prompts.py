"""Prompts: what users pass as text or token ids, converted to token ids.

Pipeline: user -> [prompts] -> intake, scoring. Host only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import integer

_BYTES = bytes | bytearray | memoryview  # sequences of int, but no token ids
_KEYS = ("prompt_token_ids", "prompt")  # of a prompt that is a dict
# Further ones of vLLM's prompts, which may be there without a value.
_WITHOUT_VALUE = (
    "multi_modal_data",
    "mm_processor_kwargs",
    "multi_modal_uuids",
    "cache_salt",
)


def token_ids(
    tokenizer: Tokenizer | None, name: str, value: Any, add_special_tokens: bool = True
) -> list[int]:
    """Return the token ids of one prompt.

    Args:
      tokenizer: the model's tokenizer, or None if it has none.
      name: how error messages call the argument.
      value: a text, token ids (a sequence of int or a 1-D integer array), or one of
        these as {"prompt": text} or {"prompt_token_ids": token ids}.
      add_special_tokens: add the tokenizer's special tokens, such as a BOS, to a text.

    Raises:
      ValueError: `value` is neither text nor token ids, or it is text and there is no
        tokenizer.
    """
    value = _without_dict(name, value)
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(
                f"{name}: expected token ids, got text: the model has no tokenizer"
            )
        return tokenizer.encode(value, add_special_tokens)
    if not _is_token_ids(value):
        raise _not_a_prompt(name, "text or a list of token ids", value)
    return [int(token) for token in value]


def text_of(value: Any) -> str | None:
    """Return the text of a prompt; None for a prompt of token ids."""
    if isinstance(value, Mapping):
        value = value.get("prompt")
    return str(value) if isinstance(value, str) else None


def prompt_list(name: str, value: Any) -> list[Any]:
    """Return one prompt or several as a list of prompts.

    Args:
      name: how error messages call the argument.
      value: a text, token ids, a dict of either (see `token_ids`), or a sequence, an
        iterator or an array of them. An empty sequence is no prompts, not one empty
        prompt.

    Raises:
      ValueError: `value` is none of these.
    """
    if isinstance(value, str | Mapping):
        return [value]
    is_array = isinstance(value, np.ndarray | jax.Array)
    is_ordered = not isinstance(value, Set | _BYTES)
    if is_array and value.ndim == 1 and np.issubdtype(value.dtype, np.integer):
        return [value]
    if is_array and value.ndim == 1 and value.dtype.kind not in "OSUT":
        is_ordered = False  # numbers that are no token ids
    is_ordered &= not is_array or value.ndim in (1, 2)
    if not isinstance(value, Iterable) or not is_ordered:
        expected = "text, a list of token ids, or a list of either"
        raise _not_a_prompt(name, expected, value)
    prompts = list(value)
    return [prompts] if prompts and _is_token_ids(prompts) else prompts


def scoring_pairs(
    tokenizer: Tokenizer | None, prompts: Any, continuations: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of each prompt and of its continuation.

    A continuation's text is tokenized without special tokens.

    Raises:
      ValueError: the numbers of prompts and continuations differ, or one of them is
        neither text nor token ids.
    """
    prompts = prompt_list("prompts", prompts)
    continuations = prompt_list("continuations", continuations)
    if len(prompts) != len(continuations):
        raise ValueError(
            f"continuations: expected one for each of {len(prompts)} prompts, got "
            f"{len(continuations)}"
        )
    return (
        [token_ids(tokenizer, f"prompts[{i}]", p) for i, p in enumerate(prompts)],
        [
            token_ids(tokenizer, f"continuations[{i}]", c, add_special_tokens=False)
            for i, c in enumerate(continuations)
        ],
    )


def _without_dict(name: str, value: Any) -> Any:
    """Return the text or the token ids of a prompt that is a dict, as vLLM's can be."""
    if not isinstance(value, Mapping):
        return value
    used = {
        key
        for key, item in value.items()
        if key not in _WITHOUT_VALUE or item not in (None, {})
    }
    if unknown := sorted(map(str, used - set(_KEYS))):
        raise ValueError(
            f"{name}: expected a dict with 'prompt' or 'prompt_token_ids', got the key "
            f"{unknown[0]!r}"
        )
    # Token ids take precedence: the text beside them is what they were made from.
    given = [value[key] for key in _KEYS if value.get(key) is not None]
    if not given or isinstance(given[0], Mapping):
        expected = "a dict with 'prompt' or 'prompt_token_ids'"
        raise _not_a_prompt(name, expected, value)
    ids = value.get("prompt_token_ids")
    if ids is not None and not _is_token_ids(ids):
        raise _not_a_prompt(f"{name}['prompt_token_ids']", "token ids", ids)
    return given[0]


def _not_a_prompt(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(
        f"{name}: expected {expected}, got {value!r:.80} ({type(value).__name__})"
    )


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    if not isinstance(value, Sequence) or isinstance(value, str | _BYTES):
        return False
    return all(_is_token_id(token) for token in value)


def _is_token_id(value: Any) -> bool:
    """Whether `value` is an integer, also one of NumPy or JAX, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    try:
        integer("token", value)
    except ValueError:
        return False
    return True
