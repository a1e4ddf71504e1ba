"""Distributed: connects the processes of several hosts before anything runs.

Pipeline: the same script on every host -> [distributed] -> make_mesh.

JAX's own distributed runtime does the work. This module adds a short time limit and
checks that all processes were started with the same options and make the same calls.
Every process computes the schedule for itself, so any difference would make the
schedules diverge.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def initialize(
    options: Mapping[str, Any] | None = None,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 120,
) -> None:
    """Connect this process to the others; call it before any other use of JAX.

    Without an address, the environment variables JPAGED_COORDINATOR,
    JPAGED_NUM_PROCESSES and JPAGED_PROCESS_ID are used. Without those, JAX finds the
    processes itself, on Slurm, Open MPI, TPU pods and Kubernetes. On CPUs, collectives
    use gloo.

    Args:
      options: what must be equal in all processes, such as the script's flags; None:
        nothing is compared.
      coordinator_address: HOST:PORT of process 0.
      num_processes: the number of processes.
      process_id: this process's number, from 0.
      timeout_s: seconds to wait until all processes have connected.

    Raises:
      ValueError: only some of address, number and id are given, one is out of range,
        or processes were started with different options.
      RuntimeError: JAX was used or initialised before, or finds no cluster.

    If a process does not connect in time, JAX aborts process 0 with DEADLINE_EXCEEDED.
    """
    if coordinator_address is None and "JPAGED_COORDINATOR" in os.environ:
        coordinator_address = os.environ["JPAGED_COORDINATOR"]
        num_processes = int(os.environ["JPAGED_NUM_PROCESSES"])
        process_id = int(os.environ["JPAGED_PROCESS_ID"])
    _check_address(coordinator_address, num_processes, process_id)
    if timeout_s < 1:
        raise ValueError(f"timeout_s: expected at least 1, got {timeout_s}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=timeout_s,
        heartbeat_timeout_seconds=max(10, timeout_s),
    )
    if options is not None:
        check_same_options(options)


def _check_address(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{missing[0]}: expected all of {', '.join(given)} or none, got "
            f"{', '.join(name for name in given if name not in missing)} only"
        )
    if num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id: expected 0 to {num_processes - 1}, got {process_id}"
            )


def is_shared(mesh: Mesh | None) -> bool:
    """Return whether a mesh has devices of several processes."""
    return mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1


def min_over_processes(number: int) -> int:
    """Return the smallest of all processes' numbers; every process must call it.

    Numbers are from 0 to 2 ** 63 - 1.
    """
    return min(_gather_numbers(number))


def number_of_process_0(number: int) -> int:
    """Return process 0's number, within the same range; every process must call it."""
    return _gather_numbers(number)[0]


def check_same_options(options: Mapping[str, Any]) -> None:
    """Check that all processes have the same options; every process must call it.

    Raises:
      ValueError: in every process, if options differ. The message names the options
        and the processes that differ from process 0.
    """
    names = sorted(options)
    if _differing([_digest(names)]):
        raise ValueError(
            "options: expected the same names in all processes, got others in some; "
            f"this is process {jax.process_index()}, which has {', '.join(names)}"
        )
    differing = _differing([_digest(options[name]) for name in names])
    if differing:
        wrong = {names[number]: where for number, where in differing.items()}
        mine = ", ".join(f"{name}={options[name]!r}" for name in wrong)
        raise ValueError(_difference(wrong, f"which has {mine}"))


class CallDigests:
    """Digests of the calls that this process received, to compare with the others.

    Calls have kinds. For each kind there is one digest, of all its calls in order.
    """

    def __init__(self, *kinds: str):
        self._digests = {kind: b"" for kind in kinds}

    def note(self, kind: str, what: Any) -> None:
        """Add a call or its arguments to the digest of a kind."""
        self._digests[kind] = _digest((self._digests[kind].hex(), what))

    def check(self) -> None:
        """Check that all processes received the same calls.

        Every process must call it, at the same points.

        Raises:
          ValueError: in every process, if calls differ. The message names the kinds and
            the processes that differ from process 0.
        """
        kinds = list(self._digests)
        differing = _differing([_digest(self._digests[kind].hex()) for kind in kinds])
        if differing:
            wrong = {kinds[number]: where for number, where in differing.items()}
            raise ValueError(
                _difference(wrong, "and all must make the same calls in the same order")
            )


def _digest(what: Any) -> bytes:
    """Return the digest of an object's repr, without memory addresses."""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(what))
    return hashlib.sha256(text.encode()).digest()


def _difference(wrong: Mapping[str, Sequence[int]], more: str) -> str:
    numbers = sorted({number for where in wrong.values() for number in where})
    return (
        f"{', '.join(wrong)}: expected the same in all processes, got values other "
        f"than process 0's in {', '.join(f'process {number}' for number in numbers)}; "
        f"this is process {jax.process_index()}, {more}"
    )


def _differing(digests: Sequence[bytes]) -> dict[int, list[int]]:
    """Return the indices of digests that differ from process 0's, and the processes."""
    every = _gather_bytes(np.frombuffer(b"".join(digests), np.uint8))
    every = every.reshape(len(every), len(digests), -1)
    is_other = (every != every[0]).any(axis=-1)
    return {
        number: np.flatnonzero(column).tolist()
        for number, column in enumerate(is_other.T)
        if column.any()
    }


def _gather_numbers(number: int) -> list[int]:
    """Return all processes' numbers, sent as bytes: JAX's integers have 32 bits."""
    every = _gather_bytes(np.frombuffer(number.to_bytes(8), np.uint8))
    return [int.from_bytes(each.tobytes()) for each in every]


def _gather_bytes(mine: np.ndarray) -> np.ndarray:
    """Return u8[processes, n] of each process's u8[n]."""
    every = multihost_utils.process_allgather(mine)
    return np.asarray(every).reshape(-1, mine.size)
