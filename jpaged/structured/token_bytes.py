"""Token bytes: the bytes of each token of a tokenizer.

Pipeline: tokenizer -> [structured.token_bytes] -> token automaton. Host only.

A token can end inside a character, so its decoded text is not sufficient. The steps of
the tokenizer's decoder determine its bytes.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jpaged.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes of each token id in the middle of a text.

    None for special tokens, unused ids and tokens without text. Supports byte-level
    tokenizers and those like SentencePiece, with or without byte tokens.

    Raises:
        ValueError: the tokenizer's decoder has other steps.
    """
    backend = tokenizer.backend
    steps = _steps(backend.decoder)
    token_of_bytes: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id not in tokenizer.special_token_ids:
            token_of_bytes[token_id] = _bytes_of(token, steps) or None
    return token_of_bytes


def _steps(decoder: Any) -> list[Mapping[str, Any]]:
    """Return the decoder's steps as their settings, or raise for unknown ones."""
    if decoder is None:
        raise ValueError(
            "structured_outputs: expected a byte-level or SentencePiece tokenizer, got "
            "one without a decoder, so the bytes of its tokens are unknown"
        )
    settings = json.loads(decoder.__getstate__())
    steps = settings["decoders"] if settings["type"] == "Sequence" else [settings]
    kept, is_fused = [], False
    for step in steps:
        is_fused |= step["type"] == "Fuse"
        is_known = step["type"] in ("ByteLevel", "ByteFallback", "Metaspace", "Fuse")
        if step["type"] == "Replace":
            is_known = "String" in step["pattern"] and not is_fused
        elif step["type"] == "Strip":
            # It strips the start of the whole text, which is that of the prompt.
            is_known = is_fused and step["stop"] == 0
        if not is_known:
            raise ValueError(
                "structured_outputs: expected a byte-level or SentencePiece tokenizer, "
                f"got one with the decoder step {step}"
            )
        if step["type"] not in ("Fuse", "Strip"):
            kept.append(step)
    return kept


def _bytes_of(token: str, steps: list[Mapping[str, Any]]) -> bytes:
    for step in steps:
        if step["type"] == "ByteLevel":
            return _from_byte_level(token)
        if step["type"] == "ByteFallback":
            match = _BYTE_TOKEN.fullmatch(token)
            if match:
                return bytes([int(match.group(1), 16)])
        elif step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        else:  # Metaspace
            token = token.replace(step["replacement"], " ")
    return token.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's map from characters to bytes.

    Visible bytes have their own character, the others those from U+0100 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    # An added token with a character outside the alphabet is its own text.
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode("utf-8")
