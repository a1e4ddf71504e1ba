"""Parameters of users' functions: numbers and arrays that are data of a request.

Pipeline: user -> [parameters] -> request table. Host only.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jpaged.validation import error, finite_number

Specs = tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype of each


class Range(NamedTuple):
    """Allowed values of a number, or of each element of an array."""

    low: float = -math.inf
    high: float = math.inf
    above: float | None = None  # exclusive lower limit

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, which names the number, if a value is out of range.

        Value and limits are compared as float32, as programs compute: 1e-50 becomes 0,
        which is not above 0.

        Args:
          name: of the number, for the message.
          value: a number, or an array of them.
        """
        try:
            with np.errstate(over="ignore"):  # infinite numbers are refused below
                found = np.asarray(value).astype(np.float32)
                low, high = np.float32(self.low), np.float32(self.high)
        except (TypeError, ValueError):
            raise error(name, self._expected(), value) from None
        is_allowed = np.isfinite(found) & (found >= low) & (found <= high)
        if self.above is not None:
            is_allowed &= found > np.float32(self.above)
        if np.asarray(value).dtype.kind not in "iufV" or not is_allowed.all():
            raise error(name, self._expected(), value)

    def _expected(self) -> str:
        return finite_number(self.low, self.high, self.above)


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
