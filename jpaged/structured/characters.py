r"""Characters: sets of Unicode characters, and their UTF-8 as an automaton.

Pipeline: regex -> [structured.characters] -> byte automaton. Host only.

A set is a tuple of ranges (first, last) of code points in ascending order that neither
overlap nor touch. The classes \d, \w and \s are those of ECMA-262: only \s contains
characters beyond ASCII.
"""

import functools
import sys
import unicodedata
from collections.abc import Iterable

from jpaged.structured.nfa import Fragment, Nfa

Ranges = tuple[tuple[int, int], ...]
_SURROGATES = (0xD800, 0xDFFF)  # no UTF-8


def ranges_of(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Return the set of characters in any of these ranges, without surrogates."""
    merged: list[list[int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    low, high = _SURROGATES
    kept = []
    for first, last in merged:
        kept += [(first, min(last, low - 1)), (max(first, high + 1), last)]
    return tuple((first, last) for first, last in kept if first <= last)


def complement(ranges: Ranges) -> Ranges:
    """Return the set of all other characters."""
    found, start = [], 0
    for first, last in ranges:
        found.append((start, first - 1))
        start = last + 1
    return ranges_of(pair for pair in (*found, (start, sys.maxunicode)) if _has(pair))


def _has(pair: tuple[int, int]) -> bool:
    return pair[0] <= pair[1]


def _of(text: str) -> Ranges:
    return ranges_of((ord(character), ord(character)) for character in text)


ANY = ranges_of([(0, sys.maxunicode)])
DIGITS = ranges_of([(ord("0"), ord("9"))])
WORD = ranges_of([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
SPACES = ranges_of(
    [
        *_of("\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"),
        (0x2000, 0x200A),
    ]
)
# White space in both ECMA-262 and Python, and in either.
COMMON_SPACES = tuple(pair for pair in SPACES if pair != (0xFEFF, 0xFEFF))
ALL_SPACES = ranges_of([*SPACES, (0x1C, 0x1F), (0x85, 0x85)])
LINE_ENDS, LINE_FEED = _of("\n\r\u2028\u2029"), _of("\n")
POSIX = {
    "alnum": ranges_of([(0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)]),
    "alpha": ranges_of([(0x41, 0x5A), (0x61, 0x7A)]),
    "ascii": ranges_of([(0, 0x7F)]),
    "blank": _of("\t "),
    "cntrl": ranges_of([(0, 0x1F), (0x7F, 0x7F)]),
    "digit": DIGITS,
    "graph": ranges_of([(0x21, 0x7E)]),
    "lower": ranges_of([(0x61, 0x7A)]),
    "print": ranges_of([(0x20, 0x7E)]),
    "punct": ranges_of([(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)]),
    "space": _of("\t\n\v\f\r "),
    "upper": ranges_of([(0x41, 0x5A)]),
    "word": WORD,
    "xdigit": ranges_of([(0x30, 0x39), (0x41, 0x46), (0x61, 0x66)]),
}
_LONG_NAMES = {
    "letter": "L", "uppercase_letter": "Lu", "lowercase_letter": "Ll", "mark": "M",
    "number": "N", "decimal_number": "Nd", "digit": "Nd", "punctuation": "P",
    "symbol": "S", "separator": "Z", "space_separator": "Zs", "other": "C",
    "titlecase_letter": "Lt", "modifier_letter": "Lm", "other_letter": "Lo",
    "letter_number": "Nl", "control": "Cc", "format": "Cf", "punct": "P",
    "currency_symbol": "Sc", "math_symbol": "Sm", "dash_punctuation": "Pd",
}  # fmt: skip


@functools.cache
def _categories() -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for code in range(sys.maxunicode + 1):
        ranges = found.setdefault(unicodedata.category(chr(code)), [])
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return found


@functools.cache
def category(name: str) -> Ranges | None:
    r"""Return the characters of \p{name}, or None for an unknown name.

    Names are those of general categories, such as L, Lu or Letter, and Any, ASCII and
    Alphabetic (letters and letter numbers).
    """
    name = name.split("=")[-1].strip()
    special = {"any": ANY, "ascii": POSIX["ascii"]}
    if name.lower() in special:
        return special[name.lower()]
    names = [_LONG_NAMES.get(name.lower(), name)]
    if name.lower() in ("alphabetic", "alpha"):
        names = ["L", "Nl"]
    pairs = [
        pair
        for key, ranges in _categories().items()
        if any(key.startswith(part) for part in names if part)
        for pair in ranges
    ]
    return ranges_of(pairs) if pairs else None


@functools.cache
def unicode_class(letter: str) -> Ranges:
    r"""Return the characters of Python's \d or \w."""
    if letter == "d":
        return category("Nd") or ()
    return ranges_of([*(category("L") or ()), *(category("N") or ()), (0x5F, 0x5F)])


@functools.cache
def _other_cases() -> dict[int, frozenset[int]]:
    """Return the other cases of each character that has some."""
    groups: dict[str, set[int]] = {}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        folded = character.casefold()
        folded = folded if len(folded) == 1 else character.lower()
        if folded != character and len(folded) == 1:
            groups.setdefault(folded, {ord(folded)}).add(code)
    return {
        code: frozenset(group - {code}) for group in groups.values() for code in group
    }


def ignoring_case(ranges: Ranges) -> Ranges:
    """Return the set with the other cases of its characters."""
    others = [
        (other, other)
        for code, cases in _other_cases().items()
        if any(first <= code <= last for first, last in ranges)
        for other in cases
    ]
    return ranges_of([*ranges, *others])


def ascii_bytes(ranges: Ranges) -> int | None:
    """Return the set as a set of bytes, or None if it is not within ASCII."""
    if ranges and ranges[-1][1] > 0x7F:
        return None
    return sum((1 << (last + 1)) - (1 << first) for first, last in ranges)


@functools.lru_cache(maxsize=256)
def utf8(ranges: Ranges) -> Fragment:
    """Return the automaton of the UTF-8 of one character of the set."""
    nfa = Nfa()
    end = nfa.node()
    starts = []
    for first, last in ranges:
        for low, high in _sequences(first, last):
            node = end
            for a, b in zip(reversed(low), reversed(high), strict=True):
                node = nfa.before((1 << (b + 1)) - (1 << a), node)
            starts.append(node)
    return Fragment(nfa.determinised(nfa.node(*starts), [end]))


def _sequences(first: int, last: int) -> Iterable[tuple[bytes, bytes]]:
    """Split a range so that in each part every byte of UTF-8 has a range of its own."""
    for most in (0x7F, 0x7FF, 0xFFFF):
        if first <= most < last:
            yield from _sequences(first, most)
            yield from _sequences(most + 1, last)
            return
    for bits in (6, 12, 18):
        block = (1 << bits) - 1
        if last > 0x7F and first >> bits != last >> bits:
            if first & block:
                yield from _sequences(first, first | block)
                yield from _sequences((first | block) + 1, last)
                return
            if last & block != block:
                yield from _sequences(first, (last & ~block) - 1)
                yield from _sequences(last & ~block, last)
                return
    yield chr(first).encode(), chr(last).encode()
