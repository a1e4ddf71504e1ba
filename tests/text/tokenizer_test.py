"""Tokenizers: incremental decoding against decoding all tokens at once."""

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jpaged.text.tokenizer import (
    IncrementalDetokenizer,
    OutputText,
    StopChecker,
    Tokenizer,
    bad_word_token_ids,
)

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


def first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Return the text before the first complete stop string, letter by letter."""
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], string
    return text, None


letters = st.text("abc", max_size=6)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.lists(letters, max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_across_any_division_into_pieces(pieces, stop):
    checker = StopChecker(stop)
    shown = [checker.push(piece) for piece in pieces]
    is_stopped = checker.stop_reason is not None
    shown.append(checker.finish())
    text, reason = first_stop("".join(pieces), stop)
    assert checker.text == "".join(shown) == text
    assert checker.stop_reason == reason
    if is_stopped:
        # num_tokens ends with the token that completes the stop string.
        before = "".join(pieces[: checker.num_tokens - 1])
        assert first_stop(before, stop)[1] is None
        assert first_stop(before + pieces[checker.num_tokens - 1], stop)[1] == reason
    else:
        assert checker.num_tokens == len(pieces)


def test_the_last_characters_are_held_back_while_they_can_become_a_stop_string():
    checker = StopChecker(["END"])
    assert checker.push("text E") == "text"
    assert checker.push("N") == " "
    assert checker.push("ds here, EN") == "ENds here, "
    assert checker.push("D and more") == ""
    assert checker.finish() == ""
    assert checker.text == "text ENds here, "
    assert (checker.num_tokens, checker.stop_reason) == (4, "END")
    assert checker.push("more") == ""
    assert checker.num_tokens == 4


def test_without_stop_strings_no_text_is_held_back():
    assert StopChecker().push("abc") == "abc"


def test_stop_strings_in_the_first_min_tokens_are_ignored():
    checker = StopChecker(["b"], min_tokens=2)
    for piece in ["ab", "b", "ab"]:
        checker.push(piece)
    assert (checker.text, checker.num_tokens) == ("abba", 3)


def test_output_text_stops_within_a_token_and_counts_that_token():
    token_ids = BYTE_LEVEL.encode("日本語。hello world")[1:]
    output = OutputText(BYTE_LEVEL, stop=["o w"])
    shown = "".join(output.push(token) for token in token_ids) + output.finish()
    assert shown == output.text == "日本語。hell"
    assert output.stop_reason == "o w"
    used = BYTE_LEVEL.decode(token_ids[: output.num_tokens])
    assert "o w" in used
    assert "o w" not in BYTE_LEVEL.decode(token_ids[: output.num_tokens - 1])


def test_without_a_tokenizer_tokens_are_counted_and_stop_strings_are_refused():
    output = OutputText(None)
    assert output.push(5) == ""
    assert (output.finish(), output.text, output.num_tokens) == ("", "", 1)
    with pytest.raises(ValueError, match=r"stop: expected none, got .* stop_token_ids"):
        OutputText(None, stop=["x"])


def four_letters() -> Tokenizer:
    """Return a byte-level BPE of a few pieces; Ġ is a space and Ċ a line end."""
    pieces = ["<s>", "a", "b", "c", "Ġ", "Ċ", "ab", "Ġab"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [("a", "b"), ("Ġ", "ab")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["ab"], [(6,), (7,)]),  # "ab" and " ab" are one token each
        ([" ab"], [(6,), (7,)]),
        (["abc"], [(6, 3), (7, 3)]),
        (["c"], [(3,)]),  # " c" is "c" after a token for the space
        (["c", "   c", "ab", "ab"], [(3,), (6,), (7,)]),
        ([" "], [(4,)]),
        (["\n"], [(5,)]),
        (["ab ab"], [(6, 7), (7, 7)]),
    ],
)
def test_bad_words_are_tokenized_with_and_without_a_leading_space(words, expected):
    assert bad_word_token_ids(four_letters(), words) == expected


def test_bad_words_that_cannot_be_encoded_are_refused_with_their_index():
    with pytest.raises(ValueError, match=r"bad_words: expected none, got \('a',\): "):
        bad_word_token_ids(None, ["a"])
    assert bad_word_token_ids(None, []) == []
    with pytest.raises(ValueError, match=r"bad_words\[1\]: .* got 'd'"):
        bad_word_token_ids(four_letters(), ["a", "d"])
    with pytest.raises(ValueError, match=r"bad_words\[0\]: .* a lone surrogate"):
        bad_word_token_ids(four_letters(), ["a\ud800"])
    known = models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(known)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert bad_word_token_ids(Tokenizer(backend), ["one"]) == [(1,)]
    with pytest.raises(ValueError, match=r"bad_words\[0\]: .* got 'one two'"):
        bad_word_token_ids(Tokenizer(backend), ["one two"])
