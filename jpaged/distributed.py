"""Distributed: the processes of several hosts, joined before anything runs.

Place on the road: the same script on every host -> [distributed] -> make_mesh.

JAX's own distributed runtime does all of it; what is added: a short time limit, and
a check that all processes were started alike, since every one computes the schedule
for itself and differing flags would part them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils


def initialize(
    options: Mapping[str, Any] | None = None,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 120,
) -> None:
    """Joins this process to the others; call it before any other use of JAX.

    Without an address, JPAGED_COORDINATOR, JPAGED_NUM_PROCESSES and JPAGED_PROCESS_ID
    of the environment say who is who; without those, JAX finds the processes by itself,
    on Slurm, Open MPI, TPU pods and Kubernetes. On CPUs, collectives go over gloo.

    Args:
      options: what must be the same in all processes, such as the script's flags; of
        what JSON can hold. None: nothing is compared.
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      timeout_s: seconds to wait for all to arrive.

    Raises:
      ValueError: only some of address, number and id are given, one is out of range,
        or processes were started with different options.
      RuntimeError: JAX was used or initialised before, or finds no cluster.

    JAX aborts process 0, with DEADLINE_EXCEEDED, where another has not arrived in time.
    """
    if coordinator_address is None and "JPAGED_COORDINATOR" in os.environ:
        coordinator_address = os.environ["JPAGED_COORDINATOR"]
        num_processes = int(os.environ["JPAGED_NUM_PROCESSES"])
        process_id = int(os.environ["JPAGED_PROCESS_ID"])
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{missing[0]}: wanted all of {', '.join(given)} or none, got "
            f"{', '.join(name for name in given if name not in missing)} only"
        )
    if num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id: wanted 0 to {num_processes - 1}, got {process_id}"
            )
    if timeout_s < 1:
        raise ValueError(f"timeout_s: wanted at least 1, got {timeout_s}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=timeout_s,
        heartbeat_timeout_seconds=max(10, timeout_s),
    )
    if options is not None:
        check_alike(options)


def check_alike(options: Mapping[str, Any]) -> None:
    """Raises ValueError, in every process, where their options differ.

    Processes are named whose options are not those of process 0.
    """
    text = json.dumps(options, sort_keys=True)
    digest = hashlib.sha256(text.encode()).digest()
    every = multihost_utils.process_allgather(
        jax.numpy.asarray(list(digest), jax.numpy.uint8)
    ).reshape(-1, len(digest))
    others = [n for n, each in enumerate(every) if (each != every[0]).any()]
    if others:
        raise ValueError(
            "options: wanted the same in all processes, got others than process 0's "
            f"in {', '.join(f'process {n}' for n in others)}; this is process "
            f"{jax.process_index()}, started with {text}"
        )
