"""Text in and out: the tokenizer, text token by token, stop strings, bad words.

Place on the road: prompt -> [text] -> token ids -> llm, and token ids -> [text] ->
text. Host only. A checkpoint without a tokenizer works with token ids alone.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

# What decoding gives for bytes that are not (yet) a whole character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokenizers that are not read: SentencePiece, tiktoken, slow BPE.
_OTHER_KINDS = ("tokenizer.model", "spiece.model", "tekken.json", "merges.txt")
_CONTEXT = 6  # tokens of the prompt that the first output token is decoded after


class Tokenizer:
    """A checkpoint's tokenizer: text to token ids and back."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: pathlib.Path | None = None,
    ):
        self.backend = backend
        self.folder = folder  # that it came from, where chat templates are
        # A file may ask for truncation or padding, which training uses. A prompt that
        # is too long is to be refused, not shortened.
        backend.no_truncation()
        backend.no_padding()
        self.special_token_ids: frozenset[int] = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        # SentencePiece's tokens for single bytes.
        byte_ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_token_ids: frozenset[int] = frozenset(
            token_id for token_id in byte_ids if token_id is not None
        )
        # Ids may have holes, so this is not the number of entries.
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer | None":
        """Return the tokenizer of `folder`/tokenizer.json; None where there is none.

        Raises:
            ValueError: the file is there, but is no tokenizer; or the folder has
              another kind of tokenizer alone.
        """
        path = pathlib.Path(folder) / "tokenizer.json"
        if not path.is_file():
            for name in _OTHER_KINDS:
                if (path.parent / name).is_file():
                    raise ValueError(
                        f"{path.parent}: wanted tokenizer.json, got {name} alone; "
                        f"convert it with transformers: AutoTokenizer.from_pretrained("
                        f"FOLDER).save_pretrained(FOLDER); or move it away, to work "
                        f"with token ids alone"
                    )
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: wanted a tokenizer, got: {error}") from error
        return cls(backend, path.parent)

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise ValueError if the tokenizer has ids that the model does not know."""
        if self.vocab_size > model_vocab_size:
            raise ValueError(
                f"tokenizer: its token ids go up to {self.vocab_size - 1}, but the "
                f"model's vocab_size is {model_vocab_size}; it is not this model's "
                f"tokenizer, or tokens were added without resizing the model"
            )

    def encode(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `prompt`, with the special tokens that the
        tokenizer's own post-processor adds (a BOS, for example), unless told not to."""
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt: wanted a string, got {prompt!r} ({type(prompt).__name__})"
            )
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt: wanted text that can be written as UTF-8, got a lone "
                f"surrogate {prompt[error.start]!r} at character {error.start}"
            ) from error
        return self.backend.encode(prompt, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; ids that are no tokens have none."""
        return self.backend.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens
        )

    def decoded_token(self, token_id: int) -> str:
        """Return the text of one token alone, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)


def bad_word_token_ids(
    tokenizer: Tokenizer | None, words: Iterable[str]
) -> list[tuple[int, ...]]:
    """Return the token sequences that must not be generated for `words`, as vLLM does.

    A word is written without the spaces in front of it, and once more with one, as it
    stands within a text. The second way counts where it is as many tokens with another
    first one; else it is the first way after a token for the space, or a text of its
    own that vLLM does not forbid. A word of spaces alone is taken as it is. (vLLM takes
    off tabs and line ends too, and so forbids another word than it was given.)

    No special tokens are added, and no sequence comes twice. The same word spelled by
    other tokens is not forbidden: bad words are about tokens.

    Raises:
        ValueError: there is no tokenizer, or it has no tokens for a word.
    """
    words = tuple(words)
    if not words:
        return []
    if tokenizer is None:
        raise ValueError(
            f"bad_words: wanted none, got {words!r}: the model's folder has no "
            f"tokenizer.json, so there are no words; use logit_bias or "
            f"allowed_token_ids"
        )
    found: dict[tuple[int, ...], None] = {}
    for position, word in enumerate(words):
        bare = word.lstrip(" ")
        plain = _word_token_ids(tokenizer, bare or word, word, position)
        found[plain] = None
        if bare:
            spaced = _word_token_ids(tokenizer, " " + bare, word, position)
            if spaced[0] != plain[0] and len(spaced) == len(plain):
                found[spaced] = None
    return list(found)


def _word_token_ids(
    tokenizer: Tokenizer, text: str, word: str, position: int
) -> tuple[int, ...]:
    """Return the tokens of `text`, or raise ValueError about `word` if it has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"bad_words[{position}]: wanted text that can be written as UTF-8, got "
            f"a lone surrogate in {word!r}"
        ) from error
    token_ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    if not token_ids or (
        unknown is not None and tokenizer.backend.token_to_id(unknown) in token_ids
    ):
        raise ValueError(
            f"bad_words[{position}]: wanted text that the tokenizer has tokens for, "
            f"got {word!r}, which it cannot write"
        )
    return tuple(token_ids)


class IncrementalDetokenizer:
    """The text of one growing sequence, a piece per token.

    A piece never ends within a character: bytes of an unfinished one wait for the
    rest. All pieces together are the text of decoding all tokens at once.

    A token is decoded together with the tokens of the last piece, because some
    decoders treat the first token of a text differently (SentencePiece drops its
    space). So the cost of a token does not grow with the sequence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ):
        """Start after `prompt_token_ids`, whose text is not part of any piece."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # A run of byte tokens is decoded as one: if any byte of it is wrong, all are.
        # So it has to end first, and a special token that is left out does not end it.
        self._waits = tokenizer.byte_token_ids
        if skip_special_tokens:
            self._waits |= tokenizer.special_token_ids
        # Tokens [0, _num_read) have been given out; they are here as context.
        self._token_ids = list(prompt_token_ids[-_CONTEXT:])
        self._num_read = len(self._token_ids)
        self._context = self._decode(self._token_ids)
        if self._context.endswith(REPLACEMENT):
            # The prompt ends within a character, which is the output's to finish.
            self._token_ids, self._num_read, self._context = [], 0, ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Return the text that is certain now that `token_id` came; often empty."""
        self._token_ids.append(token_id)
        if token_id in self._waits:
            return ""
        text = self._decode(self._token_ids)
        if len(text) <= len(self._context) or text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._context) :]
        self._token_ids = self._token_ids[self._num_read :]
        self._num_read = len(self._token_ids)
        self._context = self._decode(self._token_ids)
        return piece

    def finish(self) -> str:
        """Return the rest: what was waiting for more bytes, as it stands."""
        text = self._decode(self._token_ids)
        piece = text[len(self._context) :]
        self._num_read, self._context = len(self._token_ids), text
        return piece


class StopChecker:
    """Finds the first stop string in text that comes in pieces, a piece per token.

    First is the one that is complete first; of several that end together, the
    longest. That does not depend on how the text is cut into tokens, except that a
    token is never cut: `num_tokens` counts it whole.
    """

    def __init__(self, stop: Iterable[str] = (), min_tokens: int = 0):
        """Look for the strings `stop`, but for none that is complete in the first
        `min_tokens` tokens."""
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held_back = max((len(string) for string in self._stop), default=1) - 1
        self._num_given = 0
        self.text = ""  # so far, without the stop string
        self.num_tokens = 0  # up to and including the one that completed it
        self.stop_reason: str | None = None  # the stop string, once it came

    def push(self, piece: str) -> str:
        """Return text that can be shown: no part of it can become a stop string.

        The last characters, one fewer than the longest stop string has, are held
        back until more text or the end comes. After a stop nothing is taken.
        """
        if self.stop_reason is not None:
            return ""
        self.num_tokens += 1
        self._take(piece, is_checked=self.num_tokens > self._min_tokens)
        end = len(self.text)
        if self.stop_reason is None:
            end = max(self._num_given, end - self._held_back)
        return self._give(end)

    def finish(self, rest: str = "") -> str:
        """Return what was held back, after `rest` from the detokenizer."""
        if self.stop_reason is None:
            self._take(rest, is_checked=self.num_tokens > self._min_tokens)
        return self._give(len(self.text))

    def _take(self, piece: str, is_checked: bool) -> None:
        old = len(self.text)
        self.text += piece
        if not is_checked or not piece:
            return
        found = []
        for string in self._stop:
            # A match must end in the new piece; earlier ones were seen or not wanted.
            start = self.text.find(string, max(0, old - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start, string))
        if found:
            _, start, self.stop_reason = min(found)
            self.text = self.text[:start]

    def _give(self, end: int) -> str:
        piece = self.text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece


class OutputText:
    """The text of one output: detokenizer and stop strings together.

    Without a tokenizer the text stays empty, and tokens are only counted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int] = (),
        stop: Iterable[str] = (),
        min_tokens: int = 0,
    ):
        stop = tuple(stop)
        if stop and tokenizer is None:
            raise ValueError(
                f"stop: wanted none, got {stop!r}: the model's folder has no "
                f"tokenizer.json, so there is no text; use stop_token_ids"
            )
        self._detokenizer: Any = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids)
        self._checker = StopChecker(stop, min_tokens)

    def push(self, token_id: int) -> str:
        """Return the text that can be shown after `token_id`."""
        if self.stop_reason is not None:
            return ""
        if self._detokenizer is None:
            return self._checker.push("")
        return self._checker.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return the rest of the text."""
        rest = "" if self._detokenizer is None else self._detokenizer.finish()
        return self._checker.finish(rest)

    @property
    def text(self) -> str:
        """All text so far, without the stop string."""
        return self._checker.text

    @property
    def num_tokens(self) -> int:
        """Tokens so far, up to and including the one that completed a stop string."""
        return self._checker.num_tokens

    @property
    def stop_reason(self) -> str | None:
        """The stop string that came, or None."""
        return self._checker.stop_reason
