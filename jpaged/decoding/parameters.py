"""Parameters of users' functions: numbers and arrays that are data of a request.

Pipeline: user -> [parameters] -> request table. Host only.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jpaged.validation import error, number

Specs = tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype of each


class Range(NamedTuple):
    """The values that a number may have, or each element of an array."""

    low: float = -math.inf
    high: float = math.inf
    above: float | None = None  # a limit that is no value itself

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, which names the number, if a value is out of range.

        The float32 is checked that programs compute with: 1e-50 is not above 0.

        Args:
          name: of the number, for the message.
          value: a number, or an array of them.
        """
        with np.errstate(over="ignore"):  # infinite numbers are refused below
            found = np.asarray(value, np.float32)
        for one in found.reshape(-1):
            try:
                number(name, float(one), self.low, self.high, above=self.above)
            except ValueError as cause:
                expected = str(cause).split(": expected ")[1].split(", got ")[0]
                raise error(name, expected, value) from None


ANY_NUMBER = Range()


def as_parameters(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns numbers or arrays by name as arrays, sorted by name.

    Python's int, float and bool become int32, float32 and bool, as do wider arrays.

    Raises:
      ValueError: A value is no finite number and no array of them.
    """
    return {name: _array(name, value) for name, value in sorted(values.items())}


def specs_of(values: Mapping[str, np.ndarray]) -> Specs:
    """Returns what is compiled of parameters: everything but their values."""
    return tuple((name, x.shape, x.dtype.name) for name, x in values.items())


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        elif array.dtype.kind in "iu" and array.dtype != np.uint32:
            if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
                raise OverflowError
            array = array.astype(np.int32)
    except (TypeError, ValueError, OverflowError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(
            f"parameter {name}: expected a finite number or an array of them, got "
            f"{value!r:.200} ({type(value).__name__})"
        )
    return array
