r"""JSON texts: automata of the texts of strings.

Pipeline: json_shapes -> [structured.json_texts] -> json_schema. Host only.

Formats can have fewer texts than the standard allows, never more.
"""

import functools
import json
from collections.abc import Hashable
from typing import Any

import numpy as np

from jpaged.structured import byte_automata
from jpaged.structured.byte_automata import (
    NUM_BYTES,
    ByteAutomaton,
    from_choices,
    minimised,
)
from jpaged.structured.minimisation import DEAD
from jpaged.structured.regex import containing, from_regex

_ANY_STRING = r"[^\x00-\x08\x0b\x0e-\x1f]*"  # other controls have no short escape
_ESCAPES = {
    '"': '"',
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}

_MONTH_AND_DAY = (
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_DATE = f"[1-9][0-9]{{3}}-{_MONTH_AND_DAY}"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_HEX = "[0-9a-fA-F]"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        f"(?:{_GROUP}:){{1,7}}:",
        f":(?::{_GROUP}){{1,7}}",
        "::",
    ]
    + [f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{{n}}}" for n in range(1, 7)]
)
_LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,20}"  # "--" would need Punycode, as in "xn--"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,7}}"
_ATOM = "[A-Za-z0-9_+-]{1,30}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM})?@{_LABEL}(?:\.{_LABEL}){{1,3}}"
_UNIT = "[A-Za-z0-9._~!$&'()*+,;=-]"
_PATH = f"(?:/(?:{_UNIT}|[:@]|%{_HEX}{{2}})*)*"
_QUERY = (
    rf"(?:\?(?:{_UNIT}|[:@/?]|%{_HEX}{{2}})*)?(?:#(?:{_UNIT}|[:@/?]|%{_HEX}{{2}})*)?"
)
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*://{_HOST}(?::[0-9]{{1,4}})?{_PATH}{_QUERY}"
_DURATION = (
    "P(?:[0-9]{1,9}W|(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?"
    "|[0-9]{1,9}D)(?:T{time})?|T{time})"
).replace(
    "{time}",
    "(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)",
)
_POINTER = "(?:/(?:[^/~]|~[01])*)*"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uri": _URI,
    "iri": _URI,
    "uri-reference": f"(?:{_URI}|(?:/{_UNIT}+)+)",
    "iri-reference": f"(?:{_URI}|(?:/{_UNIT}+)+)",
    "uri-template": f"(?:{_URI}|(?:/{_UNIT}+)+)",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "regex": r"(?:[A-Za-z0-9 _-]|\\[dws.])*",
}


def text_of(value: Any) -> str:
    """Return the text of a scalar.

    Raises:
        ValueError: it is not a JSON value.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    has_surrogates = any(0xD800 <= ord(character) <= 0xDFFF for character in text)
    return json.dumps(value) if has_surrogates else text


@functools.lru_cache(maxsize=48)
def strings(
    least: int = 0,
    most: int | None = None,
    conditions: frozenset[tuple[str, str, bool]] = frozenset(),
    excluded: frozenset[str] = frozenset(),
    *,
    is_upper: bool = False,
) -> ByteAutomaton:
    """Return the automaton of the strings themselves, without quotes and escapes.

    Args:
        least: fewest characters.
        most: most characters; None is no limit.
        conditions: triples (kind, text, is_negated); the kind is "pattern" or "format".
        excluded: strings that are not allowed.
        is_upper: whether strings on which validators disagree are included.
    """
    found = None
    for kind, text, is_negated in sorted(conditions):
        if kind == "pattern":
            one = containing(text, is_wide=is_negated != is_upper)
        else:
            one = from_regex(FORMATS[text])
        if is_negated:
            found = byte_automata.difference(found or from_regex(_ANY_STRING), one)
        else:
            found = byte_automata.intersection(found, one) if found else one
    if least or most is not None or found is None:
        limits = (
            "*"
            if most is None and not least
            else f"{{{least},{'' if most is None else most}}}"
        )
        lengths = from_regex(_ANY_STRING[:-1] + limits)
        found = byte_automata.intersection(found, lengths) if found else lengths
    if excluded:
        found = byte_automata.difference(found, from_choices(sorted(excluded)))
    return found


@functools.lru_cache(maxsize=48)
def escaped(automaton: ByteAutomaton) -> ByteAutomaton:
    r"""Return the automaton of JSON texts, without quotes, of an automaton's strings.

    A character that must be escaped has its short escape; the others have none, except
    for \/.
    """
    plain = automaton.transitions
    num_states = automaton.num_states
    rows = np.full((2 * num_states, NUM_BYTES), DEAD, np.int32)
    rows[:num_states] = plain
    rows[:num_states, [*range(0x20), ord('"'), ord("\\")]] = DEAD
    for letter, character in _ESCAPES.items():
        rows[num_states:, ord(letter)] = plain[:, ord(character)]
    has_escape = (rows[num_states:] != DEAD).any(axis=1)
    after = np.arange(num_states, 2 * num_states)
    rows[:num_states, ord("\\")] = np.where(has_escape, after, DEAD)
    is_accepting = np.append(automaton.is_accepting, np.zeros(num_states, np.bool_))
    return minimised(rows, is_accepting)


def cache_key(value: Any) -> Hashable:
    """Return a key by which equal JSON values are equal, and true differs from 1."""
    if isinstance(value, dict):
        return "object", frozenset(
            (name, cache_key(part)) for name, part in value.items()
        )
    if isinstance(value, list):
        return "array", tuple(map(cache_key, value))
    return type(value).__name__ if isinstance(value, bool) else "value", value
