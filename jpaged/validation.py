"""Checks of argument values: each returns the value in one form, or raises ValueError.

All messages have the form `NAME: expected ..., got VALUE (TYPE)`. Host only.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any


def error(name: str, expected: str, got: Any) -> ValueError:
    """Return the ValueError for an argument that has a wrong value.

    >>> print(error("top_k", "an integer", "many"))
    top_k: expected an integer, got 'many' (str)
    """
    return ValueError(
        f"{name}: expected {expected}, got {got!r:.200} ({type(got).__name__})"
    )


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None
) -> int:
    """Return `value` as int if it is an integer in [low, high]; bool is refused."""
    expected = "an integer"
    if low is not None:
        expected += f" of at least {low}"
    if high is not None:
        expected += f" and at most {high}" if low is not None else f" of at most {high}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise error(name, expected, value)
    found = int(value)
    if (low is not None and found < low) or (high is not None and found > high):
        raise error(name, expected, value)
    return found


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
) -> float:
    """Return `value` as float if it is finite, in [low, high] and above `above`."""
    limits = []
    if above is not None:
        limits.append(f"above {above:g}")
    if low > -math.inf:
        limits.append(f"of at least {low:g}")
    if high < math.inf:
        limits.append(f"at most {high:g}" if limits else f"of at most {high:g}")
    expected = " ".join(["a finite number", " and ".join(limits)]).rstrip()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise error(name, expected, value)
    found = float(value)
    is_above = above is None or found > above
    if not math.isfinite(found) or not low <= found <= high or not is_above:
        raise error(name, expected, value)
    return found


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise error(name, "True or False", value)
    return value


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return `value` if it is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise error(name, f"one of {choices}", value)
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return a sequence of token ids as a tuple of int."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise error(name, "a sequence of token ids", value)
    return tuple(integer(f"{name}[{i}]", token, low=0) for i, token in enumerate(value))


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Return one string or several as a tuple; empty strings are refused."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise error(name, "a string or a sequence of strings", value)
    found = tuple(value)
    for i, string in enumerate(found):
        if not isinstance(string, str) or not string:
            raise error(f"{name}[{i}]", "a string that is not empty", string)
    return found


def text(name: str, value: Any) -> str:
    """Return `value` if it is a string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise error(name, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise error(name, "text without lone surrogates", value) from None
    return value
