r"""Starts N processes on this machine that act as N hosts, to try a script for many.

    python -m experiments.launch --processes 2 --devices_per_process 2 -- \
        python -m your_script --its_flags

Each process gets its share of virtual CPU devices, and JPAGED_COORDINATOR (host and
port), JPAGED_NUM_PROCESSES and JPAGED_PROCESS_ID for `jpaged.distributed.initialize`.
Its lines are printed with its name before them. The first process that fails ends all
the others, at once; `--timeout` ends all that are still running. The exit status is
that of the process that failed, 124 for the timeout.
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

from absl import app, flags

FLAGS = flags.FLAGS
_TIMED_OUT = 124  # as of timeout(1)
_POLL_S = 0.05
_GRACE_S = 5.0


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_integer("processes", 2, "How many.", lower_bound=1)
    flags.DEFINE_integer("devices_per_process", 2, "Of CPU.", lower_bound=1)
    flags.DEFINE_integer("port", 0, "Of process 0; 0: one that is free.", lower_bound=0)
    flags.DEFINE_float("timeout", 600.0, "Seconds for all of it.", lower_bound=0)


def free_port(port: int = 0) -> int:
    """The port if it is free, one that is for 0.

    Raises:
      ValueError: it is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"port: wanted one that is free, got {port} ({error.strerror}); leave "
                "it out to have one chosen"
            ) from None
        return probe.getsockname()[1]


def start(
    command: Sequence[str], processes: int, devices_per_process: int, port: int
) -> list[subprocess.Popen[str]]:
    """The processes, each of which leads a group of its own."""
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


def wait(running: Sequence[subprocess.Popen[str]], timeout_s: float) -> int:
    """The exit status, once all have ended; the first failure ends the others."""
    readers = []
    for number, process in enumerate(running):
        assert process.stdout is not None
        readers.append(threading.Thread(target=_copy, args=(number, process.stdout)))
        readers[-1].start()
    try:
        return _status(running, time.monotonic() + timeout_s, timeout_s)
    finally:
        _end(running)
        for reader in readers:
            reader.join()


def _status(
    running: Sequence[subprocess.Popen[str]], deadline: float, timeout_s: float
) -> int:
    while True:
        codes = [process.poll() for process in running]
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


def _end(running: Sequence[subprocess.Popen[str]]) -> None:
    """Ends what still runs, asked first."""
    left = [process for process in running if process.poll() is None]
    for process in left:
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    for process in left:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(argv: list[str]) -> None:
    """Reads flags, starts, waits."""
    command = argv[1:]
    if not command:
        raise SystemExit("command: wanted one after --, got none")
    try:
        running = start(
            command,
            FLAGS.processes,
            FLAGS.devices_per_process,
            free_port(FLAGS.port),
        )
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    sys.exit(wait(running, FLAGS.timeout))


if __name__ == "__main__":
    define_flags()
    app.run(main)
