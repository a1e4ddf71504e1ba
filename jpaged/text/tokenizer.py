"""Tokenizers and incremental detokenisation.

Pipeline: prompt -> [tokenizer] -> token ids -> llm, and token ids -> [tokenizer] ->
text. Host only. A checkpoint without a tokenizer works with token ids only.
"""

import os
import pathlib
from collections.abc import Sequence

import tokenizers

from jpaged import gguf_file
from jpaged.text import gguf_tokenizer
from jpaged.text.added_tokens import add_declared_tokens

# The result of decoding bytes that are not (yet) a whole character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Files of unsupported tokenizers: SentencePiece, tiktoken, slow BPE.
_OTHER_KINDS = ("tokenizer.model", "spiece.model", "tekken.json", "merges.txt")
_ANCHOR = "x"  # a token before the one that is decoded alone
_CONTEXT = 6  # last tokens of the prompt, decoded together with the first output


class Tokenizer:
    """A checkpoint's tokenizer: converts text to token ids and back."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: pathlib.Path | None = None,
    ):
        self.backend = backend
        # Folder or GGUF file where it was read from; chat templates are there, too.
        self.folder = folder
        # A file may enable truncation or padding, which training uses. A prompt that
        # is too long must be refused, not shortened.
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
        # Token ids may have gaps, so this is not the number of entries.
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer | None":
        """Return the tokenizer in `folder`/tokenizer.json, or None without that file.

        Tokens that only tokenizer_config.json, added_tokens.json or
        special_tokens_map.json declare are added, as AutoTokenizer does.

        Args:
            folder: of a model, or a GGUF file.

        Raises:
            ValueError: the file is not a valid tokenizer, or the folder has only a
              tokenizer of another kind.
        """
        if gguf_file.is_gguf(folder):
            read = gguf_tokenizer.read_tokenizer(gguf_file.load(folder))
            return None if read is None else cls(read, pathlib.Path(folder))
        path = pathlib.Path(folder) / "tokenizer.json"
        if not path.is_file():
            for name in _OTHER_KINDS:
                if (path.parent / name).is_file():
                    raise ValueError(
                        f"{path.parent}: expected tokenizer.json, got only {name}; "
                        "convert it with transformers: AutoTokenizer.from_pretrained("
                        "FOLDER).save_pretrained(FOLDER); or move the file away to "
                        "work with token ids only"
                    )
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: expected a tokenizer, got: {error}") from error
        add_declared_tokens(backend, path.parent)
        return cls(backend, path.parent)

    def encode(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `prompt`.

        Args:
            prompt: a text.
            add_special_tokens: add the special tokens of the tokenizer's own
                post-processor, such as a BOS.

        Raises:
            ValueError: `prompt` is not a string that can be encoded as UTF-8.
        """
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt: expected a string, got {prompt!r} ({type(prompt).__name__})"
            )
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt: expected text that can be encoded as UTF-8, got a lone "
                f"surrogate {prompt[error.start]!r} at character {error.start}"
            ) from error
        return self.backend.encode(prompt, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; unknown ids have no text."""
        return self.backend.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens
        )

    def decoded_token(self, token_id: int) -> str:
        """Return the text of one token within a text, also of a special token.

        A decoder drops the blank before the first word of a text, so the token is
        decoded behind another one.
        """
        decoder = self.backend.decoder
        token = self.backend.id_to_token(token_id)
        if decoder is None or token is None:
            return self.decode([token_id], skip_special_tokens=False)
        text = decoder.decode([_ANCHOR, token])
        if not text.startswith(_ANCHOR):
            return self.decode([token_id], skip_special_tokens=False)
        return text.removeprefix(_ANCHOR)


class IncrementalDetokenizer:
    """Decodes one growing sequence, a piece of text per token.

    A piece never ends within a character: the bytes of an unfinished character wait
    for the rest. Concatenated, the pieces equal the text of all tokens decoded at once.

    A token is decoded together with the tokens of the last piece, because some
    decoders treat the first token of a text differently (SentencePiece drops its
    space). The cost of a token therefore does not grow with the sequence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ):
        """Starts after `prompt_token_ids`, whose text is not part of any piece."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # A run of byte tokens is decoded as one: one invalid byte invalidates all of
        # them. So the run must end before it is decoded. A special token that is
        # skipped does not end it.
        self._waits = tokenizer.byte_token_ids
        if skip_special_tokens:
            self._waits |= tokenizer.special_token_ids
        # The text of tokens [0, _num_read) was returned; they remain as context.
        self._token_ids = list(prompt_token_ids[-_CONTEXT:])
        self._num_read = len(self._token_ids)
        self._context = self._decode(self._token_ids)
        if self._context.endswith(REPLACEMENT):
            # The prompt ends within a character, which the output completes.
            self._token_ids, self._num_read, self._context = [], 0, ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; often empty."""
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
        """Return the remaining text, including unfinished characters."""
        text = self._decode(self._token_ids)
        piece = text[len(self._context) :]
        self._num_read, self._context = len(self._token_ids), text
        return piece
