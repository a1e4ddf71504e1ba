"""Logprob forms: log-probabilities as the completions and the chat API return them.

Pipeline: Logprobs -> [logprob_forms] -> JSON. Host only.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jpaged.outputs import Logprob
from jpaged.structured.token_bytes import token_bytes
from jpaged.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity
Entry = Mapping[int, Logprob]


class TokenNames:
    """How tokens are called in responses.

    Args:
      tokenizer: the model's tokenizer, or None.
      as_ids: call all tokens "token_id:N", which distinguishes tokens of equal text.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False):
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def name(self, token_id: int, text: str | None = None) -> str:
        """Return a token's name; `text` is its text, if it is known."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decoded_token(token_id) if text is None else text

    def bytes_of(self, token_id: int, name: str) -> list[int]:
        """Return a token's bytes, also of one that is a part of a character."""
        found = self._bytes_in_text(token_id)
        return list(name.encode("utf-8") if found is None else found)

    def text_bytes(self, token_id: int, skips_special: bool) -> bytes:
        """Return what a token adds to the text; often nothing for a special token."""
        found = self._bytes_in_text(token_id)
        if found is not None:
            return found
        tokenizer = self._tokenizer
        if tokenizer is None:
            return b""
        if skips_special and token_id in tokenizer.special_token_ids:
            return b""
        return tokenizer.decoded_token(token_id).encode("utf-8")

    def _bytes_in_text(self, token_id: int) -> bytes | None:
        if self._tokenizer is None:
            return None
        table = _bytes_table(self._tokenizer)
        return table[token_id] if token_id < len(table) else None


@functools.lru_cache(maxsize=4)
def _bytes_table(tokenizer: Tokenizer) -> list[bytes | None]:
    try:
        return token_bytes(tokenizer)
    except ValueError:  # a decoder with steps of its own
        return []


class CompletionLogprobs:
    """Builds `logprobs` of a choice of `/v1/completions`, part by part.

    Args:
      names: names of tokens.
      top: number of most probable tokens to return per position, besides the token.
      skips_special: whether the text leaves special tokens out.
    """

    def __init__(self, names: TokenNames, top: int, skips_special: bool = True):
        self._names = names
        self._top = top
        self._skips_special = skips_special
        self._offset = 0  # complete characters of the tokens so far
        # A token that begins inside a character has the offset of this character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def part(
        self, token_ids: Sequence[int], entries: Sequence[Entry | None]
    ) -> dict[str, Any]:
        """Return the form of the next tokens; the first of a prompt has no entry."""
        tokens, offsets, logprobs, tops = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            found = None if entry is None else entry.get(token_id)
            name = self._names.name(token_id, found.decoded_token if found else None)
            tokens.append(name)
            offsets.append(self._offset)
            data = self._names.text_bytes(token_id, self._skips_special)
            self._offset += len(self._decoder.decode(data))
            logprobs.append(_finite(found.logprob) if found else None)
            tops.append(self._tops(token_id, entry) if entry else None)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _tops(self, token_id: int, entry: Entry) -> dict[str, float]:
        """Return logprobs by name; of tokens with equal names, the larger one."""
        found: dict[str, float] = {}
        for each, value in entry.items():
            if each != token_id and (value.rank or 0) > self._top:
                continue
            name = self._names.name(each, value.decoded_token)
            logprob = _finite(value.logprob)
            found[name] = max(logprob, found.get(name, logprob))
        return found


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], entries: Sequence[Entry], top: int
) -> dict[str, Any]:
    """Return `logprobs` of a choice of `/v1/chat/completions`.

    Args:
      names: names of tokens.
      token_ids: tokens of the output.
      entries: per token, its log-probability and those of the most probable tokens.
      top: number of most probable tokens to return per position.
    """
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
        tops = [
            _chat_token(names, each, value)
            for each, value in ranked
            if (value.rank or 0) <= top
        ]
        own = _chat_token(names, token_id, entry[token_id])
        content.append({**own, "top_logprobs": tops[:top]})
    return {"content": content, "refusal": None}


def _chat_token(names: TokenNames, token_id: int, value: Logprob) -> dict[str, Any]:
    name = names.name(token_id, value.decoded_token)
    return {
        "token": name,
        "logprob": _finite(value.logprob),
        "bytes": names.bytes_of(token_id, name),
    }


def prompt_logprobs(
    names: TokenNames, entries: Sequence[Entry | None]
) -> list[dict[str, Any] | None]:
    """Return `prompt_logprobs` as vLLM does: a dict per token, keyed by token id."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _finite(value.logprob),
                "rank": value.rank,
                "decoded_token": names.name(token_id, value.decoded_token),
            }
            for token_id, value in entry.items()
        }
        for entry in entries
    ]


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
