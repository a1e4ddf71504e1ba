"""Structured output: automata of regexes, choices and schemas against enumeration.

The oracle enumerates texts: a token is allowed if some text of the language starts with
the tokens so far and the vocabulary can spell the rest. Python's `re` decides which
texts are in a language. Generated texts are random walks through the automaton.
"""

import functools
import itertools
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jpaged.decoding.automaton import DEAD, shortest
from jpaged.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from jpaged.structured import byte_automata, compile_constraint, token_bytes
from jpaged.structured.byte_automata import from_choices
from jpaged.structured.over_tokens import TokenText, over_tokens
from jpaged.text.tokenizer import Tokenizer
from tests.support.automaton_walk import TINY, TINY_EOS, automaton_of, step, walk
from tests.text.tokenizer_test import BYTE_LEVEL, SENTENCEPIECE


def tokenizer_of(pieces: list[str]) -> Tokenizer:
    """A byte-level tokenizer with these ASCII tokens; EOS is the last id."""
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


# Regexes over a, b and c with a small vocabulary, by enumeration.

PIECES = ["a", "b", "ab", "ba", "bb", "aab", "abc"]  # c comes only after ab
SMALL = tokenizer_of(PIECES)
REGEXES = [
    "a|ab", "(a|ab)(c|b)?", "a*?b", "[ab]{2,4}", "(ab)*", "a?b?c?", "(?:abc|b)+",
    "aa.b|ba", "^ab$", "a(b|c)a", "(a|b)*abb", "aac|b", "",
]  # fmt: skip


@functools.cache
def texts(pattern: str) -> list[str]:
    """Texts of the language: three tokens of three letters, and three more letters."""
    letters = "abc" if set(pattern) & set("c.") else "ab"
    # Regexes without repetition match at most 4 letters.
    lengths = range(13 if set(pattern) & set("*+") else 5)
    words = (word for n in lengths for word in itertools.product(letters, repeat=n))
    return [text for word in words if re.fullmatch(pattern, text := "".join(word))]


@functools.cache
def is_spelled(text: str) -> bool:
    return not text or any(
        text.startswith(piece) and is_spelled(text[len(piece) :]) for piece in PIECES
    )


def can_continue(pattern: str, text: str) -> bool:
    return any(
        whole.startswith(text) and is_spelled(whole[len(text) :])
        for whole in texts(pattern)
    )


def differences(pattern: str, walks) -> list[str]:
    automaton = automaton_of(StructuredOutputsParams(regex=pattern), SMALL, (7,))
    wrong = []
    for tokens in walks:
        state, text = 0, ""
        for token in tokens:
            allowed = [step(automaton, state, t) != DEAD for t in range(8)]
            expected = [can_continue(pattern, text + piece) for piece in PIECES]
            expected.append(re.fullmatch(pattern, text) is not None)
            if allowed != expected:
                wrong.append(f"{pattern!r} after {text!r}: {allowed} != {expected}")
                break
            if not allowed[token] or token == 7:
                break
            state, text = step(automaton, state, token), text + PIECES[token]
    return wrong


@pytest.mark.parametrize("pattern", REGEXES)
@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=8))
def test_a_token_is_allowed_exactly_if_the_regex_can_still_match(pattern, walks):
    # Random tokens, and a random walk through the automaton.
    automaton = automaton_of(StructuredOutputsParams(regex=pattern), SMALL, (7,))
    rng = np.random.default_rng(len(walks))
    walks = [*walks, walk(automaton, rng, most=3)[:3], [0], [1]]
    assert differences(pattern, walks) == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{3}-[0-9]{4}", r"[a-z]+@[a-z]+\.(com|org)", r"(?i)yes|no", r".{1,20}",
        r"[0-9]+(\.[0-9]{2})?", r"[àéîõü]{2,5}", r"(日本|中文)+", r"[^\x00-\x7f]{1,3}",
        r'"(\\.|[^"\\])*"', r"\s*return \w{1,8}",
    ],
)  # fmt: skip
def test_random_walks_with_the_bundled_tokenizer_match_the_regex(pattern):
    automaton = automaton_of(StructuredOutputsParams(regex=pattern))
    rng = np.random.default_rng(0)
    found = {TINY.decode(walk(automaton, rng)) for _ in range(25)}
    assert len(found) > 1
    for text in found:
        assert re.fullmatch(pattern, text), text


CHOICES = ["yes", "yes, please", "no", "日本", "日本語", "naïve 😀", " "]


def test_choices_can_be_spelled_with_different_tokens():
    automaton = automaton_of(StructuredOutputsParams(choice=CHOICES))
    rng = np.random.default_rng(0)
    walks = [walk(automaton, rng) for _ in range(300)]
    assert {TINY.decode(tokens) for tokens in walks} == set(CHOICES)
    spellings = {tuple(w) for w in walks if TINY.decode(w) == "yes, please"}
    assert len(spellings) > 3
    # The tokenization of the tokenizer is one of them.
    for choice in CHOICES:
        state = 0
        for token in TINY.backend.encode(choice, add_special_tokens=False).ids:
            state = step(automaton, state, token)
        assert automaton.is_accepting[state]
    assert shortest(automaton) == 2


def test_max_tokens_below_the_shortest_text_with_eos_is_refused():
    params = StructuredOutputsParams(choice=["abab", "aabbbb"])
    automaton = automaton_of(params, SMALL, (7,), max_tokens=3)
    assert shortest(automaton) == 3  # ab ab EOS
    with pytest.raises(ValueError, match=r"max_tokens: expected at least 3, .*got 2"):
        automaton_of(params, SMALL, (7,), max_tokens=2)


def test_stop_tokens_do_not_end_a_text_in_its_middle():
    # The token "b" ends the text only after it: "ab" is spelled with the token "ab".
    params = StructuredOutputsParams(choice=["ab"])
    automaton = automaton_of(params, SMALL, (7,), stop_token_ids=[1])
    after_ab = step(automaton, 0, 2)
    assert step(automaton, 0, 0) == DEAD  # after "a" only the stop token could follow
    assert automaton.is_accepting[after_ab]
    assert step(automaton, after_ab, 1) == step(automaton, after_ab, 7) == after_ab
    with pytest.raises(ValueError, match="cannot be met with this vocabulary"):
        automaton_of(params, SMALL, (7,), stop_token_ids=[1, 2])


def test_equal_constraints_are_compiled_once():
    params = StructuredOutputsParams(json={"type": "string", "maxLength": 2})
    again = StructuredOutputsParams(json='{"type": "string", "maxLength": 2}')
    assert automaton_of(params) is automaton_of(again)
    assert automaton_of(params) is not automaton_of(params, SENTENCEPIECE, (0,))


def test_special_tokens_and_tokens_beyond_the_tokenizer_are_never_allowed():
    params = StructuredOutputsParams(regex=".*")
    size = TINY.vocab_size + 5
    automaton = compile_constraint(params, TINY, size, [TINY_EOS])
    dead = np.flatnonzero((automaton.transitions == DEAD).all(axis=0))
    tokens = np.flatnonzero(np.isin(automaton.classes, dead))
    assert {0, *range(TINY.vocab_size, size)} <= set(tokens.tolist())
    # The text "<|bos|>" is still allowed, spelled with ordinary tokens.
    assert TINY.special_token_ids == {0, 1}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "(a"}, r"'\(a', which does not parse at position 0: missing \)"),
        ({"regex": "a)(b"}, r"does not parse at position 1: the \) closes no group"),
        ({"regex": "[z-a]"}, "does not parse at position 1: bad character range"),
        ({"regex": "[[a"}, r"does not parse at position 0: the class \[ is not closed"),
        ({"regex": r"\y"}, r"does not parse at position 0: unknown escape \\y"),
        ({"regex": "(?<=a)b"}, "with look-behind at position 0, which is not "),
        ({"regex": "a(?=b)b"}, "expected look-ahead only at the start of the text"),
        ({"regex": r"(a)\1"}, "with a back-reference at position 3"),
        ({"regex": r"\bab"}, r"with the word boundary \\b at position 0"),
        ({"regex": "b^a"}, "expected a regex that some text matches, got 'b\\^a'"),
        ({"regex": "(a{1000}){1000}"}, "expected a constraint of at most 150000 nodes"),
        ({"regex": "(a|b)*a(a|b){20}"}, "a constraint of at most 60000 states"),
        ({"regex": "c"}, "cannot be met with this vocabulary"),
        ({"regex": "é+"}, "cannot be met with this vocabulary"),
        ({"choice": ["ab", "bc"]}, r"choice\[1\]: expected a text that .* got 'bc'"),
        ({"json": {"type": "integer"}}, "cannot be met with this vocabulary"),
    ],
)  # fmt: skip
def test_impossible_constraints_are_refused_with_the_reason(params, message):
    with pytest.raises(ValueError, match=message):
        automaton_of(StructuredOutputsParams(**params), SMALL, (7,))


def test_a_model_without_tokenizer_or_eos_is_refused():
    params = StructuredOutputsParams(choice=["a"])
    with pytest.raises(ValueError, match="expected a model with a tokenizer, got none"):
        compile_constraint(params, None, 10, [1])
    with pytest.raises(
        ValueError, match="expected a model with an EOS token, got none"
    ):
        compile_constraint(params, SMALL, 8, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of regex, choice and json, got none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one .* got regex and choice"),
        ({"regex": 3}, r"regex: .* a string, got 3 \(int\)"),
        ({"regex": "\ud800"}, "regex: .* text without lone surrogates"),
        ({"choice": "abc"}, "choice: .* a sequence of strings, got 'abc'"),
        ({"choice": []}, "choice: .* at least one string"),
        ({"choice": ["a", ""]}, r"choice\[1\]: .* a string that is not empty"),
        ({"json": "{"}, "json: .* a JSON schema, got '{'"),
        ({"json": {"const": {1, 2}}}, "json: .* a JSON schema, "),
        ({"json": "[1]"}, "json: .* a JSON schema: a dict"),
    ],
)
def test_invalid_or_ambiguous_parameters_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**values)


def test_sampling_and_beam_search_accept_structured_outputs_params_or_their_fields():
    params = StructuredOutputsParams(json={"type": "object"})
    assert params.json == '{"type": "object"}'
    assert SamplingParams(structured_outputs=params).structured_outputs == params
    beams = BeamSearchParams(2, max_tokens=4, structured_outputs=params)
    assert beams.structured_outputs is params
    for make in (SamplingParams, lambda **kw: BeamSearchParams(2, max_tokens=4, **kw)):
        regex = StructuredOutputsParams(regex="a")
        assert make(structured_outputs={"regex": "a"}).structured_outputs == regex
        with pytest.raises(ValueError, match=r"structured_outputs: .*"):
            make(structured_outputs="a")


# The bytes of tokens.

BYTE_LEVEL_PIECES = token_bytes(BYTE_LEVEL)


def test_token_bytes_equal_what_the_library_decodes():
    for tokenizer in (TINY, BYTE_LEVEL):
        pieces = token_bytes(tokenizer)
        assert len(pieces) == tokenizer.vocab_size
        for token_id, piece in enumerate(pieces):
            if piece is None:
                assert token_id in tokenizer.special_token_ids
            else:
                text = piece.decode("utf-8", errors="replace")
                assert text == tokenizer.decode([token_id])


@hypothesis.given(st.text(max_size=30))
def test_the_token_bytes_of_an_encoded_text_are_its_bytes(text):
    token_ids = BYTE_LEVEL.backend.encode(text, add_special_tokens=False).ids
    assert b"".join(BYTE_LEVEL_PIECES[token] for token in token_ids) == text.encode()


def test_sentencepiece_tokens_keep_their_space_and_byte_tokens_are_bytes():
    pieces = token_bytes(SENTENCEPIECE)
    assert pieces[1:8] == [
        b" ",
        b" hello",
        b" world",
        b"x",
        b" y",
        "é".encode(),
        "日".encode(),
    ]
    assert pieces[8 + 0x41] == b"A"
    assert pieces[8 + 0xFF] == b"\xff"
    # The library decodes the same bytes after another token.
    for token_id, piece in enumerate(pieces):
        if piece is not None and not piece[0] & 0x80:
            assert SENTENCEPIECE.decode([4, token_id]) == "x" + piece.decode()
    metaspace = Backend(models.BPE({"▁a": 0, "b": 1, "<0x41>": 2}, []))
    metaspace.decoder = decoders.Metaspace()
    assert token_bytes(Tokenizer(metaspace)) == [b" a", b"b", b"<0x41>"]


def test_sentencepiece_texts_can_mix_pieces_and_bytes():
    # The unknown token of this tokenizer is ordinary text, "<unk>".
    automaton = automaton_of(
        StructuredOutputsParams(choice=[" hello é", "x日A"]), SENTENCEPIECE, (0,)
    )
    rng = np.random.default_rng(0)
    walks = [walk(automaton, rng) for _ in range(60)]
    found = {SENTENCEPIECE.decode([4, *tokens])[1:] for tokens in walks}
    assert found == {" hello é", "x日A"}
    assert any(len(tokens) > 6 for tokens in walks)
    assert any(len(tokens) < 4 for tokens in walks)


def test_added_tokens_are_text_unless_they_are_special():
    backend = Backend.from_str(TINY.backend.to_str())
    backend.add_tokens([AddedToken("two words"), AddedToken("日本")])
    backend.add_special_tokens(["<x>"])
    pieces = token_bytes(Tokenizer(backend))
    assert pieces[-3:] == [b"two words", "日本".encode(), None]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    ],
)
def test_an_unsupported_decoder_is_refused(decoder):
    backend = Backend(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match=r"structured_outputs: .*SentencePiece token"):
        token_bytes(Tokenizer(backend))


# Byte automata.


def test_equivalent_states_are_merged_and_the_language_is_unchanged():
    # The states after y and z are equivalent, and so are all accepting states.
    automaton = from_choices(["ya", "yb", "za", "zb"])
    assert len(automaton.transitions) == 3
    words = ["".join(word) for word in itertools.product("yzab", repeat=2)]
    assert sorted(filter(automaton.matches, words)) == ["ya", "yb", "za", "zb"]
    nothing = byte_automata.minimised(automaton.transitions, np.zeros(3, np.bool_))
    assert nothing.transitions.shape == (1, 256)
    assert not nothing.matches("")


@hypothesis.given(
    st.lists(st.text("ab日é", min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.binary(max_size=4), max_size=12),
)
def test_transitions_of_tokens_equal_those_of_their_bytes(choices, tokens):
    automaton = from_choices(choices)
    tokens = [*tokens, None, *(choice.encode()[:3] for choice in choices)]
    transitions, classes = over_tokens(automaton, TokenText.of(tokens))
    for state in range(len(automaton.transitions)):
        for token, piece in enumerate(tokens):
            reached = state if piece else DEAD
            for byte in piece or b"":
                reached = (
                    reached if reached == DEAD else automaton.transitions[reached, byte]
                )
            assert transitions[state, classes[token]] == reached


PATTERNS = ["a|ab", "(a|ab)(c|b)?", "[ab]{2,4}", "aac|b"]


def nothing_is_dead(live, transitions, is_accepting):
    return np.ones_like(live(transitions, is_accepting))


def one_byte_short(of, token_bytes):
    return of([piece and (piece[:-1] or piece) for piece in token_bytes])


def test_planted_faults_are_found(monkeypatch):
    from jpaged.decoding import automaton as automaton_module
    from jpaged.structured import compile as compile_module
    from jpaged.structured import nfa as nfa_module
    from jpaged.structured import regex as regex_module

    walks = [[0, 1], [2], [5], [3, 0]]

    def found():
        compile_module._compiled.cache_clear()
        compile_module._token_text.cache_clear()
        regex_module._compiled.cache_clear()
        return [wrong for pattern in PATTERNS for wrong in differences(pattern, walks)]

    assert found() == []
    faults = [
        (automaton_module, "_live_states", nothing_is_dead),
        (TokenText, "of", one_byte_short),
        (nfa_module, "minimised", lambda merge, t, a, c: merge(t, np.ones_like(a), c)),
        (compile_module, "from_regex", lambda make, pattern: make(f"{pattern}|b")),
    ]
    for module, name, change in faults:
        with monkeypatch.context() as patch:
            patch.setattr(
                module, name, functools.partial(change, getattr(module, name))
            )
            assert found() != [], name
    found()  # replaces the faulty entries of the caches
