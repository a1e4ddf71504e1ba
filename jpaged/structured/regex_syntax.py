r"""Regex syntax: parses a pattern to a tree.

Pipeline: regex -> [structured.regex_syntax] -> tree -> byte automaton. Host only.

The syntax is that of ECMA-262 and Python where both agree. Where they differ, both
spellings are accepted: (?<name>a) and (?P<name>a), \u{1F600} and \U0001F600. Flags
(?i), (?s) and (?x) work as in Python. \d, \w and \s are those of ECMA-262.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import NoReturn

from jpaged.structured import characters
from jpaged.structured.characters import Ranges

MAX_GROUPS = 100  # nested
START, END = "start", "end"  # of the text


@dataclasses.dataclass(frozen=True)
class Characters:
    """One character of a set."""

    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Parts one after the other."""

    parts: tuple["Node", ...] = ()


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """Any of several parts."""

    parts: tuple["Node", ...]


@dataclasses.dataclass(frozen=True)
class Repetition:
    """A part `least` to `most` times; None is no limit."""

    part: "Node"
    least: int
    most: int | None


@dataclasses.dataclass(frozen=True)
class Anchor:
    """The start or the end of the text."""

    where: str


@dataclasses.dataclass(frozen=True)
class LookAhead:
    """A condition on the rest of the text."""

    part: "Node"
    is_negative: bool


Node = Characters | Sequence | Alternatives | Repetition | Anchor | LookAhead

# What \d, \w and \s match for both ECMA-262 and Python.
_CLASSES = {
    "d": characters.DIGITS,
    "w": characters.WORD,
    "s": characters.COMMON_SPACES,
}
# Python's $ matches before a line feed at the end of the text, too.
_END_OR_LINE_END = Sequence(
    (Repetition(Characters(characters.LINE_FEED), 0, 1), Anchor(END))
)
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "a": 7, "e": 27}
_HEX = re.compile(
    r"x\{([0-9A-Fa-f]{1,8})\}|u\{([0-9A-Fa-f]{1,8})\}|x([0-9A-Fa-f]{2})"
    r"|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})"
)
_PAIR = re.compile(r"\\u([Dd][89ABab][0-9A-Fa-f]{2})\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})")
_BRACES = re.compile(r"\{([0-9]+)(,([0-9]*))?\}")
_GROUP = re.compile(
    r"\?(?:P?<(?P<name>[^\W\d][\w$]*)>|(?P<flags>[a-zA-Z]*(?:-[a-zA-Z]+)?)[:)])"
)
_PROPERTY = re.compile(r"[pP](?:\{(\^?)([\w =]+)\}|([A-Z]))")
_POSIX = re.compile(r"\[:(\^?)([a-z]+):\]")


def parse(pattern: str, *, is_json: bool = False, is_wide: bool = False) -> Node:
    r"""Return the tree of a pattern.

    Args:
        pattern: the regex.
        is_json: whether it is of a JSON schema. Validators read such patterns as
            ECMA-262 or as Python do: the tree has the texts that match for both. Else
            \d and \w are those of ECMA-262, and only \s is that of both.
        is_wide: whether the tree has the texts that match for one of them.

    Raises:
        ValueError: the pattern does not parse, or has parts that cannot be a finite
            automaton; the message has the position.
    """
    parser = _Parser(pattern, is_json, is_wide)
    node = parser.alternatives(frozenset())
    if parser.position < len(pattern):
        parser.fail("the ) closes no group")
    return node


class _Parser:
    def __init__(self, pattern: str, is_json: bool, is_wide: bool) -> None:
        self._is_json, self._is_wide = is_json, is_wide
        self.pattern, self.position, self._depth = pattern, 0, 0

    def fail(self, reason: str, position: int | None = None) -> NoReturn:
        """Raise the error for a position, which is the current one by default."""
        short = self.pattern if len(self.pattern) <= 80 else self.pattern[:80] + "..."
        at = self.position if position is None else position
        raise ValueError(
            f"regex: expected a regex, got {short!r}, which does not parse at position "
            f"{at}: {reason}"
        )

    def unsupported(self, what: str, position: int) -> NoReturn:
        """Raise the error for a construct that cannot be a finite automaton."""
        short = self.pattern if len(self.pattern) <= 80 else self.pattern[:80] + "..."
        raise ValueError(
            f"regex: expected a regex that can be a finite automaton, got {short!r} "
            f"with {what} at position {position}, which is not supported"
        )

    @contextlib.contextmanager
    def _complement(self, is_complement: bool) -> Iterator[None]:
        """Read a part whose complement is used, which needs the opposite reading."""
        self._is_wide ^= is_complement
        yield
        self._is_wide ^= is_complement

    def _named_class(self, letter: str) -> Ranges:
        is_complement = letter.isupper()
        with self._complement(is_complement):
            found = _CLASSES[letter.lower()]
            if self._is_wide and letter in "sS":
                found = characters.ALL_SPACES
            elif self._is_wide and self._is_json:
                found = characters.unicode_class(letter.lower())
        return characters.complement(found) if is_complement else found

    def _peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.position)

    def _take(self, text: str) -> bool:
        if self._peek(text):
            self.position += len(text)
            return True
        return False

    def _match(self, expression: re.Pattern) -> re.Match | None:
        match = expression.match(self.pattern, self.position)
        if match:
            self.position = match.end()
        return match

    def alternatives(self, flags: frozenset[str]) -> Node:
        parts = []
        while True:
            part, flags = self._sequence(flags)
            parts.append(part)
            if not self._take("|"):
                return parts[0] if len(parts) == 1 else Alternatives(tuple(parts))

    def _sequence(self, flags: frozenset[str]) -> tuple[Node, frozenset[str]]:
        parts: list[Node] = []
        while self.position < len(self.pattern) and not (
            self._peek("|") or self._peek(")")
        ):
            if "x" in flags and self._skip_space():
                continue
            start = self.position
            if self._take("("):
                node, flags = self._group(flags, start)
                if node is None:
                    continue
            else:
                node = self._atom(flags)
            while "x" in flags and self._skip_space():
                pass
            parts.append(self._repeated(node, start))
        return (parts[0] if len(parts) == 1 else Sequence(tuple(parts))), flags

    def _skip_space(self) -> bool:
        return bool(self._match(re.compile(r"\s+|#[^\n]*")))

    def _group(
        self, flags: frozenset[str], start: int
    ) -> tuple[Node | None, frozenset[str]]:
        """Return a group, or None and the new flags for a group of flags only."""
        inner, look = flags, None
        for text in ("?=", "?!"):
            if look is None and self._take(text):
                look = text
        for text in ("?<=", "?<!"):
            if self._peek(text):
                self.unsupported("look-behind", start)
        if self._peek("?>"):
            self.unsupported("an atomic group", start)
        if self._take("?#"):
            while self.position < len(self.pattern) and not self._peek(")"):
                self.position += 1
            if not self._take(")"):
                self.fail("the comment is not closed", start)
            return None, flags
        if look is None and self._peek("?"):
            match = self._match(_GROUP)
            if not match:
                self.fail("an unknown group after (?", start)
            if match["flags"] is not None:
                inner = self._with_flags(flags, match["flags"], start)
                if match.group().endswith(")"):
                    return None, inner
        self._depth += 1
        if self._depth > MAX_GROUPS:
            self.fail(f"more than {MAX_GROUPS} nested groups", start)
        with self._complement(look == "?!"):
            node = self.alternatives(inner)
        self._depth -= 1
        if not self._take(")"):
            self.fail("missing )", start)
        return (LookAhead(node, look == "?!") if look else node), flags

    def _with_flags(self, flags: frozenset[str], text: str, at: int) -> frozenset[str]:
        added, _, removed = text.partition("-")
        for flag in added + removed:
            if flag not in "isxau":
                self.unsupported(f"the flag {flag!r}", at)
        return (flags | set(added)) - set(removed)

    def _repeated(self, node: Node, start: int) -> Node:
        is_repeated = False
        while True:
            position = self.position
            if self._take("*"):
                least, most = 0, None
            elif self._take("+"):
                least, most = 1, None
            elif self._take("?"):
                least, most = 0, 1
            elif match := self._match(_BRACES):
                least = int(match[1])
                most = (
                    least if match[2] is None else int(match[3]) if match[3] else None
                )
            else:
                return node
            if is_repeated:
                self.fail("multiple repeat", position)
            if isinstance(node, LookAhead | Anchor) and least == 0:
                self.unsupported("an optional condition", start)
            if most is not None and most < least:
                self.fail(
                    f"the repetition's limits {least} and {most} are swapped", position
                )
            node, is_repeated = Repetition(node, least, most), True
            self._take("?")  # a lazy repetition has the same texts
            if self._peek("+"):
                self.unsupported("a possessive repetition", position)

    def _atom(self, flags: frozenset[str]) -> Node:
        start, character = self.position, self.pattern[self.position]
        self.position += 1
        if character == "^":
            return Anchor(START)
        if character == "$":
            return _END_OR_LINE_END if self._is_wide and self._is_json else Anchor(END)
        if character == ".":
            if "s" in flags:
                return Characters(characters.ANY)
            is_python = self._is_wide and self._is_json
            ends = characters.LINE_FEED if is_python else characters.LINE_ENDS
            return Characters(characters.complement(ends))
        if character == "[":
            return self._cased(self._class(start), flags)
        if character in "*+?":
            self.fail("nothing to repeat", start)
        if character == "\\":
            following = self.pattern[self.position : self.position + 1]
            if following in ("A", "z", "Z"):
                self.position += 1
                return Anchor(START if following == "A" else END)
            if following in ("b", "B"):
                self.unsupported(f"the word boundary \\{following}", start)
            return self._cased(self._escape(start), flags)
        return self._cased(((ord(character), ord(character)),), flags)

    def _cased(self, ranges: Ranges, flags: frozenset[str]) -> Characters:
        ranges = characters.ranges_of(ranges)
        return Characters(characters.ignoring_case(ranges) if "i" in flags else ranges)

    def _escape(self, start: int) -> Ranges:
        """Return the characters of an escape after its backslash."""
        pair = _PAIR.match(self.pattern, start)
        if pair:
            self.position = pair.end()
            high, low = int(pair[1], 16), int(pair[2], 16)
            code = 0x10000 + ((high - 0xD800) << 10) + low - 0xDC00
            return ((code, code),)
        if match := self._match(_HEX):
            code = int(next(filter(None, match.groups())), 16)
            if code > 0x10FFFF:
                self.fail(f"no character has the number {code:#x}", start)
            return ((code, code),)
        if match := self._match(_PROPERTY):
            ranges = characters.category(match[2] or match[3])
            if ranges is None:
                self.unsupported(f"the Unicode property {match.group()!r}", start)
            is_negative = match.group().startswith("P") != bool(match[1])
            return characters.complement(ranges) if is_negative else ranges
        if match := self._match(re.compile("c([A-Za-z])")):
            code = ord(match[1]) % 32
            return ((code, code),)
        if match := self._match(re.compile("0[0-7]{0,2}")):
            code = int(match.group(), 8)
            return ((code, code),)
        character = self.pattern[self.position : self.position + 1]
        self.position += 1
        if character.lower() in _CLASSES:
            return self._named_class(character)
        if character in _CONTROLS:
            return ((_CONTROLS[character], _CONTROLS[character]),)
        if character == "":
            self.fail("nothing follows the \\", start)
        if character.isdigit() or character == "k":
            self.unsupported("a back-reference", start)
        if character.isascii() and character.isalpha():
            self.fail(f"unknown escape \\{character}", start)
        return ((ord(character), ord(character)),)

    def _class(self, start: int) -> Ranges:
        """Return the characters of a class after its opening bracket."""
        is_negative = self._take("^")
        with self._complement(is_negative):
            found = characters.ranges_of(self._class_items(start))
        return characters.complement(found) if is_negative else found

    def _class_items(self, start: int) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        is_first = True
        while True:
            if self.position >= len(self.pattern):
                self.fail("the class [ is not closed", start)
            # As in Python, ] is an ordinary character at the start of a class.
            if self._peek("]") and not (
                is_first and "]" in self.pattern[self.position + 1 :]
            ):
                self.position += 1
                break
            is_first = False
            at = self.position
            first = self._class_item()
            is_range = self._peek("-") and not self._peek("-]")
            if is_range and len(first) == 1 and first[0][0] == first[0][1]:
                self.position += 1
                if self.position >= len(self.pattern):
                    self.fail("the class [ is not closed", start)
                last = self._class_item()
                if len(last) == 1 and last[0][0] == last[0][1]:
                    if last[0][0] < first[0][0]:
                        self.fail("bad character range", at)
                    first = ((first[0][0], last[0][0]),)
                else:  # a class after -: both are single items
                    first = (*first, (0x2D, 0x2D), *last)
            ranges += first
        return ranges

    def _class_item(self) -> Ranges:
        start = self.position
        if match := self._match(_POSIX):
            if match[2] not in characters.POSIX:
                self.fail(f"unknown class {match.group()}", start)
            ranges = characters.POSIX[match[2]]
            return characters.complement(ranges) if match[1] else ranges
        self.position += 1
        character = self.pattern[start]
        if character != "\\":
            return ((ord(character), ord(character)),)
        if self._take("b"):  # backspace within a class
            return ((8, 8),)
        return self._escape(start)
