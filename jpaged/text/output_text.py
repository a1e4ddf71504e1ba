"""Output text: the text of an output that grows by tokens, and its stop strings.

Pipeline: token ids -> [output_text] -> request state. Host only.
"""

import functools
from collections.abc import Collection, Iterable, Sequence

from jpaged.text.tokenizer import IncrementalDetokenizer, Tokenizer


class StopChecker:
    """Finds the first stop string in text that arrives in pieces, one per token.

    The first stop string is the one that is complete first; of several that end at the
    same character, the longest. The result does not depend on how the text is divided
    into tokens, except that `num_tokens` counts whole tokens.

    A stop string that contains a special token is searched in the text with all
    special tokens, also if they are not part of the output's text.

    Args:
        stop: the stop strings.
        min_tokens: the first tokens, in which no stop string is looked for.
        include_stop: whether the text ends with the stop string that was found.
        special_tokens: the special tokens that the text leaves out.
    """

    def __init__(
        self,
        stop: Iterable[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        special_tokens: Collection[str] = (),
    ):
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        shown = {string: string for string in self._stop}
        for string in self._stop:
            for token in special_tokens:
                shown[string] = shown[string].replace(token, "")
        self._with_special = {s for s in self._stop if shown[s] != s}
        # How many characters of the text can belong to a stop string that is not yet
        # complete. What a special token would complete can be all of them.
        self._held_back = max(
            (len(shown[s]) - (s not in self._with_special) for s in self._stop),
            default=0,
        )
        self._num_shown = 0  # characters that were returned
        self._all = ""  # the text with special tokens, if a stop string has one
        self._hidden: list[tuple[int, int]] = []  # special tokens: index, length
        self.text = ""  # so far, without the stop string unless it is included
        self.num_tokens = 0  # including the one that completed the stop string
        self.stop_reason: str | None = None  # the stop string that was found

    def push(self, piece: str, special: str = "") -> str:
        """Return the text that cannot become part of a stop string any more.

        The last characters, one fewer than the longest stop string has, are held
        back until more text arrives or the text ends. Pieces after a stop string are
        ignored.

        Args:
            piece: the text of the next token.
            special: the token itself, if it is a special token without text.
        """
        if self.stop_reason is not None:
            return ""
        self.num_tokens += 1
        self._append(piece, special, is_checked=self.num_tokens > self._min_tokens)
        end = len(self.text)
        if self.stop_reason is None:
            end = max(self._num_shown, end - self._held_back)
        return self._show(end)

    def finish(self, rest: str = "") -> str:
        """Append `rest`, the detokenizer's last text; return all text held back."""
        if self.stop_reason is None:
            self._append(rest, "", is_checked=self.num_tokens > self._min_tokens)
        return self._show(len(self.text))

    def _append(self, piece: str, special: str, is_checked: bool) -> None:
        old, old_all = len(self.text), len(self._all)
        self.text += piece
        if self._with_special:
            self._all += piece + special
            if special:
                self._hidden.append((old_all + len(piece), len(special)))
        if not is_checked or not (piece or special):
            return
        found = []
        for string in self._stop:
            # A match must end in the new piece: earlier matches were found already,
            # or ended within the first `min_tokens` tokens.
            if string in self._with_special:
                start = self._all.find(string, max(0, old_all - len(string) + 1))
                if start >= 0:
                    end = self._shown_index(start + len(string))
                    found.append((end, self._shown_index(start), string))
                continue
            start = self.text.find(string, max(0, old - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start, string))
        if found:
            _, start, string = min(found)
            self.stop_reason = string
            self.text = self.text[:start] + string * self._include_stop

    def _shown_index(self, index: int) -> int:
        """Return the index in the text for an index in the text with special tokens."""
        return index - sum(
            min(length, index - start)
            for start, length in self._hidden
            if start < index
        )

    def _show(self, end: int) -> str:
        piece = self.text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return piece


class OutputText:
    """The text of one output: detokenisation and stop strings combined.

    Without a tokenizer the text stays empty and tokens are only counted.

    Args:
        tokenizer: the model's tokenizer, or None.
        prompt_token_ids: the tokens before the output.
        stop: the stop strings.
        min_tokens: the first tokens, in which no stop string is looked for.
        include_stop: whether the text ends with the stop string that was found.
        skip_special_tokens: whether the text leaves special tokens out.
        spaces_between_special_tokens: False removes what the tokenizer's decoder puts
            between special tokens, if the text shows them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int] = (),
        stop: Iterable[str] = (),
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):
        stop = tuple(stop)
        self._detokenizer: IncrementalDetokenizer | None = None
        self._special: dict[int, str] = {}
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, prompt_token_ids, skip_special_tokens
            )
            if stop or not spaces_between_special_tokens:
                self._special = special_tokens(tokenizer)
        elif stop:
            raise ValueError(
                f"stop: expected none, got {stop!r}: the model has no tokenizer, so "
                "there is no text; use stop_token_ids"
            )
        self._skips = skip_special_tokens
        self._removes_spaces = not (
            skip_special_tokens or spaces_between_special_tokens
        )
        self._was_special = False
        hidden = self._special.values() if skip_special_tokens else ()
        self._checker = StopChecker(stop, min_tokens, include_stop, hidden)

    def push(self, token_id: int) -> str:
        """Return the text that can be shown after `token_id`; often empty."""
        if self.stop_reason is not None:
            return ""
        if self._detokenizer is None:
            return self._checker.push("")
        piece = self._detokenizer.push(token_id)
        special = self._special.get(token_id, "")
        if self._removes_spaces and special and self._was_special:
            piece = special
        self._was_special = bool(special)
        return self._checker.push(piece, special if self._skips else "")

    def finish(self) -> str:
        """Return the remaining text."""
        rest = "" if self._detokenizer is None else self._detokenizer.finish()
        return self._checker.finish(rest)

    @property
    def text(self) -> str:
        """The text so far, without the stop string unless it is included."""
        return self._checker.text

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, including the one that completed a stop string."""
        return self._checker.num_tokens

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was found, or None."""
        return self._checker.stop_reason


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the text of each special token, by id."""
    texts = {i: tokenizer.backend.id_to_token(i) for i in tokenizer.special_token_ids}
    return {i: text for i, text in texts.items() if text}
