"""Added tokens: tokens that a folder declares outside of tokenizer.json.

Pipeline: tokenizer_config.json, ... -> [added_tokens] -> tokenizer. Host only.

The files and their precedence are those of transformers' AutoTokenizer:
`added_tokens_decoder` in tokenizer_config.json, or else added_tokens.json and
special_tokens_map.json; then the special tokens that tokenizer_config.json names.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no such file.

    Raises:
      ValueError: the file contains something else.
    """
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: expected a JSON object, got {contents!r:.40}")
    return contents


def add_declared_tokens(backend: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Add the tokens that the folder's other files declare to a tokenizer.

    Raises:
      ValueError: a file is invalid, or declares an id that the token cannot have.
    """
    config = read_json(folder / "tokenizer_config.json")
    if config.get("added_tokens_decoder") is None:
        config |= read_json(folder / "special_tokens_map.json")
    names = dict(_special_tokens(config, folder))
    with_ids = _tokens_with_ids(config, folder, names)
    for token_id, token in sorted(with_ids.items()):
        _add(backend, token)
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"{folder}: expected token id {backend.token_to_id(token.content)} for "
                f"the added token {token.content!r}, the next of tokenizer.json, got "
                f"{token_id}; save the tokenizer again with transformers"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content, (token, is_named) in names.items():
        if content not in known:
            _add(backend, token)
        elif is_named:
            _mark_special(backend, content)


def _special_tokens(
    config: Mapping[str, Any], folder: pathlib.Path
) -> Iterator[tuple[str, tuple[tokenizers.AddedToken, bool]]]:
    """Yield each special token by its text, and whether it has a role such as eos."""
    roles = [f"{kind}_token" for kind in _NAMED]
    others = [key for key in config if key.endswith("_token") and key not in roles]
    extra = config.get("extra_special_tokens")
    extra = extra or config.get("additional_special_tokens") or []
    named = [config.get(key) for key in roles]
    named += [config[key] for key in others if isinstance(config[key], str)]
    named += extra.values() if isinstance(extra, dict) else []
    for value in named:
        if value is not None:
            token = _token(value, folder, is_special=True)
            yield token.content, (token, True)
    for value in extra if isinstance(extra, list) else []:
        token = _token(value, folder, is_special=True)
        yield token.content, (token, False)


def _tokens_with_ids(
    config: Mapping[str, Any],
    folder: pathlib.Path,
    special: Mapping[str, Any],
) -> dict[int, tokenizers.AddedToken]:
    found: dict[int, tokenizers.AddedToken] = {}
    declared = config.get("added_tokens_decoder")
    if declared is None:
        texts = read_json(folder / "added_tokens.json")
        pairs = [(number, text) for text, number in texts.items()]
    elif isinstance(declared, dict):
        pairs = list(declared.items())
    else:
        pairs = [(declared, "")]
    named = [*special]
    for number, value in pairs:
        if not str(number).isdecimal() or isinstance(number, bool):
            raise ValueError(
                f"{folder}: expected token ids and tokens in added_tokens_decoder or "
                f"added_tokens.json, got {number!r:.60} with {value!r:.60}"
            )
        found[int(number)] = _token(value, folder, is_special=value in named)
    return found


def _token(
    value: Any, folder: pathlib.Path, *, is_special: bool
) -> tokenizers.AddedToken:
    """Return a token from its text, or from an object with its text and flags."""
    if isinstance(value, str):
        value = {"content": value}
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        raise ValueError(
            f"{folder}: expected a text, or an object with content, as an added token, "
            f"got {value!r:.80}"
        )
    is_special = is_special or bool(entry.get("special"))
    flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
    return tokenizers.AddedToken(content, special=is_special, **flags)


def _add(backend: tokenizers.Tokenizer, token: tokenizers.AddedToken) -> None:
    known = backend.get_added_tokens_decoder().values()
    if repr(token) not in map(repr, known):
        backend.add_tokens([token])


def _mark_special(backend: tokenizers.Tokenizer, content: str) -> None:
    """Make an added token special; its other flags stay."""
    for token in backend.get_added_tokens_decoder().values():
        if token.content == content and not token.special:
            token.special = True
            backend.add_tokens([token])
