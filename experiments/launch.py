r"""Starts N processes on this machine that act as N hosts, to try a multi-host script.

    python -m experiments.launch --processes 2 --devices_per_process 2 -- \
        python -m your_script --its_flags

Each process has its own virtual CPU devices, and the variables JPAGED_COORDINATOR (host
and port), JPAGED_NUM_PROCESSES and JPAGED_PROCESS_ID for
`jpaged.parallel.distributed.initialize`. Each line that a process prints is printed
after the number of the process. The first process that fails stops all the others, and
`--timeout` stops all that are still running. The exit status is that of the process
that failed, or 124 at the timeout.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from absl import flags

from experiments.lib import runner

FLAGS = flags.FLAGS
_TIMED_OUT = 124  # the status of timeout(1)
_POLL_S = 0.05
_GRACE_S = 5.0


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer(
        "devices_per_process", 2, "Virtual CPU devices of each process.", lower_bound=1
    )
    flags.DEFINE_integer(
        "port", 0, "Port of process 0; 0: one that is free.", lower_bound=0
    )
    flags.DEFINE_float(
        "timeout", 600.0, "Time limit of all processes, in seconds.", lower_bound=0
    )


def free_port(port: int = 0) -> int:
    """Returns `port` if it is free, or a free port for 0.

    Raises:
      ValueError: The port is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"--port: expected a free port, got {port} ({error.strerror}); leave "
                "the flag out to have one chosen"
            ) from None
        return probe.getsockname()[1]


def start_processes(
    command: Sequence[str], processes: int, devices_per_process: int, port: int
) -> list[subprocess.Popen[str]]:
    """Starts the processes; each leads its own process group.

    Args:
      command: The program and its arguments.
      processes: Number of processes.
      devices_per_process: Virtual CPU devices of each.
      port: Port of process 0.
    """
    devices = f"--xla_force_host_platform_device_count={devices_per_process}"
    started = []
    for number in range(processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
            "JPAGED_COORDINATOR": f"127.0.0.1:{port}",
            "JPAGED_NUM_PROCESSES": str(processes),
            "JPAGED_PROCESS_ID": str(number),
            "PYTHONUNBUFFERED": "1",
        }
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        )
    return started


def wait_for(processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> int:
    """Waits until all processes ended or one failed; returns the exit status."""
    readers = []
    for number, process in enumerate(processes):
        assert process.stdout is not None
        readers.append(threading.Thread(target=_copy, args=(number, process.stdout)))
        readers[-1].start()
    try:
        return _status(processes, time.monotonic() + timeout_s, timeout_s)
    finally:
        _stop(processes)
        for reader in readers:
            reader.join()


def _status(
    processes: Sequence[subprocess.Popen[str]], deadline: float, timeout_s: float
) -> int:
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                what = f"exit status {code}"
                if code < 0:
                    what = signal.Signals(-code).name
                left = [f"process {n}" for n, code in enumerate(codes) if code is None]
                if left:
                    what += f"; still running then: {', '.join(left)}"
                print(f"process {number} failed: {what}", file=sys.stderr)
                return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        if time.monotonic() > deadline:
            left = [f"process {n}" for n, code in enumerate(codes) if code is None]
            print(f"{', '.join(left)} not done after {timeout_s:g} s", file=sys.stderr)
            return _TIMED_OUT
        time.sleep(_POLL_S)


def _copy(number: int, lines: IO[str]) -> None:
    for line in lines:
        print(f"[{number}] {line}", end="", flush=True)


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Terminates processes that still run, and kills them after a grace period."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    for process in left:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(argv: list[str]) -> int:
    """Starts the processes and waits for them."""
    command = argv[1:]
    with runner.user_errors("launch"):
        if not command:
            raise ValueError("command: expected one after --, got none")
        processes = start_processes(
            command,
            FLAGS.processes,
            FLAGS.devices_per_process,
            free_port(FLAGS.port),
        )
    return wait_for(processes, FLAGS.timeout)


if __name__ == "__main__":
    runner.start(main, define_flags, takes_arguments=True)
