"""Tokenizers and chat templates of GGUF files, without torch.

huggingface_gguf_test compares with transformers' tokenizers on hundreds of texts.
"""

import json
import pathlib

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jpaged.text import chat
from jpaged.text.gguf_splits import SPLITS
from jpaged.text.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support.models import gguf_files
from tests.support.texts import texts

SPECIALS = ["<|begin|>", "<|im_end|>", "<think>"]
CORPUS = texts(400, seed=7)


def trained(pre: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of 600 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(SPECIALS[:2])
    backend.add_tokens(SPECIALS[2:])
    return backend


def merges_of(backend: tokenizers.Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def write(path: pathlib.Path, architecture="llama", **keys) -> pathlib.Path:
    """A file with only these keys; "__" stands for the dot of a name."""
    writer = gguf.GGUFWriter(path, architecture)
    entries = {key.replace("__", "."): value for key, value in keys.items()}
    gguf_files.write_metadata(
        writer,
        {
            key if key.startswith("general") else f"tokenizer.{key}": value
            for key, value in entries.items()
        },
    )
    gguf_files.finish(writer)
    return path


def byte_level_keys(backend: tokenizers.Tokenizer, pre: str, **more) -> dict:
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [{"<think>": 4}.get(t, 3 if t in SPECIALS else 1) for t in tokens]
    return {
        "ggml__model": "gpt2",
        "ggml__pre": pre,
        "ggml__tokens": tokens,
        "ggml__token_type": kinds,
        "ggml__merges": merges_of(backend),
        "ggml__bos_token_id": vocab["<|begin|>"],
        "ggml__eos_token_id": vocab["<|im_end|>"],
        **more,
    }


# The pre-tokenizers of the models' own tokenizer.json.
OWN = {
    "gpt-2": [pre_tokenizers.ByteLevel(False)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)],
    "qwen2": [
        pre_tokenizers.Split(
            tokenizers.Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(
            tokenizers.Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
    "tekken": [
        pre_tokenizers.Split(
            tokenizers.Regex(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
}


@pytest.mark.parametrize("pre", OWN)
def test_a_byte_level_tokenizer_equals_the_one_it_was_written_from(pre, tmp_path):
    own = trained(pre_tokenizers.Sequence(OWN[pre]))
    keys = byte_level_keys(own, pre, ggml__add_bos_token=False)
    got = Tokenizer.from_folder(write(tmp_path / "m.gguf", **keys))
    assert got is not None
    assert got.vocab_size == own.get_vocab_size()
    for text in texts(300, SPECIALS):
        want = own.encode(text).ids
        assert got.encode(text) == want
        assert got.decode(want) == own.decode(want)
        assert got.decode(want, False) == own.decode(want, skip_special_tokens=False)
        pieces = IncrementalDetokenizer(got)
        assert "".join(map(pieces.push, want)) + pieces.finish() == got.decode(want)


def test_planted_fault_another_pre_tokenizer_divides_some_texts_otherwise(tmp_path):
    own = trained(pre_tokenizers.Sequence(OWN["smollm"]))
    keys = byte_level_keys(own, "gpt-2")
    other = Tokenizer.from_folder(write(tmp_path / "m.gguf", **keys))
    differ = [t for t in texts(300) if other.encode(t) != own.encode(t).ids]
    assert 5 < len(differ) < 150


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_every_pre_tokenizer_keeps_all_characters_of_a_text(pre, tmp_path):
    own = trained(pre_tokenizers.ByteLevel(False))
    keys = byte_level_keys(own, pre, ggml__add_bos_token=False)
    got = Tokenizer.from_folder(write(tmp_path / "m.gguf", **keys))
    for text in texts(150):
        assert got.decode(got.encode(text)) == text


def test_bos_and_eos_are_added_as_the_flags_of_the_file_say(tmp_path):
    own = trained(pre_tokenizers.ByteLevel(False))
    bos, eos = (own.token_to_id(token) for token in SPECIALS[:2])
    plain = own.encode("word").ids
    for pre, flags, want in (
        ("gpt-2", {}, plain),
        ("llama-bpe", {}, [bos, *plain]),
        ("llama-bpe", {"ggml__add_bos_token": False}, plain),
        ("gpt-2", {"ggml__add_bos_token": True}, [bos, *plain]),
        ("gpt-2", {"ggml__add_eos_token": True}, [*plain, eos]),
    ):
        keys = byte_level_keys(own, pre, **flags)
        got = Tokenizer.from_folder(write(tmp_path / "m.gguf", **keys))
        assert got.encode("word") == want
        assert got.encode("word", add_special_tokens=False) == plain


# SentencePiece.

PIECES = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "abc", "▁abc", "\n", "é", "▁▁"]
SCORES = [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -9.0, -4.0, -5.0, 0.0, 0.0, -6.0]


def pieces_keys(**more) -> dict:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *PIECES]
    return {
        "ggml__model": "llama",
        "ggml__tokens": tokens,
        "ggml__scores": [0.0] * 259 + SCORES,
        "ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "ggml__bos_token_id": 1,
        "ggml__eos_token_id": 2,
        "ggml__unknown_token_id": 0,
        **more,
    }


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(token) for token in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("abc", ["<s>", "▁abc"]),
        # The best score is merged first: "ab" and not "bc".
        ("b abc", ["<s>", "▁", "b", "▁abc"]),
        ("abbc", ["<s>", "▁ab", "bc"]),
        (" b", ["<s>", "▁", "b"]),  # a text that starts with a blank gets no other
        ("é日", ["<s>", "▁", "é", "<0xE6>", "<0x97>", "<0xA5>"]),
        ("a</s>a", ["<s>", "▁a", "</s>", "a"]),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text, want, tmp_path):
    got = Tokenizer.from_folder(write(tmp_path / "m.gguf", **pieces_keys()))
    assert pieces(got, text) == want
    assert got.decode(got.encode(text)) == text.replace("</s>", "").lstrip(" ")
    assert len(got.byte_token_ids) == 256
    assert got.special_token_ids == {0, 1, 2}


def test_gemma_has_no_prefix_merges_by_id_and_stores_blanks_as_spaces(tmp_path):
    keys = pieces_keys(ggml__add_space_prefix=False)
    keys["ggml__tokens"] = [*keys["ggml__tokens"][:-1], "  "]
    keys["ggml__scores"] = [0.0] * len(keys["ggml__tokens"])
    file = write(tmp_path / "m.gguf", "gemma2", **keys)
    got = Tokenizer.from_folder(file)
    assert pieces(got, "abc a") == ["<s>", "abc", "▁a"]
    assert pieces(got, "  b") == ["<s>", "▁▁", "b"]
    assert got.decode(got.encode("  abc a")) == "  abc a"


def test_phi_3_marks_every_part_and_its_tokens_take_the_space_after_them(tmp_path):
    keys = pieces_keys(general__name="Phi 3 Mini")
    got = Tokenizer.from_folder(write(tmp_path / "m.gguf", "phi3", **keys))
    assert pieces(got, "a</s>a") == ["<s>", "▁a", "</s>", "▁a"]
    keys = pieces_keys(general__name="Phi-3-mini")
    got = Tokenizer.from_folder(write(tmp_path / "m.gguf", "phi3", **keys))
    assert pieces(got, "a</s>\n a") == ["<s>", "▁a", "</s>", "▁a"]


# Templates and errors.


def test_templates_and_special_tokens_are_those_of_the_file(tmp_path):
    keys = pieces_keys(
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        chat_template__tool_use="{{ tools[0].name }}",
    )
    tokenizer = Tokenizer.from_folder(write(tmp_path / "m.gguf", **keys))
    options = {"chat_template": None, "add_generation_prompt": True}
    messages = [{"role": "user", "content": "abc"}]
    (got,) = chat.chat_prompts(tokenizer, messages, tools=None, **options)
    ids = tokenizer.backend.token_to_id
    assert got == [1, ids("abc"), 2]
    (got,) = chat.chat_prompts(tokenizer, messages, tools=[{"name": "b"}], **options)
    assert got == [ids("▁"), ids("b")]
    bare = Tokenizer.from_folder(write(tmp_path / "n.gguf", **pieces_keys()))
    with pytest.raises(ValueError, match=r"chat_template: expected one in .*GGUF file"):
        chat.chat_prompts(bare, messages, tools=None, **options)


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    assert Tokenizer.from_folder(write(tmp_path / "m.gguf")) is None
    assert Tokenizer.from_folder(write(tmp_path / "n.gguf", ggml__model="none")) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ggml__model": "t5"}, r"model: expected 'gpt2' or 'llama', got 't5'; pass"),
        ({"ggml__scores": [0.0]}, "scores: expected one for each of 272 tokens, got 1"),
        ({"ggml__token_type": [1]}, "token_type: expected one for each of 272 tokens"),
        ({"ggml__tokens": ["a", "b", "a"]}, "got 'a' as ids 0 and 2"),
        ({"ggml__tokens": [1, 2]}, "tokens: expected texts, got 1"),
        ({"ggml__model": "gpt2"}, "merges: expected a value in the metadata"),
        (
            {"ggml__model": "gpt2", "ggml__merges": ["ab"]},
            "merges: expected two tokens and a space, got 'ab'",
        ),
        (
            {"ggml__model": "gpt2", "ggml__merges": ["a zz"]},
            "ggml: expected a tokenizer, got: .*zz",
        ),
        (
            {"ggml__model": "gpt2", "ggml__pre": "new"},
            r"pre: expected one of .*got 'ne",
        ),
        (
            {"ggml__bos_token_id": 999, "ggml__add_bos_token": True},
            "add_bos_token: expected tokenizer.ggml.bos_token_id with it, got none",
        ),
        ({"chat_template": 3}, None),
    ],
)
def test_an_invalid_tokenizer_is_refused_by_file_and_key(keys, message, tmp_path):
    file = write(tmp_path / "m.gguf", **pieces_keys(**keys))
    if message is None:
        tokenizer = Tokenizer.from_folder(file)
        with pytest.raises(ValueError, match=r"m.gguf: tokenizer.chat_template: expe"):
            chat.ChatTemplates.from_folder(tokenizer.folder)
        return
    with pytest.raises(ValueError, match=rf"m.gguf: tokenizer.*{message}"):
        Tokenizer.from_folder(file)
