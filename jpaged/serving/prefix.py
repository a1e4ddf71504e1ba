"""Prefix: the beginning of prompts, computed once and kept.

Place on the road: user -> [prefix] -> serving -> engine. Host only.
"""

from __future__ import annotations

from collections.abc import Sequence

from jpaged.serving.engine_host import EngineHost
from jpaged.text.tokenizer import Tokenizer


class Prefix:
    """A pinned prefix; see `LLM.pin`. Ends with `release`, or as a context manager."""

    def __init__(
        self, host: EngineHost, tokenizer: Tokenizer | None, token_ids: Sequence[int]
    ):
        self._host = host
        self._tokenizer = tokenizer
        self._pinned = host.pin(token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The prefix's tokens."""
        return list(self._pinned.token_ids)

    def prompt(self, continuation: str | Sequence[int]) -> list[int]:
        """The token ids of the prefix and of what follows it, a text or token ids.

        Raises:
          ValueError: a text, where the model has no tokenizer.
        """
        if not isinstance(continuation, str):
            return [*self.token_ids, *map(int, continuation)]
        if self._tokenizer is None:
            raise ValueError(
                "continuation: wanted token ids, got text: the model has no tokenizer"
            )
        # A BOS belongs at the beginning of the prefix alone.
        rest = self._tokenizer.encode(continuation, add_special_tokens=False)
        return [*self.token_ids, *rest]

    def release(self) -> None:
        """Lets the prefix go; requests that map its blocks keep them. Idempotent."""
        with self._host.lock:
            self._host.unpin(self._pinned)

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Prefix({len(self._pinned.token_ids)} tokens)"
