"""Prompts: what users pass as text or token ids, converted to token ids.

Pipeline: user -> [prompts] -> intake, scoring. Host only.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpaged.text.tokenizer import Tokenizer


def token_ids(
    tokenizer: Tokenizer | None, name: str, value: Any, add_special_tokens: bool = True
) -> list[int]:
    """Return the token ids of one prompt.

    Args:
      tokenizer: the model's tokenizer, or None if it has none.
      name: how error messages call the argument.
      value: a text, or token ids (a sequence of int or a 1-D integer array).
      add_special_tokens: add the tokenizer's special tokens, such as a BOS, to a text.

    Raises:
      ValueError: `value` is neither text nor token ids, or it is text and there is no
        tokenizer.
    """
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(
                f"{name}: expected token ids, got text: the model has no tokenizer"
            )
        return tokenizer.encode(value, add_special_tokens)
    if not _is_token_ids(value):
        raise ValueError(
            f"{name}: expected text or a list of token ids, got {value!r:.80} "
            f"({type(value).__name__})"
        )
    return [int(token) for token in value]


def prompt_list(name: str, value: Any) -> list[Any]:
    """Return one prompt or several as a list of prompts.

    Args:
      name: how error messages call the argument.
      value: a text, token ids, or a sequence of either. An empty sequence is no
        prompts, not one empty prompt.

    Raises:
      ValueError: `value` is none of these.
    """
    if isinstance(value, str) or (_is_token_ids(value) and len(value) > 0):
        return [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ValueError(
            f"{name}: expected text, a list of token ids, or a list of either, got "
            f"{value!r:.80} ({type(value).__name__})"
        )
    return list(value)


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


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, Sequence) and all(
        isinstance(token, numbers.Integral) and not isinstance(token, bool)
        for token in value
    )
