"""Cost entry: the registry record of a cost model, and the machine it is built for.

Pipeline: model and chip -> [machine] -> cost entry -> cost model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.load import CostModel
from jpaged.simulator.costs.served_models import ServedModel
from jpaged.simulator.options import Option


@dataclasses.dataclass(frozen=True)
class Machine:
    """A model on its chips."""

    model: ServedModel
    chip: Chip
    num_chips: int = 1  # tensor parallelism


@dataclasses.dataclass(frozen=True)
class CostEntry:
    """A cost model in the registry.

    Attributes:
      name: as in flags.
      build: `build(machine, **options)` returns the cost model.
      options: settings that a runner offers as flags, by the keywords of `build`.
    """

    name: str
    build: Callable[..., CostModel]
    options: tuple[Option, ...]
