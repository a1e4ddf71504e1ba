r"""JSON numbers: automata of the texts of numbers.

Pipeline: json_shapes -> [structured.json_numbers] -> json_schema. Host only.

Bounded numbers can have fewer texts than the standard allows, never more.
"""

import functools
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from jpaged.structured import byte_automata
from jpaged.structured.byte_automata import NUM_BYTES, ByteAutomaton, minimised
from jpaged.structured.minimisation import DEAD
from jpaged.structured.regex import from_regex

_INTEGER = r"-?(?:0|[1-9][0-9]*)"
_NUMBER = rf"{_INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}})?"
_MAX_DIVISOR = 4000
_MOST_DIGITS = 30  # of a bound; a larger bound is replaced by this many nines
_PRECISION = 15  # digits that a 64-bit float represents


def _any_of(regexes: Iterable[str]) -> str:
    return f"(?:{'|'.join(dict.fromkeys(regexes))})"


def integers_between(low: int, high: int | None) -> str:
    """Return the regex of the integers from `low` >= 0 to `high`; None is no bound."""
    longest = len(str(low if high is None else high))
    parts = []
    for num_digits in range(len(str(low)), longest + 1):
        first = max(low, 10 ** (num_digits - 1) if num_digits > 1 else 0)
        last = 10**num_digits - 1 if high is None else min(high, 10**num_digits - 1)
        parts.append(_between(str(first), str(last)))
    if high is None:
        parts.append(f"[1-9][0-9]{{{longest},}}")
    return _any_of(parts)


def _between(low: str, high: str) -> str:
    """Return the regex of numbers from `low` to `high`, which have equal lengths."""
    num_digits = len(low)
    if low == "0" * num_digits and high == "9" * num_digits:
        return f"[0-9]{{{num_digits}}}"
    if low[0] == high[0]:
        return low[0] + _between(low[1:], high[1:])
    nines, zeros = "9" * (num_digits - 1), "0" * (num_digits - 1)
    parts = [low[0] + _between(low[1:], nines), high[0] + _between(zeros, high[1:])]
    if int(high[0]) - int(low[0]) > 1:
        middle = f"[{int(low[0]) + 1}-{int(high[0]) - 1}]"
        parts.append(f"{middle}[0-9]{{{num_digits - 1}}}")
    return _any_of(parts)


Bound = tuple[Fraction, bool]  # a number, and whether it is excluded


@functools.lru_cache(maxsize=48)
def numbers(
    is_integer: bool,
    low: Bound | None = None,
    high: Bound | None = None,
    divisors: frozenset[Fraction] = frozenset(),
    non_divisors: frozenset[Fraction] = frozenset(),
    excluded: frozenset[Fraction] = frozenset(),
) -> ByteAutomaton | None:
    """Return the automaton of the texts of numbers, or None if there are none.

    Raises:
        ValueError: a divisor has too many digits.
    """
    low, high = _moderate(low, -1), _moderate(high, 1)
    if low is None and high is None and not (divisors | non_divisors | excluded):
        return from_regex(_INTEGER if is_integer else _NUMBER)
    if is_integer:
        regex = _integers(low, high)
        if regex is None:
            return None
        found = from_regex(regex)
    else:
        found = _decimals(low, high)
    for divisor in divisors:
        found = byte_automata.intersection(found, _multiples(divisor))
    for divisor in non_divisors:
        found = byte_automata.intersection(found, _non_multiples(divisor))
    for number in excluded:
        found = byte_automata.difference(found, from_regex(_texts_of(number)))
    return None if found.is_empty else found


def _moderate(bound: Bound | None, sign: int) -> Bound | None:
    """Return the bound, or one nearer to 0 if it has too many digits."""
    most = 10**_MOST_DIGITS - 1
    if bound is None or sign * bound[0] <= most:
        return bound
    return Fraction(sign * most), False


def _integers(low: Bound | None, high: Bound | None) -> str | None:
    least = (
        None if low is None else math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])
    )
    most = (
        None
        if high is None
        else math.ceil(high[0]) - 1
        if high[1]
        else math.floor(high[0])
    )
    if least is not None and most is not None and least > most:
        return None
    parts = []
    if least is None or least < 0:
        first = 1 if most is None else max(1, -most)
        parts.append(f"-{integers_between(first, None if least is None else -least)}")
    if most is None or most >= 0:
        parts.append(integers_between(max(0, least or 0), most))
    return _any_of(parts)


def _decimals(low: Bound | None, high: Bound | None) -> ByteAutomaton:
    """Return the automaton of decimal numbers without exponent within the bounds."""
    parts = []
    if high is None or high[0] > 0 or high == (0, False):
        parts.append(_magnitudes("", low if low and low[0] >= 0 else None, high))
    if low is None or low[0] < 0:
        least = (-high[0], high[1]) if high and high[0] <= 0 else None
        parts.append(_magnitudes("-", least, (-low[0], low[1]) if low else None))
    return functools.reduce(byte_automata.union, parts)


def _magnitudes(sign: str, low: Bound | None, high: Bound | None) -> ByteAutomaton:
    """Return the automaton of `sign` and decimals from `low` >= 0 to `high` >= 0."""
    bounds = [_expanded(bound) for bound in (low, high) if bound]
    num_decimals = _PRECISION - max(
        (len(str(whole)) for whole, _ in bounds), default=10
    )
    num_decimals = max(1, num_decimals, *(len(digits) for _, digits in bounds))
    some = rf"(?:\.[0-9]{{1,{num_decimals}}})?"
    regexes = [f"(?:0|[1-9][0-9]*){some}"]
    if low:
        whole, digits = _expanded(low)
        above = f"{integers_between(whole + 1, None)}{some}"
        regexes.append(f"{above}|{whole}{_above(digits, low[1])}")
    if high:
        whole, digits = _expanded(high)
        parts = [f"{integers_between(0, whole - 1)}{some}"] if whole else []
        if digits or not high[1]:
            parts.append(f"{whole}{_below(digits, high[1])}")
        regexes.append(_any_of(parts or ["[^\\s\\S]"]))
    automata = [
        from_regex(f"{sign}(?:{regex})", may_be_empty=True) for regex in regexes
    ]
    return functools.reduce(byte_automata.intersection, automata)


def _expanded(bound: Bound) -> tuple[int, str]:
    """Return the integer and the digits of the fraction of a bound of at least 0."""
    whole = math.floor(bound[0])
    rest, digits = bound[0] - whole, ""
    while rest and len(digits) < 2 * _MOST_DIGITS:
        rest *= 10
        digits += str(math.floor(rest))
        rest -= math.floor(rest)
    return whole, digits


def _above(digits: str, is_open: bool) -> str:
    """Return the regex of fractions >= `digits`, or > `digits` if `is_open`."""
    parts = [rf"\.{digits}[0-9]*[1-9][0-9]*"] if is_open else []
    if not is_open:
        parts += [rf"\.{digits}[0-9]*"] if digits else ["", r"\.[0-9]+"]
    for i, digit in enumerate(digits):
        if digit != "9":
            parts.append(rf"\.{digits[:i]}[{int(digit) + 1}-9][0-9]*")
    return _any_of(parts)


def _below(digits: str, is_open: bool) -> str:
    """Return the regex of fractions <= `digits`, or < `digits` if `is_open`."""
    parts = [""]
    for i, digit in enumerate(digits):
        if i:
            parts.append(rf"\.{digits[:i]}")
        if digit != "0":
            parts.append(rf"\.{digits[:i]}[0-{int(digit) - 1}][0-9]*")
    if not is_open:
        parts.append(rf"\.{digits}0*" if digits else r"\.0+")
    return _any_of(parts)


def _multiples(divisor: Fraction) -> ByteAutomaton:
    """Return the automaton of decimal texts of multiples of `divisor`."""
    num_decimals = _num_decimals(divisor)
    found = byte_automata.intersection(
        from_regex(_INTEGER), _divisible(divisor.numerator)
    )
    if num_decimals:
        exact = from_regex(rf"{_INTEGER}\.[0-9]{{{num_decimals}}}")
        scaled = _divisible(int(divisor * 10**num_decimals))
        found = byte_automata.union(found, byte_automata.intersection(exact, scaled))
    return found


def _num_decimals(divisor: Fraction) -> int:
    num_decimals = 0
    while (divisor * 10**num_decimals).denominator != 1:
        num_decimals += 1
        if num_decimals > 12:
            raise ValueError(
                f"multipleOf: expected a decimal number, got {float(divisor)}"
            )
    return num_decimals


def _non_multiples(divisor: Fraction) -> ByteAutomaton:
    """Return the automaton of decimal texts of numbers that are not multiples.

    A text has as many decimals as the divisor, none, or more with a last one above 0.
    """
    multiples = _multiples(divisor)
    num_decimals = _num_decimals(divisor)
    exact = rf"(?:\.[0-9]{{{num_decimals}}})?" if num_decimals else ""
    longer = rf"\.[0-9]{{{num_decimals},}}[1-9]"
    texts = from_regex(rf"{_INTEGER}(?:{exact}|{longer})")
    return byte_automata.difference(texts, multiples)


def _divisible(divisor: int) -> ByteAutomaton:
    """Return the automaton of texts whose digits are a multiple of `divisor`."""
    if divisor > _MAX_DIVISOR:
        raise ValueError(
            f"multipleOf: expected at most {_MAX_DIVISOR} (times a power of ten for "
            f"decimals), got {divisor}"
        )
    rest = np.arange(divisor, dtype=np.int32)
    rows = np.full((divisor, NUM_BYTES), DEAD, np.int32)
    rows[:, [ord("-"), ord(".")]] = rest[:, None]
    for digit in range(10):
        rows[:, ord("0") + digit] = (rest * 10 + digit) % divisor
    return minimised(rows, rest == 0)


def _texts_of(number: Fraction) -> str:
    """Return the regex of the decimal texts of a number."""
    whole, digits = _expanded((abs(number), False))
    sign = "-" if number < 0 else "-?" if not number else ""
    return rf"{sign}{whole}\.{digits}0*" if digits else rf"{sign}{whole}(?:\.0+)?"
