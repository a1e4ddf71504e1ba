"""Bad words as sequences of tokens."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jpaged.text.bad_words import bad_word_token_ids
from jpaged.text.tokenizer import Tokenizer


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
        (["b"], [(2,), (6,), (7,)]),  # also within "ab" and " ab"
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
    with pytest.raises(ValueError, match=r"bad_words\[1\]: .* got 'd'"):
        bad_word_token_ids(four_letters(), ["a", "d"])
    known = models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(known)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert bad_word_token_ids(Tokenizer(backend), ["one"]) == [(1,)]
    with pytest.raises(ValueError, match=r"bad_words\[0\]: .* got 'one two'"):
        bad_word_token_ids(Tokenizer(backend), ["one two"])
