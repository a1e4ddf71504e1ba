"""Structured output: automata from regexes, choices and schemas, against plain search.

The oracle enumerates texts: a sequence of tokens may go on as long as some text of the
language begins with it and the tokens can spell the rest. Python's `re` says which
texts are in a language. Generated texts are random walks through the automaton.
"""

import functools
import itertools
import re
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jpaged.decoding.automaton import DEAD, shortest
from jpaged.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from jpaged.structured import byte_automata, compile_constraint, token_bytes
from jpaged.structured.byte_automata import TokenText, from_choices, over_tokens
from jpaged.text.tokenizer import Tokenizer
from tests.support.automaton_walk import TINY, TINY_EOS, automaton_of, step, walk
from tests.text.tokenizer_test import BYTE_LEVEL, SENTENCEPIECE


def tokenizer_of(pieces: list[str]) -> Tokenizer:
    """A byte-level tokenizer with these ASCII tokens; EOS is the last id."""
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


# Regexes over a, b, c with a vocabulary of a few tokens, by enumeration.

PIECES = ["a", "b", "ab", "ba", "bb", "aab", "abc"]  # c comes only after ab
SMALL = tokenizer_of(PIECES)
REGEXES = [
    "a|ab", "(a|ab)(c|b)?", "a*?b", "[ab]{2,4}", "(ab)*", "a?b?c?", "(?:abc|b)+",
    "aa.b|ba", "^ab$", "a(b|c)a", "(a|b)*abb", "aac|b", "",
]  # fmt: skip


@functools.cache
def texts(pattern: str, longest: int = 12) -> list[str]:
    # Three tokens of three letters, and three more letters that a regex may want.
    letters = "abc" if set(pattern) & set("c.") else "ab"
    lengths = range(longest + 1)
    words = (word for n in lengths for word in itertools.product(letters, repeat=n))
    return [text for word in words if re.fullmatch(pattern, text := "".join(word))]


def is_spelled(text: str) -> bool:
    return not text or any(
        text.startswith(piece) and is_spelled(text[len(piece) :]) for piece in PIECES
    )


def can_go_on(pattern: str, text: str) -> bool:
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
            wanted = [can_go_on(pattern, text + piece) for piece in PIECES]
            wanted.append(re.fullmatch(pattern, text) is not None)
            if allowed != wanted:
                wrong.append(f"{pattern!r} after {text!r}: {allowed}, wanted {wanted}")
                break
            if not allowed[token] or token == 7:
                break
            state, text = step(automaton, state, token), text + PIECES[token]
    return wrong


@pytest.mark.parametrize("pattern", REGEXES)
@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=8))
def test_a_token_is_allowed_just_where_the_regex_can_still_match(pattern, walks):
    # Some random tokens, and what the automaton itself would do.
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


def test_choices_are_spelled_in_every_way_that_the_tokens_allow():
    automaton = automaton_of(StructuredOutputsParams(choice=CHOICES))
    rng = np.random.default_rng(0)
    walks = [walk(automaton, rng) for _ in range(300)]
    assert {TINY.decode(tokens) for tokens in walks} == set(CHOICES)
    spellings = {tuple(w) for w in walks if TINY.decode(w) == "yes, please"}
    assert len(spellings) > 3
    # The tokenizer's own way is one of them.
    for choice in CHOICES:
        state = 0
        for token in TINY.backend.encode(choice, add_special_tokens=False).ids:
            state = step(automaton, state, token)
        assert automaton.is_accepting[state]
    assert shortest(automaton) == 2


def test_the_fewest_tokens_are_counted_with_eos_and_held_against_max_tokens():
    params = StructuredOutputsParams(choice=["abab", "aabbbb"])
    automaton = automaton_of(params, SMALL, (7,), max_tokens=3)
    assert shortest(automaton) == 3  # ab ab EOS
    with pytest.raises(ValueError, match=r"max_tokens: wanted at least 3, .*got 2"):
        automaton_of(params, SMALL, (7,), max_tokens=2)


def test_choices_need_no_library_and_regexes_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    assert automaton_of(StructuredOutputsParams(choice=["one", "two"])).num_states > 3
    for params in ({"regex": "[xyz]q"}, {"json": {"type": "null"}}):
        with pytest.raises(ValueError, match=r"pip install 'jpaged\[structured\]'"):
            automaton_of(StructuredOutputsParams(**params))


def test_the_same_constraint_is_compiled_once():
    params = StructuredOutputsParams(json={"type": "string", "maxLength": 2})
    again = StructuredOutputsParams(json='{"type": "string", "maxLength": 2}')
    assert automaton_of(params) is automaton_of(again)
    assert automaton_of(params) is not automaton_of(params, SENTENCEPIECE, (0,))


def test_special_tokens_and_tokens_beyond_the_tokenizer_are_never_allowed():
    params = StructuredOutputsParams(regex=".*")
    size = TINY.vocab_size + 5
    automaton = compile_constraint(params, TINY, size, [TINY_EOS])
    never = np.flatnonzero((automaton.transitions == DEAD).all(axis=0))
    tokens = np.flatnonzero(np.isin(automaton.classes, never))
    assert {0, *range(TINY.vocab_size, size)} <= set(tokens.tolist())
    # <|bos|> can still be written by letters, which is only text.
    assert TINY.special_token_ids == {0, 1}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "(a"}, r"regex: '\(a' does not parse: missing \)"),
        ({"regex": "a)(b"}, r"does not parse: the \) at position 1 closes nothing"),
        ({"regex": "[z-a]"}, "does not parse: bad character range z-a at position 1"),
        ({"regex": "(?=a)b"}, "is not supported: .*Look-around"),
        ({"regex": r"(a)\1"}, "is not supported: .*back-references"),
        ({"regex": "b(^a|b)"}, "has a start anchor at position 2"),
        ({"regex": "[a&&b]"}, "matches no text at all"),
        ({"regex": "(a{1000}){1000}"}, "at most 50000 states, got about 1000000"),
        ({"regex": r"\w{1000}"}, r"got about 320000 .* write \[a-z\] for \\w"),
        ({"regex": "c"}, "cannot be met with this vocabulary"),
        ({"regex": "é+"}, "cannot be met with this vocabulary"),
        ({"choice": ["ab", "bc"]}, r"choice\[1\]: wanted a text that the .* got 'bc'"),
        ({"json": {"type": "integer"}}, "cannot be met with this vocabulary"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(params, message):
    with pytest.raises(ValueError, match=message):
        automaton_of(StructuredOutputsParams(**params), SMALL, (7,))


def test_without_a_tokenizer_or_eos_there_is_no_constraint():
    params = StructuredOutputsParams(choice=["a"])
    with pytest.raises(ValueError, match="wanted a model with a tokenizer, got none"):
        compile_constraint(params, None, 10, [1])
    with pytest.raises(ValueError, match="wanted a model with an EOS token, got none"):
        compile_constraint(params, SMALL, 8, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected exactly one of regex, choice and json, got none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one .* got regex and choice"),
        ({"regex": 3}, r"regex: expected a string, got 3 \(int\)"),
        ({"regex": "\ud800"}, "regex: expected text without lone surrogates"),
        ({"choice": "abc"}, "choice: expected a sequence of strings, got 'abc'"),
        ({"choice": []}, "choice: expected at least one string"),
        ({"choice": ["a", ""]}, r"choice\[1\]: expected a string that is not empty"),
        ({"json": "{"}, "json: expected a JSON schema, got '{', which is not JSON"),
        ({"json": {"const": {1, 2}}}, "json: expected a JSON schema, .*not JSON"),
        ({"json": "[1]"}, "json: expected a JSON schema: a dict"),
    ],
)
def test_parameters_that_say_nothing_clear_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**values)


def test_both_kinds_of_requests_take_structured_outputs_and_nothing_else():
    params = StructuredOutputsParams(json={"type": "object"})
    assert params.json == '{"type": "object"}'
    assert SamplingParams(structured_outputs=params).structured_outputs == params
    beams = BeamSearchParams(2, max_tokens=4, structured_outputs=params)
    assert beams.structured_outputs is params
    for make in (SamplingParams, lambda **kw: BeamSearchParams(2, max_tokens=4, **kw)):
        with pytest.raises(ValueError, match="structured_outputs: expected Structured"):
            make(structured_outputs={"regex": "a"})


# The bytes of tokens.


def test_token_bytes_are_what_the_library_decodes():
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
def test_the_bytes_of_an_encoded_text_are_its_bytes(text):
    pieces = token_bytes(BYTE_LEVEL)
    token_ids = BYTE_LEVEL.backend.encode(text, add_special_tokens=False).ids
    assert b"".join(pieces[token] for token in token_ids) == text.encode()


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
    # After another token, the library says the same.
    for token_id, piece in enumerate(pieces):
        if piece is not None and not piece[0] & 0x80:
            assert SENTENCEPIECE.decode([4, token_id]) == "x" + piece.decode()
    metaspace = Backend(models.BPE({"▁a": 0, "b": 1, "<0x41>": 2}, []))
    metaspace.decoder = decoders.Metaspace()
    assert token_bytes(Tokenizer(metaspace)) == [b" a", b"b", b"<0x41>"]


def test_sentencepiece_texts_may_mix_pieces_and_bytes():
    # Its unknown token is an ordinary token here, and would spell "<unk>".
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
def test_a_decoder_that_is_not_understood_is_refused(decoder):
    backend = Backend(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match=r"structured_outputs: .*SentencePiece token"):
        token_bytes(Tokenizer(backend))


# Byte automata.


def test_equal_states_are_merged_and_the_language_stays():
    # ya, yb, za, zb: the states after y and z are equal, and so are all ends.
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
def test_tokens_walk_as_their_bytes_do_one_by_one(choices, tokens):
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
    from jpaged.structured import regex as regex_module

    walks = [[0, 1], [2], [5], [3, 0]]

    def found():
        compile_module._compiled.cache_clear()
        compile_module._token_text.cache_clear()
        return [wrong for pattern in PATTERNS for wrong in differences(pattern, walks)]

    assert found() == []
    faults = [
        (automaton_module, "_live_states", nothing_is_dead),
        (TokenText, "of", one_byte_short),
        (regex_module, "minimised", lambda merge, t, a: merge(t, np.ones_like(a))),
        (compile_module, "from_regex", lambda make, pattern: make(f"{pattern}|b")),
    ]
    for module, name, change in faults:
        with monkeypatch.context() as patch:
            patch.setattr(
                module, name, functools.partial(change, getattr(module, name))
            )
            assert found() != [], name
    found()  # leaves nothing faulty behind in the caches
