"""GGUF tokenizers: the tokenizer and the chat templates in a GGUF file's metadata.

Pipeline: *.gguf -> [text.gguf_tokenizer] -> tokenizer, chat. Host only.

Two kinds: byte-level BPE ("gpt2"), and SentencePiece ("llama"), whose scores give the
order of the merges. Where a file does not say how a text is treated, this module does
what transformers does with the same file.
"""

from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jpaged.gguf_file import GGUFFile
from jpaged.text.gguf_splits import SPLITS

_BLANK = "▁"  # SentencePiece's space
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_TEMPLATE = "tokenizer.chat_template"


def read_tokenizer(file: GGUFFile) -> tokenizers.Tokenizer | None:
    """The tokenizer of a file, or None if it has none.

    Raises:
      ValueError: the metadata is invalid, or the tokenizer is of another kind.
    """
    kind = file.get("tokenizer.ggml.model", str, "none")
    if kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model: expected 'gpt2' or 'llama', got "
            f"{kind!r}; pass the folder of the model's own tokenizer: LLM(..., "
            "tokenizer=FOLDER)"
        )
    tokens = _tokens(file)
    try:
        build = _byte_level if kind == "gpt2" else _sentencepiece
        backend = build(file, tokens)
    except Exception as error:  # the library raises bare Exception
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{file.path}: tokenizer.ggml: expected a tokenizer, got: {error}"
        ) from error
    _add_tokens(backend, file, tokens)
    _add_ends(backend, file, tokens, kind)
    return backend


def special_tokens(file: GGUFFile) -> dict[str, str]:
    """The special tokens that a chat template can use, such as "bos_token"."""
    tokens = file.get("tokenizer.ggml.tokens", list, [])
    found = {}
    for role in _ROLES:
        number = _role_id(file, role, len(tokens))
        if number is not None:
            found[f"{role}_token"] = tokens[number]
    return found


def chat_templates(file: GGUFFile) -> dict[str, str]:
    """The chat templates of a file by name."""
    found = {
        key.removeprefix(f"{_TEMPLATE}."): file.get(key, str)
        for key in file.metadata
        if key.startswith(f"{_TEMPLATE}.")
    }
    if _TEMPLATE in file.metadata:
        found["default"] = file.get(_TEMPLATE, str)
    return found


def _tokens(file: GGUFFile) -> list[str]:
    """The vocabulary; the index of a token is its id."""
    tokens = file.require("tokenizer.ggml.tokens", list)
    if tokens and not isinstance(tokens[0], str):
        raise ValueError(
            f"{file.path}: tokenizer.ggml.tokens: expected texts, got {tokens[0]!r:.40}"
        )
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        for number, token in enumerate(tokens):
            if (first := seen.setdefault(token, number)) != number:
                raise ValueError(
                    f"{file.path}: tokenizer.ggml.tokens: expected different tokens, "
                    f"got {token!r:.40} as ids {first} and {number}"
                )
    return tokens


def _role_id(file: GGUFFile, role: str, num_tokens: int) -> int | None:
    number = file.get(f"tokenizer.ggml.{_ROLES[role]}_token_id", int)
    return number if number is not None and 0 <= number < num_tokens else None


def _kinds(file: GGUFFile, tokens: list[str]) -> list[int]:
    """The type of each token; normal ones if the file does not say it."""
    key = "tokenizer.ggml.token_type"
    kinds = file.get(key, list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(
            f"{file.path}: {key}: expected one for each of {len(tokens)} tokens, got "
            f"{len(kinds)}"
        )
    return kinds


def _byte_level(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre: expected one of {sorted(SPLITS)}, got "
            f"{name!r}; pass the folder of the model's own tokenizer: LLM(..., "
            "tokenizer=FOLDER)"
        )
    split = SPLITS[name]
    merges = [
        _pair(file, merge) for merge in file.require("tokenizer.ggml.merges", list)
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, ignore_merges=split.ignores_merges)
    )
    steps: list[Any] = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in split.patterns
    ]
    starts_with_space = file.get("tokenizer.ggml.add_space_prefix", bool, False)
    steps.append(pre_tokenizers.ByteLevel(False, use_regex=False))
    if starts_with_space:
        backend.normalizer = normalizers.Prepend(" ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(file: GGUFFile, merge: Any) -> tuple[str, str]:
    # A token of a byte-level vocabulary contains no space.
    parts = merge.split(" ") if isinstance(merge, str) else ()
    if len(parts) != 2:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.merges: expected two tokens and a space, got "
            f"{merge!r:.60}"
        )
    return parts[0], parts[1]


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    architecture = file.get("general.architecture", str, "")
    is_gemma = architecture.startswith("gemma")
    if is_gemma:
        # Runs of blanks are stored as spaces.
        tokens = [_BLANK * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = _role_id(file, "unk", len(tokens))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            list(_merges(file, tokens, vocab, is_gemma)),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = file.get("tokenizer.ggml.add_space_prefix", bool, not is_gemma)
    as_blanks = normalizers.Replace(" ", _BLANK)
    if is_gemma and not has_prefix:
        backend.normalizer = as_blanks
    elif architecture == "phi3" and has_prefix:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_BLANK), as_blanks]
        )
    else:
        scheme = "first" if has_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, scheme, split=False)
    steps: list[Any] = [
        decoders.Replace(_BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(
    file: GGUFFile, tokens: list[str], vocab: dict[str, int], by_id: bool
) -> Iterator[tuple[str, str]]:
    """Merges in the order of their use: into the tokens with the best scores first.

    Args:
      file: the file.
      tokens: the vocabulary.
      vocab: the id of each token.
      by_id: whether the order is that of the ids (Gemma), not of the scores.
    """
    key = "tokenizer.ggml.scores"
    scores = [-number for number in range(len(tokens))]
    if not by_id:
        scores = file.require(key, list)
        if len(scores) != len(tokens):
            raise ValueError(
                f"{file.path}: {key}: expected one for each of {len(tokens)} tokens, "
                f"got {len(scores)}"
            )
    found = []
    for number, token in enumerate(tokens):
        for size in range(1, len(token)):
            left, right = token[:size], token[size:]
            if left in vocab and right in vocab:
                order = (scores[number], len(left), len(right))
                found.append((order, (left, right)))
    found.sort(key=lambda each: each[0], reverse=True)
    for _, pair in found:
        yield pair


def _add_tokens(
    backend: tokenizers.Tokenizer, file: GGUFFile, tokens: list[str]
) -> None:
    """Declare the tokens that are matched as a whole, special ones as such."""
    vocab = backend.get_vocab()
    named = set(special_tokens(file).values())
    name = file.get("general.name", str, "").lower()
    # Phi-3's special tokens take the white space after them. Files do not say so;
    # llama.cpp decides by the name, too.
    strips = any(part in name for part in ("phi-3", "phi3"))
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    added = []
    for token, kind in zip(tokens, _kinds(file, tokens), strict=True):
        is_special = kind in (_CONTROL, _UNKNOWN) or token in named
        if token in vocab and (is_special or kind == _USER_DEFINED):
            added.append(
                tokenizers.AddedToken(
                    token,
                    normalized=False,
                    special=is_special,
                    rstrip=strips and token not in kept,
                )
            )
    backend.add_tokens(added)


def _add_ends(
    backend: tokenizers.Tokenizer, file: GGUFFile, tokens: list[str], kind: str
) -> None:
    """Make the tokenizer add BOS and EOS, if the file says so."""
    pre = SPLITS.get(file.get("tokenizer.ggml.pre", str, "default"))
    has_bos = kind == "llama" or (pre is not None and pre.adds_bos)
    defaults = {"bos": has_bos, "eos": False}
    ends = {}
    for role, default in defaults.items():
        key = f"tokenizer.ggml.add_{role}_token"
        number = _role_id(file, role, len(tokens))
        if not file.get(key, bool, default):
            continue
        if number is None and key in file.metadata:
            raise ValueError(
                f"{file.path}: {key}: expected tokenizer.ggml.{role}_token_id with it, "
                "got none"
            )
        if number is not None:
            ends[role] = (tokens[number], number)
    if not ends:
        return
    start = [ends["bos"][0]] if "bos" in ends else []
    end = [ends["eos"][0]] if "eos" in ends else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, *start, "$B", *end],
        special_tokens=list(dict.fromkeys(ends.values())),
    )
