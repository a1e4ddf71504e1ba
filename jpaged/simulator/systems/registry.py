"""Registry: systems by name, built for a workload and a memory.

Pipeline: names in flags -> [registry] -> system.

A new system is one module with its `ENTRIES`, and one line here.
"""

from __future__ import annotations

from typing import Any

from jpaged.simulator.systems import (
    contiguous,
    engine_entries,
    fastertransformer,
    no_evict,
    orca,
)
from jpaged.simulator.systems.base import System, SystemEntry
from jpaged.simulator.workloads.workload import Workload

SYSTEMS: dict[str, SystemEntry] = {
    entry.name: entry
    for entry in (
        *engine_entries.ENTRIES,
        *orca.ENTRIES,
        *fastertransformer.ENTRIES,
        *contiguous.ENTRIES,
        *no_evict.ENTRIES,
    )
}


def find_system(name: str, workload: Workload, num_slots: int, **sizes: Any) -> System:
    """Build the system of a name.

    Args:
      name: a key of `SYSTEMS`.
      workload: the requests that it will serve.
      num_slots: tokens whose keys and values fit into the memory.
      **sizes: `max_num_seqs`, and for the engine what `make_engine_system` accepts.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name].build(workload, num_slots, **sizes)
