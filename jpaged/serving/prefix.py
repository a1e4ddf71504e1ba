"""Pinned prefixes: first tokens of prompts that are computed once and kept.

Pipeline: user -> [prefix] -> engine host -> engine. Host only.
"""

from __future__ import annotations

from collections.abc import Sequence

from jpaged.serving.engine_host import EngineHost
from jpaged.text import prompts
from jpaged.text.tokenizer import Tokenizer


class Prefix:
    """A pinned prefix, kept until `release` or the end of `with`; see `LLM.pin`."""

    def __init__(
        self, host: EngineHost, tokenizer: Tokenizer | None, token_ids: Sequence[int]
    ):
        self._host = host
        self._tokenizer = tokenizer
        self._pinned = host.pin(token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the prefix."""
        return list(self._pinned.token_ids)

    def prompt(self, continuation: str | Sequence[int]) -> list[int]:
        """Return the token ids of the prefix followed by a continuation.

        Args:
          continuation: a text, which gets no special tokens because a BOS may only
            start the prefix; or token ids.

        Raises:
          ValueError: a text, if the model has no tokenizer.
        """
        rest = prompts.token_ids(
            self._tokenizer, "continuation", continuation, add_special_tokens=False
        )
        return [*self.token_ids, *rest]

    def release(self) -> None:
        """Release the prefix; requests that map its blocks keep them.

        Further calls have no effect.
        """
        with self._host.lock:
            self._host.unpin(self._pinned)

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Prefix({len(self._pinned.token_ids)} tokens)"
