"""Checks of argument values: each returns the value in one form, or raises ValueError.

All messages have the form `NAME: expected ..., got VALUE (TYPE)`. Host only.
"""

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

LARGEST_INT32 = 2**31 - 1  # integers of requests are int32 on the device
_MAX_BITS = 256  # of any integer; Python does not print those of thousands of digits


def error(name: str, expected: str, got: Any) -> ValueError:
    """Return the ValueError for an argument that has a wrong value.

    >>> print(error("top_k", "an integer", "many"))
    top_k: expected an integer, got 'many' (str)
    """
    try:
        shown = f"{got!r:.200}"
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = "a value that cannot be printed"
    return ValueError(f"{name}: expected {expected}, got {shown} ({_kind(got)})")


def _kind(value: Any) -> str:
    """Return the name of a value's type."""
    return type(value).__name__


def _is_scalar(value: Any, kinds: str) -> bool:
    """Whether `value` is a NumPy, JAX or torch scalar whose dtype begins so."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return getattr(value, "shape", None) == () and dtype.startswith(
        tuple(kinds.split())
    )


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None
) -> int:
    """Return `value` as int if it is an integer in [low, high]; bool is refused.

    NumPy and JAX scalars are integers if their dtype is.
    """
    expected = "an integer"
    if low is not None:
        expected += f" of at least {low}"
    if high is not None:
        expected += f" and at most {high}" if low is not None else f" of at most {high}"
    try:
        found = operator.index(value)
    except TypeError:
        raise error(name, expected, value) from None
    is_bool = isinstance(value, bool) or _is_scalar(value, "bool")
    if is_bool or found.bit_length() > _MAX_BITS:
        raise error(name, expected, value)
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
    expected = finite_number(low, high, above)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and not _is_scalar(value, "float bfloat int uint"):
        raise error(name, expected, value)
    try:
        found = float(value)
    except OverflowError:  # an int beyond the range of floats
        raise error(name, expected, value) from None
    is_above = above is None or found > above
    if not math.isfinite(found) or not low <= found <= high or not is_above:
        raise error(name, expected, value)
    return found


def finite_number(low: float, high: float, above: float | None) -> str:
    """Return what is expected of a number, for a message."""
    limits = []
    if above is not None:
        limits.append(f"above {above:g}")
    if low > -math.inf:
        limits.append(f"of at least {low:g}")
    if high < math.inf:
        limits.append(f"at most {high:g}" if limits else f"of at most {high:g}")
    return " ".join(["a finite number", " and ".join(limits)]).rstrip()


def flag(name: str, value: Any) -> bool:
    """Return `value` as bool if it is True or False, also of NumPy or JAX."""
    if not isinstance(value, bool) and not _is_scalar(value, "bool"):
        raise error(name, "True or False", value)
    return bool(value)


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return `value` if it is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise error(name, f"one of {choices}", value)
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return a sequence of token ids as a tuple of int."""
    tokens = items(name, value, "a sequence of token ids")
    return tuple(
        integer(f"{name}[{i}]", token, low=0, high=LARGEST_INT32)
        for i, token in enumerate(tokens)
    )


def items(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    """Return the items of a sequence that is neither text nor bytes nor a mapping."""
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        raise error(name, expected, value)
    try:
        return tuple(value)
    except TypeError:  # not iterable, or an array without axes
        raise error(name, expected, value) from None


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Return one string or several as a tuple; empty strings are refused."""
    if isinstance(value, str):
        value = (value,)
    found = items(name, value, "a string or a sequence of strings")
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
