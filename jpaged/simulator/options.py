"""Options: the settings of a registry entry, which runners offer as flags.

Pipeline: registry entry -> [options] -> flags of a runner -> entry's `build`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a system or of a cost model.

    Attributes:
      name: keyword of the setting, and name of its flag.
      kind: type of its value; "floats" is a list of numbers.
      help: one line for `--help`, with the meaning of an omitted value.
      choices: the values that a "str" may have; empty: any.
      minimum: the smallest allowed number; None: any.
    """

    name: str
    kind: Literal["str", "int", "float", "bool", "floats"]
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
