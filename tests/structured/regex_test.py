"""Regexes: every short text is decided as Python's `re` decides it."""

import itertools
import re

import numpy as np
import pytest

from jpaged.structured import characters
from jpaged.structured.minimisation import DEAD, equivalent_states
from jpaged.structured.nfa import Nfa
from jpaged.structured.regex import containing, from_regex

PATTERNS = [
    "a|ab", "(a|ab)(c|b)?", "a*?b", "[ab]{2,4}", "(ab)*", "a?b?c?", "(?:abc|b)+", "",
    "^ab$", "(a|b)*abb", "(a*)*b", "^a|b$", "(^a|b)c", "(a|^)b", "a$|b", "a{0}b",
    "(a|b{2,}){1,3}", "^(?!ab)[abc]{1,3}$", "^(?=.*b)a.{1,2}", "(?i)aB", "[^a]b",
    "((a|)b*)*c", "^$|^c+", "(?x) a b # c\n | c", r"a\Z|b", "(?P<x>a)(?:b)", "[]a]b",
    r"[\]a-]", "^(?!a)|^ab", "(?s).b", "(?i:A)b", r"\x61\u0062?",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_short_texts_match_as_in_python(pattern):
    whole, part = from_regex(pattern), containing(pattern)
    for length in range(5):
        for word in itertools.product("abc", repeat=length):
            text = "".join(word)
            assert whole.matches(text) == bool(re.fullmatch(pattern, text)), text
            assert part.matches(text) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize(
    ("pattern", "matched", "unmatched"),
    [
        (r"\d\w\s", ["7_\t", "0a\xa0"], ["߀a ", "7é ", "7_x"]),
        (r"\D\W\S", ["é-é"], ["7-é", "aa-"]),
        (r"\u{1F600}\x{41}", ["😀A"], ["u{1F600}A"]),
        (r"\uD83D\uDE00|\U0001F601", ["😀", "😁"], ["\u083d"]),
        (r"\e\cJ\a\f\v\0", ["\x1b\n\x07\x0c\x0b\x00"], ["e"]),
        (r"\p{Lu}\P{L}\p{Letter}", ["É1é"], ["é1é", "ÉÉé"]),
        (r"[[:alpha:]][[:^digit:]]", ["ax"], ["1x", "a1"]),
        (r"(?i)straße|k", ["STRAßE", "Straẞe", "K"], ["strasse"]),
        (r"[[a]b", ["[b", "ab"], ["b"]),
        (r"[^]", ["a", "\n"], ["", "aa"]),
        (r"[a&&b]", ["a", "&"], ["&&"]),
        (r"a{,2}{", ["a{,2}{"], ["a{"]),
        (r".", ["é", "😀"], ["\n", "\r", "\u2028"]),
    ],
)
def test_escapes_are_those_of_ecma_262_and_python(pattern, matched, unmatched):
    automaton = from_regex(pattern)
    for text in matched:
        assert automaton.matches(text), text
    for text in unmatched:
        assert not automaton.matches(text), text


def test_utf8_of_ranges_contains_exactly_their_characters():
    rng = np.random.default_rng(0)
    edges = [0x7F, 0x7FF, 0xD7FF, 0xFFFF, 0x10FFFF]
    for _ in range(60):
        starts = rng.choice(edges, 3) - rng.integers(0, 0x80, 3)
        ends = np.minimum(starts + rng.choice([0, 3, 70, 5_000, 70_000], 3), 0x10FFFF)
        ranges = characters.ranges_of(zip(starts.tolist(), ends.tolist(), strict=True))
        nfa = Nfa()
        end = nfa.node()
        start = nfa.fragment_before(characters.utf8(ranges), end)
        automaton = nfa.determinised(start, [end])
        for code in (np.concatenate([starts, ends])[:, None] + np.arange(-2, 3)).flat:
            if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
                is_in = any(first <= code <= last for first, last in ranges)
                assert automaton.matches(chr(code)) == is_in, hex(code)


def languages(transitions, is_accepting, length):
    """The texts of each state up to a length, by enumeration."""
    found = [set() for _ in is_accepting]
    for state in range(len(is_accepting)):
        for word in itertools.chain.from_iterable(
            itertools.product(range(transitions.shape[1]), repeat=n)
            for n in range(length + 1)
        ):
            reached = state
            for letter in word:
                reached = reached if reached == DEAD else transitions[reached, letter]
            if reached != DEAD and is_accepting[reached]:
                found[state].add(word)
    return found


@pytest.mark.parametrize("is_acyclic", [False, True])
def test_states_are_equivalent_exactly_if_they_have_the_same_texts(is_acyclic):
    rng = np.random.default_rng(1)
    for _ in range(60):
        num_states = int(rng.integers(1, 6))
        transitions = rng.integers(-1, num_states, (num_states, 2))
        if is_acyclic:
            later = np.arange(num_states)[:, None] + rng.integers(1, 3, (num_states, 2))
            transitions = np.where(later < num_states, later, DEAD)
        is_accepting = rng.random(num_states) < 0.4
        groups = equivalent_states(transitions.astype(np.int32), is_accepting)
        # States that differ do so in a text shorter than the number of states.
        texts = languages(transitions, is_accepting, num_states)
        for a, b in itertools.product(range(num_states), repeat=2):
            assert (groups[a] == groups[b]) == (texts[a] == texts[b])
        assert [group == DEAD for group in groups] == [not one for one in texts]


def test_long_chains_are_minimised_in_a_few_rounds():
    automaton = from_regex("[a-z]{100,5000}")
    assert automaton.num_states == 5001
    assert automaton.matches("a" * 5000)
    assert not automaton.matches("a" * 99)
