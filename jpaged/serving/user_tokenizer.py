"""The tokenizer that users get: the usual methods of transformers' tokenizers.

Pipeline: tokenizer -> [user tokenizer] -> user. Host only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jpaged.text import chat
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import error, integer


class Encoding(dict[str, Any]):
    """Token ids of one text or several: `input_ids` and `attention_mask`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"Encoding: expected {list(self)}, got {name!r}")
        return self[name]


class UserTokenizer:
    """A model's tokenizer with the methods and attributes that scripts use.

    They have the names, defaults and results of transformers' tokenizers: `decode`
    shows special tokens unless it is told to skip them. `bos_token`, `eos_token`,
    `pad_token` and `unk_token`, and their ids as `eos_token_id` and so on, are None if
    the checkpoint declares none.

    Args:
      tokenizer: the model's tokenizer.
      eos_token_ids: the model's EOS tokens; the first is used if the tokenizer's files
        declare none.
      name: of the model.
    """

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Sequence[int], name: str = ""
    ):
        self.name_or_path = name
        self.is_fast = True
        self._tokenizer = tokenizer
        templates = chat.templates_of(tokenizer)
        self.chat_template = templates.templates.get("default")
        backend = tokenizer.backend
        for kind in ("bos", "eos", "pad", "unk"):
            token = templates.special_tokens.get(f"{kind}_token")
            if token is None and kind == "eos" and eos_token_ids:
                token = backend.id_to_token(eos_token_ids[0])
            setattr(self, f"{kind}_token", token)
            found = None if token is None else backend.token_to_id(token)
            setattr(self, f"{kind}_token_id", found)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the tokenizer has no {name!r}; `backend_tokenizer` is the "
            "tokenizers.Tokenizer, and transformers.AutoTokenizer has all methods"
        )

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self._tokenizer.backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added ones."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return sorted(self._tokenizer.special_token_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens."""
        return [self.backend_tokenizer.id_to_token(i) for i in self.all_special_ids]

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return self.backend_tokenizer.get_vocab()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens)

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True
    ) -> Encoding:
        """Return the token ids of one text or several as `input_ids`."""
        if not isinstance(text, str | Sequence):
            raise error("text", "a text or a sequence of texts", text)
        texts = [text] if isinstance(text, str) else list(text)
        ids = [self.encode(one, add_special_tokens) for one in texts]
        masks = [[1] * len(one) for one in ids]
        if isinstance(text, str):
            return Encoding(input_ids=ids[0], attention_mask=masks[0])
        return Encoding(input_ids=ids, attention_mask=masks)

    def decode(
        self,
        token_ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Return the text of token ids.

        Args:
          token_ids: a token id, or a sequence or an array of them.
          skip_special_tokens: leave special tokens out.
          clean_up_tokenization_spaces: accepted if it is None or False, which change
            nothing.
        """
        if clean_up_tokenization_spaces:
            raise ValueError(
                "clean_up_tokenization_spaces: expected None or False, got "
                f"{clean_up_tokenization_spaces!r}"
            )
        found = token_ids if isinstance(token_ids, Iterable) else [token_ids]
        tokens = [integer("token_ids", token, low=0) for token in found]
        return self._tokenizer.decode(tokens, skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the texts of several sequences of token ids."""
        return [self.decode(each, skip_special_tokens) for each in sequences]

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, without special tokens."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=False))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the token of an id, or the tokens of several."""
        if np.ndim(ids) == 0:
            return self.backend_tokenizer.id_to_token(int(ids))
        return [self.backend_tokenizer.id_to_token(int(token)) for token in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or the ids of several; None if it is unknown."""
        if isinstance(tokens, str):
            return self.backend_tokenizer.token_to_id(tokens)
        return [self.backend_tokenizer.token_to_id(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """Return the prompt of a conversation, or of several.

        Args:
          conversation: messages, or a list of conversations.
          tools: JSON schemas of functions that the model may call.
          chat_template: source or name of a template; None is the checkpoint's.
          add_generation_prompt: end the prompt with the header of the answer.
          continue_final_message: end the prompt within its last message.
          tokenize: return token ids; False returns text.
          variables: further variables of the template.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        make = chat.chat_prompts if tokenize else chat.chat_texts
        found = make(
            self._tokenizer,
            conversation,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            **variables,
        )
        return found[0] if chat.is_conversation(conversation) else found

    def __repr__(self) -> str:
        return f"UserTokenizer({self.name_or_path!r}, {len(self)} tokens)"
