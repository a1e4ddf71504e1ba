"""Names of test cases that are the same in every process."""

import re


def stable_repr(value: object) -> str:
    """Return `repr(value)` without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
