"""Output printer: prints outputs on stdout, complete or as they grow.

Pipeline: outputs -> [output printer] -> stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jpaged.llm import Delta
from jpaged.outputs import CompletionOutput, RequestOutput


class OutputPrinter:
    """Prints each prompt, its output, and why the output ended."""

    def __init__(self, prompts: Sequence[Any], has_text: bool) -> None:
        """Keeps the prompts; without a tokenizer (`has_text`) token ids are printed."""
        self._prompts = prompts
        self._has_text = has_text

    def print_complete(self, index: int, output: RequestOutput) -> None:
        """Prints the finished output of prompt number `index`."""
        for completion in output.outputs:
            self._head(index, completion.index, len(output.outputs))
            text, token_ids = completion.text, completion.token_ids
            self._write(text if self._has_text else _ids(token_ids))
            self._foot(completion.finish_reason, len(completion.token_ids))
            if completion.logprobs is not None:
                self._logprobs(completion)

    def print_stream(self, deltas: Iterable[Delta], num_samples: Sequence[int]) -> None:
        """Prints outputs as they grow, one after the other in the order of prompts.

        Args:
          deltas: Parts of the outputs; parts of later outputs are kept until then.
          num_samples: The number of outputs of each prompt.
        """
        order = [(i, j) for i, n in enumerate(num_samples) for j in range(n)]
        waiting: dict[tuple[int, int], list[Delta]] = {key: [] for key in order}
        num_tokens = 0
        following = iter(order)
        current = self._start_next(following, num_samples)
        for delta in deltas:
            waiting[delta.request, delta.sample].append(delta)
            while current is not None and waiting[current]:
                part = waiting[current].pop(0)
                num_tokens += len(part.token_ids)
                self._write(part.text if self._has_text else _ids(part.token_ids))
                if part.finish_reason is not None:
                    self._foot(part.finish_reason, num_tokens)
                    num_tokens = 0
                    current = self._start_next(following, num_samples)

    def _start_next(
        self, following: Iterator[tuple[int, int]], num_samples: Sequence[int]
    ) -> tuple[int, int] | None:
        """Prints the head of the next output; returns its prompt and sample."""
        current = next(following, None)
        if current is not None:
            self._head(*current, num_samples[current[0]])
        return current

    def _head(self, index: int, sample: int, num_samples: int) -> None:
        which = f"{index + 1}/{len(self._prompts)}"
        if num_samples > 1:
            which += f", sample {sample + 1}/{num_samples}"
        prompt = self._prompts[index]
        self._write(f"--- {which}\n")
        self._write(prompt if isinstance(prompt, str) else f"{_ids(prompt)}-> ")

    def _foot(self, reason: str | None, num_tokens: int) -> None:
        self._write(f"\n--- {reason}, {num_tokens} tokens\n\n")

    def _logprobs(self, output: CompletionOutput) -> None:
        for token, likely in zip(output.token_ids, output.logprobs or [], strict=True):
            entries = (
                f"{name} {found.decoded_token or ''!r} {found.logprob:.3f}"
                for name, found in likely.items()
            )
            self._write(f"{token}: {', '.join(entries)}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _ids(token_ids: Iterable[int]) -> str:
    return "".join(f"{token} " for token in token_ids)
