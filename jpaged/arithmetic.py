"""Integer arithmetic for Python numbers and arrays."""

from typing import Any


def cdiv(dividend: Any, divisor: Any) -> Any:
    """Divide integers, rounding up.

    Args:
      dividend: int or integer array.
      divisor: positive int or integer array.

    Returns:
      The smallest integer that is at least `dividend / divisor`, of the operands' type.

    >>> cdiv(7, 4), cdiv(8, 4)
    (2, 2)
    """
    return -(-dividend // divisor)
