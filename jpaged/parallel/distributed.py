"""Distributed: the processes of several hosts, joined before anything runs.

Place on the road: the same script on every host -> [distributed] -> make_mesh.

JAX's own distributed runtime does all of it; what is added: a short time limit, and
checks that all processes were started alike and are asked the same, since every one
computes the schedule for itself and whatever differs would part them.
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
    """Joins this process to the others; call it before any other use of JAX.

    Without an address, JPAGED_COORDINATOR, JPAGED_NUM_PROCESSES and JPAGED_PROCESS_ID
    of the environment say who is who; without those, JAX finds the processes by itself,
    on Slurm, Open MPI, TPU pods and Kubernetes. On CPUs, collectives go over gloo.

    Args:
      options: what must be the same in all processes, such as the script's flags.
        None: nothing is compared.
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


def is_shared(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1


def least(number: int) -> int:
    """The least of all processes' numbers, from 0 up to 2 ** 63 - 1; each calls it."""
    return min(_numbers(number))


def first(number: int) -> int:
    """Process 0's number, within the same limits; each calls it."""
    return _numbers(number)[0]


def check_alike(options: Mapping[str, Any]) -> None:
    """Raises ValueError, in every process, where their options differ.

    It names what differs from process 0's, and in which processes.
    """
    names = sorted(options)
    if _differing([_digest(names)]):
        raise ValueError(
            "options: wanted the same names in all processes, got others in some; this "
            f"is process {jax.process_index()}, which has {', '.join(names)}"
        )
    differing = _differing([_digest(options[name]) for name in names])
    if differing:
        wrong = {names[number]: where for number, where in differing.items()}
        mine = ", ".join(f"{name}={options[name]!r}" for name in wrong)
        raise ValueError(_difference(wrong, f"which has {mine}"))


class Asked:
    """What a process is asked, to be compared with what the others are asked.

    Of each kind it keeps one digest, of all that was noted in turn.
    """

    def __init__(self, *kinds: str):
        self._digests = {kind: b"" for kind in kinds}

    def note(self, kind: str, what: Any) -> None:
        """Adds something to what was asked."""
        self._digests[kind] = _digest((self._digests[kind].hex(), what))

    def check(self) -> None:
        """Raises ValueError, in every process, where they were asked different things.

        Each calls it at the same points; it names the kinds and the processes.
        """
        kinds = list(self._digests)
        differing = _differing([_digest(self._digests[kind].hex()) for kind in kinds])
        if differing:
            wrong = {kinds[number]: where for number, where in differing.items()}
            raise ValueError(
                _difference(wrong, "and all have to make the same calls in one order")
            )


def _digest(what: Any) -> bytes:
    """Of its repr; where something lies in memory is no part of it."""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(what))
    return hashlib.sha256(text.encode()).digest()


def _difference(wrong: Mapping[str, Sequence[int]], more: str) -> str:
    numbers = sorted({number for where in wrong.values() for number in where})
    return (
        f"{', '.join(wrong)}: wanted the same in all processes, got others than "
        f"process 0's in {', '.join(f'process {number}' for number in numbers)}; this "
        f"is process {jax.process_index()}, {more}"
    )


def _differing(digests: Sequence[bytes]) -> dict[int, list[int]]:
    """Which of the digests are not process 0's, and in which processes."""
    every = _gathered(np.frombuffer(b"".join(digests), np.uint8))
    every = every.reshape(len(every), len(digests), -1)
    is_other = (every != every[0]).any(axis=-1)
    return {
        number: np.flatnonzero(column).tolist()
        for number, column in enumerate(is_other.T)
        if column.any()
    }


def _numbers(number: int) -> list[int]:
    """All processes' numbers; as bytes, for JAX's integers have 32 bits."""
    every = _gathered(np.frombuffer(number.to_bytes(8), np.uint8))
    return [int.from_bytes(each.tobytes()) for each in every]


def _gathered(mine: np.ndarray) -> np.ndarray:
    """[processes, n] of each process's [n]."""
    every = multihost_utils.process_allgather(mine)
    return np.asarray(every).reshape(-1, mine.size)
