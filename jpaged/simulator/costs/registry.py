"""Registry: cost models by name, built for a machine.

Pipeline: names and options in flags -> [registry] -> cost model.

A new cost model is one module with its `ENTRY`, and one line here. Cost models that are
fitted to measurements (`fit`, `buckets`) are built in Python only.
"""

from __future__ import annotations

from typing import Any

from jpaged.simulator.costs import profiles, roofline, step_fits
from jpaged.simulator.costs.base import CostEntry, Machine
from jpaged.simulator.costs.load import CostModel

COST_MODELS: dict[str, CostEntry] = {
    entry.name: entry for entry in (roofline.ENTRY, step_fits.ENTRY, profiles.ENTRY)
}


def find_cost_model(name: str, machine: Machine, **options: Any) -> CostModel:
    """Build the cost model of a name.

    Args:
      name: a key of `COST_MODELS`.
      machine: the model and its chips.
      **options: values of the entry's options.

    Raises:
      FileNotFoundError: a file of the options does not exist.
      ValueError: the name is unknown, and the message lists the known ones; or as the
        entry's `build`.
    """
    if name not in COST_MODELS:
        raise ValueError(
            f"cost_model: expected one of {', '.join(COST_MODELS)}, got {name!r}"
        )
    return COST_MODELS[name].build(machine, **options)
