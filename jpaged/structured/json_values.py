"""JSON values: the regexes of their texts.

Pipeline: [structured.json_values] -> json_schema. Host only.

Alternatives in a regex are in parentheses, so that regexes can be concatenated.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

ANY_DEPTH = 2  # levels of objects and arrays in a value without a schema
PLAIN = r'[^"\\\x00-\x1f]'  # a character that needs no escape in a string
CHARACTER = rf'(?:{PLAIN}|\\["\\/bfnrt])'
STRING = f'"{CHARACTER}*"'
INTEGER = r"-?(?:0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
COMMA, COLON = ", ?", ": ?"

_MONTH_AND_DAY = (
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_DATE = f"[1-9][0-9]{{3}}-{_MONTH_AND_DAY}"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = "[0-9a-f]"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
}


def any_of(regexes: Iterable[str]) -> str:
    """Return the regex that matches what any of `regexes` matches."""
    regexes = list(dict.fromkeys(regexes))
    return regexes[0] if len(regexes) == 1 else f"(?:{'|'.join(regexes)})"


def literal(value: Any, where: str) -> str:
    """Return the regex of exactly one value."""
    if isinstance(value, Mapping):
        members = (
            (literal(name, where) + COLON + literal(part, where), True)
            for name, part in value.items()
        )
        return object_of(members)
    if isinstance(value, list):
        return rf"\[{COMMA.join(literal(part, where) for part in value)}\]"
    try:
        return re.escape(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected a JSON value, got {value!r}") from error


def object_of(members: Iterable[tuple[str, bool]]) -> str:
    """Return the regex of objects with members (regex, is_required) in this order."""
    # From the last member to the first: `first` is the rest of the object if no member
    # has been written yet, `after` the rest if one has.
    first = after = ""
    for member, is_required in reversed(list(members)):
        if is_required:
            first = member + after
            after = COMMA + member + after
        else:
            rest = f"|{first}" if first else "|"
            first = f"(?:{member}{after}{rest})"
            after = f"(?:{COMMA}{member})?{after}"
    return rf"\{{{first}\}}"


def free_object(value: str) -> str:
    """Return the regex of objects with any names and with values that match `value`."""
    member = f"{STRING}{COLON}{value}"
    return rf"\{{(?:{member}(?:{COMMA}{member})*)?\}}"


def anything(depth: int) -> str:
    """Return the regex of any value with up to `depth` levels of objects and arrays."""
    values = ["null", "true", "false", NUMBER, STRING]
    if depth:
        inner = anything(depth - 1)
        values.append(rf"\[(?:{inner}(?:{COMMA}{inner})*)?\]")
        values.append(free_object(inner))
    return any_of(values)


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
    return any_of(parts)


def _between(low: str, high: str) -> str:
    """Return the regex of numbers from `low` to `high`, which have equal lengths."""
    num_digits = len(low)
    if not num_digits:
        return ""
    if low == "0" * num_digits and high == "9" * num_digits:
        return f"[0-9]{{{num_digits}}}"
    if low[0] == high[0]:
        return low[0] + _between(low[1:], high[1:])
    nines, zeros = "9" * (num_digits - 1), "0" * (num_digits - 1)
    parts = [low[0] + _between(low[1:], nines), high[0] + _between(zeros, high[1:])]
    if int(high[0]) - int(low[0]) > 1:
        middle = f"[{int(low[0]) + 1}-{int(high[0]) - 1}]"
        parts.append(f"{middle}[0-9]{{{num_digits - 1}}}")
    return any_of(parts)
