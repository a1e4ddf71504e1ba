"""Bad words as automata: texts against a search, and walks over tokens."""

import itertools
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged.decoding.automaton import DEAD, EOS_CLASS
from jpaged.params import StructuredOutputsParams
from jpaged.structured import compile_constraint
from jpaged.structured.bad_words import (
    MAX_BYTES,
    compile_bad_words,
    intersection,
    without_words,
)
from jpaged.text.tokenizer import Tokenizer
from tests.support.tiny_llm import ascii_tokenizer, byte_tokenizer

WORDS = st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=4)
ASCII = Tokenizer(ascii_tokenizer())
BYTES = Tokenizer(byte_tokenizer())


def is_free(text, words):
    """Whether a text has none of the words, which may begin at the start."""
    starts = [w[1:] for w in words if w.startswith(" ") and w != " "]
    if any(word.startswith("  ") or word == " " for word in words):
        return None  # whether the start counts as a blank depends on the others
    return not any(w in text for w in words) and not any(
        map(text.startswith, filter(None, starts))
    )


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(WORDS, st.text("ab é", max_size=10))
def test_exactly_the_texts_with_a_word_are_forbidden(words, text):
    expected = is_free(text, words)
    automaton = without_words(words)
    if expected is None:
        if automaton.matches(text):
            assert not any(word in text for word in words)
    else:
        assert automaton.matches(text) == expected


@pytest.mark.parametrize("tokenizer", [ASCII, BYTES], ids=["ascii", "bytes"])
@pytest.mark.parametrize("words", [("ab", "c"), ("ca", " na", "café"), ("日本", "x")])
def test_no_walk_over_tokens_writes_a_word(tokenizer, words):
    size = tokenizer.vocab_size + 3  # a model's vocabulary is often padded
    automaton = compile_bad_words(words, tokenizer, size, (1,))
    assert automaton.classes[1] == EOS_CLASS
    assert automaton.is_accepting.all()
    rng = random.Random(3)
    forbidden = 0
    for _ in range(50):
        state, ids = 0, []
        for _ in range(40):
            row = automaton.transitions[state, automaton.classes]
            forbidden += int((row == DEAD).sum())
            token = rng.choice(np.flatnonzero(row != DEAD).tolist())
            state, ids = row[token], [*ids, token]
        text = tokenizer.decode(ids)
        assert not any(word in text for word in words)
    assert forbidden


def test_tokens_without_text_are_allowed_and_do_not_separate_the_parts_of_a_word():
    automaton = compile_bad_words(("ab",), ASCII, ASCII.vocab_size, (1,))
    special, a, b = 0, *(ASCII.backend.token_to_id(c) for c in "ab")
    state = automaton.transitions[0, automaton.classes[a]]
    state = automaton.transitions[state, automaton.classes[special]]
    assert automaton.transitions[state, automaton.classes[b]] == DEAD
    ab = ASCII.backend.token_to_id("ab")
    assert ab is None or automaton.transitions[0, automaton.classes[ab]] == DEAD


def test_with_structured_output_exactly_the_texts_without_a_word_are_left():
    constraint = compile_constraint(
        StructuredOutputsParams(regex="[abc]{1,4}"), ASCII, ASCII.vocab_size, (1,)
    )
    words = compile_bad_words(("ab", "cc"), ASCII, ASCII.vocab_size, (1,))
    both = intersection(constraint, words)
    for length in range(1, 6):
        for letters in itertools.product("abc", repeat=length):
            text, state = "".join(letters), 0
            for letter in text:
                token = ASCII.backend.token_to_id(letter)
                state = both.transitions[state, both.classes[token]]
                if state == DEAD:
                    break
            expected = length <= 4 and "ab" not in text and "cc" not in text
            assert (state != DEAD and both.is_accepting[state]) == expected
    only = compile_constraint(
        StructuredOutputsParams(choice=["ab"]), ASCII, ASCII.vocab_size, (1,)
    )
    with pytest.raises(ValueError, match="bad_words: expected strings that leave"):
        intersection(only, words)


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match=f"at most {MAX_BYTES} bytes"):
        compile_bad_words(("x" * (MAX_BYTES + 1),), ASCII, ASCII.vocab_size, (1,))
