"""Tokenizers: incremental decoding against decoding all tokens at once."""

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jpaged.text.tokenizer import IncrementalDetokenizer, Tokenizer

TEXTS = [
    "def main():\n    return 'hello world'\n",
    "naïve café, Ångström: e\u0301 is two characters",
    "日本語の文章と中文句子。日本語。",
    "👩‍👩‍👧‍👦 family, 🇯🇵 flag, 👍🏽 thumb, 😀😀😀",
    "\ufffd is a character too",
]


def train(vocab_size: int = 330) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer with a BOS that the post-processor adds."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Return a tokenizer whose decoder drops the first space and joins byte tokens."""
    pieces = ["<unk>", "▁", "▁hello", "▁world", "x", "▁y", "é", "日"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


BYTE_LEVEL = Tokenizer(train())
SENTENCEPIECE = Tokenizer(sentencepiece_like())


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], **settings) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **settings)
    return [detokenizer.push(token) for token in token_ids] + [detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_adds_special_tokens_and_decoding_removes_them(text):
    token_ids = BYTE_LEVEL.encode(text)
    assert token_ids[0] == 0
    assert BYTE_LEVEL.decode(token_ids) == text
    assert BYTE_LEVEL.decode(token_ids, skip_special_tokens=False) == "<s>" + text
    assert BYTE_LEVEL.special_token_ids == {0, 1}
    assert BYTE_LEVEL.decoded_token(1) == "</s>"


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ends_within_a_character(text):
    token_ids = BYTE_LEVEL.encode(text)
    pieces = pieces_of(BYTE_LEVEL, token_ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    # Text is returned early: an emoji needs several tokens, letters do not wait.
    assert sum(piece != "" for piece in pieces) > len(text) // 4


@hypothesis.given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
def test_pieces_of_any_tokens_equal_the_text_of_all_tokens(token_ids):
    # Random byte-level tokens are mostly incomplete characters.
    assert "".join(pieces_of(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@hypothesis.given(st.lists(st.integers(1, 7) | st.integers(8, 263), max_size=30))
def test_pieces_of_any_sentencepiece_tokens_equal_the_text_of_all_tokens(token_ids):
    whole = SENTENCEPIECE.decode(token_ids)
    assert "".join(pieces_of(SENTENCEPIECE, token_ids)) == whole


@hypothesis.given(st.text(max_size=30))
def test_pieces_of_any_text_equal_that_text(text):
    token_ids = BYTE_LEVEL.encode(text)
    assert "".join(pieces_of(BYTE_LEVEL, token_ids)) == text


def test_the_first_token_after_a_prompt_keeps_its_space():
    assert pieces_of(SENTENCEPIECE, [3], prompt_token_ids=[2]) == [" world", ""]
    assert pieces_of(SENTENCEPIECE, [3]) == ["world", ""]


def test_the_output_completes_a_character_that_the_prompt_begins():
    first, second = BYTE_LEVEL.encode("Ω")[1:]  # not in the training text: two tokens
    prompt = [*BYTE_LEVEL.encode("ab"), first]
    letter = BYTE_LEVEL.encode("d")[-1]
    pieces = pieces_of(BYTE_LEVEL, [second, letter], prompt_token_ids=prompt)
    assert "".join(pieces) == BYTE_LEVEL.decode([second, letter]) == "\ufffdd"


def test_from_folder_returns_a_tokenizer_or_none_or_names_an_invalid_file(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None
    path = tmp_path / "tokenizer.json"
    backend = train()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(path))
    loaded = Tokenizer.from_folder(tmp_path)
    # Truncation and padding, which training enables, do not apply to prompts.
    assert loaded.encode(TEXTS[0]) == BYTE_LEVEL.encode(TEXTS[0])
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer, got"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("token_id", "text"),
    [
        (2, " hello"),
        (1, " "),
        (4, "x"),
        (5, " y"),
        (8 + 0x41, "A"),
        (8 + 0xE6, "\ufffd"),
    ],
)
def test_a_single_token_keeps_its_leading_blank(token_id, text):
    assert SENTENCEPIECE.decoded_token(token_id) == text


@hypothesis.given(st.integers(0, BYTE_LEVEL.vocab_size - 1))
def test_a_single_byte_level_token_has_the_text_of_its_id(token_id):
    want = BYTE_LEVEL.decode([token_id], skip_special_tokens=False)
    assert BYTE_LEVEL.decoded_token(token_id) == want


def test_a_prompt_that_is_not_text_is_refused():
    with pytest.raises(ValueError, match=r"prompt: expected a string, got 3 \(int\)"):
        BYTE_LEVEL.encode(3)
    with pytest.raises(ValueError, match=r"lone surrogate .* at character 1"):
        BYTE_LEVEL.encode("a\ud800")
